"""The portable backend: the primitives in plain PyTorch, on any device. Its aim is to be exact, not to be fast: it
makes temporary tensors of n elements, in the dtypes of the tensors that it is given.

Conventions of every backend: arguments are checked by the caller; ``tau`` is a 0-d tensor on the scores' device and no
primitive reads it on the host; a packed mask is a 1-d ``uint8`` tensor of ``ceil(n / 8)`` bytes in which element ``i``
of the row-major flattened tensor is bit ``i % 8`` (least significant first) of byte ``i // 8`` and padding bits are
zero.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.adam import adam
from torch.optim.sgd import sgd

from .conv_geometry import Geometry
from .exporting import is_exporting
from .mask import GateOrder, GradientOrder, Mask, RestoreOrder
from .moments import Stored, decode, encode
from .updates import (
    SGD,
    AdamW,
    AdamWState,
    Batch,
    CodedAdamWState,
    CodedSGDState,
    Gradient,
    Plan,
    SGDState,
    Update,
)

PART = 2**17
"""How many elements are converted to a wider dtype at once, where the result is a sum."""


def gate_key(scores: Tensor, rule: str) -> Tensor:
    """``|S|`` or ``S``."""
    return scores.abs() if rule == "magnitude" else scores


def threshold(scores: Tensor, rank: int, rule: str) -> Tensor:
    """The ``rank``-th (from 0) of the ascending keys, NaN last: a 0-d tensor."""
    keys = gate_key(scores.detach(), rule).reshape(-1)
    if keys.device.type != "cpu":
        # torch.kthvalue runs in a single block on a GPU, so it is expected to be slower than a sort.
        return keys.sort().values[rank]
    # torch.kthvalue takes quadratic time on keys that fall and rise again. NumPy's partition has no such case, and was
    # faster on other keys too (docs/log.md). It has no bfloat16.
    if keys.itemsize == 2:
        return _threshold_of_16_bits(keys, rank)
    return torch.tensor(np.partition(keys.numpy(), rank)[rank], dtype=keys.dtype, device="cpu")


def _threshold_of_16_bits(keys: Tensor, rank: int) -> Tensor:
    """:func:`threshold` on the CPU, of the integers that order as the keys do."""
    bits = keys.view(torch.int16)
    if bool((bits < 0).any()):
        bits = _reordered(bits).masked_fill_(keys.isnan(), 0x7FFF)
    found = np.partition(bits.numpy(), rank)[rank]
    return _reordered(torch.tensor(found, dtype=torch.int16, device="cpu")).view(keys.dtype)


def _reordered(bits: Tensor) -> Tensor:
    """The bits of floats as integers in the same order, and back."""
    return bits ^ (bits >> 15 & 0x7FFF)


def keep_mask(scores: Tensor, tau: Tensor, rule: str) -> Tensor:
    """``not (key < tau)``, boolean."""
    return (gate_key(scores, rule) < tau).logical_not_()


def gate(weight: Tensor, scores: Tensor, tau: Tensor, rule: str, dtype: torch.dtype) -> Tensor:
    """``m ? W : +0.0`` in ``dtype``."""
    # In place on a copy, which has the strides of the weight; masked_fill's own result need not have them.
    return weight.to(dtype, copy=True).masked_fill_(gate_key(scores, rule) < tau, 0.0)


def gates(orders: Sequence[GateOrder], plan: Plan | None = None) -> list[Tensor]:
    """:func:`threshold` and :func:`gate` for many tensors: writes each ``masked`` and returns the thresholds, 0-d. A
    ``plan`` stays empty."""
    taus = []
    for order in orders:
        taus.append(threshold(order.scores, order.rank, order.rule))
        order.masked.copy_(gate(order.weight, order.scores, taus[-1], order.rule, order.masked.dtype))
    return taus


def gate_packed(weight: Tensor, packed: Tensor, dtype: torch.dtype) -> Tensor:
    """Do what :func:`gate` does, with the mask in its packed form."""
    keep = unpack(packed, weight.numel()).view(weight.shape)
    return weight.to(dtype, copy=True).masked_fill_(~keep, 0.0)


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
    for "magnitude" (Eq. 5). The mask is computed again from the scores and tau, so that it need not be stored
    after the forward pass."""
    dw = torch.empty_like(grad, dtype=weight.dtype) if need_weight else None
    ds = torch.empty_like(grad, dtype=scores.dtype) if need_scores else None
    gates_backward([GradientOrder(grad, weight, scores, tau, union, rule, dw, ds)])
    return dw, ds


