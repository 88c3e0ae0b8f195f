"""A stream of tasks.

It keeps the datasets' uint8 images. It builds the float32 tensors of a task when asked for them, and they depend on
seed and task alone. So memory holds one task at a time, and a resumed run sees what the first one saw.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

import torch
from torch import Tensor

from wsn_fast.train.data import Dataset
from wsn_fast.train.samples import SamplesInMemory
from wsn_fast.train.streams.images import channel_statistics
from wsn_fast.train.streams.interface import Stream
from wsn_fast.train.streams.kinds import generator, parts

_AT_ONCE = 512  # images, which stay in the processor's cache from one pass to the next


@dataclass(frozen=True, eq=False)
class TaskData:
    """One task's data: inputs float32 [N, C, H, W], labels int64 [N] in 0..classes-1.

    Attributes:
        task: Task id, 0..T-1.
        train_x: Training inputs.
        train_y: Training labels.
        val_x: Validation inputs, held out from the training set; empty if `val_fraction` is 0.
        val_y: Validation labels.
        test_x: Test inputs.
        test_y: Test labels.
        classes: Number of this task's classes.
    """

    task: int
    train_x: Tensor
    train_y: Tensor
    val_x: Tensor
    val_y: Tensor
    test_x: Tensor
    test_y: Tensor
    classes: int


class TaskStream(Stream, Sequence[TaskData]):
    """A sequence of tasks. A task is built when the stream is indexed.

    Inputs are normalised with the mean and the standard deviation of each channel over the whole training set of their
    dataset. Scaling the pixels to [0, 1] first would give the same, because the scale cancels.

    Args:
        kind: `permuted`: a task has all classes, and a permutation of the pixel positions of its own (the first task
            too, as in the paper's code). `split`: each task has some of the classes, renumbered from 0 within it.
            `rotated`: a task has all classes, and task t of T is rotated by t * 180/T degrees counter-clockwise
            (bilinear, with zeros from outside the image). `superclass`: a task has the classes of one superclass, in
            the order of their numbers. `datasets`: each task is a dataset; grey images get the channels of the others,
            and smaller images a border of zeros.
        data: The dataset that the samples come from; for `datasets` a sequence of them.
        tasks: Number of tasks T.
        seed: Decides permutations, random orders and the validation split.
        val_fraction: Fraction of each task's training samples held out for validation, in [0, 1).
        class_order: The order in which the tasks of a `split` stream take classes, and those of a `superclass` stream
            superclasses: `random` (the seed decides), `given` (by their numbers), or the numbers themselves. Classes
            that are not named belong to no task.
        classes_per_task: Number of classes that each task of a `split` stream takes; what is left belongs to no task.
            None deals all classes evenly.

    Attributes:
        kind: The kind.
        task_ids: The task ids 0..T-1.
        classes: Number of classes of each task.
        input_shape: Shape of one input, (C, H, W).
        mean: For each task the mean of each channel of its dataset in raw pixel values, float32 [C, 1, 1].
        std: Their standard deviation (1 where a channel is constant), float32 [C, 1, 1].
        fingerprint: Identifies the data: see `Dataset`.

    Raises:
        ValueError: If an argument is out of range, the arguments do not fit together, or a dataset has too few samples.
    """

    def __init__(
        self,
        kind: str,
        data: Dataset | Sequence[Dataset],
        tasks: int,
        seed: int,
        *,
        val_fraction: float = 0.1,
        class_order: str | Sequence[int] = "random",
        classes_per_task: int | None = None,
    ) -> None:
        for name, count in (("tasks", tasks), ("classes_per_task", classes_per_task)):
            if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
                raise ValueError(f"{name}: expected an integer of at least 1, got {count!r}")
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise ValueError(f"seed: expected an integer, got {seed!r}")
        if not isinstance(val_fraction, int | float) or not 0 <= val_fraction < 1:
            raise ValueError(f"val_fraction: expected a number in [0, 1), got {val_fraction!r}")
        datasets = [data] if isinstance(data, Dataset) else list(data)
        self.kind = kind
        self.task_ids = list(range(tasks))
        self._val_fraction = val_fraction
        self._parts = parts(kind, datasets, tasks, seed, class_order, classes_per_task)
        self.classes = {task: len(self._parts[task].classes) for task in self.task_ids}
        self.input_shape = tuple(self._parts[0].dataset.train_x.shape[1:])
        self.fingerprint = _fingerprint(kind, datasets)
        self.mean: dict[int, Tensor] = {}
        self.std: dict[int, Tensor] = {}
        self._orders: dict[int, Tensor] = {}
        self._prepare(seed)
        self._check_sizes()

    def _prepare(self, seed: int) -> None:
        """Compute statistics and the order of the samples, once for each dataset."""
        known: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        for task, part in enumerate(self._parts):
            images = part.dataset.train_x
            if id(part.dataset) not in known:
                # All tasks of a dataset use one order, so that an image held out for validation in one task is not
                # trained on in another.
                purpose = f"validation of dataset {len(known)}" if known else "validation"
                order = torch.randperm(len(images), generator=generator(seed, purpose))
                known[id(part.dataset)] = (*channel_statistics(images), order)
            self.mean[task], self.std[task], self._orders[task] = known[id(part.dataset)]

    def __len__(self) -> int:
        """The number of tasks."""
        return len(self.task_ids)

    @overload
    def __getitem__(self, index: int) -> TaskData: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[TaskData]: ...

    def __getitem__(self, index: int | slice) -> TaskData | Sequence[TaskData]:
        """Build a task; a slice builds all of its tasks.

        Raises:
            IndexError: If there is no such task.
        """
        if isinstance(index, slice):
            return [self[task] for task in self.task_ids[index]]
        task = self.task_ids[index]
        return TaskData(task, *self.training_data(task), *self.test_data(task), self.classes[task])

    def training_data(self, task: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The training inputs and labels and the validation inputs and labels of one task, as in its `TaskData`.

        Raises:
            IndexError: If there is no such task.
        """
        task = self.task_ids[task]
        dataset, labels, order = self._parts[task].dataset, self._labels(task), self._orders[task]
        rows = order[labels[dataset.train_y[order]] >= 0]
        held_out = self._held_out(len(rows))
        val, train = rows[:held_out], rows[held_out:]
        return (
            self._inputs(dataset.train_x, train, task),
            labels[dataset.train_y[train]],
            self._inputs(dataset.train_x, val, task),
            labels[dataset.train_y[val]],
        )

    def training(self, task: int) -> tuple[SamplesInMemory, SamplesInMemory]:
        """See :meth:`Stream.training`."""
        train_x, train_y, val_x, val_y = self.training_data(task)
        return SamplesInMemory(train_x, train_y), SamplesInMemory(val_x, val_y)

    def test(self, task: int) -> SamplesInMemory:
        """See :meth:`Stream.test`."""
        return SamplesInMemory(*self.test_data(task))

    def test_data(self, task: int) -> tuple[Tensor, Tensor]:
        """The test inputs and labels of one task, as in its `TaskData`. This is cheaper than building the whole task.

        Raises:
            IndexError: If there is no such task.
        """
        task = self.task_ids[task]
        dataset = self._parts[task].dataset
        labels = self._labels(task)[dataset.test_y]
        rows = torch.nonzero(labels >= 0).flatten()
        return self._inputs(dataset.test_x, rows, task), labels[rows]

    def _labels(self, task: int) -> Tensor:
        """Map each class of the task's dataset to its label within the task, or to -1."""
        part = self._parts[task]
        labels = torch.full((part.dataset.classes,), -1)
        labels[part.classes] = torch.arange(len(part.classes))
        return labels

    def _inputs(self, images: Tensor, rows: Tensor, task: int) -> Tensor:
        x = torch.empty(len(rows), *images.shape[1:])
        change, mean, std = self._parts[task].change, self.mean[task], self.std[task]
        for part, of_images in zip(x.split(_AT_ONCE), rows.split(_AT_ONCE), strict=True):
            changed = change(images.index_select(0, of_images))  # a third of the time of images[of_images]
            torch.sub(changed, mean, out=part).div_(std)  # bytes become float32 in the same pass
        return x

    def _held_out(self, count: int) -> int:
        return round(count * self._val_fraction)

    def _check_sizes(self) -> None:
        for task, part in enumerate(self._parts):
            name = part.dataset.name
            count = int(torch.isin(part.dataset.train_y, part.classes).sum())
            held_out = self._held_out(count)
            if held_out == count or (self._val_fraction > 0 and held_out == 0):
                raise ValueError(
                    f"val_fraction: {self._val_fraction} of the {count} training samples of task {task} of "
                    f"{name!r} leave {count - held_out} to train on, {held_out} to validate on"
                )
            if not torch.isin(part.dataset.test_y, part.classes).any():
                raise ValueError(f"dataset: {name!r} has no test samples for task {task}")


def _fingerprint(kind: str, datasets: Sequence[Dataset]) -> str:
    """Identifies what a stream is made from."""
    if kind != "superclass" and len(datasets) == 1:
        return datasets[0].fingerprint
    digest = hashlib.blake2b(digest_size=16)
    for dataset in datasets:
        superclasses = dataset.superclasses if kind == "superclass" else None
        digest.update(dataset.fingerprint.encode())
        digest.update(b"" if superclasses is None else superclasses.numpy().data)
    return digest.hexdigest()
