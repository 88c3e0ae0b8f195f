"""Folders of images, one folder per class, and TinyImageNet's layout.

The memory for all images is bounded by the sizes of their files.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from wsn_fast.train import machine
from wsn_fast.train.data.dataset import Dataset
from wsn_fast.train.data.decoding import decode
from wsn_fast.train.data.files import ALWAYS, DataError, read_bytes
from wsn_fast.train.data.loading import Shows, shows_nothing

_EXPANDS = 160  # a byte of a PNG in black and white, such as Omniglot's, can stand for a hundred bytes of RGB


def load_image_folder(root: Path, shows: Shows = shows_nothing) -> Dataset:
    """The images below ``root``, in ``train`` and in ``val`` or ``test``. Classes are numbered in the order of
    TinyImageNet's ``wnids.txt``, or by their names where there is no such file."""
    train = root / "train"
    names = _class_names(root, train)
    labels = {name: label for label, name in enumerate(names)}
    # "val" first: TinyImageNet's "test" has no labels.
    test = next((root / part for part in ("val", "test") if (root / part).is_dir()), None)
    if test is None:
        raise DataError(f"{root}: found neither val/ nor test/ beside train/")
    train_files = list(_by_class(train, labels))
    annotations = test / "val_annotations.txt"
    test_files = list(_annotated(annotations, labels) if annotations.is_file() else _by_class(test, labels))
    if not test_files:
        raise DataError(f"{annotations if annotations.is_file() else test}: no images")
    size = decode(train_files[0][0], str(train_files[0][0])).shape
    _check_room(root, len(train_files) + len(test_files), size)
    train_x, test_x = (
        _decode_all(shows(files, len(files), f"reading {folder}"), files, size)
        for folder, files in ((train, train_files), (test, test_files))
    )
    train_y, test_y = (torch.tensor([label for _, label in files]) for files in (train_files, test_files))
    return Dataset("folder", train_x, train_y, test_x, test_y, len(names))


def _class_names(root: Path, train: Path) -> list[str]:
    """The folders in ``train``, in the order of their numbers."""
    names = sorted(entry.name for entry in train.iterdir() if entry.is_dir()) if train.is_dir() else []
    if not names:
        raise DataError(f"{train}: no class folders there (expected train/<class>/*.png, *.jpg or *.jpeg)")
    order = root / "wnids.txt"
    if not order.is_file():
        return names
    listed = read_bytes(order).decode("utf-8", "replace").split()
    if sorted(listed) != names:
        wrong = next(iter({*names} ^ {*listed}), "a class twice")
        raise DataError(f"{order}: expected each folder of {train} once, but they differ in {wrong!r:.99}")
    return listed


def _by_class(folder: Path, labels: dict[str, int]) -> Iterator[tuple[Path, int]]:
    """(file, label) of every image in folder/<class>/ or, as TinyImageNet has it, folder/<class>/images/."""
    for class_folder in sorted(entry for entry in folder.iterdir() if entry.is_dir()):
        if class_folder.name not in labels:
            raise DataError(f"{class_folder}: a class that train/ does not have")
        inner = class_folder / "images"
        files = (inner if inner.is_dir() else class_folder).iterdir()
        images = sorted(path for path in files if path.suffix.lower() in (".png", ".jpg", ".jpeg"))
        if not images:
            raise DataError(f"{class_folder}: no .png, .jpg or .jpeg files")
        yield from ((path, labels[class_folder.name]) for path in images)


def _annotated(annotations: Path, labels: dict[str, int]) -> Iterator[tuple[Path, int]]:
    """(file, label) of every line of TinyImageNet's val_annotations.txt: file name, class, box (unused)."""
    for number, line in enumerate(read_bytes(annotations).decode("utf-8", "replace").splitlines(), 1):
        where = f"{annotations}: line {number}"
        columns = line.split("\t")
        if len(columns) < 2 or columns[1] not in labels:
            raise DataError(f"{where}: expected a file name and a class of train/, got {line[:99]!r}")
        path = annotations.parent / "images" / columns[0]
        if Path(columns[0]).name != columns[0] or not path.is_file():
            raise DataError(f"{where}: no file {path}")
        yield path, labels[columns[1]]


def _check_room(root: Path, count: int, size: tuple[int, ...]) -> None:
    """Raise ``DataError`` if so many images do not fit into the memory of this machine."""
    wanted, memory = count * math.prod(size), machine.memory()
    if memory is not None and wanted > memory:
        raise DataError(
            f"{root}: {count} images of (height, width) {size[:2]} take {wanted / 2**30:.1f} GiB, this machine has "
            f"{memory / 2**30:.1f} GiB; the stream own loads images when they are needed"
        )


def _decode_all(shown: Iterable[tuple[Path, int]], files: list[tuple[Path, int]], size: tuple[int, ...]) -> Tensor:
    """Image files -> uint8 [N, 3, H, W]; every image must have the given (H, W, 3)."""
    wanted, stored = len(files) * math.prod(size), sum(path.stat().st_size for path in {path for path, _ in files})
    if wanted > ALWAYS + _EXPANDS * stored:
        raise DataError(
            f"{files[0][0].parent}: {len(files)} images of (height, width) {size[:2]} take {wanted} bytes, and files "
            f"of {stored} bytes may expand to {ALWAYS + _EXPANDS * stored} at most"
        )
    images = torch.empty((len(files), 3, *size[:2]), dtype=torch.uint8)
    for row, (path, _) in enumerate(shown):
        pixels = decode(path, str(path))
        if pixels.shape != size:
            raise DataError(f"{path}: (height, width) {pixels.shape[:2]}, the first image's {size[:2]}")
        images[row] = torch.from_numpy(pixels).permute(2, 0, 1)
    return images
