"""The library's backends as contenders, and why one is not there."""

from __future__ import annotations

from types import ModuleType

import torch

from wsn_fast.backends import NAMES, choose, native_cuda

from .cases import UnavailableError

BACKENDS = NAMES


def backend(name: str, operation: str, device: torch.device, dtype: torch.dtype | None = None) -> ModuleType:
    """The backend module ``name``, if it runs ``operation`` on ``device``.

    Raises:
        UnavailableError: it does not, with the reason.
    """
    choice = choose(operation, device, dtype, name)
    if choice.name != name:
        raise UnavailableError(choice.reason.removeprefix(f"backend={name!r}, but "))
    return choice.backend


def cuda_select(device: torch.device) -> ModuleType:
    """The native CUDA selection.

    Raises:
        UnavailableError: it is not there, with the reason.
    """
    library = native_cuda.load()
    if library.lib is None:
        raise UnavailableError(library.reason)
    obstacle = native_cuda.obstacle(device)
    if obstacle:
        raise UnavailableError(obstacle)
    module: ModuleType = native_cuda
    return module
