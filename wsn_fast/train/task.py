"""A task with data of one's own. This file imports no PyTorch, so that the command line does not either."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch.utils.data import Dataset


class Task(NamedTuple):
    """A task with data of one's own.

    Data are a map-style ``torch.utils.data.Dataset`` of pairs (input, label), or anything like it that has a length and
    takes an index; or a ``DataLoader``, or anything else that gives batches (inputs, labels) whenever it is iterated.
    Inputs are of floating point and have one shape in all tasks, labels are integers from 0 to ``classes - 1``.

    Attributes:
        train: the data to train on.
        test: the data to test on.
        classes: the number of classes of the task.
        validation: the data for validation; None holds out a part of ``train``, which has to be a dataset then.
    """

    train: Dataset[Any] | Iterable[Any]
    test: Dataset[Any] | Iterable[Any]
    classes: int
    validation: Dataset[Any] | Iterable[Any] | None = None
