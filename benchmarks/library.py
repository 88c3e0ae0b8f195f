"""The library's backends as contenders."""

from __future__ import annotations

from types import ModuleType

import torch

from wsn_fast.backends import NAMES, choose
from wsn_fast.doctor.measuring.checks import UnavailableError

BACKENDS = NAMES


def backend(name: str, operation: str, device: torch.device, dtype: torch.dtype | None = None) -> ModuleType:
    """The backend module ``name``; ``UnavailableError`` with the reason if it does not run ``operation`` there."""
    choice = choose(operation, device, dtype, name)
    if choice.name != name:
        raise UnavailableError(choice.reason.removeprefix(f"backend={name!r}, but "))
    return choice.backend
