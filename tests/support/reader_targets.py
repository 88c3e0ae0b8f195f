"""The readers of files of unknown origin, each as a function of the bytes of a file.

A reader returns, or raises the error that it promises. Anything else passes through, and is a fault.
``tests/support/fuzz_readers.py`` feeds them with bytes that a coverage-guided fuzzer finds, and
``tests/train/test_corpus.py`` with those that it has found.
"""

from __future__ import annotations

import contextlib
import gzip
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from wsn_fast.continual.register import TaskRegister
from wsn_fast.nn import json_text
from wsn_fast.train import checkpoint, records, task_logs
from wsn_fast.train.checkpoint import CheckpointError
from wsn_fast.train.data import cifar, idx, pickles
from wsn_fast.train.data.archive import read_members
from wsn_fast.train.data.decoding import decode
from wsn_fast.train.data.files import DataError
from wsn_fast.train.folder import read_config


@contextlib.contextmanager
def _file(folder: Path, name: str, data: bytes) -> Iterator[Path]:
    path = folder / name
    path.write_bytes(data)
    yield path


def pickle_(data: bytes, folder: Path) -> None:
    with contextlib.suppress(pickles.PickleError):
        pickles.loads(data)


def batch(data: bytes, folder: Path) -> None:
    with contextlib.suppress(DataError):
        cifar._read_batch("here", data, cifar._CIFAR["cifar100"])


def idx_(data: bytes, folder: Path) -> None:
    with _file(folder, "idx", data) as path, contextlib.suppress(DataError):
        idx._read_idx(path, 3)


def idx_gz(data: bytes, folder: Path) -> None:
    with _file(folder, "idx.gz", gzip.compress(data, 1, mtime=0)) as path, contextlib.suppress(DataError):
        idx._read_idx(path, 1, 9)


def archive(data: bytes, folder: Path) -> None:
    with _file(folder, "archive", data) as path, contextlib.suppress(DataError):
        read_members(path, ("train", "test"))


def image(data: bytes, folder: Path) -> None:
    with _file(folder, "image.png", data) as path, contextlib.suppress(DataError):
        decode(path, "here")


def signed_checkpoint(data: bytes, folder: Path) -> None:
    """A checkpoint whose digest is right, whatever else is wrong."""
    found = checkpoint._DIGEST.search(data)
    if found is not None:
        data = data[: found.start(1)] + checkpoint._digest(data, found.start(1)) + data[found.end(1) :]
    with _file(folder, "000001.safetensors", data) as path, contextlib.suppress(CheckpointError):
        checkpoint.load(path)


def config(data: bytes, folder: Path) -> None:
    with _file(folder, "config.json", data), contextlib.suppress(ValueError):
        read_config(folder)


def results(data: bytes, folder: Path) -> None:
    with _file(folder, "results.json", data) as path, contextlib.suppress(ValueError):
        records._read_results(path)


def log(data: bytes, folder: Path) -> None:
    with _file(folder, "metrics.jsonl", data) as path:
        notes: list[str] = []
        task_logs.read(path, notes)
        assert sum(map(len, notes)) < 10_000


def register(data: bytes, folder: Path) -> None:
    with contextlib.suppress(ValueError):
        TaskRegister().decode(torch.frombuffer(bytearray(data or b" "), dtype=torch.uint8))


def json_(data: bytes, folder: Path) -> None:
    with contextlib.suppress(ValueError):
        json_text.parse(data)


TARGETS: tuple[Callable[[bytes, Path], None], ...] = (
    pickle_, batch, idx_, idx_gz, archive, image, signed_checkpoint, config, results, log, register, json_,
)  # fmt: skip


def read(member: bytes, folder: Path) -> None:
    """Read ``member``, whose first byte chooses the reader."""
    if member:
        TARGETS[member[0] % len(TARGETS)](member[1:], folder)
