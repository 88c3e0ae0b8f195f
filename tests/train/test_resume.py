"""A run killed at any moment and resumed ends as if nothing had happened."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from same_end import assert_same_end
from stopping_console import Stop, StoppingConsole
from torch import Tensor, nn

from wsn_fast.continual.wsn import WSN
from wsn_fast.train import checkpoint, data, loop, nets, run
from wsn_fast.train.command_line import main
from wsn_fast.train.config import resolve
from wsn_fast.train.processes import Processes
from wsn_fast.train.report import Console
from wsn_fast.train.run import Run
from wsn_fast.train.samples import Samples

ROOT = Path(__file__).parents[2]
OPTIONS = ["--tasks", "3", "--epochs", "4", "--batch-size", "64", "--preset", "clarena", "--optimizer", "adamw"]
OPTIONS += ["--checkpoint-seconds", "0", "--weight-decay", "0.01", "--lr-patience", "1", "--device", "cpu", "--quiet"]


# --- real kills, in processes of their own ----------------------------------------------------------------
def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "wsn_fast.train", "train", *arguments]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    subprocess.run(command("permuted", *OPTIONS, "--out", str(folder)), env=environment(), check=True)
    return folder


# Dies so many seconds after the n-th line of its log was begun. They are seconds of its own CPU time, so that a busy
# machine does not let it end before.
KILLED_BY_THE_CLOCK = """
import signal, sys
from wsn_fast.train import folder
from wsn_fast.train.command_line import main

lines, seconds, arguments = int(sys.argv[1]), float(sys.argv[2]), sys.argv[3:]
open_to_append = folder.open_to_append

def counted(path):
    global lines
    lines -= 1
    if not lines:
        signal.setitimer(signal.ITIMER_PROF, seconds)  # SIGPROF: no code of Python runs, as with SIGKILL
    return open_to_append(path)

folder.open_to_append = counted
main(arguments)
"""


def test_a_run_killed_at_any_moment_ends_the_same(undisturbed: Path, tmp_path: Path) -> None:
    moments = random.Random(1)
    folder = tmp_path / "run"
    arguments = ["permuted", *OPTIONS, "--out", str(folder)]
    for _ in range(2):
        when = [str(moments.randint(2, 5)), str(moments.uniform(0.001, 0.05))]
        code = [sys.executable, "-c", KILLED_BY_THE_CLOCK, *when, "train", *arguments]
        assert subprocess.run(code, env=environment(), check=False).returncode == -signal.SIGPROF
        arguments = ["--resume", str(folder), "--quiet"]
    assert not (folder / "results.json").exists()
    subprocess.run(command(*arguments), env=environment(), check=True)
    assert_same_end(folder, undisturbed)


# Dies in the n-th checkpoint it writes: while the bytes go out, or between the temporary file and its new name.
KILLED_IN_A_WRITE = """
import os, signal, sys
from wsn_fast.train import checkpoint
from wsn_fast.train.command_line import main

function, number, arguments = sys.argv[1], int(sys.argv[2]), sys.argv[3:]
original, save = getattr(os, function), checkpoint.save
calls = 0

