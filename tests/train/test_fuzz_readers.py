"""Damaged and foreign bytes: a reader returns what it should, or raises its own error, and nothing else.

That is DataError for datasets, CheckpointError (or ValueError, for a config) for the files of a run.
"""

from __future__ import annotations

import copy
import gzip
import io
import json
import pickle
import struct
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fuzz import damaged, fuzzed
from hypothesis import strategies as st
from torch import Tensor

from wsn_fast.train import checkpoint
from wsn_fast.train.checkpoint import Checkpoint, CheckpointError
from wsn_fast.train.config import TrainConfig, resolve
from wsn_fast.train.data import DataError, load
from wsn_fast.train.folder import read_config
from wsn_fast.train.report import Console
from wsn_fast.train.run import Run

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


@fuzzed(300, st.data(), st.sampled_from(list(IDX_FILES)), st.booleans())
def test_damaged_idx(folder: Path, data: st.DataObject, name: str, compress: bool) -> None:
    whole = gzip.compress(IDX_FILES[name], mtime=0) if compress else IDX_FILES[name]
    (folder / name).write_bytes(data.draw(damaged(whole)))
    assert_right_or_data_error("mnist", folder, (1, 3, 2), 10)
    (folder / name).write_bytes(IDX_FILES[name])


@fuzzed(500, st.data(), st.sampled_from(BATCHES))
def test_damaged_pickle(folder: Path, data: st.DataObject, whole: bytes) -> None:
    (folder / "test").write_bytes(data.draw(damaged(whole)))
    assert_right_or_data_error("cifar100", folder, (3, 32, 32), 100)


@fuzzed(300, st.lists(st.sampled_from([*(bytes([code]) for code in range(256)), *GLOBALS.split(b" ")]), max_size=30))
def test_random_pickle_programs(folder: Path, program: list[bytes]) -> None:
    (folder / "test").write_bytes(b"\x80\x02" + b"".join(program) + b".")
    assert_right_or_data_error("cifar100", folder, (3, 32, 32), 100)


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("archive") / "cifar-100-python.tar.gz"


@fuzzed(150, st.data(), st.booleans())
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


# --- the files of a run ----------------------------------------------------------------------------------------------
JUNK = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9) | st.lists(st.integers(), max_size=3)
)


@st.composite
def edited(draw: st.DrawFn, whole: Any) -> Any:
    """A JSON value with up to three of its parts, at any depth, taken away or replaced by something else."""
    whole = copy.deepcopy(whole)
    for _ in range(draw(st.integers(1, 3))):
        part = whole
        while isinstance(part, dict | list) and part:
            key = draw(st.sampled_from(list(part) if isinstance(part, dict) else range(len(part))))
            inner = part[key]
            if not (isinstance(inner, dict | list) and inner and draw(st.booleans())):
                if draw(st.booleans()):
                    del part[key]
                else:
                    part[key] = draw(JUNK | st.just({}))
                break
            part = inner
    return whole


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """A run inside its second task."""
    threads = torch.get_num_threads()
    folder = tmp_path_factory.mktemp("trained") / "run"
    given = {"tasks": 3, "epochs": 1, "batch_size": 256, "device": "cpu", "out": str(folder)}
    run = Run.start(resolve(**given), Console(quiet=True))
    run._train_task()
    run.wsn.begin_task(1)
    yield run
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def saved(trained: Run) -> bytes:
    checkpoint.save(trained.folder, 1, {"task": 1, "rows": [[1.5]]}, trained.wsn.state_dict())
    return (trained.folder / "000001.safetensors").read_bytes()


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoint") / "000001.safetensors"


@fuzzed(300, st.data())
def test_damaged_checkpoint(saved: bytes, path: Path, data: st.DataObject) -> None:
    content = data.draw(damaged(saved) | st.binary(max_size=200))
    path.write_bytes(content)
    try:
        assert checkpoint.load(path).state == {"task": 1, "rows": [[1.5]]}
    except CheckpointError as error:
        assert str(path) in str(error) and content != saved
    else:
        assert content == saved


