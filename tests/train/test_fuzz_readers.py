"""Damaged bytes: a reader returns a dataset of the right shape or raises DataError, and nothing else."""

from __future__ import annotations

import gzip
import io
import pickle
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wsn_fast.train.data import DataError, load

RNG = np.random.default_rng(0)


def idx(*shape: int, high: int) -> bytes:
    header = bytes([0, 0, 8, len(shape)]) + struct.pack(f">{len(shape)}I", *shape)
    return header + RNG.integers(0, high, shape, dtype=np.uint8).tobytes()


IDX_FILES = {
    "train-images-idx3-ubyte": idx(4, 3, 2, high=256),
    "train-labels-idx1-ubyte": idx(4, high=10),
    "t10k-images-idx3-ubyte": idx(2, 3, 2, high=256),
    "t10k-labels-idx1-ubyte": idx(2, high=10),
}


def batch(protocol: int) -> bytes:
    content = {b"data": np.zeros((1, 3072), np.uint8), b"fine_labels": [7], b"filenames": [b"one.png"]}
    return pickle.dumps(content, protocol)


BATCHES = [batch(protocol) for protocol in range(6)]
GLOBALS = b"cnumpy\ndtype\n cnumpy\nndarray\n cnumpy.core.multiarray\n_reconstruct\n c_codecs\nencode\n"


@st.composite
def damaged(draw: st.DrawFn, whole: bytes) -> bytes:
    """The bytes with up to four bits flipped, mostly near the ends (the structure), perhaps cut short."""
    data = bytearray(whole)
    near = st.integers(0, min(len(data), 300) - 1)
    position = near | near.map(lambda offset: len(data) - 1 - offset) | st.integers(0, len(data) - 1)
    for at, bit in draw(st.lists(st.tuples(position, st.integers(0, 7)), max_size=4)):
        data[at] ^= 1 << bit
    return bytes(data[: draw(st.just(len(data)) | st.integers(0, len(data)))])


def assert_right_or_data_error(name: str, root: Path, image: tuple[int, ...], classes: int) -> None:
    try:
        found = load(name, root)
    except DataError as error:
        assert str(root) in str(error)
        return
    for x, y in ((found.train_x, found.train_y), (found.test_x, found.test_y)):
        assert x.dtype == torch.uint8 and y.dtype == torch.int64 and x.ndim == 4 and len(x) == len(y) > 0
        assert x.shape[1:].numel() == torch.Size(image).numel() and 0 <= int(y.min()) <= int(y.max()) < classes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder with good files: each example damages one of them."""
    root = tmp_path_factory.mktemp("fuzz")
    for name, content in (IDX_FILES | {"train": BATCHES[2], "test": BATCHES[2]}).items():
        (root / name).write_bytes(content)
    return root


@settings(max_examples=300, deadline=None)
@given(st.data(), st.sampled_from(list(IDX_FILES)), st.booleans())
def test_damaged_idx(folder: Path, data: st.DataObject, name: str, compress: bool) -> None:
    whole = gzip.compress(IDX_FILES[name], mtime=0) if compress else IDX_FILES[name]
    (folder / name).write_bytes(data.draw(damaged(whole)))
    assert_right_or_data_error("mnist", folder, (1, 3, 2), 10)
    (folder / name).write_bytes(IDX_FILES[name])


@settings(max_examples=500, deadline=None)
@given(st.data(), st.sampled_from(BATCHES))
def test_damaged_pickle(folder: Path, data: st.DataObject, whole: bytes) -> None:
    (folder / "test").write_bytes(data.draw(damaged(whole)))
    assert_right_or_data_error("cifar100", folder, (3, 32, 32), 100)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from([*(bytes([code]) for code in range(256)), *GLOBALS.split(b" ")]), max_size=30))
def test_random_pickle_programs(folder: Path, program: list[bytes]) -> None:
    (folder / "test").write_bytes(b"\x80\x02" + b"".join(program) + b".")
    assert_right_or_data_error("cifar100", folder, (3, 32, 32), 100)


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("archive") / "cifar-100-python.tar.gz"


@settings(max_examples=150, deadline=None)
@given(st.data(), st.booleans())
def test_damaged_archive(archive: Path, data: st.DataObject, compress: bool) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name in ("train", "test"):
            entry = tarfile.TarInfo(f"cifar-100-python/{name}")
            entry.size = len(BATCHES[2])
            tar.addfile(entry, io.BytesIO(BATCHES[2]))
    whole = gzip.compress(buffer.getvalue(), mtime=0) if compress else buffer.getvalue()
    archive.write_bytes(data.draw(damaged(whole)))
    assert_right_or_data_error("cifar100", archive.parent, (3, 32, 32), 100)