def gates_backward(orders: Sequence[GradientOrder], plan: Plan | None = None) -> None:
    """:func:`gate_backward` for many tensors: writes ``weight_grad`` and ``score_grad`` of each. A ``plan`` stays
    empty."""
    for grad, weight, scores, tau, union, rule, dw, ds in orders:
        if dw is not None:
            drop = gate_key(scores, rule) < tau
            if union is not None:
                drop |= unpack(union, weight.numel()).view(weight.shape)
            dw.copy_(grad).masked_fill_(drop, 0.0)
        if ds is not None:
            product = ds if ds.dtype is weight.dtype else torch.empty_like(ds, dtype=weight.dtype)
            product.copy_(grad).mul_(weight)
            if rule == "magnitude":
                product *= scores.sign()
            if product is not ds:
                ds.copy_(product)


def adamw_step(batch: Batch, settings: Sequence[tuple[AdamW, AdamW]]) -> None:
    """One update of several weights and their scores, in place. Weights in the packed union keep every bit. The plan
    stays empty."""
    for update, gradient, (weight, scores) in zip(batch.updates, batch.gradients, settings, strict=True):
        state = update.state
        assert isinstance(state, AdamWState)
        with _Step(update, gradient, batch.scale) as (weight_new, dw, ds):
            _adamw(weight_new, dw, state.weight_avg, state.weight_avg_sq, state.weight_step, weight)
            _adamw(update.scores, ds, state.scores_avg, state.scores_avg_sq, state.scores_step, scores)


def _adamw(param: Tensor, grad: Tensor, mean: Tensor, square: Tensor, step: Tensor, s: AdamW) -> None:
    adam(
        [param], [grad], [mean], [square], [], [step - 1],  # adam() adds 1 to the step
        fused=_flat(param, grad, mean, square), foreach=False, amsgrad=False,
        beta1=s.beta1, beta2=s.beta2, lr=s.lr, weight_decay=s.weight_decay, eps=s.eps,
        maximize=False, decoupled_weight_decay=s.decoupled,
    )  # fmt: skip


def sgd_step(batch: Batch, settings: Sequence[tuple[SGD, SGD]]) -> None:
    """Do what :func:`adamw_step` does, for SGD."""
    for update, gradient, (weight, scores) in zip(batch.updates, batch.gradients, settings, strict=True):
        state = update.state
        assert isinstance(state, SGDState)
        with _Step(update, gradient, batch.scale) as (weight_new, dw, ds):
            _sgd(weight_new, dw, state.weight_momentum, weight)
            _sgd(update.scores, ds, state.scores_momentum, scores)


def _sgd(param: Tensor, grad: Tensor, buffer: Tensor | None, s: SGD) -> None:
    kept: list[Tensor | None] = [None if s.first else buffer]
    # On the CPU torch's fused SGD is wrong in half precision, at least up to torch 2.13.
    wrong = param.is_cpu and param.dtype in (torch.bfloat16, torch.float16)
    fused = not wrong and _flat(param, grad, *([] if buffer is None else [buffer]))
    sgd(
        [param], [grad], kept, fused=fused, foreach=False,
        weight_decay=s.weight_decay, momentum=s.momentum, lr=float(s.lr),
        dampening=s.dampening, nesterov=s.nesterov, maximize=False,
    )  # fmt: skip
    if s.first and buffer is not None and kept[0] is not None:
        buffer.copy_(kept[0])


def adamw_coded_step(batch: Batch, settings: Sequence[tuple[AdamW, AdamW]]) -> None:
    """:func:`adamw_step` with running means as :mod:`wsn_fast.backends.moments` stores them: it decodes them, makes the
    update in float32 (float64 where that is the dtype of the weight), and encodes them again. For this it makes
    tensors of n elements of 32 and 64 bits, also of weights in 16 bits."""
    for update, gradient, (weight, scores) in zip(batch.updates, batch.gradients, settings, strict=True):
        state = update.state
        assert isinstance(state, CodedAdamWState)
        with _Step(update, gradient, batch.scale) as (weight_new, dw, ds):
            for param, grad, avg, avg_sq, step, s in (
                (weight_new, dw, state.weight_avg, state.weight_avg_sq, state.weight_step, weight),
                (update.scores, ds, state.scores_avg, state.scores_avg_sq, state.scores_step, scores),
            ):
                wide, mean, square = _wide(param), decode(avg, param, True), decode(avg_sq, param, False)
                _adamw(wide, grad.to(wide.dtype), mean, square, step, s)
                _store(param, wide, step, (mean, avg, True), (square, avg_sq, False))