def test_a_header_longer_than_any_file(path: Path) -> None:
    path.write_bytes(b"\xff" * 8 + b"{}")
    with pytest.raises(CheckpointError, match="not a checkpoint of wsn-fast"):
        checkpoint.load(path)


def signed(header: dict[str, Any], tensors: bytes) -> bytes:
    """A safetensors file whose digest is right, whatever else is wrong."""
    text = json.dumps(header, separators=(",", ":")).encode()
    raw = struct.pack("<Q", len(text)) + text + tensors
    found = checkpoint._DIGEST.search(raw)
    return (
        raw if found is None else raw[: found.start(1)] + checkpoint._digest(raw, found.start(1)) + raw[found.end(1) :]
    )


@fuzzed(300, st.data())
def test_checkpoint_of_another_make(saved: bytes, path: Path, data: st.DataObject) -> None:
    """The digest protects against accidents and not against other writers."""
    end = 8 + int.from_bytes(saved[:8], "little")
    header = json.loads(saved[8:end])
    header = data.draw(edited(header))
    about = header.get("__metadata__")
    for name in ("compressed", "state") if isinstance(about, dict) else ():
        if isinstance(about.get(name), str) and data.draw(st.booleans()):
            try:
                about[name] = json.dumps(data.draw(edited(json.loads(about[name]))))
            except ValueError:  # edited already
                continue
    path.write_bytes(signed(header, saved[end:]))
    try:
        found = checkpoint.load(path)
    except CheckpointError as error:
        assert str(path) in str(error)
    else:
        assert isinstance(found.state, dict)


def test_a_compressed_tensor_that_would_fill_the_memory(saved: bytes, path: Path) -> None:
    end = 8 + int.from_bytes(saved[:8], "little")
    header, tensors = json.loads(saved[8:end]), bytearray(saved[end:])
    name = next(iter(json.loads(header["__metadata__"]["compressed"])))
    start, stop = header[name]["data_offsets"]
    # A frame of zstd that claims 2**40 bytes.
    tensors[start:stop] = (b"\x28\xb5\x2f\xfd\xc0\x58" + struct.pack("<Q", 1 << 40)).ljust(stop - start, b"\0")
    path.write_bytes(signed(header, bytes(tensors[: len(saved) - end])))
    with pytest.raises(CheckpointError, match="is not of the shape"):
        checkpoint.load(path)


@fuzzed(150, st.data())
def test_restoring_what_another_program_wrote(trained: Run, path: Path, data: st.DataObject) -> None:
    good = checkpoint.load_from(trained.folder / "checkpoint")
    state, tensors = data.draw(edited(good.state)), dict(good.tensors)
    for name in data.draw(st.lists(st.sampled_from(list(tensors)), max_size=3, unique=True)):
        ways: list[Tensor | None] = [None, torch.empty(0), tensors[name].double(), tensors[name].flatten()[1:]]
        way = data.draw(st.sampled_from(range(len(ways))))
        del tensors[name]
        if ways[way] is not None:
            tensors[name] = ways[way]
    try:
        trained.restore(Checkpoint(path, 1, state, tensors))
    except CheckpointError as error:
        assert str(path) in str(error)
    except ValueError as error:
        assert str(error)
    trained.restore(good)  # whatever it was, it leaves no trace
    assert trained.wsn.verify().tasks == [0]


@fuzzed(200, st.data())
def test_damaged_config(trained: Run, path: Path, data: st.DataObject) -> None:
    whole = (trained.folder / "config.json").read_bytes()
    text = data.draw(damaged(whole) | edited(json.loads(whole)).map(lambda value: json.dumps(value).encode()))
    (path.parent / "config.json").write_bytes(text)
    try:
        assert isinstance(read_config(path.parent), TrainConfig)
    except ValueError as error:
        assert str(path.parent / "config.json") in str(error)
