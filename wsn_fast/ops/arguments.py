"""Checks of the arguments that public functions share. Each error names the argument, what was expected and what
came."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from numbers import Real

import numpy as np
import torch
from torch import Tensor

from ..backends import parse_override
from ..choices import RULES as RULES

_CONSTANT = "value >= "
"""How a rule with a constant threshold begins."""

SCORE_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def check_density(density: object, name: str = "density") -> float:
    """Return ``density`` as a float in (0, 1]. Anything else, also of another type, is a ``ValueError`` that gives the
    argument's name and value."""
    number = isinstance(density, Real) and not isinstance(density, bool)
    if not number or not 0 < float(density) <= 1:  # type: ignore[arg-type]
        raise ValueError(f"{name} must be a number in (0, 1], got {density!r}")
    return float(density)  # type: ignore[arg-type]


def check_bool(name: str, value: object) -> bool:
    """Return ``value``, a bool of Python or NumPy, as a bool. Anything else is a ``TypeError`` that gives the name and
    the value of the argument: a string or a number is more often a mistake than an answer."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return bool(value)


def check_bool_or_count(name: str, value: object) -> bool | int:
    """Return ``value``, a bool of Python or NumPy or a positive number, as a bool or an int. Another type is a
    ``TypeError`` and a number below 1 a ``ValueError``, each with the name and the value of the argument."""
    if isinstance(value, bool | np.bool_):
        return bool(value)
    if not isinstance(value, int):
        raise TypeError(f"{name} must be True, False or an int, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1 if it is a number, got {value}")
    return value


def check_rule(rule: object) -> str:
    """``rule`` if it is one of ``RULES`` or has a constant threshold, as ``"value >= 0.005"`` has; else
    ``ValueError``."""
    if rule in RULES:
        return str(rule)
    if isinstance(rule, str) and rule.startswith(_CONSTANT):
        with contextlib.suppress(ValueError):
            number = float(rule.removeprefix(_CONSTANT))
            if math.isfinite(number):
                return f"{_CONSTANT}{number}"
    raise ValueError(f"rule must be one of {RULES}, or '{_CONSTANT}' and a number, got {rule!r}")


def constant_threshold(rule: str) -> float | None:
    """The threshold of a rule that keeps all scores of at least a number, as ``"value >= 0.005"`` does. None for a rule
    that ranks the scores."""
    return float(rule.removeprefix(_CONSTANT)) if rule.startswith(_CONSTANT) else None


def key_of(rule: str) -> str:
    """What backends know of a rule: the key of the scores that is compared with the threshold, "magnitude" or
    "value"."""
    return rule if rule in RULES else "value"


def check_backend(backend: object) -> str | None:
    """``backend`` if it is None or an override (:func:`wsn_fast.backends.parse_override`), else ``TypeError`` or
    ``ValueError``."""
    if backend is None:
        return None
    if not isinstance(backend, str):
        raise TypeError(f"backend must be a string or None, got {type(backend).__name__}")
    parse_override(backend)
    return backend


def check_dtype(scores: object) -> Tensor:
    """``scores`` if it is a floating tensor of a supported dtype, else ``TypeError``."""
    if not isinstance(scores, Tensor):
        raise TypeError(f"scores must be a torch.Tensor, got {type(scores).__name__}")
    if scores.dtype not in SCORE_DTYPES:
        raise TypeError(f"scores must be float32, float64, bfloat16 or float16, got {scores.dtype}")
    return scores


def check_sequence(scores: object) -> list[Tensor]:
    """The elements of ``scores``, which nobody has checked yet. ``TypeError`` if it is no sequence."""
    if not isinstance(scores, Sequence) or isinstance(scores, str):
        raise TypeError(f"scores must be a torch.Tensor or a sequence of them, got {type(scores).__name__}")
    return list(scores)


def check_scores(scores: object) -> Tensor:
    """``scores`` if it is a non-empty floating tensor of a supported dtype."""
    scores = check_dtype(scores)
    if scores.numel() == 0:
        raise ValueError(f"scores must have at least one element, got shape {tuple(scores.shape)}")
    return scores
