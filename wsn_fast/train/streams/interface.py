"""What a run asks of a stream of tasks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

from wsn_fast.train.samples import Samples


class Stream(ABC):
    """A stream of tasks.

    Attributes:
        task_ids: the task ids 0..T-1.
        classes: the number of classes of each task.
        input_shape: the shape of one input.
        fingerprint: identifies the data, so that a resumed run can refuse others.
    """

    task_ids: Sequence[int]
    classes: Mapping[int, int]
    input_shape: tuple[int, ...]
    fingerprint: str

    @abstractmethod
    def training(self, task: int) -> tuple[Samples, Samples]:
        """The samples of a task to train on, and those held out for validation. ``IndexError`` if there is no such
        task."""

    @abstractmethod
    def test(self, task: int) -> Samples:
        """The samples of a task to test on. ``IndexError`` if there is no such task."""

    def __len__(self) -> int:
        """The number of tasks."""
        return len(self.task_ids)
