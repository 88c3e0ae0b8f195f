"""A choice of cases from a space that is too large to compile: any two values of two axes meet in one of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from typing import Any

Row = Mapping[str, Any]
"""One value of each axis."""


def covering(axes: Mapping[str, Sequence[Any]], first: Iterable[Row] = ()) -> list[dict[str, Any]]:
    """Rows in which any two values of two axes meet at least once.

    Args:
        axes: the values of each axis.
        first: rows that have to be among them, perhaps without some axes, which are filled in.
    """
    missing = {
        frozenset(((a, i), (b, j))): None  # a dict, since its order is the same in every process
        for a, b in combinations(axes, 2)
        for i in range(len(axes[a]))
        for j in range(len(axes[b]))
    }
    begun = [{axis: axes[axis].index(value) for axis, value in row.items()} for row in first]
    rows = []
    while begun or missing:
        row = begun.pop(0) if begun else dict(next(iter(missing)))
        for axis in axes:
            if axis not in row:
                row[axis] = max(
                    range(len(axes[axis])), key=lambda i: sum(pair in missing for pair in _with(axis, i, row))
                )
        for pair in combinations(row.items(), 2):
            missing.pop(frozenset(pair), None)
        rows.append({axis: axes[axis][row[axis]] for axis in axes})
    return rows


def _with(axis: str, value: int, row: dict[str, int]) -> list[frozenset[tuple[str, int]]]:
    return [frozenset(((axis, value), other)) for other in row.items()]