def dying(*args):
    if function == "fsync":
        os.ftruncate(args[0], os.fstat(args[0]).st_size // 2)
    os.kill(os.getpid(), signal.SIGKILL)

def counted(*args):
    global calls
    calls += 1
    if calls == number:
        setattr(os, function, dying)
    return save(*args)

checkpoint.save = counted
main(arguments)
"""


def test_a_run_killed_inside_a_checkpoint_write_ends_the_same(undisturbed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    arguments = ["permuted", *OPTIONS, "--out", str(folder)]
    for function, number in (("replace", 7), ("fsync", 3)):
        code = [sys.executable, "-c", KILLED_IN_A_WRITE, function, str(number), "train", *arguments]
        assert subprocess.run(code, env=environment(), check=False).returncode == -signal.SIGKILL
        left = sorted(path.name for path in (folder / "checkpoint").iterdir())
        assert [name[-4:] for name in left] == ["sors", "sors", ".tmp"]
        arguments = ["--resume", str(folder), "--quiet"]
    subprocess.run(command(*arguments), env=environment(), check=True)
    assert_same_end(folder, undisturbed)


# --- stops at every kind of moment, in this process -------------------------------------------------------
class Stateful(nn.Module):
    """Everything that has state of its own: batch statistics, and dropout, which draws from the global generator."""

    def __init__(self, inputs: int, classes: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Flatten(), nn.Linear(inputs, 40), nn.BatchNorm1d(40), nn.ReLU(), nn.Dropout(0.2)
        )
        self.head = nn.Linear(40, classes)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.features(x))
        return out


@pytest.fixture(scope="module")
def stateful(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[dict[str, Any], Path]]:
    """Settings of a run with that net, and the folder of an undisturbed one: 3 tasks of 4 epochs of 11 steps.

    The validation loss has its sign changed, so that an early epoch is the best and lr falls.
    """

    def evaluate(wsn: WSN, samples: Samples, processes: Processes, *rest: Any) -> tuple[float, float]:
        loss, accuracy = loop.evaluate(wsn, samples, processes, *rest)
        return -loss, accuracy

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "evaluate", evaluate)
        patch.setattr(nets, "build", lambda name, shape, classes: Stateful(64, classes))
        settings = {"tasks": 3, "epochs": 4, "batch_size": 120, "preset": "clarena", "lr_patience": 1, "device": "cpu"}
        folder = tmp_path_factory.mktemp("stateful") / "run"
        Run.start(resolve(**settings, out=str(folder)), Console(quiet=True)).finish()
        yield settings, folder


@pytest.mark.parametrize(
    "way",
    [{"one_pass": False}, {"one_pass": True}, *({"one_pass": True, "moments": kind} for kind in ("8bit", "bfloat16"))],
    ids=["torch", "one-pass", "8bit", "bfloat16"],
)
@pytest.mark.parametrize(
    ("optimizer", "seconds"),  # 0 saves after every epoch, 1e9 after every task
    [
        ("adam", 0.0),
        ("sgd", 1e9),
        pytest.param("adam", 1e9, marks=pytest.mark.ci),
        pytest.param("sgd", 0.0, marks=pytest.mark.ci),
    ],
)
def test_stops_at_seeded_steps(
    stateful: tuple[dict[str, Any], Path], tmp_path: Path, optimizer: str, seconds: float, way: dict[str, Any]
) -> None:
    moments = random.Random(f"{optimizer} {seconds}")
    settings = {**stateful[0], "optimizer": optimizer, "checkpoint_seconds": seconds, **way}
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    Run.start(resolve(**settings, out=str(straight)), Console(quiet=True)).finish()
    with pytest.raises(Stop):
        Run.start(resolve(**settings, out=str(stopped)), StoppingConsole(moments.randint(1, 60))).finish()
    for _ in range(3):
        torch.manual_seed(moments.randint(0, 99))  # what another process would start with
        with pytest.raises(Stop):
            Run.resume(stopped, StoppingConsole(moments.randint(1, 40))).finish()
    Run.resume(stopped, Console(quiet=True)).finish()
    assert_same_end(stopped, straight)


def stopped_run(stateful: tuple[dict[str, Any], Path], folder: Path, steps: int = 70) -> Path:
    with pytest.raises(Stop):
        Run.start(resolve(**stateful[0], out=str(folder)), StoppingConsole(steps)).finish()
    return folder


def test_a_run_stopped_before_its_first_checkpoint_starts_over(
    stateful: tuple[dict[str, Any], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save(*_: object) -> None:
        raise Stop

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(checkpoint, "save", save)
        Run.start(resolve(**stateful[0], out=str(tmp_path / "run")), Console(quiet=True))
    Run.resume(tmp_path / "run", Console(quiet=True)).finish()
    assert_same_end(tmp_path / "run", stateful[1])


def test_a_damaged_checkpoint_is_named_and_the_one_before_leads_to_the_same_end(
    stateful: tuple[dict[str, Any], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = stopped_run(stateful, tmp_path / "run")
    *_, before, newest = sorted((folder / "checkpoint").iterdir())
    newest.write_bytes(newest.read_bytes()[:-100])
    assert main(["train", "--resume", str(folder)]) == 2
    error = capsys.readouterr().err
    assert f"{newest} is damaged" in error
    assert f"--checkpoint {before.name}" in error
    assert main(["train", "--resume", str(folder), "--checkpoint", before.name, "--quiet"]) == 0
    assert_same_end(folder, stateful[1])


def test_a_full_disk_stops_a_run_that_can_go_on(
    stateful: tuple[dict[str, Any], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = stopped_run(stateful, tmp_path / "run")
    good = sorted(path.name for path in (folder / "checkpoint").iterdir())

    def replace(source: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        assert main(["train", "--resume", str(folder), "--quiet"]) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert sorted(path.name for path in (folder / "checkpoint").iterdir()) == good
    assert main(["train", "--resume", str(folder), "--quiet"]) == 0
    assert_same_end(folder, stateful[1])


def test_changed_data_are_refused(
    stateful: tuple[dict[str, Any], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = stopped_run(stateful, tmp_path / "run")
    digits = data.load("digits")
    digits.test_x[0, 0, 0, 0] += 1
    changed = data.Dataset("digits", digits.train_x, digits.train_y, digits.test_x, digits.test_y, 10)
    monkeypatch.setattr(data, "load", lambda name, folder, shows: changed)
    with pytest.raises(ValueError, match=f"data: .*got {changed.fingerprint}"):
        Run.resume(folder, Console(quiet=True))


def test_changed_settings_are_refused(stateful: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    folder = stopped_run(stateful, tmp_path / "run")
    path = folder / "config.json"
    path.write_text(path.read_text().replace('"epochs": 4', '"epochs": 5'))
    with pytest.raises(ValueError, match=r"config\.json: .*changed: epochs"):
        Run.resume(folder, Console(quiet=True))


def test_a_run_may_move_to_another_folder(stateful: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    folder = stopped_run(stateful, tmp_path / "run").rename(tmp_path / "moved")
    Run.resume(folder, Console(quiet=True)).finish()
    assert_same_end(folder, stateful[1])
    assert not (tmp_path / "run").exists()


def test_resuming_a_finished_run_writes_what_is_missing_and_changes_nothing(
    stateful: tuple[dict[str, Any], Path], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    Run.start(resolve(**stateful[0], out=str(folder)), Console(quiet=True)).finish()
    (folder / "results.json").unlink()
    Run.resume(folder, Console(quiet=True)).finish()
    assert_same_end(folder, stateful[1])


def test_a_folder_without_a_run_cannot_be_resumed(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no run"):
        Run.resume(tmp_path, Console(quiet=True))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"config": 3}', '{"config": {}}'])
def test_a_damaged_config_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json is damaged"):
        Run.resume(tmp_path, Console(quiet=True))
