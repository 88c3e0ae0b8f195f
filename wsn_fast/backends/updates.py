"""What an update of a gated tensor is made of: the conventions that the optimizer primitives of all backends share."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

Plan = dict[Any, Any]
"""What a backend keeps from call to call for one set of tensors, empty at first; its owner passes it again and again,
and lets it live as long as a CUDA graph of such a call."""


class Next(NamedTuple):
    """What an update leaves behind for the next forward pass, in tensors that it writes in place.

    Attributes:
        masked: the shape of the weight, contiguous, in the compute dtype: ``m ? W : +0.0`` of the updated weight and
            scores.
        tau: 0-d, in the dtype of the scores: their threshold after the update. It may be the tensor that the update
            reads as the threshold of the last forward pass.
        rank: of the threshold among the ascending keys (:func:`wsn_fast.ops.threshold_rank`).
        window: int64 [:data:`WINDOW`], where the backend keeps what it knows about the threshold from update to update,
            on the device of the scores; zeros at first, and meaningless to another backend. What it holds decides the
            time that the exact threshold takes, never its value.
    """

    masked: Tensor
    tau: Tensor
    rank: int
    window: Tensor


WINDOW = 8
"""Numbers in :attr:`Next.window`. The first is 0 for a backend to start from nothing. The last two are for everybody:
how many updates found the threshold in the window, and how many had to search through all scores."""


class Update(NamedTuple):
    """A gated tensor, and the gradients for it.

    Attributes:
        grad: G, the gradient of the masked weight, in the dtype of the weight or in the compute dtype; dW where
            ``score_grad`` is given.
        score_grad: dS, or None where it is to be formed from G (Eq. 5).
        weight: updated in place, but for the elements in ``union``, which keep every bit.
        scores: of the shape and dtype of the weight, updated in place.
        tau: 0-d, the threshold of the forward pass. Not read where ``score_grad`` is given.
        union: ``uint8`` [ceil(n / 8)], the packed mask of what finished tasks use, or None.
        rule: "magnitude" or "value".
        scale: 0-d float32 or float64 on the same device: a factor for dW and dS (gradient clipping), or None.
        next: what to prepare for the next forward pass, or None.
    """

    grad: Tensor
    score_grad: Tensor | None
    weight: Tensor
    scores: Tensor
    tau: Tensor | None
    union: Tensor | None
    rule: str
    scale: Tensor | None = None
    next: Next | None = None


class AdamW(NamedTuple):
    """The settings of one update, as of ``torch.optim.AdamW``, or of ``Adam`` where ``decoupled`` is False. ``step``:
    0-d, that of this update, 1 at first; on the device of the weight, like an ``lr`` that is a tensor."""

    lr: float | Tensor
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    step: Tensor
    decoupled: bool


class SGD(NamedTuple):
    """The settings of one update, as of ``torch.optim.SGD``. ``first``: the momentum buffer becomes the gradient."""

    lr: float | Tensor
    momentum: float
    dampening: float
    weight_decay: float
    nesterov: bool
    first: bool


class AdamWState(NamedTuple):
    """The running means of a weight and of its scores, updated in place; of their shape and dtype."""

    weight_avg: Tensor
    weight_avg_sq: Tensor
    scores_avg: Tensor
    scores_avg_sq: Tensor


class SGDState(NamedTuple):
    """The momentum buffers of a weight and of its scores, updated in place; None where the momentum is 0."""

    weight_momentum: Tensor | None
    scores_momentum: Tensor | None
