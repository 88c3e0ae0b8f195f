"""The one-pass optimizer steps of the native CPU library; see :mod:`wsn_fast.backends.native`.

Weights, scores and states are all float32 or all float64. G may be float32, float64, bfloat16 or float16. Tensors that
are not contiguous are copied, and the results are copied back.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..moments import STORAGES, Stored, blocks_of
from ..updates import (
    SGD,
    WINDOW,
    AdamW,
    AdamWState,
    Batch,
    CodedAdamWState,
    CodedSGDState,
    Gradient,
    Next,
    SGDState,
    Update,
)
from .binding import DTYPES, call, contiguous, dtype_code, packed_mask, rule_code, threshold_pointer
from .shared_library import POINTER, SIZE


class _AdamW(ctypes.Structure):
    _fields_: ClassVar = [
        *((name, ctypes.c_double) for name in ("lr", "beta1", "beta2", "eps", "weight_decay")),
        ("step", SIZE),
        ("decoupled", ctypes.c_int32),
    ]


class _SGD(ctypes.Structure):
    _fields_: ClassVar = [
        *((name, ctypes.c_double) for name in ("lr", "momentum", "dampening", "weight_decay")),
        ("nesterov", ctypes.c_int32),
        ("first", ctypes.c_int32),
        ("step", SIZE),
    ]


class _Next(ctypes.Structure):
    _fields_: ClassVar = [
        *((name, POINTER) for name in ("masked", "tau", "window")),
        ("rank", SIZE),
        ("masked_dtype", ctypes.c_int32),
    ]


class _Gated(ctypes.Structure):
    _fields_: ClassVar = [
        *((name, POINTER) for name in ("grad", "score_grad", "weight", "scores", "tau", "union_mask")),
        ("next", ctypes.POINTER(_Next)),
        ("n", SIZE),
        ("scale", ctypes.c_double),
        *((name, ctypes.c_int32) for name in ("dtype", "grad_dtype", "rule")),
    ]


class _AdamWItem(ctypes.Structure):
    _fields_: ClassVar = [
        ("tensor", _Gated),
        *((name, POINTER) for name in AdamWState._fields[:4]),
        ("for_weight", _AdamW),
        ("for_scores", _AdamW),
        *((f"{name}_scales", POINTER) for name in AdamWState._fields[:4]),
        ("weight_storage", ctypes.c_int32),
        ("scores_storage", ctypes.c_int32),
    ]


class _SGDItem(ctypes.Structure):
    _fields_: ClassVar = [
        ("tensor", _Gated),
        *((name, POINTER) for name in SGDState._fields),
        ("for_weight", _SGD),
        ("for_scores", _SGD),
        *((f"{name}_scales", POINTER) for name in SGDState._fields),
        ("weight_storage", ctypes.c_int32),
        ("scores_storage", ctypes.c_int32),
    ]


class _Operands:
    """Keeps what is behind the pointers of one call alive until it is over."""

    def __init__(self) -> None:
        self._kept: list[Any] = []
        self._copies: list[tuple[Tensor, Tensor]] = []
        self.has_copies = False

    def read(self, name: str, tensor: Tensor, like: Tensor) -> int:
        """The address of an input."""
        dense = contiguous(name, tensor, like)
        if dense is not tensor:
            self.has_copies = True
            self._kept.append(dense)
        return dense.data_ptr()

    def write(self, name: str, tensor: Tensor, like: Tensor, dtype: torch.dtype | None = None) -> int:
        """The address of a tensor that is updated in place, in the shape of ``like`` and a dtype, else that of
        ``like``."""
        dtype = like.dtype if dtype is None else dtype
        if tensor.dtype is not dtype:
            raise TypeError(f"{name} must be a {dtype} tensor, got {tensor.dtype}")
        dense = contiguous(name, tensor, like)
        if dense is not tensor:
            self.has_copies = True
            self._copies.append((tensor, dense))
        return dense.data_ptr()

    def keep(self, thing: Any) -> Any:
        """Return ``thing``, which stays alive as long as this object."""
        self._kept.append(thing)
        return thing

    def copy_back(self) -> None:
        """Copy results back into the tensors that were not contiguous."""
        for tensor, dense in self._copies:
            tensor.copy_(dense)


@dataclass
class _Known:
    """The items of the last batch, for a batch of the same updates: all but the gradients and the settings stays."""

    updates: Sequence[Update]
    kinds: Sequence[Any]
    items: Any
    operands: _Operands


def adamw_step(batch: Batch, settings: Sequence[tuple[AdamW, AdamW]]) -> None:
    """:func:`wsn_fast.backends.torch.adamw_step`, in one pass over each tensor."""
    items, operands = _items(batch, _AdamWItem, AdamWState._fields[:4])
    known: dict[tuple[AdamW, int], _AdamW] = {}  # most tensors have the same settings and as many steps
    for item, update, (weight, scores) in zip(items, batch.updates, settings, strict=True):
        assert isinstance(update.state, AdamWState | CodedAdamWState)
        item.for_weight = _settings(known, weight, int(update.state.weight_step))
        item.for_scores = _settings(known, scores, int(update.state.scores_step))
    call("wsn_adamw_step", items, len(items))
    operands.copy_back()


def adamw_coded_step(batch: Batch, settings: Sequence[tuple[AdamW, AdamW]]) -> None:
    """:func:`wsn_fast.backends.torch.adamw_coded_step`, in one pass over each tensor."""
    adamw_step(batch, settings)


def _settings(known: dict[tuple[AdamW, int], _AdamW], of: AdamW, step: int) -> _AdamW:
    key = of, step
    if key not in known:
        known[key] = _AdamW(float(of.lr), *of[1:5], step, of.decoupled)
    return known[key]


def sgd_step(batch: Batch, settings: Sequence[tuple[SGD, SGD]]) -> None:
    """:func:`wsn_fast.backends.torch.sgd_step`, in one pass over each tensor."""
    for update, pair in zip(batch.updates, settings, strict=True):
        assert isinstance(update.state, SGDState | CodedSGDState)
        for name, buffer, s in zip(SGDState._fields, update.state[:2], pair, strict=True):
            if buffer is None and s.momentum != 0:
                raise ValueError(f"{name} must be a tensor for a momentum of {s.momentum}, got None")
    items, operands = _items(batch, _SGDItem, SGDState._fields)
    for item, update, pair in zip(items, batch.updates, settings, strict=True):
        steps = map(int, update.state[2:]) if isinstance(update.state, CodedSGDState) else (0, 0)
        item.for_weight, item.for_scores = (
            _SGD(float(s.lr), s.momentum, s.dampening, s.weight_decay, s.nesterov, s.first, step)
            for s, step in zip(pair, steps, strict=True)
        )
    call("wsn_sgd_step", items, len(items))
    operands.copy_back()


def sgd_coded_step(batch: Batch, settings: Sequence[tuple[SGD, SGD]]) -> None:
    """:func:`wsn_fast.backends.torch.sgd_coded_step`, in one pass over each tensor."""
    sgd_step(batch, settings)


def _items(batch: Batch, kind: type[Any], states: Sequence[str]) -> tuple[Any, _Operands]:
    """The items of a batch without their settings: those of the last batch with other gradients if it had the same
    updates. ``states`` are the names of what the optimizer remembers."""
    kinds = [(one.grad.dtype, one.score_grad is None, one.tau is None) for one in batch.gradients]
    known: _Known | None = None if batch.plan is None else batch.plan.get(_Known)
    if known is not None and known.updates is batch.updates and known.kinds == kinds and _are_dense(batch):
        scale = 1.0 if batch.scale is None else float(batch.scale)
        for item, (grad, score_grad, tau) in zip(known.items, batch.gradients, strict=True):
            gated = item.tensor
            gated.grad, gated.scale = grad.data_ptr(), scale
            gated.score_grad = None if score_grad is None else score_grad.data_ptr()
            gated.tau = None if tau is None else tau.data_ptr()
        return known.items, known.operands
    operands = _Operands()
    items = (kind * len(batch.updates))()
    for item, update, gradient in zip(items, batch.updates, batch.gradients, strict=True):
        item.tensor = _gated(update, gradient, batch.scale, operands)
        for name, state in zip(states, update.state or (), strict=False):
            _put_mean(item, name, state, update.weight, operands)
    if batch.plan is not None and not operands.has_copies:  # the batch itself keeps its tensors alive
        batch.plan[_Known] = _Known(batch.updates, kinds, items, operands)
    return items, operands


def _put_mean(item: Any, name: str, mean: Tensor | Stored | None, weight: Tensor, operands: _Operands) -> None:
    """Write a running mean, and how it is stored, to an item."""
    if not isinstance(mean, Stored):
        setattr(item, name, None if mean is None else operands.write(name, mean, weight))
        return
    values, scales = mean
    dtype = weight.dtype if mean.storage == "float32" else values.dtype
    setattr(item, name, operands.write(name, values, weight, dtype))
    setattr(item, f"{name.partition('_')[0]}_storage", STORAGES.index(mean.storage))  # the order of wsn_means
    if scales is not None:
        blocks = scales.new_empty(blocks_of(values))
        setattr(item, f"{name}_scales", operands.write(f"{name}_scales", scales, blocks, torch.float32))


def _are_dense(batch: Batch) -> bool:
    """Whether all gradients are as the library takes them."""
    return all(
        one.grad.is_contiguous() and one.grad.is_cpu and (one.score_grad is None or one.score_grad.is_contiguous())
        for one in batch.gradients
    )


def gradient_squares(batch: Batch) -> Tensor:
    """The sums of the squares of dW and dS of each tensor in turn: float64 [2 * len(updates)]."""
    operands = _Operands()
    members = zip(batch.updates, batch.gradients, strict=True)
    gated = [_gated(update._replace(next=None), gradient, batch.scale, operands) for update, gradient in members]
    sums = torch.empty(2 * len(gated), dtype=torch.float64, device="cpu")
    call("wsn_gradient_squares", (_Gated * len(gated))(*gated), len(gated), sums.data_ptr())
    return sums


def _gated(update: Update, gradient: Gradient, scale: Tensor | None, operands: _Operands) -> _Gated:
    grad, score_grad, tau = gradient
    weight, scores, union, rule, _, following = update
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
        None if following is None else operands.keep(ctypes.pointer(_next(following, scores))),
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
