"""CIFAR-10 and CIFAR-100 from their official Python pickles, as a folder or as the .tar.gz archive.

A reader of our own reads the pickles (:mod:`wsn_fast.train.data.pickles`), so that no code runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from wsn_fast.train.data.archive import read_members
from wsn_fast.train.data.dataset import Dataset, check_split
from wsn_fast.train.data.files import DataError, read_bytes
from wsn_fast.train.data.pickles import Array, Buffer, Dtype, PickleError, loads


class _Cifar(NamedTuple):
    folder: str
    archive: str
    train: tuple[str, ...]
    test: str
    labels: str
    classes: int
    superclass: str | None = None


_BATCHES = tuple(f"data_batch_{i}" for i in range(1, 6))
_CIFAR = {
    "cifar10": _Cifar("cifar-10-batches-py", "cifar-10-python.tar.gz", _BATCHES, "test_batch", "labels", 10),
    "cifar100": _Cifar(
        "cifar-100-python", "cifar-100-python.tar.gz", ("train",), "test", "fine_labels", 100, "coarse_labels"
    ),
}


def load_cifar(name: str, root: Path) -> Dataset:
    """The dataset ``cifar10`` or ``cifar100``, from the folder ``root`` or the archive in it."""
    layout = _CIFAR[name]
    files = _cifar_files(root, layout)
    batches = {member: _read_batch(where, data, layout) for member, where, data in files}
    train = [batches[member] for member in layout.train]
    train_x, train_y = torch.cat([batch.images for batch in train]), torch.cat([batch.labels for batch in train])
    test = batches[layout.test]
    superclasses = train[0].superclasses if layout.superclass else None
    return Dataset(name, train_x, train_y, test.images, test.labels, layout.classes, superclasses)


def _cifar_files(root: Path, layout: _Cifar) -> Iterator[tuple[str, str, bytearray]]:
    """The name, the place and the bytes of each file that is needed, from the folder or else from the archive."""
    wanted = (*layout.train, layout.test)
    for folder in (root / layout.folder, root):
        if any((folder / member).is_file() for member in wanted):
            yield from ((member, str(folder / member), read_bytes(folder / member)) for member in wanted)
            return
    archive = root / layout.archive
    if not archive.is_file():
        names = f"{', '.join(wanted)} (there or in {layout.folder}/)"
        raise DataError(f"{root}: found neither the files {names} nor {layout.archive}")
    found = read_members(archive, wanted)
    if missing := [member for member in wanted if member not in found]:
        raise DataError(f"{archive}: the archive holds no {', '.join(missing)}")
    yield from ((member, *found.pop(member)) for member in wanted)


class _Batch(NamedTuple):
    images: Tensor
    labels: Tensor
    superclasses: Tensor | None


def _read_batch(where: str, data: bytes | bytearray, layout: _Cifar) -> _Batch:
    """One CIFAR pickle -> uint8 images [N, 3, 32, 32], int64 labels [N] and, where it has them, the superclass of each
    class, int64 [classes]."""
    try:
        batch = loads(data)
    except PickleError as error:
        raise DataError(f"{where}: cannot be unpickled ({error})") from error
    if not isinstance(batch, dict):
        raise DataError(f"{where}: expected a pickled dict, found {type(batch).__name__}")
    images = _pixels(batch.get(b"data", batch.get("data")), where)
    targets = _labels(batch, layout.labels, where)
    check_split(images, targets, layout.classes, where)
    coarse = layout.superclass
    if coarse is None or not {coarse, coarse.encode()} & batch.keys():
        return _Batch(images, targets, None)
    return _Batch(images, targets, _superclasses(targets, _labels(batch, coarse, where), layout.classes, where))


def _labels(batch: Mapping[Any, object], name: str, where: str) -> Tensor:
    """A list of labels in a pickled batch, int64 [N]."""
    labels = batch.get(name.encode(), batch.get(name))
    if not isinstance(labels, list) or not set(map(type, labels)) <= {int}:
        raise DataError(f"{where}: {name!r} is missing or not a list of integers")
    try:
        return torch.tensor(labels, dtype=torch.int64)
    except (OverflowError, RuntimeError, ValueError) as error:
        raise DataError(f"{where}: a label in {name!r} does not fit 64 bits") from error


def _superclasses(fine: Tensor, coarse: Tensor, classes: int, where: str) -> Tensor:
    """The superclass of each class, int64 [classes], from the two labels of every image."""
    if len(coarse) != len(fine):
        raise DataError(f"{where}: {len(fine)} labels, but {len(coarse)} superclasses")
    of_class = torch.full((classes,), -1).scatter_(0, fine, coarse)
    if not torch.equal(of_class[fine], coarse):
        wrong = int(fine[of_class[fine] != coarse][0])
        raise DataError(f"{where}: images of class {wrong} have different superclasses")
    return of_class


def _pixels(array: object, where: str) -> Tensor:
    """A recorded C-ordered uint8 array [N, 3072] -> uint8 tensor [N, 3, 32, 32]."""
    match array:
        case Array(state=(_, (int(n), 3072), Dtype(args=(b"u1" | "u1", *_)), False | 0, bytes(raw))):
            pass
        case Buffer(args=(bytes(raw), Dtype(args=(b"u1" | "u1", *_)), (int(n), 3072), "C")):
            pass
        case _:
            raise DataError(f"{where}: 'data' is missing or not a C-ordered uint8 array [N, 3072]")
    if n < 1 or len(raw) != n * 3072:
        raise DataError(f"{where}: 'data' has {len(raw)} bytes where {n} rows need {n * 3072}")
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8).reshape(n, 3, 32, 32)
