"""A run of several processes that was stopped goes on: with as many processes to the bit, with more or fewer of them up
to rounding, and it says so. Each of them can measure it and report it."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from processes import needs_gloo
from ranks import Ended, drive
from same_end import assert_same_end

from wsn_fast.train import checkpoint, records

ROOT = Path(__file__).parents[2]
pytestmark = needs_gloo
# 7 steps in an epoch, the last one of 20 samples: three processes have 7, 7 and 6 of it.
SMALL = ["permuted", "--tasks", "2", "--epochs", "3", "--batch-size", "213", "--device", "cpu", "--lr", "0.01"]
SMALL += ["--checkpoint-seconds", "0", "--lr-patience", "1", "--preset", "clarena"]
LOST = "wsn-fast: error: another process of this run has failed or was killed; what started the processes says which"
STEPS = 2 * 3 * 7
NETS = {"float64": "driver_cases:plain", "stateful": "driver_cases:stateful"}


class Runs:
    """Makes undisturbed runs, once each."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._made = folder, {}  # type: ignore[var-annotated]

    def __call__(self, net: str, world: int) -> Path:
        if (net, world) not in self._made:
            folder = self._folder / f"{net}{world}"
            folder.mkdir()
            ended = drive(folder, world, "train", *SMALL, "--out", folder / "run", "--quiet", prepare=NETS[net])
            assert ended.codes == [0] * world, ended
            self._made[net, world] = folder / "run"
        return self._made[net, world]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("undisturbed"))


def stopped(folder: Path, net: str, world: int, which: int, steps: int) -> Path:
    """A run of which one process was killed after so many steps."""
    arguments = ("train", *SMALL, "--out", folder / "run", "--quiet")
    ended = drive(folder, world, *arguments, prepare="driver_cases:killed", using=[net, which, steps])
    assert ended.codes[which] == -signal.SIGKILL, ended
    if world > 1:  # all others stop, and one of them says so
        assert {code for rank, code in enumerate(ended.codes) if rank != which} == {2}, ended
        assert ended.lines == [f"{LOST}. `wsn-fast train --resume {folder / 'run'}` continues"]
    return folder / "run"


def resumed(folder: Path, net: str, world: int) -> Ended:
    ended = drive(folder.parent, world, "train", "--resume", folder, prepare=NETS[net])
    assert ended.codes == [0] * world, ended
    return ended


