"""Avalanche's checkpoints with the plugin, and the script of its page; ``.ci/ecosystem`` runs this."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

if find_spec("avalanche") is None:
    pytest.skip('needs Avalanche: pip install "wsn-fast[avalanche]"', allow_module_level=True)

import dill
import quiet_avalanche  # noqa: F401 - first of all
from avalanche.checkpointing import maybe_load_checkpoint, save_checkpoint
from avalanche_problem import labelled, logits, model, strategy_of

ROOT = Path(__file__).parents[2]

pytestmark = [pytest.mark.ecosystem, pytest.mark.filterwarnings("default", "error:::wsn_fast")]


@pytest.mark.parametrize("optimizer", ["AdamW", "one pass, two groups"])
def test_a_resumed_strategy_ends_as_one_that_was_not_interrupted(
    optimizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(dill.settings, "byref", True)
    stream, path = labelled().train_stream, tmp_path / "checkpoint.pkl"
    strategy = strategy_of(model(), optimizer)
    strategy.train(stream[0])
    save_checkpoint(strategy, path)
    before = logits(strategy.model, 0)
    strategy.train(stream[1:])

    resumed, trained = maybe_load_checkpoint(strategy_of(model(), optimizer), path)
    assert torch.equal(logits(resumed.model, 0), before)
    resumed.train(stream[trained:])
    assert resumed.model.tasks == [0, 1, 2]
    assert getattr(resumed.optimizer, "one_pass", False) == (optimizer != "AdamW")
    expected, found = strategy.model.state_dict(), resumed.model.state_dict()
    assert list(expected) == list(found)
    for name, tensor in expected.items():
        assert torch.equal(torch.as_tensor(found[name]), torch.as_tensor(tensor)), name


# --- the page --------------------------------------------------------------------------------------------------------
(SCRIPT,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/how-to/avalanche.md").read_text("utf-8"), re.DOTALL)
DIES = """
import os, signal
from avalanche.training import Naive

forward = Naive.forward

def dies(strategy):
    if strategy.is_training and strategy.clock.train_exp_counter == 1 and strategy.clock.train_exp_iterations == 20:
        os.kill(os.getpid(), signal.SIGKILL)
    return forward(strategy)

Naive.forward = dies
"""
SAVES_FIRST = """
def first():
    with torch.no_grad(), strategy.model.use_task(0):
        return strategy.model.eval()(torch.ones(5, 20))

if trained:
    torch.save((trained, first()), "then.pt")
for experience"""
SAVES_END = '\ntorch.save((first(), strategy.model.state_dict()), "end.pt")\n'


def run(folder: Path, script: str) -> subprocess.CompletedProcess[str]:
    folder.mkdir(exist_ok=True)
    (folder / "train.py").write_text(script.replace("\nfor experience", SAVES_FIRST, 1) + SAVES_END)
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-W", "ignore", "train.py"]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def test_the_script_of_the_page_survives_a_kill(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", SCRIPT)
    assert whole.returncode == 0, whole.stderr
    killed = run(tmp_path / "killed", DIES + SCRIPT)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    resumed = run(tmp_path / "killed", SCRIPT)
    assert resumed.returncode == 0, resumed.stderr

    logits_of_whole, expected = torch.load(tmp_path / "whole" / "end.pt", weights_only=False)
    trained, logits_then = torch.load(tmp_path / "killed" / "then.pt", weights_only=False)
    logits_at_end, found = torch.load(tmp_path / "killed" / "end.pt", weights_only=False)
    assert trained == 1
    assert torch.equal(logits_then, logits_at_end)
    assert torch.equal(logits_then, logits_of_whole)
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert torch.equal(torch.as_tensor(found[name]), torch.as_tensor(tensor)), name
