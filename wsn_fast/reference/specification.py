"""The specification in plain PyTorch: slow, obvious, and the oracle of every test.

Nothing here is used by the fast path and nothing of the fast path is used here, so that agreement between the two means
something. Any floating dtype; float64 for comparisons. Source: Kang et al., "Forget-free Continual Learning with
Winning SubNetworks" (WSN), ICML 2022, and its authors' code; equation numbers are the paper's.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from fractions import Fraction

import torch
import torch.nn.functional as F
from torch import Tensor


# --- the gate
# -----------------------------------------------------------------------------------------------------------
def threshold_rank(n: int, density: float, rule: str = "magnitude") -> int:
    """The index ``j`` of the threshold among ``n`` ascending keys.

    ``"magnitude"`` follows the paper's code to the bit: ``.01 * q * (n - 1)`` with ``q = (1 - c) * 100`` in float64,
    rounded half to even. ``"value"`` is ``ceil((1 - c) * (n - 1))`` in exact arithmetic on the decimal digits of ``c``,
    which is what ``scores >= torch.quantile(scores, 1 - c)`` selects when computed without rounding.
    """
    if rule == "value":
        return math.ceil((1 - Fraction(repr(float(density)))) * (n - 1))
    position = Fraction(0.01 * ((1 - float(density)) * 100) * (n - 1))
    below = math.floor(position)
    above_half = position - below > Fraction(1, 2)
    tie_to_even = position - below == Fraction(1, 2) and below % 2 == 1
    return below + int(above_half or tie_to_even)


def gate_key(scores: Tensor, rule: str = "magnitude") -> Tensor:
    """What is compared: ``|S|`` for ``"magnitude"``, ``S`` for ``"value"``."""
    return scores.abs() if rule == "magnitude" else scores


def topc_threshold(scores: Tensor, density: float, *, rule: str = "magnitude") -> Tensor:
    """tau, an element of the tensor: the ``j``-th of its keys in ascending order, NaN last. 0-d, the dtype of
    ``scores``. A rule such as ``"value >= 0.005"`` names tau itself (Piggyback, Mallya et al., ECCV 2018)."""
    if rule.startswith("value >= "):
        return torch.tensor(float(rule[9:]), dtype=scores.dtype, device=scores.device)
    keys = gate_key(scores.detach(), rule).flatten().sort().values
    return keys[threshold_rank(keys.numel(), density, rule)]


def topc_mask(scores: Tensor, density: float, *, rule: str = "magnitude") -> Tensor:
    """``keep(i) = not (key[i] < tau)``: boolean, the shape of ``scores``. Ties and NaN are kept."""
    return ~(gate_key(scores.detach(), rule) < topc_threshold(scores, density, rule=rule))


# --- forward and backward
# -----------------------------------------------------------------------------------------------
def select(mask: Tensor, tensor: Tensor) -> Tensor:
    """``mask ? tensor : +0.0``. A select and not a product, so that NaN, infinities and signs outside the mask are
    gone."""
    return torch.where(mask, tensor, torch.zeros((), dtype=tensor.dtype, device=tensor.device))


def linear(
    x: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None = None, bias_mask: Tensor | None = None
) -> Tensor:
    """``y = x (W*m)^T + b*m_b``."""
    masked_bias = select(bias_mask, bias) if bias is not None and bias_mask is not None else None
    return F.linear(x, select(mask, weight), masked_bias)


def gate_backward(
    grad: Tensor,
    weight: Tensor,
    scores: Tensor,
    mask: Tensor,
    union: Tensor | None = None,
    rule: str = "magnitude",
) -> tuple[Tensor, Tensor]:
    """From ``G``, the gradient with respect to the masked weight, to ``(dW, dS)``: Eq. 4 and Eq. 5.

    ``dW`` is G where the weight is in the mask and not owned by an earlier task, else +0.0. ``dS`` is the
    straight-through
    gradient and uses the whole weight: scores of weights outside the mask learn too, and so do scores of frozen
    weights.
    """
    trainable = mask if union is None else mask & ~union
    score_grad = grad * weight
    if rule == "magnitude":
        score_grad = score_grad * scores.sign()
    return select(trainable, grad), score_grad


def surrogate_weight(weight: Tensor, scores: Tensor, density: float, rule: str = "magnitude") -> Tensor:
    """A differentiable stand-in whose gradients are those of Eq. 5: ``W * (m + key - stop_gradient(key))``, for
    ``gradcheck``."""
    key = gate_key(scores, rule)
    mask = topc_mask(scores, density, rule=rule).to(weight.dtype)
    return weight * (mask + key - key.detach())


def union_masks(masks: Iterable[Tensor]) -> Tensor:
    """``M``: true where any of the boolean masks is. At least one mask is needed."""
    first, *rest = masks
    union = first.clone()
    for mask in rest:
        union |= mask
    return union


# --- metrics
# ------------------------------------------------------------------------------------------------------------ A[i][j]
# is the test accuracy on task j after training task i; rows and columns in the order of training, j <= i measured.
def average_accuracy(matrix: Sequence[Sequence[float]]) -> float:
    """``ACC = mean_j A[T][j]``."""
    return math.fsum(matrix[-1]) / len(matrix)


def backward_transfer(matrix: Sequence[Sequence[float]]) -> float:
    """``BWT = mean_{j<T} (A[T][j] - A[j][j])``; 0 for a single task."""
    last = len(matrix) - 1
    return math.fsum(matrix[last][j] - matrix[j][j] for j in range(last)) / last if last else 0.0


def forward_transfer(before: Sequence[float], at_random: Sequence[float]) -> float:
    """``FWT = mean_{j>1} (A[j-1][j] - r_j)``, ``before[j]`` being ``A[j-1][j]`` (``before[0]`` is unused); 0 for
    one task."""
    gains = [b - r for b, r in zip(before[1:], at_random[1:], strict=True)]
    return math.fsum(gains) / len(gains) if gains else 0.0


def forgetting(matrix: Sequence[Sequence[float]]) -> list[float]:
    """``max_i A[i][j] - A[T][j]`` for each task j."""
    tasks = len(matrix)
    return [max(matrix[i][j] for i in range(j, tasks)) - matrix[-1][j] for j in range(tasks)]


def capacity(union_density: float, compression: float, tasks: int) -> float:
    """``CAP = (1 - sparsity of the union) + (1 - alpha) * T / 32`` (paper, appendix), as a fraction of the dense fp32
    model."""
    return union_density + (1 - compression) * tasks / 32
