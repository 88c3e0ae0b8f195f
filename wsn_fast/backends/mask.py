"""What the primitives take in place of long lists of arguments: the mask of a gated tensor, and what to make of one of
many tensors."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Mask(NamedTuple):
    """Which elements of a gated tensor of n elements are kept.

    In training the mask follows from the scores: ``not (key(scores) < tau)``, where the key is ``|S|`` or ``S``, by the
    rule. The mask of a finished task is packed.

    Attributes:
        scores: of the shape of the tensor; None for a packed mask.
        tau: 0-d, the threshold of the scores; None for a packed mask.
        rule: "magnitude" or "value", the key of the scores.
        packed: ``uint8`` [ceil(n / 8)], the mask of a finished task, which takes the place of scores and tau; or None.
        union: ``uint8`` [ceil(n / 8)], the packed mask of what finished tasks use, for gradients; or None.
    """

    scores: Tensor | None
    tau: Tensor | None
    rule: str
    packed: Tensor | None = None
    union: Tensor | None = None

    @classmethod
    def of_packed(cls, packed: Tensor) -> Mask:
        """The mask of a finished task."""
        return cls(None, None, "magnitude", packed)

    @property
    def source(self) -> str:
        """Where the mask comes from, as the tuning tables name it: "scores" or "packed"."""
        return "scores" if self.packed is None else "packed"


class GateOrder(NamedTuple):
    """A gate that is to be made, as one of many.

    Attributes:
        weight: contiguous, n elements.
        scores: contiguous, of the same shape.
        rank: of the threshold among the ascending keys (:func:`wsn_fast.ops.threshold_rank`).
        rule: "magnitude" or "value".
        masked: contiguous, of the shape of the weight, in the compute dtype; the result is written here.
    """

    weight: Tensor
    scores: Tensor
    rank: int
    rule: str
    masked: Tensor


class GradientOrder(NamedTuple):
    """Gradients that are to be formed, as those of one of many gated tensors of n elements.

    The results are new memory: they share none with the other tensors. Contiguous tensors are the fast case.

    Attributes:
        grad: G, the gradient of the masked weight, of the shape of the weight, in the compute dtype.
        weight: n elements.
        scores: of the shape of the weight.
        tau: 0-d, the threshold of the scores in the forward pass, in the dtype of the scores.
        union: ``uint8`` [ceil(n / 8)], the packed mask of what finished tasks use, or None.
        rule: "magnitude" or "value".
        weight_grad: of the shape and dtype of the weight; dW is written here. None if it is not needed.
        score_grad: of the shape of the weight and the dtype of the scores; dS is written here, or None likewise.
    """

    grad: Tensor
    weight: Tensor
    scores: Tensor
    tau: Tensor
    union: Tensor | None
    rule: str
    weight_grad: Tensor | None
    score_grad: Tensor | None


class RestoreOrder(NamedTuple):
    """Frozen values that are to be put back into one of many tensors of n elements.

    Attributes:
        param: written in place where ``union`` has a bit. A contiguous one is the fast case.
        saved: contiguous, n elements of the dtype of ``param``: the saved values in row-major order.
        union: ``uint8`` [ceil(n / 8)], the packed mask of what finished tasks use; None restores every element.
    """

    param: Tensor
    saved: Tensor
    union: Tensor | None
