"""How scores are drawn."""

from __future__ import annotations

import math

from torch import Tensor, nn

from ..choices import SCORE_INITS

ScoreInit = str | float
"""One of ``SCORE_INITS``, or the value of all scores."""


def check_score_init(mode: object) -> ScoreInit:
    """Return ``mode``. Raises ``ValueError`` if it is neither one of ``SCORE_INITS`` nor a finite number."""
    if isinstance(mode, int | float) and not isinstance(mode, bool) and math.isfinite(mode):
        return float(mode)
    if mode not in SCORE_INITS:
        raise ValueError(f"score_init must be one of {SCORE_INITS}, or a number, got {mode!r}")
    return str(mode)


def draw(score: Tensor, mode: ScoreInit, fan_in: int) -> None:
    """Draw new scores, in place.

    Args:
        score: of any shape.
        mode: see :meth:`wsn_fast.nn.gated.SubnetLayer.reset_scores`.
        fan_in: that of the weight of the layer.
    """
    if isinstance(mode, float):
        nn.init.constant_(score, mode)
    elif mode == "default":
        # Kaiming uniform has the same bound as the biases: gain(sqrt 5) * sqrt(3 / fan_in) = 1 / sqrt(fan_in).
        bound = 1 / math.sqrt(fan_in)
        nn.init.uniform_(score, -bound, bound)
    elif mode == "N01":
        nn.init.normal_(score)
    else:
        nn.init.uniform_(score)