@pytest.mark.parametrize("world", [pytest.param(2, marks=pytest.mark.ci), 3])
def test_as_many_processes_go_on_to_the_bit(undisturbed: Runs, tmp_path: Path, world: int) -> None:
    """With batch norm and dropout. After its first step PyTorch's wrapper sums three processes in another order."""
    moments = random.Random(world)
    folder = stopped(tmp_path, "stateful", world, moments.randrange(world), moments.randint(STEPS // 2, STEPS))
    ended = resumed(folder, "stateful", world)
    assert_same_end(folder, undisturbed("stateful", world))
    assert "goes on with" not in ended.said[0]


@pytest.mark.parametrize(("before", "now"), [(2, 1), (2, 3), pytest.param(1, 2, marks=pytest.mark.ci)])
def test_another_number_of_processes_goes_on_up_to_rounding(
    undisturbed: Runs, tmp_path: Path, before: int, now: int
) -> None:
    folder = stopped(tmp_path, "float64", before, before - 1, STEPS // 2 + 3)
    ended = resumed(folder, "float64", now)
    number = {1: "1 process", 2: "2 processes", 3: "3 processes"}
    said = f"this run was trained by {number[before]} and goes on with {number[now]}: results may differ by rounding"
    assert ended.said[0].splitlines()[0] == said
    ours, theirs = (checkpoint.load_from(x / "checkpoint").tensors for x in (folder, undisturbed("float64", 1)))
    for name, tensor in theirs.items():
        if name.endswith("_masks"):
            assert torch.equal(ours[name], tensor), name
        elif name not in ("rng/cpu", "model/_extra_state"):
            assert torch.allclose(ours[name], tensor, rtol=1e-9, atol=1e-11), name


def test_what_sees_a_part_of_each_batch_is_named(tmp_path: Path) -> None:
    folder = stopped(tmp_path, "stateful", 2, 0, STEPS // 2 + 3)
    said = resumed(folder, "stateful", 1).said[0].splitlines()[0]
    assert said.endswith("by rounding, and by more because features.2 sees what each process has of a batch")


def test_the_log_of_a_run_says_how_many_processes_trained_each_epoch(tmp_path: Path) -> None:
    folder = stopped(tmp_path, "float64", 2, 1, STEPS // 2 + 10)  # in the second epoch of the second task
    resumed(folder, "float64", 1)
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    assert [line["processes"] for line in lines if line["kind"] == "epoch"] == [2, 2, 2, 2, 1, 1]


@pytest.mark.parametrize(("made", "measured"), [(2, 1), (2, 3), pytest.param(1, 2, marks=pytest.mark.ci)])
def test_any_number_of_processes_measures_the_same(undisturbed: Runs, tmp_path: Path, made: int, measured: int) -> None:
    folder = undisturbed("float64", made)
    ended = drive(tmp_path, measured, "eval", folder, prepare="driver_cases:plain", using=[100])
    assert ended.codes == [0] * measured, ended
    assert ended.said[0].endswith(f"every number is that of {folder / 'results.json'}\n")
    assert ended.said[1:] == [""] * (measured - 1) and ended.lines == []


def test_a_number_that_differs_is_said_once(undisturbed: Runs, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(undisturbed("float64", 2), tmp_path / "run"))
    path = folder / "results.json"
    path.write_text(path.read_text().replace('"acc": ', '"acc": 1'))
    ended = drive(tmp_path, 2, "eval", folder, prepare="driver_cases:plain")
    assert ended.codes == [1, 1]
    assert len(ended.lines) == 1 and ended.lines[0].startswith("wsn-fast: differs: acc")


def test_a_folder_without_a_run_is_one_error(tmp_path: Path) -> None:
    ended = drive(tmp_path, 2, "eval", tmp_path / "run")
    assert 2 in ended.codes and len(ended.lines) == 1 and "holds no run" in ended.lines[0], ended


def test_a_report_is_written_by_the_first_process(undisturbed: Runs, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(undisturbed("float64", 2), tmp_path / "run"))
    ended = drive(tmp_path, 2, "report", folder)
    assert ended.codes == [0, 0] and ended.said[1] == "", ended
    assert "all of it in" in ended.said[0] and (folder / "report.html").stat().st_size > 1000
    assert [task.epochs for task in records.read(str(folder)).tasks] == [3, 3]


class Killed(NamedTuple):
    """An undisturbed run of two processes, and the moments of each place of each."""

    folder: Path
    moments: list[dict[str, int]]


# --- kills at any moment ----------------------------------------------------------------------------------
KILLED = [*SMALL, "--optimizer", "adamw", "--weight-decay", "0.01", "--quiet"]


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> Killed:
    folder = tmp_path_factory.mktemp("counted")
    using = [0, "anywhere", 0, str(folder / "counts")]
    ended = drive(folder, 2, "train", *KILLED, "--out", folder / "run", prepare="driver_cases:dying", using=using)
    assert ended.codes == [0, 0], ended
    every: list[dict[str, Any]] = [json.loads((folder / f"counts.{rank}").read_text()) for rank in (0, 1)]
    return Killed(folder / "run", every)


def kill_and_resume(counted: Killed, tmp_path: Path, seed: int) -> None:
    """SIGKILL for the first process, the second one or both, in turn, at a random moment of a place; then go on."""
    draw, which = random.Random(seed), seed % 2
    place = draw.choice([place for place, moments in counted.moments[which].items() if moments])
    using = [which, place, draw.randint(1, counted.moments[which][place]), str(tmp_path / "counts")]
    folder, both = tmp_path / "run", seed % 3 == 2
    arguments = ("train", *KILLED, "--out", folder)
    ended = drive(tmp_path, 2, *arguments, prepare="driver_cases:dying", using=using, one_kills_all=both)
    assert ended.codes[which] == -signal.SIGKILL, (using, ended)
    other = ended.codes[1 - which]
    if both:
        assert other in (-signal.SIGKILL, 2), (using, ended)
    elif other == 2:
        [line] = ended.lines
        assert line.startswith(LOST), (using, line)
    else:  # it had not met the other one yet, or had no more to do
        assert other in (0, -signal.SIGTERM) and not ended.lines, (using, ended)
    begun = (folder / "config.json").exists()
    again = ["--resume", folder, "--quiet"] if begun else [*KILLED, "--out", folder]
    ended = drive(tmp_path, 2, "train", *again)
    assert ended.codes == [0, 0] and not ended.lines, (using, ended)
    assert_same_end(folder, counted.folder)


KILLED_UNDER_TORCHRUN = """
import os, sys
sys.path.insert(0, {support!r})
import driver_cases
driver_cases.killed(int(os.environ["RANK"]), "float64", 1, 9)
from wsn_fast.train.command_line import main
sys.exit(main())
"""


@pytest.mark.ci
def test_torchrun_stops_the_others_and_one_says_so(undisturbed: Runs, tmp_path: Path) -> None:
    script, folder = tmp_path / "train.py", tmp_path / "run"
    script.write_text(KILLED_UNDER_TORCHRUN.format(support=str(ROOT / "tests" / "support")))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [*torchrun, "train", *SMALL, "--out", str(folder), "--quiet"]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 1
    said = [line for line in ran.stderr.splitlines() if line.startswith("wsn-fast: ")]
    assert said == [f"{LOST}. `wsn-fast train --resume {folder}` continues"], ran.stderr
    assert "Signal 9 (SIGKILL)" in ran.stderr  # torchrun's own report
    resumed(folder, "float64", 2)
    assert_same_end(folder, undisturbed("float64", 2))


# Seed 4 dies within a task, and its checkpoint has the state of an optimizer. Seed 2 kills both.
@pytest.mark.parametrize("seed", [4, *(pytest.param(seed, marks=pytest.mark.ci) for seed in (1, 2))])
def test_a_run_killed_at_a_random_moment_ends_the_same(counted: Killed, tmp_path: Path, seed: int) -> None:
    kill_and_resume(counted, tmp_path, seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_twenty_kills(counted: Killed, tmp_path: Path, seed: int) -> None:
    kill_and_resume(counted, tmp_path, seed)
