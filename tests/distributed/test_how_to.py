"""The scripts of the pages on several processes run under torchrun as they stand there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from processes import needs_gloo

ROOT = Path(__file__).parents[2]
pytestmark = needs_gloo


def scripts(page: str) -> list[str]:
    """The Python code of a page, by its blocks."""
    text = (ROOT / "docs" / "how-to" / page).read_text("utf-8")
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def run(folder: Path, *command: str) -> str:
    """What a command of Python prints in ``folder``."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    whole = [sys.executable, *command]
    ran = subprocess.run(whole, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def said_by(script: int, folder: Path) -> list[tuple[str, str]]:
    """The processes and tasks of which a script of the page prints results, sorted. It runs in ``folder``."""
    (folder / "train.py").write_text(scripts("distributed.md")[script])
    return sorted(re.findall(r"process (\d): task (\d), \d+% right", run(folder, *TORCHRUN, "train.py")))


def test_the_script_with_ddp_runs_under_torchrun(tmp_path: Path) -> None:
    assert said_by(0, tmp_path) == [("0", "0"), ("1", "1")]
    assert torch.load(tmp_path / "model.pt")["model.0.weight_masks"].shape[0] == 3


def test_the_script_with_shards_runs_under_torchrun(tmp_path: Path) -> None:
    assert said_by(1, tmp_path) == [(process, task) for process in "01" for task in "012"]
    assert torch.load(tmp_path / "model.pt")["model.0.weight_masks"].shape == (3, 160)


@pytest.mark.ci
@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_a_gpt_learns_two_tasks_and_one_process_loads_its_checkpoint(way: str, tmp_path: Path) -> None:
    for name, code in zip(("gpt.py", "train.py", "load.py"), scripts("gpt.md"), strict=True):
        (tmp_path / name).write_text(code)
    trained = run(tmp_path, *TORCHRUN, "train.py", way)
    losses = [float(loss) for loss in re.findall(r"task \d: loss (\S+)", trained)]
    assert len(losses) == 2 and max(losses) < 0.1  # ln 64 = 4.2 before training
    assert run(tmp_path, "load.py", way) == trained
