"""The one-pass optimizer steps of the native CPU library; see :mod:`wsn_fast.backends.native`.

Weights, scores and states are float32, or all float64; G may be of any of the four dtypes. Tensors that are not
contiguous are copied, and copied back.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from .native_library import DTYPES, call, contiguous, dtype_code, packed_mask, rule_code, threshold_pointer
from .updates import SGD, WINDOW, AdamW, AdamWState, Next, Plan, SGDState, Update

_POINTER, _SIZE = ctypes.c_void_p, ctypes.c_int64


class _AdamW(ctypes.Structure):
    _fields_: ClassVar = [
        *((name, ctypes.c_double) for name in ("lr", "beta1", "beta2", "eps", "weight_decay")),
        ("step", _SIZE),
        ("decoupled", ctypes.c_int32),
    ]


class _SGD(ctypes.Structure):
    _fields_: ClassVar = [
        *((name, ctypes.c_double) for name in ("lr", "momentum", "dampening", "weight_decay")),
        ("nesterov", ctypes.c_int32),
        ("first", ctypes.c_int32),
    ]


class _Next(ctypes.Structure):
    _fields_: ClassVar = [
        *((name, _POINTER) for name in ("masked", "tau", "window")),
        ("rank", _SIZE),
        ("masked_dtype", ctypes.c_int32),
    ]


class _Gated(ctypes.Structure):
    _fields_: ClassVar = [
        *((name, _POINTER) for name in ("grad", "score_grad", "weight", "scores", "tau", "union_mask")),
        ("next", ctypes.POINTER(_Next)),
        ("n", _SIZE),
        ("scale", ctypes.c_double),
        *((name, ctypes.c_int32) for name in ("dtype", "grad_dtype", "rule")),
    ]


class _AdamWItem(ctypes.Structure):
    _fields_: ClassVar = [
        ("tensor", _Gated),
        *((name, _POINTER) for name in AdamWState._fields),
        ("for_weight", _AdamW),
        ("for_scores", _AdamW),
    ]


class _SGDItem(ctypes.Structure):
    _fields_: ClassVar = [
        ("tensor", _Gated),
        *((name, _POINTER) for name in SGDState._fields),
        ("for_weight", _SGD),
        ("for_scores", _SGD),
    ]


class _Operands:
    """The tensors behind the pointers of one call, kept alive until it is over."""

    def __init__(self) -> None:
        self._kept: list[Tensor] = []
        self._copies: list[tuple[Tensor, Tensor]] = []

    def read(self, name: str, tensor: Tensor, like: Tensor) -> int:
        """The address of an input."""
        dense = contiguous(name, tensor, like)
        self._kept.append(dense)
        return dense.data_ptr()

    def write(self, name: str, tensor: Tensor, like: Tensor) -> int:
        """The address of a tensor that is updated in place, in the dtype of ``like``."""
        if tensor.dtype is not like.dtype:
            raise TypeError(f"{name} must be a {like.dtype} tensor, got {tensor.dtype}")
        dense = contiguous(name, tensor, like)
        if dense is not tensor:
            self._copies.append((tensor, dense))
        return dense.data_ptr()

    def settle(self) -> None:
        """Copy back what was updated in a copy."""
        for tensor, dense in self._copies:
            tensor.copy_(dense)


def adamw_step(
    updates: Sequence[Update],
    states: Sequence[AdamWState],
    for_weights: Sequence[AdamW],
    for_scores: Sequence[AdamW],
    plan: Plan | None = None,
) -> None:
    """:func:`wsn_fast.backends.torch.adamw_step`, in one pass over each tensor."""
    operands = _Operands()
    items = (_AdamWItem * len(updates))()
    for item, update, state, weight, scores in zip(items, updates, states, for_weights, for_scores, strict=True):
        gated = _gated(update, operands)
        pointers = [operands.write(*named, update.weight) for named in zip(AdamWState._fields, state, strict=True)]
        settings = (
            _AdamW(float(s.lr), s.beta1, s.beta2, s.eps, s.weight_decay, int(s.step), s.decoupled)
            for s in (weight, scores)
        )
        item.__init__(gated, *pointers, *settings)
    call("wsn_adamw_step", items, len(items))
    operands.settle()


def sgd_step(
    updates: Sequence[Update],
    states: Sequence[SGDState],
    for_weights: Sequence[SGD],
    for_scores: Sequence[SGD],
    plan: Plan | None = None,
) -> None:
    """:func:`wsn_fast.backends.torch.sgd_step`, in one pass over each tensor."""
    operands = _Operands()
    items = (_SGDItem * len(updates))()
    for item, update, state, weight, scores in zip(items, updates, states, for_weights, for_scores, strict=True):
        gated, pointers, settings = _gated(update, operands), [], []
        for name, buffer, s in zip(SGDState._fields, state, (weight, scores), strict=True):
            if buffer is None and s.momentum != 0:
                raise ValueError(f"{name} must be a tensor for a momentum of {s.momentum}, got None")
            pointers.append(None if buffer is None else operands.write(name, buffer, update.weight))
            settings.append(_SGD(float(s.lr), s.momentum, s.dampening, s.weight_decay, s.nesterov, s.first))
        item.__init__(gated, *pointers, *settings)
    call("wsn_sgd_step", items, len(items))
    operands.settle()


def gradient_squares(updates: Sequence[Update], plan: Plan | None = None) -> Tensor:
    """The sums of the squares of dW and dS of each tensor in turn: float64 [2 * len(updates)]."""
    operands = _Operands()
    tensors = (_Gated * len(updates))(*(_gated(update._replace(next=None), operands) for update in updates))
    sums = torch.empty(2 * len(updates), dtype=torch.float64, device="cpu")
    call("wsn_gradient_squares", tensors, len(tensors), sums.data_ptr())
    return sums


def _gated(update: Update, operands: _Operands) -> _Gated:
    grad, score_grad, weight, scores, tau, union, rule, scale, following = update
    if not isinstance(weight, Tensor) or weight.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"weight must be a float32 or float64 tensor, got {getattr(weight, 'dtype', type(weight))}")
    if score_grad is not None and not grad.dtype is score_grad.dtype is weight.dtype:
        raise TypeError(f"grad and score_grad must be {weight.dtype}, got {grad.dtype} and {score_grad.dtype}")
    if score_grad is None and tau is None:
        raise ValueError("tau must be a tensor where score_grad is None, got None")
    n = weight.numel()
    return _Gated(
        operands.read("grad", grad, weight),
        None if score_grad is None else operands.read("score_grad", score_grad, weight),
        operands.write("weight", weight, weight),
        operands.write("scores", scores, weight),
        None if tau is None else threshold_pointer(tau, scores),
        None if union is None else operands.read("union", packed_mask("union", union, n), union),
        None if following is None else ctypes.pointer(_next(following, scores)),
        n,
        1.0 if scale is None else float(scale),
        DTYPES[weight.dtype],
        dtype_code("grad", grad.dtype),
        rule_code(rule),
    )


def _next(following: Next, scores: Tensor) -> Any:
    masked, tau, rank, window = following
    if not masked.is_contiguous() or masked.shape != scores.shape:
        raise ValueError(f"masked must be contiguous, of shape {tuple(scores.shape)}, got shape {tuple(masked.shape)}")
    if window.dtype is not torch.int64 or window.shape != (WINDOW,) or not window.is_contiguous():
        raise ValueError(f"window must be {WINDOW} int64, got {tuple(window.shape)} of {window.dtype}")
    if not 0 <= rank < scores.numel():
        raise ValueError(f"rank must be in [0, {scores.numel()}), got {rank}")
    masked_dtype = dtype_code("masked", masked.dtype)
    return _Next(masked.data_ptr(), threshold_pointer(tau, scores), window.data_ptr(), rank, masked_dtype)
