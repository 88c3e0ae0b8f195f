"""Piggyback (Mallya, Davis and Lazebnik, ECCV 2018)."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from ..continual.wsn import WSN
from ..convert import convert
from .frozen import freeze


def piggyback(model: nn.Module, *, threshold: float = 5e-3, score_init: float = 1e-2, **options: Any) -> WSN:
    """Learn a mask for each task over the weights of a trained model, which never change (Mallya, Davis and Lazebnik,
    "Piggyback: Adapting a Single Network to Multiple Tasks by Learning to Mask Weights", ECCV 2018).

    A mask keeps the weights whose score is at least ``threshold`` (Eq. 1 of the paper). The scores of every task begin
    at ``score_init``, so that a task begins with all weights. Their gradient is ``G * W``, where G is the gradient of
    the masked weight. Weights, biases and all other parameters of ``model`` stay as they are; normalisation layers and
    heads are trained for each task.

    Args:
        model: a trained model; it is converted in place.
        threshold: the constant threshold of the scores.
        score_init: the first value of all scores, at least ``threshold``.
        options: ``heads`` and other arguments of :func:`wsn_fast.convert`, but not ``density``, ``rule`` and
            ``score_init``.

    Returns:
        A WSN, whose tasks are begun, trained and ended as ever.

    Raises:
        ValueError: ``threshold`` or ``score_init`` is not a finite number, or ``score_init`` is below ``threshold``; or
            as :func:`wsn_fast.convert` says.
    """
    for name, number in (("threshold", threshold), ("score_init", score_init)):
        if not isinstance(number, int | float) or isinstance(number, bool) or not math.isfinite(number):
            raise ValueError(f"{name} must be a finite number, got {number!r}")
    if score_init < threshold:
        raise ValueError(
            f"score_init must be at least threshold ({threshold}), got {score_init}: a task would begin with no weight"
        )
    rule = f"value >= {threshold}"
    freeze(convert(model, 1.0, rule=rule, score_init=score_init, **options), norms=False)
    return WSN(model, rest="frozen", reinit_scores=True, score_init=score_init)
