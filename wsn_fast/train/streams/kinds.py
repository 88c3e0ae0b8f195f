"""What a task of each kind of stream is made of."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from wsn_fast.train.choices import KINDS, ORDERED
from wsn_fast.train.data import Dataset
from wsn_fast.train.streams.images import brought_together, rotate


class Part(NamedTuple):
    """What one task takes from a dataset.

    Attributes:
        dataset: where the samples come from.
        classes: int64 [C], the classes of the dataset that belong to the task, in the order of the task's labels.
        change: makes the images of the task, uint8 or float32, from uint8 [N, C, H, W]; values keep the scale of raw
            pixels.
    """

    dataset: Dataset
    classes: Tensor
    change: Callable[[Tensor], Tensor] = Tensor.contiguous


def generator(seed: int, purpose: str) -> torch.Generator:
    """The random numbers of a stream for one purpose. They do not depend on those for others."""
    digest = hashlib.blake2b(f"{seed}/{purpose}".encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big"))


def parts(
    kind: str,
    datasets: Sequence[Dataset],
    tasks: int,
    seed: int,
    class_order: str | Sequence[int] = "random",
    classes_per_task: int | None = None,
) -> list[Part]:
    """The parts of the tasks of a stream. For the arguments see :class:`wsn_fast.train.streams.TaskStream`.

    Raises:
        ValueError: the arguments do not fit together.
    """
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")
    if kind == "datasets":
        if tasks != len(datasets):
            raise ValueError(f"tasks: expected the number of datasets, {len(datasets)}, got {tasks}")
        return [Part(dataset, torch.arange(dataset.classes)) for dataset in brought_together(datasets)]
    if len(datasets) != 1:
        raise ValueError(f"data: a {kind} stream has one dataset, got {len(datasets)}")
    (dataset,) = datasets
    if kind in ORDERED:
        sets = _split if kind == "split" else _superclasses
        return [Part(dataset, classes) for classes in sets(dataset, tasks, seed, class_order, classes_per_task)]
    changes = {"permuted": partial(_permuted, seed), "rotated": partial(_rotated, tasks)}[kind]
    return [Part(dataset, torch.arange(dataset.classes), partial(changes, task)) for task in range(tasks)]


def _permuted(seed: int, task: int, images: Tensor) -> Tensor:
    pixels = images.shape[2] * images.shape[3]
    order = torch.randperm(pixels, generator=generator(seed, f"pixels of task {task}"))
    # NumPy takes a third of the time of torch's indexing.
    return torch.from_numpy(np.take(images.flatten(2).numpy(), order.numpy(), axis=2)).view(images.shape)


def _rotated(tasks: int, task: int, images: Tensor) -> Tensor:
    return rotate(images.float(), 180.0 * task / tasks)


def _split(
    dataset: Dataset, tasks: int, seed: int, class_order: str | Sequence[int], each: int | None
) -> Sequence[Tensor]:
    order = _order(class_order, dataset.classes, "classes", dataset, seed)
    if each is None:
        if len(order) % tasks:
            divisors = [str(n) for n in range(1, len(order) + 1) if len(order) % n == 0]
            raise ValueError(
                f"tasks: {tasks} does not divide the {len(order)} classes of {dataset.name!r}; {', '.join(divisors)} do"
            )
        each = len(order) // tasks
    if tasks * each > len(order):
        raise ValueError(
            f"tasks: {tasks} tasks of {each} classes need {tasks * each}, and {dataset.name!r} has {len(order)}: "
            f"{len(order) // each} tasks are possible"
        )
    return order[: tasks * each].split(each)


def _superclasses(
    dataset: Dataset, tasks: int, seed: int, class_order: str | Sequence[int], each: int | None
) -> list[Tensor]:
    if each is not None:
        raise ValueError(f"classes_per_task: a superclass stream has the classes of a superclass, got {each}")
    of_class = dataset.superclasses
    if of_class is None:
        raise ValueError(f"data: {dataset.name!r} has no superclasses")
    groups = [torch.nonzero(of_class == number).flatten() for number in of_class[of_class >= 0].unique()]
    order = _order(class_order, len(groups), "superclasses", dataset, seed)
    if tasks > len(order):
        raise ValueError(f"tasks: expected at most the {len(order)} superclasses of {dataset.name!r}, got {tasks}")
    return [groups[number] for number in order[:tasks].tolist()]


def _order(wanted: str | Sequence[int], count: int, what: str, dataset: Dataset, seed: int) -> Tensor:
    """The numbers of classes or superclasses, in the order in which the tasks take them."""
    if wanted == "random":
        return torch.randperm(count, generator=generator(seed, what))
    if wanted == "given":
        return torch.arange(count)
    if isinstance(wanted, str) or not wanted:
        raise ValueError(f"class_order: expected random, given or numbers, got {wanted!r}")
    numbers = list(wanted)
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < count:
            raise ValueError(
                f"class_order: expected numbers of {what} of {dataset.name!r}, 0 to {count - 1}, got {number!r}"
            )
    if len(set(numbers)) < len(numbers):
        twice = next(number for number in numbers if numbers.count(number) > 1)
        raise ValueError(f"class_order: expected each number once, got {twice} more often")
    return torch.tensor(numbers)
