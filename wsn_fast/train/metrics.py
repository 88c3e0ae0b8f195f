"""The metrics of an accuracy matrix: ACC, BWT, FWT and forgetting (paper, section 5), in the unit of the matrix.

``A[i][j]`` is the test accuracy on task j after training task i. Both are counted from 0 in the order of training. Row
i needs at least the columns 0..i; further columns are ignored.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

Matrix = Sequence[Sequence[float]]


def average_accuracy(matrix: Matrix) -> float:
    """ACC: the mean of the last row.

    Raises:
        ValueError: the matrix is empty, or a row is too short. The other metrics raise the same.
    """
    _check(matrix)
    return fmean(matrix[-1][: len(matrix)])


def backward_transfer(matrix: Matrix) -> float:
    """BWT: the accuracy at the end minus the accuracy right after training, as a mean over all tasks but the last. It
    is 0.0 for one task."""
    _check(matrix)
    changes = [matrix[-1][task] - matrix[task][task] for task in range(len(matrix) - 1)]
    return fmean(changes) if changes else 0.0


def forward_transfer(before: Sequence[float], at_random: Sequence[float]) -> float:
    """FWT: the accuracy just before training minus the accuracy at random initialisation, as a mean over all tasks but
    the first. It is 0.0 for one task.

    Args:
        before: per task, the accuracy just before it is trained, with the scores of that moment and its own new
            head. The first entry is ignored, because nothing was trained before it.
        at_random: per task, the accuracy of the network at random initialisation.

    Raises:
        ValueError: the two differ in length.
    """
    if len(before) != len(at_random):
        raise ValueError(f"before and at_random must have one entry per task, got {len(before)} and {len(at_random)}")
    gains = [b - r for b, r in zip(before[1:], at_random[1:], strict=True)]
    return fmean(gains) if gains else 0.0


def forgetting(matrix: Matrix) -> list[float]:
    """Per task, its best accuracy minus its accuracy at the end. It is 0.0 if the task lost nothing."""
    _check(matrix)
    return [max(row[task] for row in matrix[task:]) - matrix[-1][task] for task in range(len(matrix))]


def _check(matrix: Matrix) -> None:
    if not matrix:
        raise ValueError("matrix must have at least one row, got none")
    for i, row in enumerate(matrix):
        if len(row) <= i:
            raise ValueError(f"row {i} of matrix must have at least {i + 1} entries, got {len(row)}")
