"""A stream of tasks of one's own: each brings its data, which need not fit into memory."""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Iterable, Iterator, Sequence, Sized
from dataclasses import replace
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from wsn_fast.train.data.files import DataError
from wsn_fast.train.data.loading import Shows, shows_nothing
from wsn_fast.train.samples.loading import (
    Kind,
    LoadedSamples,
    SamplesOfDataset,
    SamplesOfLoader,
    described,
)
from wsn_fast.train.samples.randomness import Randomness
from wsn_fast.train.samples.users_code import in_users_code, length
from wsn_fast.train.streams.interface import Stream
from wsn_fast.train.streams.kinds import generator
from wsn_fast.train.task import Task


class OwnStream(Stream):
    """Tasks with data of one's own. A task is taken out of ``made`` whenever it is needed, so that a sequence of one's
    own can open its data then.

    Args:
        made: the tasks.
        tasks: how many of them, from the first on; None takes all.
        seed: decides what is held out for validation.
        val_fraction: the fraction that is held out of a dataset whose task brings no data for validation.
        workers: the number of processes that load from datasets; 0 loads in this one.
        name: what messages call the tasks.
        shows: shows how many tasks have been opened once.

    Attributes:
        fingerprint: Identifies what is known without loading all data: of each task the number of classes and of
            samples, and the first inputs to train on, to validate and to test on.

    Raises:
        DataError: a task is none, or its data are of no kind that can be used.
        LoadingError: the code that makes a task, or loads its first inputs, has failed.
        ValueError: there are fewer tasks than ``tasks``.
    """

    def __init__(
        self,
        made: Sequence[Task],
        seed: int,
        *,
        tasks: int | None = None,
        val_fraction: float,
        workers: int = 0,
        name: str = "tasks",
        shows: Shows = shows_nothing,
    ) -> None:
        count = length(made, name) if isinstance(made, Sized) and hasattr(made, "__getitem__") else 0
        if not count:
            raise DataError(f"{name}: expected a sequence of at least one task, got {described(made)}")
        if tasks is not None and tasks > count:
            raise ValueError(f"tasks: expected at most the {count} tasks of {name}, got {tasks}")
        self._made, self._name, self._workers = made, name, workers
        self._seed, self._val_fraction = seed, val_fraction
        self.task_ids = list(range(count if tasks is None else tasks))
        self.input_shape = ()  # not known before the first input is
        self.classes: dict[int, int] = {}
        digest = hashlib.blake2b(digest_size=16)
        for number in shows(self.task_ids, len(self.task_ids), "opening the data of tasks"):
            task = self._task(number)
            self.classes[number] = task.classes
            if number == 0:
                self.input_shape = tuple(self._samples(task.train, 0, "train").first(1).shape[1:])
            parts = *self._training(number, task), self._samples(task.test, number, "test")
            digest.update(str((task.classes, [part.count for part in parts])).encode())
            for part in parts:
                digest.update(part.first(1).cpu().numpy().tobytes())
        self.fingerprint = digest.hexdigest()

    def training(self, task: int) -> tuple[LoadedSamples, LoadedSamples]:
        """See :meth:`Stream.training`."""
        number = self.task_ids[task]
        return self._training(number, self._task(number))

    def test(self, task: int) -> LoadedSamples:
        """See :meth:`Stream.test`."""
        number = self.task_ids[task]
        return self._samples(self._task(number).test, number, "test")

    def _task(self, number: int) -> Task:
        where = f"{self._name}: task {number}"
        # What a lazy sequence draws, to cut its data up for example, is the same whenever it makes the task.
        with in_users_code(where, Randomness(generator(self._seed, f"making of task {number}").initial_seed())):
            task = self._made[number]
        if not isinstance(task, Task):
            raise DataError(f"{where}: expected a wsn_fast.train.Task, got {described(task)}")
        try:
            classes = -1 if isinstance(task.classes, bool) else operator.index(task.classes)
        except TypeError:
            classes = -1
        if classes < 1:
            raise DataError(f"{where}: expected classes to be an integer of at least 1, got {task.classes!r}")
        return task._replace(classes=classes)

    def _training(self, number: int, task: Task) -> tuple[LoadedSamples, LoadedSamples]:
        train = self._samples(task.train, number, "train")
        if task.validation is not None:
            return train, self._samples(task.validation, number, "validation")
        if not isinstance(train, SamplesOfDataset):
            raise DataError(
                f"{train.kind.where}: expected a dataset, of which a part is held out for validation, or validation= "
                f"beside it, got {described(task.train)}"
            )
        return self._held_out(number, train)

    def _samples(self, data: Any, number: int, part: str) -> LoadedSamples:
        kind = Kind(f"{self._name}: task {number}, {part}", self.input_shape or None, self.classes[number])
        if isinstance(data, DataLoader):
            return SamplesOfLoader(data, kind)
        if isinstance(data, IterableDataset):
            raise DataError(f"{kind.where}: expected an IterableDataset to be in a DataLoader, got {described(data)}")
        if hasattr(data, "__getitem__") and isinstance(data, Sized):
            count = length(data, kind.where)
            if not count:
                raise DataError(f"{kind.where}: no samples")
            return SamplesOfDataset(data, torch.arange(count), kind, self._workers)  # type: ignore[arg-type]
        if isinstance(data, Iterable) and not isinstance(data, Iterator):
            return SamplesOfLoader(data, kind)
        raise DataError(
            f"{kind.where}: expected a Dataset, a DataLoader, or what gives its batches again and again, got "
            f"{described(data)}"
        )

    def _held_out(self, number: int, whole: SamplesOfDataset) -> tuple[SamplesOfDataset, SamplesOfDataset]:
        """What is left to train on, and what is held out for validation."""
        held_out = round(whole.count * self._val_fraction)
        if not 0 < held_out < whole.count:
            raise DataError(
                f"{whole.kind.where}: val_fraction {self._val_fraction} of {whole.count} samples leaves "
                f"{whole.count - held_out} to train on, {held_out} to validate on"
            )
        order = torch.randperm(whole.count, generator=generator(self._seed, f"validation of task {number}"))
        return replace(whole, rows=order[held_out:]), replace(whole, rows=order[:held_out])
