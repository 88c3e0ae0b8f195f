"""The script of the page on several processes runs under torchrun as it stands there."""

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


def test_the_script_runs_under_torchrun(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "how-to" / "distributed.md").read_text("utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (tmp_path / "train.py").write_text(code)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train.py"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    said = sorted(re.findall(r"process (\d): task (\d), \d+% right", ran.stdout))
    assert said == [("0", "0"), ("1", "1")]
    assert torch.load(tmp_path / "model.pt")["model.0.weight_masks"].shape[0] == 3
