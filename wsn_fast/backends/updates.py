"""The operands and settings of an update of a gated tensor, as the optimizer primitives of all backends take them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .moments import Stored

Plan = dict[Any, Any]
"""What a backend keeps from call to call. It is empty at first. The caller passes the same dict at every call, and
keeps it as long as a CUDA graph of such a call exists."""


class CallKey(NamedTuple):
    """What is equal for all tensors that one call of a backend serves."""

    device: torch.device
    dtype: torch.dtype
    backend: str | None


class Next(NamedTuple):
    """What an update prepares for the next forward pass, in tensors that it writes in place.

    Attributes:
        masked: the shape of the weight, contiguous, in the compute dtype: ``m ? W : +0.0`` of the updated weight and
            scores.
        tau: 0-d, in the dtype of the scores: their threshold after the update. It may be the tensor that the update
            reads as the threshold of the last forward pass.
        rank: of the threshold among the ascending keys (:func:`wsn_fast.ops.threshold_rank`).
        window: int64 [:data:`WINDOW`], where the backend keeps what it knows about the threshold from update to update,
            on the device of the scores; zeros at first, and meaningless to another backend. It only has an effect on
            the time that the exact threshold takes, never on its value.
    """

    masked: Tensor
    tau: Tensor
    rank: int
    window: Tensor


WINDOW = 8
"""How many numbers are in :attr:`Next.window`. The first one is 0 if nothing is known yet. The last two are counters
that any reader may use: how many updates found the threshold in the window, and how many searched through all
scores."""


class AdamWState(NamedTuple):
    """The running means of a weight and of its scores, of their shape and dtype, updated in place; and 0-d tensors with
    the numbers of their updates, this one included (the first one has 1), on the device of the weight."""

    weight_avg: Tensor
    weight_avg_sq: Tensor
    scores_avg: Tensor
    scores_avg_sq: Tensor
    weight_step: Tensor
    scores_step: Tensor


class SGDState(NamedTuple):
    """The momentum buffers of a weight and of its scores, updated in place; None where the momentum is 0."""

    weight_momentum: Tensor | None
    scores_momentum: Tensor | None


class CodedAdamWState(NamedTuple):
    """An :class:`AdamWState` whose running means are stored in fewer bytes."""

    weight_avg: Stored
    weight_avg_sq: Stored
    scores_avg: Stored
    scores_avg_sq: Stored
    weight_step: Tensor
    scores_step: Tensor


class CodedSGDState(NamedTuple):
    """An :class:`SGDState` whose buffers are stored in fewer bytes, and 0-d tensors with the numbers of the updates of
    the weight and of the scores, this one included."""

    weight_momentum: Stored | None
    scores_momentum: Stored | None
    weight_step: Tensor
    scores_step: Tensor


State = AdamWState | SGDState | CodedAdamWState | CodedSGDState
"""What an optimizer remembers of a gated tensor and its scores."""


class Update(NamedTuple):
    """A gated tensor to update: what stays in its place in memory from step to step.

    A caller that passes the same sequence of updates again says that none of these tensors has moved since the last
    call. Backends keep what they know about them in the :data:`Plan`.

    Attributes:
        weight: updated in place, except for the elements in ``union``, which keep every bit.
        scores: of the shape and dtype of the weight, updated in place.
        union: ``uint8`` [ceil(n / 8)], the packed mask of what finished tasks use, or None.
        rule: "magnitude" or "value".
        state: what the optimizer remembers; None where no step is made.
        next: what to prepare for the next forward pass, or None.
    """

    weight: Tensor
    scores: Tensor
    union: Tensor | None
    rule: str
    state: State | None = None
    next: Next | None = None


class Gradient(NamedTuple):
    """The gradients for a gated tensor, which may lie somewhere else in every step.

    Attributes:
        grad: G, the gradient of the masked weight, in the dtype of the weight or in the compute dtype. If
            ``score_grad`` is given, it is dW.
        score_grad: dS. If it is None, the update computes dW and dS from G (Eq. 4 and 5).
        tau: 0-d, the threshold of the forward pass. It is not read if ``score_grad`` is given.
    """

    grad: Tensor
    score_grad: Tensor | None
    tau: Tensor | None


class AdamW(NamedTuple):
    """The settings of one update: those of ``torch.optim.AdamW``, or of ``Adam`` if ``decoupled`` is False. An ``lr``
    that is a tensor is on the device of the weight."""

    lr: float | Tensor
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    decoupled: bool


class SGD(NamedTuple):
    """The settings of one update: those of ``torch.optim.SGD``. If ``first``, the momentum buffer becomes the
    gradient."""

    lr: float | Tensor
    momentum: float
    dampening: float
    weight_decay: float
    nesterov: bool
    first: bool


class Batch(NamedTuple):
    """The updates of one call: gated tensors of one device and one dtype. The settings of a call are a pair for each
    update, for the weight and for its scores; updates with the same pair (one object) are made together.

    Attributes:
        updates: the gated tensors.
        gradients: their gradients, in the same order.
        scale: 0-d float32 or float64 on their device: a factor for all dW and dS (gradient clipping), or None.
        plan: what the backend keeps from call to call, or None.
    """

    updates: Sequence[Update]
    gradients: Sequence[Gradient]
    scale: Tensor | None = None
    plan: Plan | None = None
