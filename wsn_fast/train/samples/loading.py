"""Samples that are loaded when they are needed, by a :class:`~torch.utils.data.DataLoader`."""

from __future__ import annotations

import math
import zlib
from abc import abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, TypeGuard, TypeVar

import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
    default_collate,
)

from wsn_fast.train.data.files import DataError
from wsn_fast.train.samples.augmentation import Augmentation
from wsn_fast.train.samples.batch import ALL, Batch, Epoch, Share
from wsn_fast.train.samples.randomness import Randomness
from wsn_fast.train.samples.samples import EVAL_BATCH, Samples
from wsn_fast.train.samples.users_code import in_users_code, known_length, prepare

_MOST_NUMBERS = 1 << 24  # numbers in the inputs of a batch that is measured: 64 MB in float32
_CPU = torch.device("cpu")
_END = object()
_SAMPLERS = (SequentialSampler, RandomSampler, SubsetRandomSampler, WeightedRandomSampler)
_Item = TypeVar("_Item")


class Kind(NamedTuple):
    """What samples have to be like.

    Attributes:
        where: what messages call them.
        shape: the shape of one input; None takes any.
        classes: the number of classes.
    """

    where: str
    shape: tuple[int, ...] | None
    classes: int

    def check(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Inputs, float32 [B, *shape], and labels, int64 [B], of a batch that was loaded.

        Raises:
            DataError: it is something else.
        """
        if not isinstance(batch, list | tuple) or [isinstance(part, Tensor) for part in batch] != [True, True]:
            raise DataError(f"{self.where}: expected batches of two tensors, inputs and labels, got {described(batch)}")
        x, y = batch
        if not x.numel():
            raise DataError(f"{self.where}: expected at least one sample in each batch, got {described(batch)}")
        if y.ndim != 1 or y.dtype == torch.bool or y.is_floating_point() or y.is_complex():
            raise DataError(f"{self.where}: expected one integer label for each sample, got {described(y)}")
        shape = x.shape[1:] if self.shape is None else self.shape
        if not x.is_floating_point() or x.shape != (len(y), *shape):
            raise DataError(
                f"{self.where}: expected inputs of floating point and the shape {[len(y), *shape]}, got {described(x)}"
            )
        x, y = (_for_training(values) for values in (x.float(), y.long()))
        low, high = (int(end) for end in y.aminmax())
        if low < 0 or high >= self.classes:
            raise DataError(
                f"{self.where}: expected labels from 0 to {self.classes - 1}, got {low if low < 0 else high}"
            )
        if not x.sum().isfinite() and not x.isfinite().all():  # the sum takes less time
            raise DataError(f"{self.where}: expected finite inputs, got NaN or infinity")
        return x, y


def _for_training(values: Tensor) -> Tensor:
    """The values, as a net can train with them, whatever computed them."""
    values = values.detach()
    return values.clone() if values.is_inference() else values


def described(value: Any) -> str:
    """What a value is, in a few words."""
    if isinstance(value, Tensor):
        return f"{value.dtype} {list(value.shape)}"
    if isinstance(value, list | tuple):
        return f"{type(value).__name__} of {', '.join(map(described, value[:4])) or 'nothing'}"[:200]
    return type(value).__name__


class LoadedSamples(Samples):
    """Samples that are loaded when they are needed. What loading draws at random follows from the epoch alone."""

    kind: Kind

    @abstractmethod
    def loaded(self, batch_size: int, epoch: Epoch, share: Share) -> Iterator[tuple[int, int, Tensor, Tensor]]:
        """The batches of an epoch: how many samples a batch has, at which of them the loaded part begins, and the
        inputs and labels of that part."""

    def epoch(self, batch_size: int, epoch: Epoch, *, augment: bool = False, share: Share = ALL) -> Iterator[Batch]:
        """See :meth:`Samples.epoch`.

        Raises:
            DataError: there are no batches, or they are not of this kind.
        """
        changes = Augmentation(epoch) if augment else None
        for number, (size, start, x, y) in enumerate(self.loaded(batch_size, epoch, share)):
            take = partial(self._take, x, y, start, changes, number, size)
            mark = 1 + zlib.crc32(y.cpu().numpy().tobytes()) if self.each_process_loads_all else 0
            yield Batch(size, *share.of(size), take, mark)

    def _take(
        self, x: Tensor, y: Tensor, start: int, changes: Augmentation | None, number: int, size: int, part: slice
    ) -> tuple[Tensor, Tensor]:
        loaded = slice(part.start - start, part.stop - start)
        x, y = self._placed((x[loaded], y[loaded]))
        return (x if changes is None else changes(x, number, part, size)), y

    def _placed(self, loaded: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x, y = (values.to(self.device, non_blocking=True) for values in loaded)
        return x, y


@dataclass(frozen=True, eq=False)
class SamplesOfDataset(LoadedSamples):
    """Samples of a map-style dataset.

    Attributes:
        dataset: gives an input and its label for an index.
        rows: the indices of the samples, int64 [N].
        kind: what they have to be like.
        workers: the number of processes that load them; 0 loads them in this one.
        device: the device of the batches.
    """

    dataset: Dataset[Any]
    rows: Tensor
    kind: Kind
    workers: int = 0
    device: torch.device = _CPU

    def to(self, device: torch.device) -> SamplesOfDataset:
        """See :meth:`Samples.to`."""
        return replace(self, device=device)

    @property
    def count(self) -> int:
        """See :attr:`Samples.count`."""
        return len(self.rows)

    def batches(self, batch_size: int) -> int:
        """See :meth:`Samples.batches`."""
        return -(-self.count // batch_size)

    def loaded(self, batch_size: int, epoch: Epoch, share: Share) -> Iterator[tuple[int, int, Tensor, Tensor]]:
        """See :meth:`LoadedSamples.loaded`. Only what this process trains is loaded."""
        whole = self.rows[epoch.order(self.count)].split(batch_size)
        own = [share.of(len(rows))[0] for rows in whole]
        loaded = [rows[part] for rows, part in zip(whole, own, strict=True)]
        parts = self._load(loaded, epoch.number(share.rank), epoch.epoch)
        for rows, part, (x, y) in zip(whole, own, parts, strict=True):
            yield len(rows), part.start, x, y

    def in_order(self, share: Share = ALL) -> Iterator[tuple[Tensor, Tensor] | None]:
        """See :meth:`Samples.in_order`. Batches of large inputs have fewer samples."""
        size = min(EVAL_BATCH, max(1, _MOST_NUMBERS // math.prod(self.kind.shape or ())))
        batches = self.rows.split(size) if self.count else ()
        measured = self._load([rows for number, rows in enumerate(batches) if share.measures(number)], share.rank)
        for number in range(len(batches)):
            yield self._placed(next(measured)) if share.measures(number) else None

    def first(self, count: int) -> Tensor:
        """See :meth:`Samples.first`."""
        ((x, _),) = replace(self, workers=0)._load([self.rows[:count]], 0)
        return x.to(self.device)

    def _load(self, batches: list[Tensor], seed: int, epoch: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        loader: DataLoader[Any] = DataLoader(
            self.dataset,
            batch_sampler=[rows.tolist() for rows in batches],
            num_workers=self.workers,
            collate_fn=_Loaded,
            pin_memory=self.device.type == "cuda",
        )
        where = self.kind.where
        for loaded, rows in zip(_batches_of(loader, seed, epoch, where, [self.dataset]), batches, strict=True):
            x, y = self.kind.check(loaded.batch)
            if len(y) != len(rows):
                raise DataError(f"{where}: expected {len(rows)} samples for so many indices, got {len(y)}")
            yield x, y


@dataclass(frozen=True, eq=False)
class SamplesOfLoader(LoadedSamples):
    """Samples in the batches of a loader, which decides their size and their order.

    Attributes:
        loader: gives batches, inputs and labels, whenever it is iterated.
        kind: what they have to be like.
        device: the device of the batches.
    """

    loader: Iterable[Any]
    kind: Kind
    device: torch.device = _CPU
    each_process_loads_all = True

    def __post_init__(self) -> None:
        """Refuse a loader whose batches would not be the same in each process, or after a resume."""
        wrong = {
            "a DistributedSampler: several processes take their parts of each batch": any(
                isinstance(owner, DistributedSampler) for owner in self._owners
            ),
            "persistent_workers: they go on with their random numbers, which a resumed run does not know": getattr(
                self.loader, "persistent_workers", False
            ),
            "in_order=False: the order of its batches is a matter of chance": not getattr(
                self.loader, "in_order", True
            ),
        }
        for why, is_so in wrong.items():
            if is_so:
                raise DataError(f"{self.kind.where}: expected a loader without {why}")

    @property
    def _owners(self) -> list[Any]:
        """The loader, its dataset and its samplers, where a generator can be."""
        batch_sampler = getattr(self.loader, "batch_sampler", None)
        samplers = getattr(self.loader, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None)
        return [self.loader, getattr(self.loader, "dataset", None), *samplers]

    def to(self, device: torch.device) -> SamplesOfLoader:
        """See :meth:`Samples.to`."""
        return replace(self, device=device)

    @property
    def count(self) -> int | None:
        """See :attr:`Samples.count`."""
        size, sampler = getattr(self.loader, "batch_size", None), getattr(self.loader, "sampler", None)
        count = known_length(sampler, self.kind.where)
        if count is None or not isinstance(size, int):
            return None
        return count - count % size if getattr(self.loader, "drop_last", False) else count

    def batches(self, batch_size: int) -> int | None:
        """See :meth:`Samples.batches`. The loader's batches have the size that it gives them."""
        return known_length(self.loader, self.kind.where)

    def loaded(self, batch_size: int, epoch: Epoch, share: Share) -> Iterator[tuple[int, int, Tensor, Tensor]]:
        """See :meth:`LoadedSamples.loaded`. Each process loads all."""
        for x, y in self._load(epoch.number(), epoch.epoch):
            yield len(y), 0, x, y

    def in_order(self, share: Share = ALL) -> Iterator[tuple[Tensor, Tensor] | None]:
        """See :meth:`Samples.in_order`."""
        for number, batch in enumerate(self._load(0)):
            yield self._placed(batch) if share.measures(number) else None

    def first(self, count: int) -> Tensor:
        """See :meth:`Samples.first`."""
        found: list[Tensor] = []
        for x, _ in self._load(0):
            found.append(x[: count - sum(map(len, found))])
            if sum(map(len, found)) == count:
                break
        return torch.cat(found).to(self.device)

    def _load(self, seed: int, epoch: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        nothing = True
        for batch in _batches_of(self.loader, seed, epoch, self.kind.where, self._owners):
            nothing = False
            yield self.kind.check(batch)
        if nothing:
            raise DataError(f"{self.kind.where}: no batches")


def _batches_of(loader: Iterable[_Item], seed: int, epoch: int, where: str, owners: Iterable[Any]) -> Iterator[_Item]:
    """The batches of a loader, which draws random numbers of its own.

    Args:
        loader: gives the batches.
        seed: decides the random numbers.
        epoch: the number of the epoch.
        where: what messages call the data.
        owners: the objects that hear of seed and epoch.

    Raises:
        DataError: there are fewer batches than there surely are.
        LoadingError: code of the user fails.
    """
    randomness = Randomness(seed)
    with in_users_code(where, randomness):
        prepare(owners, seed, epoch)
        iterator = iter(loader)
    number = 0
    while True:
        with in_users_code(where, randomness):
            item: Any = next(iterator, _END)
        if item is _END:
            break
        number += 1
        yield item
    if _has_sure_length(loader) and number < len(loader):
        raise DataError(
            f"{where}: expected {len(loader)} batches, got {number}: the code that loads a sample has raised "
            "StopIteration, as next() does at the end of an iterator"
        )


def _has_sure_length(loader: Iterable[Any]) -> TypeGuard[DataLoader[Any]]:
    """Whether the length of a loader is that of PyTorch's own samplers, which do not err."""
    if type(loader) is not DataLoader:
        return False
    batches = loader.batch_sampler
    if batches is None:  # the dataset gives whole batches
        return type(loader.sampler) in _SAMPLERS
    return isinstance(batches, list) or (type(batches) is BatchSampler and type(batches.sampler) in _SAMPLERS)


class _Loaded:
    """A batch on its way to the device. Samples that are on a GPU already stay there, and are not pinned.

    Attributes:
        batch: what was loaded.
    """

    def __init__(self, samples: list[Any]) -> None:
        self.batch = default_collate(samples)

    def pin_memory(self) -> _Loaded:
        """Called by the loader, if there is a GPU."""
        if isinstance(self.batch, list | tuple):
            self.batch = [
                part.pin_memory() if isinstance(part, Tensor) and part.device.type == "cpu" else part
                for part in self.batch
            ]
        return self
