"""Datasets as uint8 tensors, read from a data folder; only the small `digits` set travels with the package.

The readers trust nothing in the files: every fault is a `DataError` that names the file and what is wrong
with it. CIFAR's pickles run no code: numpy's globals are replaced by recorders, all others are refused.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import math
import os
import pickle
import struct
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

DATASETS = ("digits", "mnist", "fashion_mnist", "cifar10", "cifar100", "folder")


class DataError(ValueError):
    """A data file is missing, damaged or not what it claims to be; the message names file and fault."""


@dataclass(frozen=True, eq=False)
class Dataset:
    """A classification dataset in memory.

    Attributes:
        name: One of `DATASETS`, or any name for data of one's own.
        train_x: Training images, uint8 [N, C, H, W], raw pixel values (0..255; `digits`: 0..16).
        train_y: Training labels, int64 [N], in 0..classes-1.
        test_x: Test images, uint8 [M, C, H, W].
        test_y: Test labels, int64 [M].
        classes: Number of classes.
        fingerprint: Hex blake2b over shapes and bytes: a resumed run can refuse data that changed.

    Raises:
        DataError: If dtypes, shapes, counts or labels do not fit together.
    """

    name: str
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    classes: int
    fingerprint: str = field(init=False)

    def __post_init__(self) -> None:
        """Check that the parts fit together and take the fingerprint."""
        _check_split(self.train_x, self.train_y, self.classes, f"{self.name} (train)")
        _check_split(self.test_x, self.test_y, self.classes, f"{self.name} (test)")
        train, test = tuple(self.train_x.shape[1:]), tuple(self.test_x.shape[1:])
        if train != test:
            raise DataError(f"{self.name}: training images are {train}, test images {test}")
        digest = hashlib.blake2b(str(self.classes).encode(), digest_size=16)
        for part in (self.train_x, self.train_y, self.test_x, self.test_y):
            digest.update(str(tuple(part.shape)).encode())
            digest.update(part.contiguous().numpy().data)
        object.__setattr__(self, "fingerprint", digest.hexdigest())


def load(name: str, data_dir: str | os.PathLike[str] | None = None) -> Dataset:
    """Load a dataset.

    Args:
        name: `digits` (vendored), `mnist` and `fashion_mnist` (idx files, plain or gzip), `cifar10` and
            `cifar100` (the official python pickles, as a folder or as the official .tar.gz), or `folder`
            (`train/<class>/*.png|jpg|jpeg`, and `val` or `test` alike; also TinyImageNet's layout). Folder
            images become RGB and must share one size.
        data_dir: Folder that holds the files. Not used for `digits`.

    Returns:
        The dataset, uint8 images [N, C, H, W] and int64 labels [N].

    Raises:
        ValueError: If `name` is unknown or `data_dir` is missing.
        DataError: If a file is missing, damaged or inconsistent.
        ImportError: If `folder` needs Pillow and it is not installed.
    """
    if name not in DATASETS:
        raise ValueError(f"name: expected one of {', '.join(DATASETS)}, got {name!r}")
    if name == "digits":
        return _load_digits()
    if data_dir is None:
        raise ValueError(f"data_dir: dataset {name!r} is read from a folder, and none was given")
    root = Path(data_dir)
    if not root.is_dir():
        raise DataError(f"{root}: not a folder (data_dir of dataset {name!r})")
    if name == "folder":
        return _load_folder(root)
    return _load_cifar(name, root) if name in _CIFAR else _load_idx(name, root)


def _check_split(images: Tensor, labels: Tensor, classes: int, where: str) -> None:
    dtypes, dims = (images.dtype, labels.dtype), (images.ndim, labels.ndim)
    if dtypes != (torch.uint8, torch.int64) or dims != (4, 1):
        raise DataError(
            f"{where}: expected uint8 images [N, C, H, W] and int64 labels [N], got "
            f"{images.dtype} {list(images.shape)} and {labels.dtype} {list(labels.shape)}"
        )
    if len(images) != len(labels):
        raise DataError(f"{where}: {len(images)} images but {len(labels)} labels")
    if images.numel() == 0:
        raise DataError(f"{where}: no images (shape {list(images.shape)})")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise DataError(f"{where}: label {low if low < 0 else high} is outside 0..{classes - 1}")


def _read_bytes(path: Path) -> bytes:
    """The content of a file, decompressed if it is gzip (by its magic, whatever the name)."""
    try:
        data = path.read_bytes()
        return gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read, perhaps truncated or damaged ({error})") from error


def _load_digits() -> Dataset:
    path = Path(__file__).with_name("digits.npz")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            parts = [torch.from_numpy(arrays[key]) for key in ("train_x", "train_y", "test_x", "test_y")]
    except Exception as error:  # numpy and zipfile raise many kinds for a damaged file
        raise DataError(f"{path}: the vendored data cannot be read ({error})") from error
    return Dataset("digits", parts[0], parts[1].long(), parts[2], parts[3].long(), 10)


def _load_idx(name: str, root: Path) -> Dataset:
    folders = (root, root / name, root / {"mnist": "MNIST", "fashion_mnist": "FashionMNIST"}[name] / "raw")
    splits: list[tuple[Tensor, Tensor]] = []
    for prefix in ("train", "t10k"):
        images_path = _find(folders, f"{prefix}-images-idx3-ubyte")
        labels_path = _find(folders, f"{prefix}-labels-idx1-ubyte")
        images, labels = _read_idx(images_path, 3).unsqueeze(1), _read_idx(labels_path, 1).long()
        _check_split(images, labels, 10, f"{images_path} with {labels_path.name}")
        if splits and images.shape[1:] != splits[0][0].shape[1:]:
            size, wanted = tuple(images.shape[2:]), tuple(splits[0][0].shape[2:])
            raise DataError(f"{images_path}: images of {size} pixels, the training images have {wanted}")
        splits.append((images, labels))
    return Dataset(name, *splits[0], *splits[1], 10)


def _find(folders: tuple[Path, ...], name: str) -> Path:
    for folder in folders:
        for path in (folder / name, folder / f"{name}.gz"):
            if path.is_file():
                return path
    raise DataError(f"{name} or {name}.gz: no such file in {', '.join(map(str, folders))}")


def _read_idx(path: Path, ndim: int) -> Tensor:
    """One idx file of unsigned bytes with `ndim` dimensions -> uint8 tensor of the shape in its header."""
    data = _read_bytes(path)
    start = 4 + 4 * ndim
    if len(data) < start:
        raise DataError(f"{path}: truncated, {len(data)} bytes where the idx header alone has {start}")
    if data[:2] != b"\0\0":
        raise DataError(f"{path}: wrong magic 0x{data[:4].hex()}, not an idx file")
    if data[2] != 0x08:
        raise DataError(f"{path}: idx dtype code 0x{data[2]:02x}, expected 0x08 (unsigned byte)")
    if data[3] != ndim:
        raise DataError(f"{path}: {data[3]} dimensions in the idx header, expected {ndim}")
    shape = struct.unpack(f">{ndim}I", data[4:start])
    found, wanted = len(data) - start, math.prod(shape)
    if found != wanted:
        fault = "truncated" if found < wanted else "too long"
        raise DataError(f"{path}: {fault}, {found} bytes of data where shape {list(shape)} needs {wanted}")
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)[start:].reshape(shape)


class _Cifar(NamedTuple):
    folder: str
    archive: str
    train: tuple[str, ...]
    test: str
    labels: str
    classes: int


_BATCHES = tuple(f"data_batch_{i}" for i in range(1, 6))
_CIFAR = {
    "cifar10": _Cifar("cifar-10-batches-py", "cifar-10-python.tar.gz", _BATCHES, "test_batch", "labels", 10),
    "cifar100": _Cifar("cifar-100-python", "cifar-100-python.tar.gz", ("train",), "test", "fine_labels", 100),
}


class _Recorded:
    """Stands in for an object of numpy's: keeps its arguments and state.

    numpy's own `__setstate__` methods are not memory-safe for hostile bytes, so they are never reached.
    """

    args: tuple[object, ...] = ()
    state: object = None

    def __init__(self, *args: object) -> None:
        self.args = args

    def __setstate__(self, state: object) -> None:
        self.state = state


class _Array(_Recorded):
    """numpy's `_reconstruct`; the contents come as state (version, shape, dtype, fortran, bytes)."""


class _Buffer(_Recorded):
    """numpy's `_frombuffer` (pickle protocol 5); arguments (bytes, dtype, shape, order)."""


class _Dtype(_Recorded):
    """numpy's `dtype`; arguments (type string, align, copy)."""


_ALLOWED_GLOBALS: dict[tuple[str, str], Callable[..., object]] = {
    ("numpy._core.multiarray", "_reconstruct"): _Array,
    ("numpy.core.multiarray", "_reconstruct"): _Array,  # numpy 1
    ("numpy._core.numeric", "_frombuffer"): _Buffer,
    ("numpy.core.numeric", "_frombuffer"): _Buffer,
    ("numpy", "dtype"): _Dtype,
    ("numpy", "ndarray"): _Recorded,
    ("_codecs", "encode"): str.encode,  # how Python 3 writes bytes in the old protocols
}


# The unpickler in Python: the one in C sizes its memo by an index in the file, a wrong bit costs gigabytes.
class _Unpickler(pickle._Unpickler):
    def find_class(self, module: str, name: str, /) -> Any:
        if (module, name) not in _ALLOWED_GLOBALS:
            raise pickle.UnpicklingError(f"global {module}.{name} is refused")
        return _ALLOWED_GLOBALS[module, name]


def _load_cifar(name: str, root: Path) -> Dataset:
    layout = _CIFAR[name]
    files = _cifar_files(root, layout)
    batches = {member: _read_batch(where, data, layout) for member, (where, data) in files.items()}
    train_x, train_y = map(torch.cat, zip(*(batches[member] for member in layout.train), strict=True))
    return Dataset(name, train_x, train_y, *batches[layout.test], layout.classes)


def _cifar_files(root: Path, layout: _Cifar) -> dict[str, tuple[str, bytes]]:
    """Where each wanted file was found, and its bytes: from the folder or else from the archive."""
    wanted = (*layout.train, layout.test)
    for folder in (root / layout.folder, root):
        if any((folder / member).is_file() for member in wanted):
            return {member: (str(folder / member), _read_bytes(folder / member)) for member in wanted}
    archive = root / layout.archive
    if not archive.is_file():
        names = f"{', '.join(wanted)} (there or in {layout.folder}/)"
        raise DataError(f"{root}: found neither the files {names} nor {layout.archive}")
    found = {}
    try:
        with tarfile.open(archive, "r:*") as tar:
            for entry in tar:
                member = PurePosixPath(entry.name).name
                content = tar.extractfile(entry) if member in wanted else None
                if content is not None:
                    found[member] = (f"{archive}:{entry.name}", content.read())
    except Exception as error:  # tarfile lets many kinds through for damaged headers
        raise DataError(f"{archive}: damaged archive ({type(error).__name__}: {error})") from error
    if missing := [member for member in wanted if member not in found]:
        raise DataError(f"{archive}: the archive holds no {', '.join(missing)}")
    return found


def _read_batch(where: str, data: bytes, layout: _Cifar) -> tuple[Tensor, Tensor]:
    """One CIFAR pickle -> uint8 images [N, 3, 32, 32] and int64 labels [N]."""
    try:
        batch = _Unpickler(io.BytesIO(data), encoding="bytes").load()
    except Exception as error:  # a damaged pickle can raise anything
        raise DataError(f"{where}: cannot be unpickled ({type(error).__name__}: {error})") from error
    if not isinstance(batch, dict):
        raise DataError(f"{where}: expected a pickled dict, found {type(batch).__name__}")
    pixels, labels = (batch.get(key.encode(), batch.get(key)) for key in ("data", layout.labels))
    images = _pixels(pixels, where)
    if not isinstance(labels, list) or not set(map(type, labels)) <= {int}:
        raise DataError(f"{where}: {layout.labels!r} is missing or not a list of integers")
    try:
        targets = torch.tensor(labels, dtype=torch.int64)
    except (OverflowError, RuntimeError, ValueError) as error:
        raise DataError(f"{where}: a label in {layout.labels!r} does not fit 64 bits") from error
    _check_split(images, targets, layout.classes, where)
    return images, targets


def _pixels(array: object, where: str) -> Tensor:
    """A recorded C-ordered uint8 array [N, 3072] -> uint8 tensor [N, 3, 32, 32]."""
    match array:
        case _Array(state=(_, (int(n), 3072), _Dtype(args=(b"u1" | "u1", *_)), False | 0, bytes(raw))):
            pass
        case _Buffer(args=(bytes() | bytearray() as raw, _Dtype(args=(b"u1" | "u1", *_)), (int(n), 3072), "C")):
            pass
        case _:
            raise DataError(f"{where}: 'data' is missing or not a C-ordered uint8 array [N, 3072]")
    if n < 1 or len(raw) != n * 3072:
        raise DataError(f"{where}: 'data' has {len(raw)} bytes where {n} rows need {n * 3072}")
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8).reshape(n, 3, 32, 32)