def sgd_coded_step(batch: Batch, settings: Sequence[tuple[SGD, SGD]]) -> None:
    """Do what :func:`adamw_coded_step` does, for SGD."""
    for update, gradient, (weight, scores) in zip(batch.updates, batch.gradients, settings, strict=True):
        state = update.state
        assert isinstance(state, CodedSGDState)
        with _Step(update, gradient, batch.scale) as (weight_new, dw, ds):
            for param, grad, momentum, step, s in (
                (weight_new, dw, state.weight_momentum, state.weight_step, weight),
                (update.scores, ds, state.scores_momentum, state.scores_step, scores),
            ):
                wide, buffer = _wide(param), None if momentum is None else decode(momentum, param, True)
                _sgd(wide, grad.to(wide.dtype), buffer, s)
                _store(param, wide, step, *([] if buffer is None or momentum is None else [(buffer, momentum, True)]))


def _wide(param: Tensor) -> Tensor:
    """``param``, or a float32 copy if it has 16 bits."""
    return param.float() if param.dtype.itemsize == 2 else param


def _store(param: Tensor, wide: Tensor, step: Tensor, *means: tuple[Tensor, Stored, bool]) -> None:
    """Store an updated parameter and its means, each with its place and whether it has a sign."""
    if wide is not param:
        param.copy_(wide)
    for mean, stored, signed in means:
        encode(mean, stored, signed, step)


def gradient_squares(batch: Batch) -> Tensor:
    """The sums of the squares of dW and dS of each tensor in turn, [2 * len(updates)]: float64 on the CPU, else
    float32."""
    sums = [
        torch.stack([part.double().square().sum() for part in grad.reshape(-1).split(PART)]).sum()
        for update, gradient in zip(batch.updates, batch.gradients, strict=True)
        for grad in _gradients(update, gradient, batch.scale)
    ]
    return torch.stack(sums).to(torch.float64 if sums[0].is_cpu else torch.float32)


def _flat(*tensors: Tensor) -> bool:
    """Whether all tensors have the same strides, and no gaps in memory. On the CPU torch's fused optimizers go through
    memory in order and ignore the strides."""
    first = tensors[0]
    last = sum((n - 1) * stride for n, stride in zip(first.shape, first.stride(), strict=True))
    return last == first.numel() - 1 and len({tensor.stride() for tensor in tensors}) == 1


