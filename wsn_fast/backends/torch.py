"""The portable backend: the primitives in plain PyTorch, on any device. Exact everywhere, fast nowhere.

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

from .shapes import Geometry
from .updates import SGD, AdamW, AdamWState, Plan, SGDState, Update


def gate_key(scores: Tensor, rule: str) -> Tensor:
    """``|S|`` or ``S``."""
    return scores.abs() if rule == "magnitude" else scores


def threshold(scores: Tensor, rank: int, rule: str) -> Tensor:
    """The ``rank``-th (from 0) of the ascending keys, NaN last: a 0-d tensor."""
    keys = gate_key(scores.detach(), rule).reshape(-1)
    if keys.device.type != "cpu":
        # Not kthvalue: it runs in a single block on a GPU, 100 ms for 16.7 M keys where a sort takes a few.
        return keys.sort().values[rank]
    # Not kthvalue here either: it is quadratic on keys that fall and rise again (a minute for a million of them).
    # NumPy's introselect is not, and several times faster otherwise. It has no bfloat16, which float32 holds exactly
    # and in order.
    array = (keys.float() if keys.dtype is torch.bfloat16 else keys).numpy()
    return torch.tensor(np.partition(array, rank)[rank], dtype=keys.dtype, device="cpu")


def keep_mask(scores: Tensor, tau: Tensor, rule: str) -> Tensor:
    """``not (key < tau)``, boolean."""
    return (gate_key(scores, rule) < tau).logical_not_()


def gate(weight: Tensor, scores: Tensor, tau: Tensor, rule: str, dtype: torch.dtype) -> Tensor:
    """``m ? W : +0.0`` in ``dtype``."""
    # In place on a copy, which has the strides of the weight; masked_fill's own result need not have them.
    return weight.to(dtype, copy=True).masked_fill_(gate_key(scores, rule) < tau, 0.0)


def gate_packed(weight: Tensor, packed: Tensor, dtype: torch.dtype) -> Tensor:
    """As :func:`gate`, with the mask read from its packed form."""
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
    for "magnitude" (Eq. 5). The mask is formed again from the scores and tau, so that nothing of it is kept in
    between."""
    grad = grad.to(weight.dtype)
    dw = ds = None
    if need_weight:
        drop = gate_key(scores, rule) < tau
        if union is not None:
            drop |= unpack(union, weight.numel()).view(weight.shape)
        dw = grad.clone().masked_fill_(drop, 0.0)
    if need_scores:
        ds = torch.mul(grad, weight, out=torch.empty_like(grad))
        if rule == "magnitude":
            ds *= scores.sign()
        ds = ds.to(scores.dtype)
    return dw, ds


def adamw_step(
    updates: Sequence[Update],
    states: Sequence[AdamWState],
    for_weights: Sequence[AdamW],
    for_scores: Sequence[AdamW],
    plan: Plan | None = None,
) -> None:
    """One update of several weights and their scores, in place. Weights in the packed union keep every bit. A ``plan``
    stays empty."""

    def adamw(param: Tensor, grad: Tensor, mean: Tensor, square: Tensor, s: AdamW) -> None:
        adam(
            [param], [grad], [mean], [square], [], [s.step - 1],  # which it counts up itself
            fused=_flat(param, grad, mean, square), foreach=False, amsgrad=False,
            beta1=s.beta1, beta2=s.beta2, lr=s.lr, weight_decay=s.weight_decay, eps=s.eps,
            maximize=False, decoupled_weight_decay=s.decoupled,
        )  # fmt: skip

    for update, state, weight, scores in zip(updates, states, for_weights, for_scores, strict=True):
        with _Step(update) as (dw, ds):
            adamw(update.weight, dw, state.weight_avg, state.weight_avg_sq, weight)
            adamw(update.scores, ds, state.scores_avg, state.scores_avg_sq, scores)


def sgd_step(
    updates: Sequence[Update],
    states: Sequence[SGDState],
    for_weights: Sequence[SGD],
    for_scores: Sequence[SGD],
    plan: Plan | None = None,
) -> None:
    """As :func:`adamw_step`, for SGD."""

    def descend(param: Tensor, grad: Tensor, buffer: Tensor | None, s: SGD) -> None:
        kept: list[Tensor | None] = [None if s.first else buffer]
        sgd(
            [param], [grad], kept, fused=_flat(param, grad, *([] if buffer is None else [buffer])), foreach=False,
            weight_decay=s.weight_decay, momentum=s.momentum, lr=float(s.lr),
            dampening=s.dampening, nesterov=s.nesterov, maximize=False,
        )  # fmt: skip
        if s.first and buffer is not None and kept[0] is not None:
            buffer.copy_(kept[0])

    for update, state, weight, scores in zip(updates, states, for_weights, for_scores, strict=True):
        with _Step(update) as (dw, ds):
            descend(update.weight, dw, state.weight_momentum, weight)
            descend(update.scores, ds, state.scores_momentum, scores)


