"""The same few primitives, several ways, and the choice between them.

A backend is a module with functions of the names and conventions of :mod:`wsn_fast.backends.torch`; it may have only
some of them. :func:`choose` answers which one runs an operation on a device, and why.
"""

from __future__ import annotations

import functools
import os
from types import ModuleType
from typing import NamedTuple

# Not `import torch`: inside this package that name is the backend of the same name.
from torch import device as Device

from . import native
from . import torch as portable

ENVIRONMENT_VARIABLE = "WSN_FAST_BACKEND"
"""Overrides the choice for the whole process: ``torch`` or ``native``. Read once, at the first choice."""


class Choice(NamedTuple):
    """A backend module, its name, and the reason for it."""

    backend: ModuleType
    name: str
    reason: str


@functools.cache
def choose(operation: str, device_type: str) -> Choice:
    """Which backend runs ``operation`` on tensors of ``device_type``, and why.

    Args:
        operation: the name of a primitive of :mod:`wsn_fast.backends.torch`, such as ``"threshold"`` or ``"pack"``.
        device_type: ``torch.device.type``, such as ``"cpu"`` or ``"cuda"``.

    Raises:
        ValueError: for an operation that no backend has, or an unknown backend in the environment variable.
    """
    if not hasattr(portable, operation):
        raise ValueError(f"operation must be a primitive of the torch backend, got {operation!r}")
    wanted = os.environ.get(ENVIRONMENT_VARIABLE)
    if wanted not in (None, "", "torch", "native"):
        raise ValueError(f"{ENVIRONMENT_VARIABLE} must be 'torch' or 'native', got {wanted!r}")
    if wanted == "torch":
        return Choice(portable, "torch", f"{ENVIRONMENT_VARIABLE}=torch")
    if operation not in native.OPERATIONS:
        return Choice(portable, "torch", f"the native library has no {operation}")
    if device_type != "cpu":
        return Choice(portable, "torch", f"the native library runs on the CPU, not on {device_type}")
    library = native.load()
    if library.lib is None:
        return Choice(portable, "torch", library.reason)
    return Choice(native, "native", library.reason)


def run(operation: str, device: Device) -> ModuleType:
    """The backend module of :func:`choose`, for ``choose(...).backend.<operation>(...)`` in one word."""
    return choose(operation, device.type).backend
