"""Whether the Triton backend can run an operation, and if not, why."""

from __future__ import annotations

import functools
from types import ModuleType

import torch

OLDEST = (8, 0)  # Ampere: bf16 in hardware, and the oldest generation that Triton supports
FLOATS = frozenset({torch.float32, torch.bfloat16, torch.float16})
WIDE = FLOATS | {torch.float64}
DTYPES = {
    "threshold": FLOATS,
    "keep_mask": frozenset(),  # there is no kernel: PyTorch needs only two or three launches
    "gate": WIDE,
    "gates": FLOATS,
    "gate_packed": WIDE,
    "gate_backward": WIDE,
    "gates_backward": WIDE,
    "restore_frozen": WIDE,
    "restore_frozen_many": WIDE,
    "adamw_step": FLOATS,
    "sgd_step": FLOATS,
    "adamw_coded_step": FLOATS,
    "sgd_coded_step": FLOATS,
    "gradient_squares": FLOATS,
    "masked_linear": FLOATS,
    "masked_linear_grad": FLOATS,
    "masked_linear_tasks": FLOATS,
    "masked_conv": FLOATS,
}
"""The dtypes that each operation on numbers supports. The other operations work on masks."""


def triton(
    operation: str, device: torch.device, dtype: torch.dtype | None, *, forced: bool
) -> tuple[ModuleType | None, str]:
    """The Triton backend if it can run ``operation`` here, and the reason why or why not.

    Args:
        operation: as for :func:`wsn_fast.backends.choose`.
        device: of the tensors.
        dtype: of the weights or scores, or None.
        forced: whether the user asked for Triton by name. Only then may Triton's interpreter run kernels on the CPU.
    """
    supported = DTYPES.get(operation)
    if supported is not None and not supported:
        return None, f"there is no Triton kernel for {operation}, because PyTorch needs only few launches for it"
    if supported is not None and dtype is not None and dtype not in supported:
        return None, f"the Triton backend has no {operation} for {dtype}"
    module, reason = _module()
    if module is None:
        return None, reason
    if not hasattr(module, operation):
        return None, f"the Triton backend has no {operation}"
    if device.type == "cpu" and forced and module.INTERPRETED:
        return module, "Triton's interpreter runs the kernel on the CPU"
    if device.type != "cuda":
        return None, f"Triton kernels run on NVIDIA GPUs, not on {device.type}"
    if not torch.cuda.is_available():
        return None, "torch finds no CUDA device"
    index = torch.cuda.current_device() if device.index is None else device.index
    obstacle = _obstacle(index)
    return (None, obstacle) if obstacle else (module, f"a Triton kernel on {torch.cuda.get_device_name(index)}")


@functools.cache
def _module() -> tuple[ModuleType | None, str]:
    try:
        from . import triton as module
    except Exception as error:  # a broken installation raises more than ImportError
        return None, f"triton cannot be imported: {type(error).__name__}: {error}"
    return module, ""


@functools.cache
def _obstacle(index: int) -> str:
    """The reason why no kernel runs on this CUDA device; empty if kernels run."""
    if torch.version.hip is not None:
        return "the Triton kernels are for NVIDIA GPUs, and this torch is built for AMD"
    capability = torch.cuda.get_device_capability(index)
    if capability < OLDEST:
        found = ".".join(map(str, capability))
        return f"the Triton kernels need compute capability {'.'.join(map(str, OLDEST))}, this GPU has {found}"
    module, _ = _module()
    assert module is not None
    try:
        # The smallest kernel needs all that the others need: a driver, a C compiler and a cache folder.
        module.pack(torch.zeros(8, dtype=torch.bool, device=torch.device("cuda", index)))
    except Exception as error:
        return f"Triton cannot run a kernel here: {type(error).__name__}: {error}"
    return ""
