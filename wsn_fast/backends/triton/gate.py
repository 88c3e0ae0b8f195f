"""Selection, the gate, its gradients and packed masks, by the kernels of ``kernels/``."""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels import _layout as layout
from ...kernels import gate as gate_kernels
from ...kernels import gate_gradients, packed_masks
from ...kernels import restore_frozen as restore_kernels
from ...kernels import threshold as select
from .device import gpu_of, on_device_of, table_of


def _flat_like(tensor: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return an uninitialised result with the strides of ``tensor``, and the contiguous tensor that a kernel writes for
    it. They are one tensor if the result is contiguous."""
    result = torch.empty_like(tensor, dtype=dtype)
    return result, result if result.is_contiguous() else torch.empty(tensor.shape, dtype=dtype, device=tensor.device)


def _filled(result: Tensor, written: Tensor) -> Tensor:
    """Return the result, with what the kernel wrote."""
    return result if result is written else result.copy_(written)


# --- selection and the gate
def threshold(scores: Tensor, rank: int, rule: str) -> Tensor:
    """The ``rank``-th (from 0) of the ascending keys, NaN last: a 0-d tensor."""
    scores = scores.detach().contiguous()
    with on_device_of(scores):
        config = table_of(scores.device).search(scores.numel(), gpu_of(scores.device))
        count = select.programs_of(scores.numel(), config)
        tensors = torch.empty(1, layout.TENSOR_COLUMNS.value, dtype=torch.int64, device=scores.device)
        programs = torch.empty(count, layout.PROGRAM_COLUMNS.value, dtype=torch.int64, device=scores.device)
        table = select.describe(scores, rank, tensors=tensors, programs=programs, config=config)
        workspace = torch.empty(select.workspace_size(table), dtype=torch.int64, device=scores.device)
        tau = torch.empty(1, dtype=scores.dtype, device=scores.device)
        select.select(table=table, tau=tau, workspace=workspace, rule=rule)
    return tau[0]


def gate(weight: Tensor, scores: Tensor, tau: Tensor, rule: str, dtype: torch.dtype) -> Tensor:
    """``m ? W : +0.0`` in ``dtype``."""
    result, out = _flat_like(weight, dtype)
    with on_device_of(weight):
        config = table_of(weight.device).gate
        operands = (weight.detach().contiguous(), scores.detach().contiguous(), tau)
        gate_kernels.gate(*operands, out, None, rule=rule, config=config)
    return _filled(result, out)


def gate_packed(weight: Tensor, packed: Tensor, dtype: torch.dtype) -> Tensor:
    """Do what :func:`gate` does, with the mask in its packed form."""
    result, out = _flat_like(weight, dtype)
    with on_device_of(weight):
        config = table_of(weight.device).gate
        gate_kernels.gate_packed(weight.detach().contiguous(), packed.contiguous(), out, config=config)
    return _filled(result, out)


def gate_backward(
    grad_masked: Tensor,
    weight: Tensor,
    scores: Tensor,
    tau: Tensor,
    union: Tensor | None,
    rule: str,
    need_weight: bool,
    need_scores: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """``dW`` and ``dS`` of the torch backend, in one pass."""
    if not (need_weight or need_scores):
        return None, None
    dw, flat_dw = _flat_like(grad_masked, weight.dtype) if need_weight else (None, None)
    ds, flat_ds = _flat_like(grad_masked, scores.dtype) if need_scores else (None, None)
    with on_device_of(weight):
        gate_gradients.gate_backward(
            grad_masked.detach().contiguous(),
            weight.detach().contiguous(),
            scores.detach().contiguous(),
            tau,
            union,
            flat_dw,
            flat_ds,
            rule=rule,
            config=table_of(weight.device).gate_backward,
        )
    for result, written in ((dw, flat_dw), (ds, flat_ds)):
        if result is not None and written is not None:
            _filled(result, written)
    return dw, ds


def restore_frozen(param: Tensor, saved: Tensor, union: Tensor) -> None:
    """In place: ``param = union ? saved : param``, bit for bit."""
    with on_device_of(param):
        if param.is_contiguous():
            restore_kernels.restore_frozen(param, saved.contiguous(), union)
        else:
            flat = param.contiguous()
            restore_kernels.restore_frozen(flat, saved.contiguous(), union)
            param.copy_(flat)


# --- packed masks
def pack(mask_: Tensor) -> Tensor:
    """Boolean mask of any shape to its packed form."""
    packed = torch.empty((mask_.numel() + 7) // 8, dtype=torch.uint8, device=mask_.device)
    with on_device_of(mask_):
        packed_masks.pack(mask_.contiguous(), packed)
    return packed


def unpack(packed: Tensor, n: int) -> Tensor:
    """Packed mask to a 1-d boolean tensor of ``n`` elements."""
    result = torch.empty(n, dtype=torch.bool, device=packed.device)
    with on_device_of(packed):
        packed_masks.unpack(packed.contiguous(), result)
    return result


def union(packed: Tensor) -> Tensor:
    """Bitwise OR over the rows of ``packed`` [T, bytes], T >= 1."""
    result = torch.empty(packed.shape[1], dtype=torch.uint8, device=packed.device)
    with on_device_of(packed):
        packed_masks.union(packed.contiguous(), result)
    return result


def popcount(packed: Tensor) -> Tensor:
    """The number of set bits, a 0-d int64 tensor."""
    count = torch.empty((), dtype=torch.int64, device=packed.device)
    with on_device_of(packed):
        packed_masks.popcount(packed.contiguous(), count)
    return count
