"""Streams of tasks made from one dataset: permuted pixels, split classes, rotated images.

A stream keeps the dataset's uint8 images. It builds the float32 tensors of a task when asked for them, and they depend
on seed and task alone. So memory holds one task at a time, and a resumed run sees what the first one saw.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

from wsn_fast.train.choices import KINDS
from wsn_fast.train.data import Dataset


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


class TaskStream(Sequence[TaskData]):
    """A sequence of tasks that are made from one dataset. A task is built when the stream is indexed.

    Inputs are normalised with the mean and the standard deviation of each channel over the whole training set. Scaling
    the pixels to [0, 1] first would give the same, because the scale cancels.

    Args:
        kind: `permuted`: a task has all classes, and a permutation of the pixel positions of its own (the first task
            too, as in the paper's code). `split`: the classes are dealt evenly to the tasks, in an order that the seed
            decides, and renumbered from 0 within each task. `rotated`: a task has all classes, and task t of T is
            rotated by t * 180/T degrees counter-clockwise (bilinear, with zeros from outside the image).
        dataset: The dataset that the samples come from.
        tasks: Number of tasks T.
        seed: Decides the permutations, the order of the classes and the validation split.
        val_fraction: Fraction of each task's training samples held out for validation, in [0, 1).

    Attributes:
        kind: `permuted`, `split` or `rotated`.
        task_ids: The task ids 0..T-1.
        classes: Number of classes of each task.
        input_shape: Shape of one input, (C, H, W).
        mean: Mean of each channel of the training images in raw pixel values, float32 [C, 1, 1].
        std: Their standard deviation (1 where a channel is constant), float32 [C, 1, 1].

    Raises:
        ValueError: If an argument is out of range, or the dataset has too few samples for it.
    """

    def __init__(
        self,
        kind: str,
        dataset: Dataset,
        tasks: int,
        seed: int,
        *,
        val_fraction: float = 0.1,
    ) -> None:
        if kind not in KINDS:
            raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")
        if isinstance(tasks, bool) or not isinstance(tasks, int) or tasks < 1:
            raise ValueError(f"tasks: expected an integer of at least 1, got {tasks!r}")
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise ValueError(f"seed: expected an integer, got {seed!r}")
        if not isinstance(val_fraction, int | float) or not 0 <= val_fraction < 1:
            raise ValueError(f"val_fraction: expected a number in [0, 1), got {val_fraction!r}")
        if kind == "split" and dataset.classes % tasks:
            divisors = [str(n) for n in range(1, dataset.classes + 1) if dataset.classes % n == 0]
            raise ValueError(
                f"tasks: {tasks} does not divide the {dataset.classes} classes of {dataset.name!r}; "
                f"{', '.join(divisors)} do"
            )
        self.kind = kind
        self.task_ids = list(range(tasks))
        self._dataset, self._seed = dataset, seed
        self._val_fraction = val_fraction
        self._class_sets = [torch.arange(dataset.classes)] * tasks
        if kind == "split":
            order = torch.randperm(dataset.classes, generator=self._generator("classes"))
            self._class_sets = list(order.chunk(tasks))
        self.classes = {task: len(self._class_sets[task]) for task in self.task_ids}
        self.input_shape = tuple(dataset.train_x.shape[1:])
        self.mean, self.std = _channel_statistics(dataset.train_x)
        # All tasks use one order, so that an image held out for validation in one task is not trained on in another.
        self._order = torch.randperm(len(dataset.train_x), generator=self._generator("validation"))
        self._check_sizes()

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
        images, targets = self._dataset.train_x, self._dataset.train_y
        labels = self._labels(task)
        rows = self._order[labels[targets[self._order]] >= 0]
        held_out = self._held_out(len(rows))
        val, train = rows[:held_out], rows[held_out:]
        return TaskData(
            task,
            self._inputs(images[train], task),
            labels[targets[train]],
            self._inputs(images[val], task),
            labels[targets[val]],
            *self.test_data(task),
            self.classes[task],
        )

    def test_data(self, task: int) -> tuple[Tensor, Tensor]:
        """The test inputs and labels of one task, as in its `TaskData`. This is cheaper than building the whole task.

        Raises:
            IndexError: If there is no such task.
        """
        task = self.task_ids[task]
        labels = self._labels(task)[self._dataset.test_y]
        rows = labels >= 0
        return self._inputs(self._dataset.test_x[rows], task), labels[rows]

    def _labels(self, task: int) -> Tensor:
        """Map each class of the dataset to its label within the task, or to -1."""
        labels = torch.full((self._dataset.classes,), -1)
        labels[self._class_sets[task]] = torch.arange(self.classes[task])
        return labels

    def _inputs(self, images: Tensor, task: int) -> Tensor:
        if self.kind == "permuted":
            pixels = images.shape[2] * images.shape[3]
            order = torch.randperm(pixels, generator=self._generator(f"pixels of task {task}"))
            images = images.flatten(2)[:, :, order].view(images.shape)
        x = images.float()
        if self.kind == "rotated":
            x = _rotate(x, 180.0 * task / len(self))
        return x.sub_(self.mean).div_(self.std)

    def _held_out(self, count: int) -> int:
        return round(count * self._val_fraction)

    def _check_sizes(self) -> None:
        train = torch.bincount(self._dataset.train_y, minlength=self._dataset.classes)
        test = torch.bincount(self._dataset.test_y, minlength=self._dataset.classes)
        for task, class_set in zip(self.task_ids, self._class_sets, strict=True):
            count = int(train[class_set].sum())
            held_out = self._held_out(count)
            if held_out == count or (self._val_fraction > 0 and held_out == 0):
                raise ValueError(
                    f"val_fraction: {self._val_fraction} of the {count} training samples of task {task} of "
                    f"{self._dataset.name!r} leave {count - held_out} to train on, {held_out} to validate on"
                )
            if not int(test[class_set].sum()):
                raise ValueError(f"dataset: {self._dataset.name!r} has no test samples for task {task}")

    def _generator(self, purpose: str) -> torch.Generator:
        digest = hashlib.blake2b(f"{self._seed}/{purpose}".encode(), digest_size=7).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest, "big"))


def _channel_statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """Exact mean and standard deviation per channel. They come from histograms, so that no float copy of the set is
    made."""
    histograms = [torch.bincount(channel.flatten(), minlength=256) for channel in images.unbind(1)]
    counts = torch.stack(histograms).double()
    values = torch.arange(256, dtype=torch.float64)
    total = counts.sum(1)
    mean = counts @ values / total
    std = ((counts * (values - mean[:, None]) ** 2).sum(1) / total).sqrt()
    std[std == 0] = 1.0
    return mean.float()[:, None, None], std.float()[:, None, None]


def _rotate(x: Tensor, degrees: float) -> Tensor:
    """Rotate images [N, C, H, W] counter-clockwise about their centre, bilinear, zeros from outside."""
    height, width = x.shape[2:]
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    # The coordinates of the grid go from -1 to 1 along either side. The ratio keeps angles right if the sides differ.
    theta = torch.tensor([[[cos, -sin * height / width, 0.0], [sin * width / height, cos, 0.0]]])
    grid = affine_grid(theta, [1, 1, height, width], align_corners=False)
    # All images are rotated in the same way, so they become channels of one image and share one grid.
    return grid_sample(x.reshape(1, -1, height, width), grid, align_corners=False).view(x.shape)
