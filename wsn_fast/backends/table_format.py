"""The format of a table of measurements, and a check of one that comes from anywhere."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

FORMAT = 1
"""Another number is another layout, which this version cannot read."""
LISTS = ("linear", "linear_grad", "linear_tasks", "conv")
"""Entries of the products, one for each shape and way."""
MEASURED = ("elementwise", *LISTS, "backends")
"""What decides anything. The rest says where a table comes from."""
LARGEST = 1 << 40

Check = Callable[[Any], bool]


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _flag(value: Any) -> bool:
    return isinstance(value, bool)


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= LARGEST


def _positive(value: Any) -> bool:
    return _count(value) and value > 0


def _time(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0


def _numbers(value: Any) -> bool:
    return isinstance(value, list) and all(map(_count, value))


def _by_name(check: Check) -> Check:
    return lambda value: isinstance(value, dict) and all(map(check, value.values()))


def _list_of(check: Check) -> Check:
    return lambda value: isinstance(value, list) and all(map(check, value))


def _object(needed: Mapping[str, Check], **others: Check) -> Check:
    """An object with all keys of ``needed``, and none besides these and ``others``."""
    known = {**needed, **others}

    def check(value: Any) -> bool:
        return (
            isinstance(value, dict)
            and needed.keys() <= value.keys() <= known.keys()
            and all(known[key](one) for key, one in value.items())
        )

    return check


_WAY: Mapping[str, Check] = {"dtype": _text, "precision": _text, "source": _text, "backward": _flag}
_TILE = _object({"rows": _count, "config": _numbers, "splits": _positive, "us": _time, "us_dense": _time})
_LINEAR = _object(
    {**_WAY, "n": _positive, "k": _positive, "max_rows": _count, "tiles": _list_of(_TILE)}, tasks=_positive
)
_CONV = _object({**_WAY, "shape": _by_name(_count), "config": _numbers, "us": _time, "us_dense": _time, "wins": _flag})
_BACKEND = _object({"choose": _text, "times": _by_name(_by_name(_time))})
_PARTS: Mapping[str, Check] = {
    "format": _count,
    "device": _text,
    "versions": _by_name(_text),
    "facts": lambda value: isinstance(value, dict),
    "not_measured": _list_of(_text),
    "elementwise": _by_name(lambda value: _numbers(value) or _by_name(_count)(value)),
    "linear": _list_of(_LINEAR),
    "linear_grad": _list_of(_LINEAR),
    "linear_tasks": _list_of(_LINEAR),
    "conv": _list_of(_CONV),
    "backends": _by_name(_by_name(_BACKEND)),
}
_NEEDED = ("format", "device", "versions")


def problem(data: Any, form: int) -> str:
    """Why ``data`` is no table of this format; empty if it is one."""
    if not isinstance(data, dict):
        return "it is no JSON object"
    if data.get("format") != form:
        return f"its format is {str(data.get('format'))[:20]}, and this version reads format {form}"
    missing = [key for key in _NEEDED if key not in data]
    if missing:
        return f"it lacks {missing[0]}"
    for key, value in data.items():
        if key not in _PARTS:
            return f"it has an unknown key, {key[:50]!r}"
        if not _PARTS[key](value):
            return f"its entry {key!r} has not the form that this version reads"
    return ""


def key_of(entry: Mapping[str, Any]) -> tuple[Any, ...]:
    """What an entry of a product is about: two entries with the same key replace each other."""
    shape = sorted(entry["shape"].items()) if "shape" in entry else (entry["n"], entry["k"], entry.get("tasks"))
    return (*(entry[name] for name in _WAY), *shape)
