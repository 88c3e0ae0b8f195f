"""MNIST and Fashion-MNIST from their idx files, plain or compressed with gzip."""

from __future__ import annotations

import math
import struct
from pathlib import Path

import torch
from torch import Tensor

from wsn_fast.train.data.dataset import Dataset, check_split
from wsn_fast.train.data.files import DataError, open_data

_INT64 = 8  # bytes


def load_idx(name: str, root: Path) -> Dataset:
    """The dataset ``mnist`` or ``fashion_mnist`` in the folder ``root``, or in one of the usual folders below it."""
    folders = (root, root / name, root / {"mnist": "MNIST", "fashion_mnist": "FashionMNIST"}[name] / "raw")
    splits: list[tuple[Tensor, Tensor]] = []
    for prefix in ("train", "t10k"):
        images_path = _find(folders, f"{prefix}-images-idx3-ubyte")
        labels_path = _find(folders, f"{prefix}-labels-idx1-ubyte")
        images, labels = _read_idx(images_path, 3).unsqueeze(1), _read_idx(labels_path, 1, _INT64 + 1).long()
        check_split(images, labels, 10, f"{images_path} with {labels_path.name}")
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


def _read_idx(path: Path, ndim: int, bytes_each: int = 1) -> Tensor:
    """One idx file of unsigned bytes with `ndim` dimensions -> uint8 tensor of the shape in its header.

    `bytes_each` is the memory that the caller will take for each element.
    """
    with open_data(path) as data:
        start = 4 + 4 * ndim
        header = data.read(start)
        if len(header) < start:
            raise DataError(f"{path}: truncated, {len(header)} bytes where the idx header alone has {start}")
        if header[:2] != b"\0\0":
            raise DataError(f"{path}: wrong magic 0x{header[:4].hex()}, not an idx file")
        if header[2] != 0x08:
            raise DataError(f"{path}: idx dtype code 0x{header[2]:02x}, expected 0x08 (unsigned byte)")
        if header[3] != ndim:
            raise DataError(f"{path}: {header[3]} dimensions in the idx header, expected {ndim}")
        shape = struct.unpack(f">{ndim}I", header[4:])
        wanted = math.prod(shape)
        needed = f"shape {list(shape)} needs {wanted}"
        if not data.compressed and data.most - start != wanted:
            found = data.most - start
            fault = "truncated" if found < wanted else "too long"
            raise DataError(f"{path}: {fault}, {found} bytes of data where {needed}")
        data.check_room(wanted * bytes_each, f"shape {list(shape)}")
        if not wanted:
            raise DataError(f"{path}: no images or labels (shape {list(shape)})")
        content = data.read(wanted)
        if len(content) < wanted:
            raise DataError(f"{path}: truncated, {len(content)} bytes of data where {needed}")
        if data.read(1):
            raise DataError(f"{path}: too long, more than {wanted} bytes of data where {needed}")
    return torch.frombuffer(content, dtype=torch.uint8).reshape(shape)
