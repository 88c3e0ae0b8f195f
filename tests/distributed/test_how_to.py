"""The scripts of the page on several processes run under torchrun as they stand there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import torch
from processes import needs_gloo

ROOT = Path(__file__).parents[2]
pytestmark = needs_gloo


def said_by(script: int, folder: Path) -> list[tuple[str, str]]:
    """The processes and tasks of which a script of the page prints results, sorted. It runs in ``folder``."""
    page = (ROOT / "docs" / "how-to" / "distributed.md").read_text("utf-8")
    (folder / "train.py").write_text(re.findall(r"```python\n(.*?)```", page, re.DOTALL)[script])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train.py"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    ran = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    return sorted(re.findall(r"process (\d): task (\d), \d+% right", ran.stdout))


def test_the_script_with_ddp_runs_under_torchrun(tmp_path: Path) -> None:
    assert said_by(0, tmp_path) == [("0", "0"), ("1", "1")]
    assert torch.load(tmp_path / "model.pt")["model.0.weight_masks"].shape[0] == 3


def test_the_script_with_shards_runs_under_torchrun(tmp_path: Path) -> None:
    assert said_by(1, tmp_path) == [(process, task) for process in "01" for task in "012"]
    assert torch.load(tmp_path / "model.pt")["model.0.weight_masks"].shape == (3, 160)
