"""The native backend: the native CPU library runs the primitives of :mod:`wsn_fast.backends.torch`.

:data:`OPERATIONS` names the primitives that it has. They follow the same conventions. Thresholds, masks, gates and
gradients are those of the torch backend to the bit, except that a NaN may become another NaN. Optimizer steps and sums
of squares may differ in their last bits. Strided inputs are copied first, and the result has
their strides, as PyTorch's result would. Errors are those of :mod:`wsn_fast.backends.native.binding`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .binding import (
    DTYPES,
    call,
    contiguous,
    dtype_code,
    packed_mask,
    pointer,
    rule_code,
    strided_like,
    threshold_pointer,
)
from .many import gates, gates_backward, restore_frozen_many
from .optimizer_steps import adamw_coded_step, adamw_step, gradient_squares, sgd_coded_step, sgd_step
from .shared_library import load

__all__ = [
    "OPERATIONS",
    "adamw_coded_step",
    "adamw_step",
    "gates",
    "gates_backward",
    "gradient_squares",
    "load",
    "restore_frozen_many",
    "sgd_coded_step",
    "sgd_step",
    "supports",
]

OPERATIONS = frozenset(
    {
        "threshold", "keep_mask", "gate", "gates", "gate_packed", "gate_backward", "gates_backward", "adamw_step",
        "sgd_step", "adamw_coded_step", "sgd_coded_step", "gradient_squares", "pack", "unpack", "union", "popcount",
        "restore_frozen", "restore_frozen_many",
    }
)  # fmt: skip


def supports(operation: str, dtype: torch.dtype | None = None) -> str | None:
    """None if the library can run ``operation``, else the reason why it cannot.

    Args:
        operation: a primitive of :mod:`wsn_fast.backends.torch`.
        dtype: the dtype of the weights or scores, or of the parameter for "restore_frozen"; None means any. Weights,
            scores, gradients and results may have different dtypes.
    """
    if operation not in OPERATIONS:
        return f"the native library has no {operation}"
    if dtype is not None:
        if operation in ("adamw_step", "sgd_step", "gradient_squares"):
            able = dtype in (torch.float32, torch.float64)
        elif operation in ("adamw_coded_step", "sgd_coded_step"):
            able = dtype is torch.float32
        elif operation in ("restore_frozen", "restore_frozen_many"):
            able = dtype.itemsize <= 8
        else:
            able = operation in ("pack", "unpack", "union", "popcount") or dtype in DTYPES
        if not able:
            return f"the native {operation} has no {dtype}"
    return load().reason if load().lib is None else None


# --- the gate ---------------------------------------------------------------------------------------------------------


def threshold(scores: Tensor, rank: int, rule: str) -> Tensor:
    """The ``rank``-th (from 0) of the ascending keys, NaN last: a 0-d tensor in the dtype of ``scores``.

    The result is the same for any number of threads. A zero of either sign is returned as +0.0.
    """
    scores = contiguous("scores", scores)
    code, n = dtype_code("scores", scores.dtype), scores.numel()
    if not 0 <= rank < n:
        raise ValueError(f"rank must be in [0, {n}), got {rank}")
    tau = torch.empty((), dtype=scores.dtype, device="cpu")
    call("wsn_threshold", scores.data_ptr(), code, n, rank, rule_code(rule), tau.data_ptr())
    return tau


def keep_mask(scores: Tensor, tau: Tensor, rule: str) -> Tensor:
    """``not (key < tau)``, boolean, in the shape of ``scores``."""
    dense = contiguous("scores", scores)
    mask = torch.empty_like(dense, dtype=torch.bool)
    code, threshold = dtype_code("scores", dense.dtype), threshold_pointer(tau, dense)
    call("wsn_keep", dense.data_ptr(), code, threshold, rule_code(rule), mask.data_ptr(), None, dense.numel())
    return mask if dense is scores else strided_like(scores, mask)


def gate(weight: Tensor, scores: Tensor, tau: Tensor, rule: str, dtype: torch.dtype) -> Tensor:
    """``m ? W : +0.0`` in ``dtype``."""
    w, s = contiguous("weight", weight), contiguous("scores", scores, weight)
    out = torch.empty_like(w, dtype=dtype)
    inputs = w.data_ptr(), dtype_code("weight", w.dtype), s.data_ptr(), dtype_code("scores", s.dtype)
    mask = threshold_pointer(tau, s), rule_code(rule)
    call("wsn_gate", *inputs, *mask, out.data_ptr(), dtype_code("dtype", dtype), None, w.numel())
    return strided_like(weight, out)


def gate_packed(weight: Tensor, packed: Tensor, dtype: torch.dtype) -> Tensor:
    """Do what :func:`gate` does, with the mask in its packed form, ``uint8`` [ceil(n / 8)]."""
    w, n = contiguous("weight", weight), weight.numel()
    bits = packed_mask("packed", packed, n)
    out = torch.empty_like(w, dtype=dtype)
    args = w.data_ptr(), dtype_code("weight", w.dtype), bits.data_ptr(), out.data_ptr(), dtype_code("dtype", dtype)
    call("wsn_gate_packed", *args, n)
    return strided_like(weight, out)


def gate_backward(
    grad: Tensor,
    weight: Tensor,
    scores: Tensor,
    tau: Tensor,
    union: Tensor | None,
    rule: str,
    need_weight: bool,
    need_scores: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """``dW``: G inside the mask and outside the packed union, else +0.0 (Eq. 4). ``dS``: ``G * W``, times ``sign(S)``
    for "magnitude" (Eq. 5). A gradient that is not needed is None."""
    w, g, s = contiguous("weight", weight), contiguous("grad", grad, weight), contiguous("scores", scores, weight)
    bits = None if union is None else packed_mask("union", union, w.numel())
    dw = torch.empty_like(w) if need_weight else None
    ds = torch.empty_like(s) if need_scores else None
    inputs = g.data_ptr(), dtype_code("grad", g.dtype), w.data_ptr(), dtype_code("weight", w.dtype)
    gate = s.data_ptr(), dtype_code("scores", s.dtype), threshold_pointer(tau, s), rule_code(rule)
    call("wsn_gate_backward", *inputs, *gate, pointer(bits), pointer(dw), pointer(ds), w.numel())
    return (dw if dw is None else strided_like(grad, dw)), (ds if ds is None else strided_like(grad, ds))


def restore_frozen(param: Tensor, saved: Tensor, union: Tensor) -> None:
    """In place: ``param = union ? saved : param``, bit for bit. ``union`` is packed."""
    if not isinstance(param, Tensor):
        raise TypeError(f"param must be a tensor, got {type(param).__name__}")
    saved = contiguous("saved", saved, param)
    if saved.dtype is not param.dtype:
        raise TypeError(f"saved must have the dtype {param.dtype} of param, got {saved.dtype}")
    n = param.numel()
    bits, dense = packed_mask("union", union, n), contiguous("param", param)
    call("wsn_restore_frozen", dense.data_ptr(), saved.data_ptr(), bits.data_ptr(), param.element_size(), n)
    if dense is not param:
        param.copy_(dense)


# --- packed masks -----------------------------------------------------------------------------------------------------


def pack(mask: Tensor) -> Tensor:
    """Boolean mask of any shape to its packed form, ``uint8`` [ceil(n / 8)]; padding bits are zero."""
    mask = contiguous("mask", mask)
    if mask.dtype is not torch.bool:
        raise TypeError(f"mask must be a torch.bool tensor, got {mask.dtype}")
    packed = torch.empty((mask.numel() + 7) // 8, dtype=torch.uint8, device="cpu")
    call("wsn_pack_bits", mask.data_ptr(), mask.numel(), packed.data_ptr())
    return packed


def unpack(packed: Tensor, n: int) -> Tensor:
    """Packed mask to a 1-d boolean tensor of ``n`` elements."""
    if n < 0:
        raise ValueError(f"n must not be negative, got {n}")
    packed = packed_mask("packed", packed, n)
    mask = torch.empty(n, dtype=torch.bool, device="cpu")
    call("wsn_unpack_bits", packed.data_ptr(), n, mask.data_ptr())
    return mask


def union(packed: Tensor) -> Tensor:
    """Bitwise OR over the rows of ``packed`` [T, bytes], T >= 1."""
    dense = packed_mask("packed", packed)
    if dense.ndim != 2 or dense.shape[0] == 0:
        raise ValueError(f"packed must have shape [T, bytes] with T >= 1, got {tuple(dense.shape)}")
    rows, size = dense.shape
    out = torch.empty(size, dtype=torch.uint8, device="cpu")
    call("wsn_union_bits", dense.data_ptr(), rows, size, out.data_ptr())
    return out


def popcount(packed: Tensor) -> Tensor:
    """The number of set bits, a 0-d int64 tensor."""
    packed = packed_mask("packed", packed)
    count = torch.empty((), dtype=torch.int64, device="cpu")
    call("wsn_popcount_bits", packed.data_ptr(), packed.numel(), count.data_ptr())
    return count
