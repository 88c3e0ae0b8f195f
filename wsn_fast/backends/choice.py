"""Decides which backend runs an operation on a device, and says why.

Whether a layer uses a fused product also depends on shapes: see :mod:`wsn_fast.ops.fusion` and
:mod:`wsn_fast.backends.triton.tuning`.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from types import MappingProxyType, ModuleType
from typing import NamedTuple

# Not `import torch`: inside this package that name is the backend of the same name.
from torch import cuda
from torch import device as Device
from torch import dtype as Dtype
from torch._C import _get_tracing_state as _tracing
from torch._C import _len_torch_dispatch_stack as _modes
from torch.compiler import is_compiling

from . import availability, native, tables, trust
from . import torch as portable
from .exporting import is_exporting

ENVIRONMENT_VARIABLE = "WSN_FAST_BACKEND"
"""Overrides the choice for the whole process, as the ``backend`` argument of :func:`choose` does for a call. It is read
once, at the first choice."""

NAMES = ("torch", "triton", "native")
PRIMITIVES = (
    "threshold", "keep_mask", "gate", "gates", "gate_packed", "gate_backward", "gates_backward", "restore_frozen",
    "restore_frozen_many", "pack", "unpack", "union", "popcount", "adamw_step", "sgd_step",
    "adamw_coded_step", "sgd_coded_step", "gradient_squares", "masked_linear", "masked_linear_grad",
    "masked_linear_tasks", "masked_conv",
)  # fmt: skip
"""The operations, all of them in :mod:`wsn_fast.backends.torch`."""


SPECIAL = MappingProxyType({"adamw_coded_step": "adamw_step", "sgd_coded_step": "sgd_step"})
"""Operations that are a special case of another one: an override of the other one holds for them too, unless they have
one of their own."""


class Choice(NamedTuple):
    """A backend module, its name, and the reason for it."""

    backend: ModuleType
    name: str
    reason: str


@functools.cache
def parse_override(text: str) -> Mapping[str, str]:
    """An override as a mapping from operation to backend; the key "" stands for every operation that has none.

    Args:
        text: ``"triton"``, ``"threshold=torch"``, or several of these separated by commas. ``"adamw_step=torch"`` also
            stands for ``adamw_coded_step``, unless that is named too, and so for SGD.

    Raises:
        ValueError: an unknown backend or operation; the message lists the known ones.
    """
    wanted: dict[str, str] = {}
    for part in text.split(","):
        operation, separator, name = part.strip().rpartition("=")
        if name not in NAMES or bool(separator) != bool(operation) or operation in wanted:
            raise ValueError(f"backend must be one of {NAMES}, or operation=backend, got {part.strip()!r} in {text!r}")
        if operation:
            _check_operation(operation)
        wanted[operation] = name
    return MappingProxyType(wanted)


def _check_operation(operation: str) -> None:
    if operation not in PRIMITIVES:
        raise ValueError(f"operation must be a primitive of the torch backend, {PRIMITIVES}, got {operation!r}")


@functools.cache
def _environment() -> str | None:
    text = os.environ.get(ENVIRONMENT_VARIABLE)
    try:
        return text if text and parse_override(text) else None
    except ValueError as error:
        raise ValueError(f"{ENVIRONMENT_VARIABLE}: {error}") from None


def overridden(operation: str, backend: str | None) -> tuple[str | None, str]:
    """Return the override for an operation, or None, and its source: the argument ``backend`` of the call or layer, or
    else the environment variable."""
    for text, source in (
        (backend, f"backend={backend!r}"),
        (_environment(), f"{ENVIRONMENT_VARIABLE}={_environment()}"),
    ):
        if text:
            wanted = parse_override(text)
            name = wanted.get(operation, wanted.get(SPECIAL.get(operation, operation), wanted.get("")))
            if name is not None:
                return name, source
    return None, ""


def choose(operation: str, device: Device | str, dtype: Dtype | None = None, backend: str | None = None) -> Choice:
    """Decide which backend runs ``operation`` on tensors of ``device``, and say why.

    An operation of another backend than torch is compared with torch's first (:mod:`wsn_fast.backends.trust`). If
    something is wrong with it, the torch backend runs it.

    Args:
        operation: the name of a primitive of :mod:`wsn_fast.backends.torch`, such as ``"threshold"`` or ``"pack"``.
        device: the tensors' device.
        dtype: the dtype of the weights or scores; None for an operation on masks, or to ask without a dtype.
        backend: an override for this call or layer (see :func:`parse_override`), which goes before that of the
            environment. If it cannot run the operation, the torch backend runs it, and the reason says so.

    Raises:
        ValueError: for an operation that no backend has, or an unknown backend in an override.
    """
    try:
        return _settled(operation, device, dtype, backend)
    except _UncheckedError as unchecked:
        return unchecked.choice


@functools.cache
def _settled(operation: str, device: Device | str, dtype: Dtype | None, backend: str | None) -> Choice:
    choice = candidate(operation, device, dtype, backend)
    if choice.backend is not portable and trust.wanted():
        if recording() or capturing() or is_compiling():
            raise _UncheckedError(choice)  # which is not remembered, so that a later use checks it
        obstacle = trust.obstacle(operation, choice.name, choice.backend, Device(device), dtype)
        choice = Choice(portable, "torch", obstacle) if obstacle else choice
    _settled_here[operation, Device(device).type, dtype, backend] = choice.name
    return choice


_settled_here: dict[tuple[str, str, Dtype | None, str | None], str] = {}


def chosen(device: Device, backend: str | None = None) -> dict[str, str]:
    """The backends that were chosen so far in this process for a kind of device, by the name of the operation, and its
    dtype if it has one: ``{"gates float32": "native", "pack": "native"}``.

    Args:
        device: whose type is asked for.
        backend: the override of the layers that are asked for. Layers with others do not count.
    """
    return {
        operation if dtype is None else f"{operation} {str(dtype).removeprefix('torch.')}": name
        for (operation, kind, dtype, override), name in _settled_here.items()
        if (kind, override) == (device.type, backend)
    }


class _UncheckedError(Exception):
    """An operation was chosen where nothing can be checked."""

    def __init__(self, choice: Choice) -> None:
        self.choice = choice


@functools.cache
def candidate(operation: str, device: Device | str, dtype: Dtype | None = None, backend: str | None = None) -> Choice:
    """What :func:`choose` decides before it checks that the operation is right there."""
    _check_operation(operation)
    device = Device(device)
    wanted, source = overridden(operation, backend)
    if wanted == "torch":
        return Choice(portable, "torch", source)
    if wanted is not None:
        module, reason = _offers(wanted, operation, device, dtype, forced=True)
        if module is not None:
            return Choice(module, wanted, f"{source}; {reason}")
        return Choice(portable, "torch", f"{source}, but {reason}")
    automatic = "triton" if device.type == "cuda" else "native"
    module, reason = _offers(automatic, operation, device, dtype, forced=False)
    faster = tables.tuned_backend(device, operation, dtype) if module is not None else None
    if faster is not None:
        return Choice(portable, *faster)
    return Choice(portable, "torch", reason) if module is None else Choice(module, automatic, reason)


def forget() -> None:
    """Decide everything again: the environment, a tuning table or an installation has changed."""
    for cache in (_environment, tables.of, candidate, _settled):
        cache.cache_clear()
    _settled_here.clear()


def _offers(
    name: str, operation: str, device: Device, dtype: Dtype | None, *, forced: bool
) -> tuple[ModuleType | None, str]:
    """The backend of this name if it can run the operation, and the reason why or why not."""
    if name == "triton":
        return availability.triton(operation, device, dtype, forced=forced)
    if device.type != "cpu":
        return None, f"the native library runs on the CPU, not on {device.type}"
    obstacle = native.supports(operation, dtype)
    return (native, native.load().reason) if obstacle is None else (None, obstacle)


def recording() -> bool:
    """Whether something records PyTorch's operations: an export, a trace, or a dispatch mode such as fake tensors."""
    # An export comes first, because a strict one compiles this function and cannot follow the other questions.
    return is_exporting() or _tracing() is not None or _modes() > 0


def capturing() -> bool:
    """Whether a CUDA graph is captured, during which nothing may wait for the device."""
    return cuda.is_initialized() and cuda.is_current_stream_capturing()


def tracing() -> bool:
    """Whether ``torch.jit.trace``, or the ONNX exporter that is built on it, records."""
    return _tracing() is not None


def run(operation: str, device: Device, dtype: Dtype | None = None, backend: str | None = None) -> ModuleType:
    """Return the backend module of :func:`choose`. While something records PyTorch's operations, return the torch
    backend, because a recorder does not see the operations of the others."""
    if recording():
        return portable
    try:
        return _settled(operation, device, dtype, backend).backend
    except _UncheckedError as unchecked:
        return unchecked.choice.backend
