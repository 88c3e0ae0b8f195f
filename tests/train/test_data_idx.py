"""Idx files: read exactly, and every fault named with its file."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
from data_errors import error_of

from wsn_fast.train.data import load

RNG = np.random.default_rng(0)


def idx_bytes(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def idx_arrays() -> dict[str, np.ndarray]:
    def random(*shape: int, high: int) -> np.ndarray:
        return RNG.integers(0, high, shape, dtype=np.uint8)

    return {
        "train-images-idx3-ubyte": random(6, 5, 4, high=256),
        "train-labels-idx1-ubyte": random(6, high=10),
        "t10k-images-idx3-ubyte": random(3, 5, 4, high=256),
        "t10k-labels-idx1-ubyte": random(3, high=10),
    }


def write_idx(folder: Path, arrays: dict[str, np.ndarray], compress: bool = False) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in arrays.items():
        if compress:
            (folder / f"{name}.gz").write_bytes(gzip.compress(idx_bytes(array), mtime=0))
        else:
            (folder / name).write_bytes(idx_bytes(array))


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
@pytest.mark.parametrize("compress", [False, True])
def test_idx_files_are_read_exactly(tmp_path: Path, name: str, compress: bool) -> None:
    arrays = idx_arrays()
    write_idx(tmp_path, arrays, compress)
    found = load(name, str(tmp_path))
    parts = (found.train_x[:, 0], found.train_y, found.test_x[:, 0], found.test_y)
    assert all(np.array_equal(part, array) for part, array in zip(parts, arrays.values(), strict=True))
    assert found.name == name and found.classes == 10


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("mnist", "mnist"),
        ("mnist", "MNIST/raw"),
        ("fashion_mnist", "fashion_mnist"),
        ("fashion_mnist", "FashionMNIST/raw"),
    ],
)
def test_idx_files_are_found_in_the_usual_folders(tmp_path: Path, name: str, folder: str) -> None:
    arrays = idx_arrays()
    write_idx(tmp_path / folder, arrays)
    assert np.array_equal(load(name, tmp_path).test_y, arrays["t10k-labels-idx1-ubyte"])


@pytest.mark.parametrize("missing", list(idx_arrays()))
def test_missing_idx_file_names_what_was_looked_for_and_where(tmp_path: Path, missing: str) -> None:
    write_idx(tmp_path, idx_arrays())
    (tmp_path / missing).unlink()
    message = error_of("mnist", tmp_path)
    assert f"{missing} or {missing}.gz: no such file in {tmp_path}, {tmp_path / 'mnist'}" in message


IMAGES = idx_bytes(np.ones((6, 5, 4), np.uint8))


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"", "truncated, 0 bytes where the idx header alone has 16"),
        (IMAGES[:15], "truncated, 15 bytes where the idx header alone has 16"),
        (IMAGES[:-1], "truncated, 119 bytes of data where shape [6, 5, 4] needs 120"),
        (IMAGES + b"\0", "too long, 121 bytes of data where shape [6, 5, 4] needs 120"),
        (b"PK\3\4" + IMAGES[4:], "wrong magic 0x504b0304"),
        (IMAGES[:2] + b"\x0d" + IMAGES[3:], "idx dtype code 0x0d, expected 0x08"),
        (IMAGES[:3] + b"\x01" + IMAGES[4:], "1 dimensions in the idx header, expected 3"),
        (IMAGES[:4] + b"\xff" * 12 + IMAGES[16:], "truncated, 120 bytes of data"),
        (gzip.compress(IMAGES, mtime=0)[:-9], "cannot be read, perhaps truncated or damaged"),
        (gzip.compress(IMAGES, mtime=0)[:-8] + b"\0" * 8, "cannot be read, perhaps truncated or damaged"),
        (gzip.compress(IMAGES, mtime=0)[:10] + b"\xff" * 30, "cannot be read, perhaps truncated or damaged"),
        (b"\x1f\x8b" + b"\0" * 30, "cannot be read, perhaps truncated or damaged"),
    ],
)
def test_damaged_idx_file_is_named_with_its_fault(tmp_path: Path, content: bytes, fault: str) -> None:
    write_idx(tmp_path, idx_arrays())
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(content)
    message = error_of("mnist", tmp_path)
    assert message.startswith(f"{path}: ") and fault in message


@pytest.mark.parametrize(
    ("name", "array", "fault"),
    [
        ("train-labels-idx1-ubyte", np.zeros(5, np.uint8), "6 images but 5 labels"),
        ("t10k-labels-idx1-ubyte", np.array([0, 10, 0], np.uint8), "label 10 is outside 0..9"),
        ("t10k-images-idx3-ubyte", np.zeros((3, 5, 5), np.uint8), "images of (5, 5) pixels"),
        ("train-images-idx3-ubyte", np.zeros((6, 0, 4), np.uint8), "no images"),
    ],
)
def test_idx_files_that_do_not_fit_together(tmp_path: Path, name: str, array: np.ndarray, fault: str) -> None:
    write_idx(tmp_path, idx_arrays() | {name: array})
    message = error_of("mnist", tmp_path)
    assert name in message and fault in message
