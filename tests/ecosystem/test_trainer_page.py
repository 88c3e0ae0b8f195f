"""The script of docs/how-to/trainer.md: it is killed in the middle of its second task and started again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from processes import needs_gloo

pytestmark = pytest.mark.ecosystem

ROOT = Path(__file__).parents[2]
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
SAYS = "logits of task 1: "


def start(folder: Path, *launcher: str, slow: bool = False, **more: str) -> subprocess.Popen[str]:
    page = (ROOT / "docs" / "how-to" / "trainer.md").read_text("utf-8")
    script = page.split("```python\n")[1].split("```")[0]
    if slow:
        script = script.replace("        return {", "        __import__('time').sleep(0.004)\n        return {")
    folder.mkdir(exist_ok=True)
    (folder / "train.py").write_text(script)
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | more
    command = [sys.executable, "-W", "ignore", *launcher, "train.py"]
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def said(process: subprocess.Popen[str]) -> list[str]:
    """What a script says of the logits of its first task."""
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return [line.split(SAYS)[1][:12] for line in output.splitlines() if SAYS in line]


def kill_in_the_second_task(process: subprocess.Popen[str], folder: Path) -> None:
    end = time.monotonic() + 300
    while not [*(folder / "runs" / "task-2").glob("checkpoint-*/trainer_state.json")]:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()


def test_a_killed_script_ends_as_one_that_was_not_killed(tmp_path: Path) -> None:
    whole = start(tmp_path / "whole")
    killed = start(tmp_path / "killed", slow=True)
    kill_in_the_second_task(killed, tmp_path / "killed")
    after_first = torch.load(tmp_path / "killed" / "runs" / "wsn.pt")
    again = said(start(tmp_path / "killed"))
    assert again == said(whole) != []
    one, other = (torch.load(tmp_path / name / "runs" / "wsn.pt") for name in ("whole", "killed"))
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
    masks = [name for name in one if name.endswith("_masks")]
    assert all(len(after_first[name]) == 1 and len(one[name]) == 2 for name in masks)


@needs_gloo
def test_two_processes_keep_the_first_task(tmp_path: Path) -> None:
    first, second = said(start(tmp_path, *TORCHRUN, ACCELERATE_USE_CPU="true"))
    assert first == second
    state = json.loads((tmp_path / "runs" / "task-2" / "checkpoint-32" / "trainer_state.json").read_text())
    assert state["global_step"] == 32, "256 samples, twice, in batches of 8 by two processes"


@needs_gloo
def test_two_processes_that_would_train_alone_say_so(tmp_path: Path) -> None:
    output, _ = start(tmp_path, *TORCHRUN).communicate(timeout=300)
    assert "2 processes were started, and Trainer would train in each of them alone" in output
    assert not (tmp_path / "runs" / "wsn.pt").exists()