def _gradients(update: Update, gradient: Gradient, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    dw: Tensor | None = gradient.grad
    ds = gradient.score_grad
    if ds is None:
        assert gradient.tau is not None
        dw, ds = gate_backward(
            gradient.grad, update.weight, update.scores, gradient.tau, update.union, update.rule, True, True
        )
    assert dw is not None and ds is not None
    return (dw, ds) if scale is None else (dw * scale, ds * scale)


class _Step:
    """A context manager for one update. On entry it gives the weight to update, dW and dS. On exit it computes the next
    masked weight.

    With a union it gives a copy, of which the trained elements become the weight in one operation at the end. So frozen
    weights are right at every moment, wherever an operation fails."""

    def __init__(self, update: Update, gradient: Gradient, scale: Tensor | None) -> None:
        self._update, self._gradient, self._scale = update, gradient, scale
        self._frozen, self._weight = None, update.weight
        if update.union is not None:
            self._weight = update.weight.clone()
            self._frozen = unpack(update.union, update.weight.numel()).view(update.weight.shape)

    def __enter__(self) -> tuple[Tensor, Tensor, Tensor]:
        return self._weight, *_gradients(self._update, self._gradient, self._scale)

    def __exit__(self, *error: object) -> None:
        u = self._update
        if self._frozen is not None and error[0] is None:
            u.weight.copy_(torch.where(self._frozen, u.weight, self._weight, out=self._weight))
        if u.next is not None and error[0] is None:
            u.next.tau.copy_(threshold(u.scores, u.next.rank, u.rule))
            u.next.masked.copy_(gate(u.weight, u.scores, u.next.tau, u.rule, u.next.masked.dtype))
            u.next.window[-1] += 1


def pack(mask: Tensor) -> Tensor:
    """Boolean mask of any shape to its packed form."""
    bits = mask.reshape(-1).to(torch.uint8)
    padding = -bits.numel() % 8
    if padding:
        bits = torch.cat([bits, bits.new_zeros(padding)])
    return (bits.view(-1, 8) << _bit_positions(bits)).sum(dim=1, dtype=torch.uint8)


def unpack(packed: Tensor, n: int) -> Tensor:
    """Packed mask to a 1-d boolean tensor of ``n`` elements."""
    # ONNX knows these functions and not the operators >> and &, and torch's exporter gets shifts of uint8 wrong.
    packed = packed.int() if is_exporting() else packed
    bits = torch.bitwise_right_shift(packed.unsqueeze(1), _bit_positions(packed))
    return torch.bitwise_and(bits, 1).view(-1)[:n].to(torch.bool)


def _bit_positions(like: Tensor) -> Tensor:
    return torch.arange(8, dtype=like.dtype, device=like.device)


def union(packed: Tensor) -> Tensor:
    """Bitwise OR over the rows of ``packed`` [T, bytes], T >= 1."""
    result = packed[0].clone()
    for row in packed[1:]:
        result |= row
    return result


def popcount(packed: Tensor) -> Tensor:
    """The number of set bits, a 0-d int64 tensor: pairs, nibbles, bytes, then a sum."""
    x = packed - ((packed >> 1) & 0x55)
    x = (x & 0x33) + ((x >> 2) & 0x33)
    return ((x + (x >> 4)) & 0x0F).sum(dtype=torch.int64)


def restore_frozen(param: Tensor, saved: Tensor, union: Tensor) -> None:
    """In place: ``param = union ? saved : param``, bit for bit."""
    frozen = unpack(union, param.numel()).view(param.shape)
    param.copy_(torch.where(frozen, saved, param))


def restore_frozen_many(orders: Sequence[RestoreOrder], plan: Plan | None = None) -> None:
    """:func:`restore_frozen` for many tensors; without a union every element is restored. A ``plan`` stays empty."""
    for param, saved, union in orders:
        values = saved.view(param.shape)
        if union is None:
            param.copy_(values)
        else:
            restore_frozen(param, values, union)


# --- products with the masked weight, which is written to memory here
def _masked(weight: Tensor, mask: Mask, dtype: torch.dtype) -> Tensor:
    if mask.packed is not None:
        return gate_packed(weight, mask.packed, dtype)
    assert mask.scores is not None and mask.tau is not None
    return gate(weight, mask.scores, mask.tau, mask.rule, dtype)


def masked_linear(x: Tensor, weight: Tensor, mask: Mask, bias: Tensor | None, backward: bool) -> Tensor:
    """``x (W*m)^T + b``, or ``x (W*m) + b`` for ``backward``.

    ``x`` is [M, K] ([M, N] for ``backward``) in the compute dtype, ``weight`` [N, K], and the bias is masked already.
    """
    masked = _masked(weight, mask, x.dtype)
    return F.linear(x, masked.t() if backward else masked, bias)


def masked_linear_grad(
    grad: Tensor, x: Tensor, weight: Tensor, mask: Mask, need_weight: bool, need_scores: bool
) -> tuple[Tensor | None, Tensor | None]:
    """:func:`gate_backward` of ``G = grad^T x``, with ``grad`` [M, N] and ``x`` [M, K] in the compute dtype."""
    assert mask.scores is not None and mask.tau is not None
    return gate_backward(grad.t() @ x, weight, mask.scores, mask.tau, mask.union, mask.rule, need_weight, need_scores)


def masked_linear_tasks(
    x: Tensor, weight: Tensor, packed: Tensor, tasks: Tensor, bias: Tensor | None, packed_bias: Tensor | None
) -> Tensor:
    """``x[i] (W*m[t])^T + b*m_b[t]`` with ``t = tasks[i]``, a row of the masks ``packed`` [T, bytes].

    It computes one product for each task. So it is the only primitive that reads something on the host: which tasks
    there are.
    """
    y = x.new_empty(x.shape[0], weight.shape[0])
    for task in tasks.unique().tolist():
        rows = tasks == task
        b = None
        if bias is not None:
            b = bias.to(x.dtype) if packed_bias is None else gate_packed(bias, packed_bias[task], x.dtype)
        y[rows] = masked_linear(x[rows], weight, Mask.of_packed(packed[task]), b, False)
    return y


def masked_conv(
    x: Tensor,
    weight: Tensor,
    mask: Mask,
    bias: Tensor | None,
    geometry: Geometry,
    groups: int,
    input_shape: Sequence[int] | None,
) -> Tensor:
    """The zero-padded convolution of ``x`` with the masked weight. If ``input_shape`` is given, it computes the
    gradient of an input of that shape instead; then ``x`` is the gradient of the convolution's result."""
    stride, padding, dilation = map(list, geometry)
    masked = _masked(weight, mask, x.dtype)
    none = [0] * len(stride)
    if input_shape is None:
        return torch.ops.aten.convolution(x, masked, bias, stride, padding, dilation, False, none, groups)
    like = x.new_empty(1).expand(list(input_shape))
    return torch.ops.aten.convolution_backward(
        x, like, masked, None, stride, padding, dilation, False, none, groups, [True, False, False]
    )[0]
