"""Files that version 0.1.0 wrote load today, and continue as they would have then."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from wsn_fast import WSN, convert
from wsn_fast.optim import SubnetAdamW
from wsn_fast.train.command_line import main

GOLDEN = Path(__file__).parents[1] / "golden"


class Net(nn.Module):
    """The model of ``model.pt``."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4 * 8 * 8, 12)
        self.gn = nn.LayerNorm(12)
        self.classifier = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.conv(x)))
        return self.classifier(torch.relu(self.gn(self.fc(x.flatten(1)))))


@pytest.fixture
def saved() -> dict[str, Any]:
    return torch.load(GOLDEN / "model.pt")


@pytest.fixture
def wsn(saved: dict[str, Any]) -> WSN:
    wsn = WSN(convert(Net(), density={"conv": 0.5, "*": 0.3}, heads="classifier"))
    wsn.load_state_dict(saved["model"])
    return wsn


def test_the_state_is_kept_to_the_bit(wsn: WSN, saved: dict[str, Any]) -> None:
    state = wsn.state_dict()
    assert state.keys() == saved["model"].keys()
    assert [name for name, tensor in state.items() if not torch.equal(tensor, saved["model"][name])] == []


def test_the_promise_of_then_holds(wsn: WSN) -> None:
    assert wsn.verify().tasks == ["a", 7] and wsn.current_task == "third"


# Another processor may multiply in another order: what no rounding touches is compared bitwise above.
@pytest.mark.parametrize("task", ["a", 7, "third"])
def test_the_tasks_compute_what_they_did(wsn: WSN, saved: dict[str, Any], task: str | int) -> None:
    wsn.eval()
    with torch.no_grad(), wsn.use_task(task):
        torch.testing.assert_close(wsn(saved["x"]), saved["logits"][task])


def test_training_goes_on(wsn: WSN, saved: dict[str, Any]) -> None:
    optimizer = SubnetAdamW(wsn, lr=1e-2, weight_decay=1e-2)
    optimizer.load_state_dict(saved["optimizer"])
    nn.functional.cross_entropy(wsn.train()(saved["x"]), saved["y"]).backward()
    optimizer.step()
    wsn.end_task()
    with torch.no_grad():
        torch.testing.assert_close(wsn.eval()(saved["x"]), saved["logits"]["third, a step later"])
    wsn.verify()


def test_a_run_is_measured_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = shutil.copytree(GOLDEN / "run", tmp_path / "run")
    assert main(["eval", str(run)]) == 0, capsys.readouterr().err


def test_a_run_that_was_killed_is_resumed(tmp_path: Path) -> None:
    run = shutil.copytree(GOLDEN / "cut", tmp_path / "cut")
    assert main(["train", "--resume", str(run)]) == 0
    now, then = (json.loads(path.read_text("utf-8")) for path in (run / "results.json", GOLDEN / "cut_results.json"))
    assert now.keys() == then.keys() and now["bwt"] == then["bwt"] == 0.0
    assert now["acc"] == pytest.approx(then["acc"], abs=1.5)  # a sample or two, on another processor
