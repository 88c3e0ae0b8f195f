"""What the tests of the driver share: a small finished run."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from wsn_fast.train import pace
from wsn_fast.train.command_line import main


@pytest.fixture(autouse=True, scope="session")
def _there_is_a_checkpoint_after_each_epoch() -> Iterator[None]:
    """Tests count on it. In processes of their own runs have ``--checkpoint-seconds 0``."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pace, "RARELY", 0)
        yield


@pytest.fixture(autouse=True, scope="module")
def _threads_are_put_back() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tasks of two epochs on the digits. Tests must not write there: see ``copy``."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    settings = ["--tasks", "2", "--epochs", "2", "--batch-size", "128", "--device", "cpu", "--quiet"]
    assert main(["train", "permuted", *settings, "--out", str(folder)]) == 0
    return folder


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "copy"))
