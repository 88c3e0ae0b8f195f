"""The selection: the exact threshold of the top density of a tensor of scores, and the mask that it gives."""

from __future__ import annotations

import functools
import math
from fractions import Fraction

import torch
from torch import Tensor

from ..backends import run
from .arguments import check_backend, check_density, check_rule, check_scores
from .operator import operator


@functools.lru_cache(maxsize=4096)
def threshold_rank(n: int, density: float, rule: str) -> int:
    """The index of the threshold among ``n`` ascending keys, on the host.

    For "magnitude" this repeats the float64 operations of the paper's code in their order, with c for ``density``:
    ``0.01 * q * (n - 1)`` with ``q = (1 - c) * 100``, rounded half to even. For "value" it is ``ceil((1 - c) *
    (n - 1))``, computed exactly from the decimal digits of c.
    """
    if rule == "magnitude":
        return round(0.01 * ((1 - density) * 100) * (n - 1))
    return math.ceil((1 - Fraction(repr(density))) * (n - 1))


def topc_threshold(scores: Tensor, density: float, *, rule: str = "magnitude", backend: str | None = None) -> Tensor:
    """The exact threshold that keeps the top ``density`` of ``scores``.

    Args:
        scores: floating tensor (float32, float64, bfloat16, float16) of any shape and strides, n >= 1 elements.
        density: the fraction to keep, in (0, 1].
        rule: ``"magnitude"`` ranks ``|S|`` as the paper's code does, ``"value"`` ranks ``S`` as CLArena does.
        backend: ``"torch"``, ``"triton"`` or ``"native"``; None lets the library choose.

    Returns:
        tau, 0-d, in the dtype and on the device of ``scores``; an element of the ranked keys. The host does not wait
        for it.

    Raises:
        TypeError: ``scores`` is not a floating tensor of a supported dtype.
        ValueError: ``scores`` is empty, ``density`` is outside (0, 1], or ``rule`` or ``backend`` is unknown.
    """
    scores, density, rule = check_scores(scores).detach(), check_density(density), check_rule(rule)
    return threshold(scores, density, rule, check_backend(backend))


def topc_mask(scores: Tensor, density: float, *, rule: str = "magnitude", backend: str | None = None) -> Tensor:
    """The mask of the top ``density`` of ``scores``.

    It is True where the key (``|S|`` or ``S``, by the rule) is not below the threshold. So ties with the threshold and
    NaN are kept. Arguments and errors are those of :func:`topc_threshold`.

    Returns:
        Boolean tensor of the shape of ``scores``, on its device.
    """
    scores, density, rule = check_scores(scores).detach(), check_density(density), check_rule(rule)
    return mask(scores, density, rule, check_backend(backend))


@operator(fake=lambda a: a.scores.new_empty(()))
def threshold(scores: Tensor, density: float, rule: str, backend: str | None = None) -> Tensor:
    """Do what :func:`topc_threshold` does, but do not check the arguments. ``scores`` need no gradient."""
    rank = threshold_rank(scores.numel(), density, rule)
    return run("threshold", scores.device, scores.dtype, backend).threshold(scores, rank, rule)


@operator(fake=lambda a: torch.empty_like(a.scores, dtype=torch.bool))
def mask(scores: Tensor, density: float, rule: str, backend: str | None = None) -> Tensor:
    """Do what :func:`topc_mask` does, but do not check the arguments. ``scores`` need no gradient."""
    tau = threshold(scores, density, rule, backend)
    return run("keep_mask", scores.device, scores.dtype, backend).keep_mask(scores, tau, rule)