def gradient_squares(updates: Sequence[Update], plan: Plan | None = None) -> Tensor:
    """The sums of the squares of dW and dS of each tensor in turn, [2 * len(updates)]: float64 on the CPU, else
    float32."""
    sums = [grad.double().square().sum() for update in updates for grad in _gradients(update)]
    return torch.stack(sums).to(torch.float64 if sums[0].is_cpu else torch.float32)


def _flat(*tensors: Tensor) -> bool:
    """Whether all lie in memory alike: torch's fused optimizers on the CPU go through memory whatever the strides."""
    return len({tensor.stride() for tensor in tensors}) == 1


def _gradients(update: Update) -> tuple[Tensor, Tensor]:
    dw: Tensor | None = update.grad
    ds = update.score_grad
    if ds is None:
        assert update.tau is not None
        dw, ds = gate_backward(
            update.grad, update.weight, update.scores, update.tau, update.union, update.rule, True, True
        )
    assert dw is not None and ds is not None
    return (dw, ds) if update.scale is None else (dw * update.scale, ds * update.scale)


class _Step:
    """The gradients of an update on the way in; on the way out what is frozen comes back, and the next gate is made."""

    def __init__(self, update: Update) -> None:
        self._update = update
        self._saved = self._frozen = None
        if update.union is not None:  # all the memory that the way out needs
            self._saved = update.weight.clone()
            self._frozen = unpack(update.union, update.weight.numel()).view(update.weight.shape)

    def __enter__(self) -> tuple[Tensor, Tensor]:
        return _gradients(self._update)

    def __exit__(self, *error: object) -> None:
        u = self._update
        if self._saved is not None and self._frozen is not None:
            u.weight.copy_(torch.where(self._frozen, self._saved, u.weight, out=self._saved))
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
    return ((packed.unsqueeze(1) >> _bit_positions(packed)) & 1).view(-1)[:n].to(torch.bool)


def _bit_positions(like: Tensor) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=like.device)


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


# --- products with the masked weight, here by way of memory
def _masked(
    weight: Tensor, packed: Tensor | None, scores: Tensor | None, tau: Tensor | None, rule: str, dtype: torch.dtype
) -> Tensor:
    if packed is not None:
        return gate_packed(weight, packed, dtype)
    assert scores is not None and tau is not None
    return gate(weight, scores, tau, rule, dtype)


def masked_linear(
    x: Tensor,
    weight: Tensor,
    packed: Tensor | None,
    scores: Tensor | None,
    tau: Tensor | None,
    rule: str,
    bias: Tensor | None,
    backward: bool,
) -> Tensor:
    """``x (W*m)^T + b``, or ``x (W*m) + b`` for ``backward``, with the mask packed or formed from the scores.

    ``x`` is [M, K] ([M, N] for ``backward``) in the compute dtype, ``weight`` [N, K], and the bias is masked already.
    """
    masked = _masked(weight, packed, scores, tau, rule, x.dtype)
    return F.linear(x, masked.t() if backward else masked, bias)


def masked_linear_grad(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    scores: Tensor,
    tau: Tensor,
    union: Tensor | None,
    rule: str,
    need_weight: bool,
    need_scores: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """:func:`gate_backward` of ``G = grad^T x``, with ``grad`` [M, N] and ``x`` [M, K] in the compute dtype."""
    return gate_backward(grad.t() @ x, weight, scores, tau, union, rule, need_weight, need_scores)


def masked_linear_tasks(
    x: Tensor, weight: Tensor, packed: Tensor, tasks: Tensor, bias: Tensor | None, packed_bias: Tensor | None
) -> Tensor:
    """``x[i] (W*m[t])^T + b*m_b[t]`` with ``t = tasks[i]``, a row of the masks ``packed`` [T, bytes].

    A product per task, and so the one primitive that reads something on the host: which tasks there are.
    """
    y = x.new_empty(x.shape[0], weight.shape[0])
    for task in tasks.unique().tolist():
        rows = tasks == task
        b = None
        if bias is not None:
            b = bias.to(x.dtype) if packed_bias is None else gate_packed(bias, packed_bias[task], x.dtype)
        y[rows] = masked_linear(x[rows], weight, packed[task], None, None, "magnitude", b, False)
    return y


def masked_conv(
    x: Tensor,
    weight: Tensor,
    packed: Tensor | None,
    scores: Tensor | None,
    tau: Tensor | None,
    rule: str,
    bias: Tensor | None,
    geometry: Geometry,
    groups: int,
    input_shape: Sequence[int] | None,
) -> Tensor:
    """The zero-padded convolution of ``x`` with the masked weight, or for an ``input_shape`` the gradient of the
    convolution's input, with ``x`` as the gradient of its result."""
    stride, padding, dilation = map(list, geometry)
    masked = _masked(weight, packed, scores, tau, rule, x.dtype)
    none = [0] * len(stride)
    if input_shape is None:
        return torch.ops.aten.convolution(x, masked, bias, stride, padding, dilation, False, none, groups)
    like = x.new_empty(1).expand(list(input_shape))
    return torch.ops.aten.convolution_backward(
        x, like, masked, None, stride, padding, dilation, False, none, groups, [True, False, False]
    )[0]