def _load_folder(root: Path) -> Dataset:
    train = root / "train"
    names = sorted(entry.name for entry in train.iterdir() if entry.is_dir()) if train.is_dir() else []
    if not names:
        raise DataError(f"{train}: no class folders there (expected train/<class>/*.png, *.jpg or *.jpeg)")
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
    size = _decode(train_files[0][0]).shape
    train_x, test_x = _decode_all(train_files, size), _decode_all(test_files, size)
    train_y, test_y = (torch.tensor([label for _, label in files]) for files in (train_files, test_files))
    return Dataset("folder", train_x, train_y, test_x, test_y, len(names))


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
    for number, line in enumerate(_read_bytes(annotations).decode("utf-8", "replace").splitlines(), 1):
        where = f"{annotations}: line {number}"
        columns = line.split("\t")
        if len(columns) < 2 or columns[1] not in labels:
            raise DataError(f"{where}: expected a file name and a class of train/, got {line!r}")
        path = annotations.parent / "images" / columns[0]
        if not path.is_file():
            raise DataError(f"{where}: no file {path}")
        yield path, labels[columns[1]]


def _decode_all(files: list[tuple[Path, int]], size: tuple[int, ...]) -> Tensor:
    """Image files -> uint8 [N, 3, H, W]; every image must have the given (H, W, 3)."""
    images = torch.empty((len(files), 3, *size[:2]), dtype=torch.uint8)
    for row, (path, _) in enumerate(files):
        pixels = _decode(path)
        if pixels.shape != size:
            raise DataError(f"{path}: (height, width) {pixels.shape[:2]}, the first image's {size[:2]}")
        images[row] = torch.from_numpy(pixels).permute(2, 0, 1)
    return images


def _decode(path: Path) -> np.ndarray[Any, Any]:
    """One image file -> uint8 [H, W, 3]."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("image folders are decoded with Pillow: pip install 'wsn-fast[images]'") from error
    try:
        with Image.open(path) as image:
            return np.array(image.convert("RGB"))
    except Exception as error:  # Pillow's plugins raise many kinds for damaged files
        raise DataError(f"{path}: not a readable image ({type(error).__name__}: {error})") from error
