"""How a command starts and how it is stopped. It starts without PyTorch, which takes longer to import than all that
``--help`` needs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RUN = ("train", "permuted", "--tasks", "1", "--epochs", "1", "--device", "cpu")


def run(*words: str, path: Path = ROOT, stdout: int = subprocess.PIPE) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(path), str(ROOT)]), "PYTHONUNBUFFERED": ""}
    command = [sys.executable, *words]
    return subprocess.run(command, env=environment, stdout=stdout, stderr=subprocess.PIPE, text=True, check=False)


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ("train --help", 0),
        ("train --version", 0),
        ("train train --help", 0),
        ("train eval --help", 0),
        ("train report --help", 0),
        ("train train --densty 0.3", 2),
        ("doctor --help", 0),
    ],
)
def test_pytorch_is_not_imported(words: str, code: int) -> None:
    module, *arguments = words.split()
    result = run("-X", "importtime", "-m", f"wsn_fast.{module}", *arguments)
    imported = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
    assert result.returncode == code
    assert "argparse" in imported
    assert {"torch", "numpy", "matplotlib"} & imported == set()


def test_a_reader_that_has_gone_is_no_traceback() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    result = run("-m", "wsn_fast.train", "--help", stdout=writing)
    os.close(writing)
    assert (result.returncode, result.stderr) == (141, "")


@pytest.mark.slow  # signals at times that depend on how busy the machine is
@pytest.mark.parametrize("share", [0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 0.97])
def test_an_interruption_at_any_time_is_one_line(share: float, whole_run: float, tmp_path: Path) -> None:
    """A second one a moment later changes nothing."""
    process = subprocess.Popen(
        [sys.executable, "-m", "wsn_fast.train", *RUN, "--out", str(tmp_path / "run")],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    time.sleep(share * whole_run)
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(0.005)
    error = process.communicate()[1]
    if process.returncode == 0:
        pytest.skip("the run was faster than the one before")
    # A shell shows 130 for both. Where Python has not begun or has ended, it says nothing.
    assert process.returncode in (130, -signal.SIGINT), error
    if process.returncode == 130 or error:
        assert error.startswith("wsn-fast: interrupted") and error.count("\n") == 1, error


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> float:
    """How long a run takes that nobody interrupts, in seconds."""
    began = time.monotonic()
    assert run("-m", "wsn_fast.train", *RUN, "--out", str(tmp_path_factory.mktemp("whole") / "run")).returncode == 0
    return time.monotonic() - began


def test_training_goes_on_when_nobody_reads_any_more(tmp_path: Path) -> None:
    """As behind ``| head -1``."""
    reading, writing = os.pipe()
    os.close(reading)
    result = run("-m", "wsn_fast.train", *RUN, "--out", str(tmp_path / "run"), stdout=writing)
    os.close(writing)
    assert (result.returncode, result.stderr) == (0, "")
    assert (tmp_path / "run" / "results.json").is_file()


def test_an_interruption_while_pytorch_is_imported_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise KeyboardInterrupt")
    result = run("-m", "wsn_fast.train", "train", path=tmp_path)
    assert (result.returncode, result.stderr) == (130, "wsn-fast: interrupted\n")
