"""Name patterns: all arguments that choose modules or parameters by name follow this rule."""

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


def matches(pattern: str, name: str) -> bool:
    """Whether ``pattern`` is the full name, the end of it after a dot ("fc1" for "blocks.0.fc1"), or an ``fnmatch``
    pattern for the full name (case-sensitive)."""
    return name == pattern or name.endswith(f".{pattern}") or fnmatchcase(name, pattern)


def matches_within(pattern: str, name: str) -> bool:
    """Whether ``pattern`` matches the name of a tensor, or that of a module around it: "visual" and "blocks.0" are all
    tensors below these modules."""
    if matches(pattern, name):
        return True
    ends = (at for at, character in enumerate(name) if character == ".")
    return any(matches(pattern, name[:at]) for at in ends)
