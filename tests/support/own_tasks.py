"""Tasks with data of one's own, as a user writes them. The driver finds this file by its path."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, TensorDataset

from wsn_fast.train import Task

CLASSES = 4


def samples(task: int, count: int) -> tuple[Tensor, Tensor]:
    """Images [count, 1, 4, 6] that say their labels."""
    generator = torch.Generator().manual_seed(count)
    y = torch.randint(CLASSES, (count,), generator=generator)
    x = torch.randn(count, 24, generator=generator)
    x.scatter_add_(1, (y * 5 + task)[:, None], torch.full((count, 1), 6.0))
    return x.view(-1, 1, 4, 6), y


@dataclass
class Noisy(Dataset[Any]):
    """Each sample gets noise whenever it is loaded, from the generators of torch, NumPy and Python."""

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        noise = torch.rand(()) + np.random.random() + random.random()
        return self.x[index] + noise, int(self.y[index])


def datasets(folder: str | None) -> list[Task]:
    """Three tasks of datasets, with noise in training."""
    return [Task(Noisy(*samples(task, 200)), TensorDataset(*samples(task, 60)), CLASSES) for task in range(3)]


def loaders(folder: str | None) -> list[Task]:
    """The same tasks in loaders that shuffle."""
    return [
        Task(
            DataLoader(Noisy(*samples(task, 190)), 32, shuffle=True),
            DataLoader(TensorDataset(*samples(task, 60)), 25),
            CLASSES,
            validation=DataLoader(TensorDataset(*samples(task, 10)), 25),
        )
        for task in range(3)
    ]


class Endless(IterableDataset[Any]):
    """Samples without a known number."""

    def __init__(self, task: int, count: int) -> None:
        self.x, self.y = samples(task, count)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return zip(self.x, self.y, strict=True)


class Shuffled(Sampler[int]):
    """A sampler of 50 samples, which draws when it hears of an epoch."""

    def __init__(self) -> None:
        self.order = [*range(50)]

    def set_epoch(self, epoch: int) -> None:
        self.order = np.random.permutation(50).tolist()

    def __iter__(self) -> Iterator[int]:
        return iter(self.order)

    def __len__(self) -> int:
        return 50


def of_unknown_length(folder: str | None) -> list[Task]:
    """Two tasks whose number of samples nobody knows."""
    return [
        Task(*(DataLoader(Endless(task, n), 32) for n in (190, 60)), CLASSES, DataLoader(Endless(task, 10), 32))
        for task in range(2)
    ]


def without_noise(folder: str | None) -> list[Task]:
    """Two tasks of datasets; the last batch of 23 samples is smaller."""
    return [Task(*(TensorDataset(*samples(task, count)) for count in (200, 60)), CLASSES) for task in range(2)]


def shuffled_loaders(folder: str | None) -> list[Task]:
    """The same in loaders, which shuffle."""
    return [
        Task(DataLoader(task.train, 23, shuffle=True), DataLoader(task.test, 25), CLASSES, DataLoader(task.test, 25))
        for task in without_noise(folder)
    ]


def cut_by_chance(folder: str | None) -> list[Task]:
    """Tasks that each process cuts up in another way."""
    order = np.random.default_rng().permutation(200)
    x, y = (part[order] for part in samples(0, 200))
    return [Task(TensorDataset(x[:100], y[:100]), TensorDataset(x[100:], y[100:]), CLASSES)] * 2


class OfTheRank:
    """Batches that are other ones in each process from the second on."""

    def __init__(self, *, in_number: bool) -> None:
        self._rank = int(os.environ.get("RANK", "0"))
        self._in_number = in_number

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        x, y = samples(0, 64)
        yield x, y
        for _ in range(1 + self._in_number * self._rank):
            yield x, y if self._in_number else (y + self._rank) % CLASSES


def other_numbers_of_batches(folder: str | None) -> list[Task]:
    """A task whose loader gives more batches in a later process."""
    held_out = TensorDataset(*samples(0, 60))
    return [Task(OfTheRank(in_number=True), held_out, CLASSES, held_out)]


def other_labels(folder: str | None) -> list[Task]:
    """A task whose loader gives other labels in a later process."""
    held_out = TensorDataset(*samples(0, 60))
    return [Task(OfTheRank(in_number=False), held_out, CLASSES, held_out)]


def other_numbers_to_validate(folder: str | None) -> list[Task]:
    """A task whose loader for validation gives more batches in a later process."""
    held_out = TensorDataset(*samples(0, 60))
    return [Task(held_out, held_out, CLASSES, OfTheRank(in_number=True))]


class FailsInALaterProcess(TensorDataset):
    """A dataset whose first samples a later process can load once, when it opens the data."""

    loaded = 0

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        self.loaded += 1
        if self.loaded > 1 and os.environ.get("RANK") == "1":
            raise ValueError("file 7 is damaged")
        return super().__getitem__(index)


def samples_that_one_process_cannot_load(folder: str | None) -> list[Task]:
    """A task whose samples for validation the second process cannot load when the task ends."""
    train, validation = TensorDataset(*samples(0, 60)), FailsInALaterProcess(*samples(0, 60))
    return [Task(train, train, CLASSES, validation)]
