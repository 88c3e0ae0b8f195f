"""Name patterns: all arguments that choose modules, parameters or buffers by name follow this rule."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

Patterns = str | Iterable[str]


def as_patterns(argument: str, patterns: Patterns) -> tuple[str, ...]:
    """Return one or several patterns as a tuple. Raises ``TypeError``, naming ``argument``, for anything else."""
    listed = (patterns,) if isinstance(patterns, str) else tuple(patterns)
    for pattern in listed:
        if not isinstance(pattern, str):
            raise TypeError(f"{argument} must be name patterns (str), got {pattern!r}")
    return listed


def names_it(pattern: str, name: str) -> bool:
    """Whether ``pattern`` is the full name, the end of it after a dot ("fc1" for "blocks.0.fc1"), or an ``fnmatch``
    pattern for the full name (case-sensitive)."""
    return name == pattern or name.endswith(f".{pattern}") or fnmatchcase(name, pattern)


def matches(pattern: str, name: str) -> bool:
    """Whether ``pattern`` names ``name``, or a module in which it is: "blocks.0" matches "blocks.0.fc1.weight"."""
    return any(names_it(pattern, name[:end]) for end in [*_dots(name), len(name)])


def _dots(name: str) -> list[int]:
    return [place for place, letter in enumerate(name) if letter == "."]
