"""The commands start without PyTorch, which takes longer to import than all that ``--help`` needs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


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


def test_an_interruption_while_pytorch_is_imported_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise KeyboardInterrupt")
    result = run("-m", "wsn_fast.train", "train", path=tmp_path)
    assert (result.returncode, result.stderr) == (130, "wsn-fast: interrupted\n")
