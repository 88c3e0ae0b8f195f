"""Several processes make one run: they train as one process does, the first one writes, and one error ends them all."""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import own_tasks
import pytest
import torch
from processes import needs_gloo
from ranks import Ended, drive
from torch import Tensor

from wsn_fast.train import checkpoint
from wsn_fast.train.command_line import main
from wsn_fast.train.folder import read_config
from wsn_fast.train.lock import FolderLock

ROOT = Path(__file__).parents[2]
pytestmark = needs_gloo
# The parts of a batch differ in size, and the last batch of an epoch is a single sample: two processes have 1 and 0 of
# it, three have 1, 0 and 0.
BATCH = 323
SMALL = ["permuted", "--tasks", "2", "--epochs", "3", "--batch-size", str(BATCH), "--device", "cpu", "--lr", "0.01"]
SMALL += ["--val-fraction", "0.1033", "--checkpoint-seconds", "0"]
SEVERAL = [2, pytest.param(3, marks=pytest.mark.ci)]


class World(NamedTuple):
    """A run in float64: its folder, how its processes ended, and what each of them saw."""

    folder: Path
    ended: Ended
    seen: list[dict[str, Any]]

    @property
    def log(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]

    @property
    def tensors(self) -> dict[str, Tensor]:
        return checkpoint.load_from(self.folder / "checkpoint").tensors


Worlds = Callable[[int], World]


# --- they train as one ------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Worlds:
    @functools.cache
    def made(world: int) -> World:
        folder = tmp_path_factory.mktemp(f"world{world}")
        arguments = ("train", *SMALL, "--out", folder / "run")
        ended = drive(folder, world, *arguments, prepare="driver_cases:in_float64", using=[str(folder / "seen")])
        assert ended.codes == [0] * world, ended
        seen = [json.loads((folder / f"seen.{rank}").read_text()) for rank in range(world)]
        return World(folder / "run", ended, seen)

    return made


@pytest.mark.parametrize("world", SEVERAL)
def test_the_sequence_of_samples_does_not_depend_on_the_processes(worlds: Worlds, world: int) -> None:
    batches = worlds(1).seen[0]["trained"]
    assert [len(batch) for batch in batches] == [*[BATCH] * 4, 1] * 6  # 2 tasks of 3 epochs
    parts = zip(*(seen["trained"] for seen in worlds(world).seen), strict=True)
    for batch, of_ranks in zip(batches, parts, strict=True):
        cut = torch.tensor(batch, dtype=torch.float64).tensor_split(world)
        # One whose part is empty trains the first sample, which counts 0.
        assert list(of_ranks) == [part.tolist() or batch[:1] for part in cut]


@pytest.mark.parametrize("world", SEVERAL)
def test_masks_in_float64_are_those_of_one_process(worlds: Worlds, world: int) -> None:
    one, more = worlds(1).tensors, worlds(world).tensors
    assert one.keys() == more.keys()
    masks = [name for name in one if name.endswith("_masks")]
    assert masks
    for name in masks:
        assert torch.equal(one[name], more[name]), name
    for name in set(one) - set(masks) - {"rng/cpu", "model/_extra_state"}:
        assert torch.allclose(one[name], more[name], rtol=1e-9, atol=1e-11), name


@pytest.mark.parametrize("world", SEVERAL)
def test_measurements_are_those_of_one_process(worlds: Worlds, world: int) -> None:
    for one, more in zip(worlds(1).log, worlds(world).log, strict=True):
        assert one["kind"] == more["kind"]
        for name in {"loss", "val_loss", "val_acc", "lr", "best_epoch", "test_acc"} & one.keys():
            assert more[name] == pytest.approx(one[name], rel=1e-6), name
    accuracies = [json.loads((worlds(n).folder / "results.json").read_text())["accuracy_matrix"] for n in (1, world)]
    assert accuracies[0] == accuracies[1]


@pytest.mark.parametrize("world", SEVERAL)
def test_the_processes_share_what_they_measure(worlds: Worlds, world: int) -> None:
    alone, shares = sum(worlds(1).seen[0]["measured"]), [sum(seen["measured"]) for seen in worlds(world).seen]
    assert sum(shares) == alone
    assert min(shares) > alone / 6


def test_the_first_process_alone_prints_and_writes(worlds: Worlds) -> None:
    first, *others = worlds(2).ended.said
    assert others == [""]
    assert "(2 processes), in " in first and first.count("task 0 (1/2): test accuracy") == 1
    assert worlds(2).ended.errors == ["", ""]
    names = [{path.name for path in worlds(n).folder.rglob("*")} for n in (1, 2)]
    assert names[0] == names[1]


@pytest.mark.parametrize("world", SEVERAL)
def test_the_log_says_how_many_processes_trained(worlds: Worlds, world: int) -> None:
    assert [line["processes"] for line in worlds(world).log if line["kind"] in ("begin", "epoch")] == [world] * 8


# --- one error ends all -----------------------------------------------------------------------------------
def one_error(ended: Ended, code: int = 2) -> str:
    """The one line that all processes wrote together, all of which have failed."""
    assert set(ended.codes) <= {code, 2} and code in ended.codes, ended
    assert len(ended.lines) == 1, ended
    assert ended.lines[0].startswith("wsn-fast: error: ")
    return ended.lines[0]


def test_a_locked_folder_is_one_error(worlds: Worlds, tmp_path: Path) -> None:
    lock = FolderLock(worlds(2).folder)
    lock.acquire()
    try:
        ended = drive(tmp_path, 2, "train", "--resume", worlds(2).folder)
    finally:
        lock.release()
    assert "is in use: another process is at work on this run" in one_error(ended)


def test_a_folder_that_is_not_empty_is_one_error(worlds: Worlds, tmp_path: Path) -> None:
    ended = drive(tmp_path, 2, "train", *SMALL, "--out", worlds(2).folder)
    assert "out: expected an empty or new folder" in one_error(ended)


@pytest.mark.parametrize(
    ("words", "says"),
    [(["--density", "7"], "density: expected a number in (0, 1], got 7.0"), (["--checkpoint", "x"], "together with")],
)
def test_a_wrong_argument_is_one_error(tmp_path: Path, words: list[str], says: str) -> None:
    ended = drive(tmp_path, 2, "train", *SMALL, *words, "--out", tmp_path / "run")
    assert says in one_error(ended)
    assert not (tmp_path / "run").exists()


def test_an_unknown_option_is_said_once(tmp_path: Path) -> None:
    ended = drive(tmp_path, 2, "train", "--fast")
    assert 2 in ended.codes and ended.errors[0].count("unrecognized arguments: --fast") == 1
    assert ended.errors[1] == ""


@pytest.mark.parametrize("which", [0, 1])
def test_data_that_one_process_cannot_read_are_one_error(tmp_path: Path, which: int) -> None:
    arguments = ("train", *SMALL, "--out", tmp_path / "run")
    ended = drive(tmp_path, 2, *arguments, prepare="driver_cases:without_data", using=[which])
    assert "data: there are none" in one_error(ended)
    assert not (tmp_path / "run").exists()


def test_a_process_that_is_to_end_says_how_to_go_on(tmp_path: Path) -> None:
    arguments = ("train", *SMALL, "--out", tmp_path / "run", "--quiet")
    ended = drive(tmp_path, 2, *arguments, prepare="driver_cases:terminated", using=[1, 7])
    assert f"was killed; what started the processes says which. `wsn-fast train --resume {tmp_path}" in one_error(ended)
    assert ended.codes == [2, 2] and ended.errors[0] == "", "the one that got the signal says so"


@pytest.mark.parametrize("which", [0, 1])
def test_processes_that_are_hurried_still_say_one_error(tmp_path: Path, which: int) -> None:
    arguments = ("train", *SMALL, "--out", tmp_path / "run")
    ended = drive(tmp_path, 2, *arguments, prepare="driver_cases:hurried", using=[which])
    assert "data: there are none" in one_error(ended)
    assert ended.codes == [2, 2]


def test_a_process_without_memory_stops_all(tmp_path: Path) -> None:
    arguments = ("train", *SMALL, "--out", tmp_path / "run", "--quiet")
    ended = drive(tmp_path, 2, *arguments, prepare="driver_cases:without_memory", using=[1, 7])
    assert "task 0: no memory; the last good checkpoint is kept in " in one_error(ended)
    assert ended.errors[1], "the process that has no memory says so"


def test_what_one_process_finds_at_the_end_of_a_task_stops_all(tmp_path: Path) -> None:
    arguments = ("train", *SMALL, "--out", tmp_path / "run", "--quiet")
    ended = drive(tmp_path, 2, *arguments, prepare="driver_cases:not_finite_in_one", using=[1])
    assert one_error(ended, 1) == "wsn-fast: error: a score is infinite"


def test_batch_norm_of_one_sample_is_one_error(tmp_path: Path) -> None:
    arguments = ("train", *SMALL, "--out", tmp_path / "run", "--quiet")
    ended = drive(tmp_path, 2, *arguments, prepare="driver_cases:stateful")
    assert "batch_size: the last batch of 1 leaves one sample to a process, and the net cannot" in one_error(ended)


def test_a_score_that_is_not_finite_is_said_by_the_first_process(tmp_path: Path) -> None:
    arguments = ("train", *SMALL, "--out", tmp_path / "run", "--quiet")
    ended = drive(tmp_path, 2, *arguments, prepare="driver_cases:not_finite")
    assert "task 0, epoch 1: " in one_error(ended, 1) and "the last good checkpoint, 000001, " in ended.errors[0]


@pytest.mark.parametrize(("name", "value"), [("RANK", None), ("RANK", "one"), ("RANK", "2"), ("WORLD_SIZE", "0")])
def test_an_environment_that_torchrun_did_not_set_is_named(
    name: str, value: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    if value is not None:
        monkeypatch.setenv(name, value)
    assert main(["train", *SMALL, "--out", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err.startswith(f"wsn-fast: error: {name}: expected an integer from ")


# --- torchrun itself --------------------------------------------------------------------------------------
def console_script() -> list[str]:
    script = Path(sys.executable).with_name("wsn-fast")
    if not script.exists():
        pytest.skip("the console script is not installed beside this Python")
    return ["--no-python", str(script)]


@pytest.mark.parametrize(
    "program",
    [lambda: ["-m", "wsn_fast.train"], pytest.param(console_script, marks=pytest.mark.ci)],
    ids=["module", "console script"],
)
def test_torchrun_starts_the_driver(program: Callable[[], list[str]], tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *program()]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [*torchrun, "train", *SMALL, "--out", str(tmp_path / "run")]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    assert len(re.findall(r"\(2 processes\), in ", ran.stdout)) == 1
    assert read_config(tmp_path / "run").batch_size == BATCH


# --- tasks with data of one's own -------------------------------------------------------------------------
@pytest.mark.parametrize("make", ["without_noise", "shuffled_loaders"])
def test_processes_train_data_of_ones_own_as_one(make: str, tmp_path: Path) -> None:
    words = ["train", "own", "--data", f"{own_tasks.__file__}:{make}", "--net", "mlp", "--epochs", "2"]
    words += ["--batch-size", "23", "--lr", "0.01", "--device", "cpu", "--quiet"]
    tensors = []
    for world in (1, 2):
        folder = tmp_path / str(world)
        folder.mkdir()
        ended = drive(folder, world, *words, "--out", folder / "run", prepare="driver_cases:own", using=[])
        assert ended.codes == [0] * world, ended
        tensors.append(checkpoint.load_from(folder / "run" / "checkpoint").tensors)
    one, two = tensors
    masks = [name for name in one if name.endswith("_masks")]
    assert masks and all(torch.equal(one[name], two[name]) for name in masks)
    weights = [name for name in one if name.endswith(".weight")]
    assert all(torch.allclose(one[name], two[name], rtol=1e-9, atol=1e-11) for name in weights)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        ("cut_by_chance", "data: the processes do not have the same data"),
        ("other_numbers_of_batches", "data: the loader of each process has to give the same batches"),
        ("other_numbers_to_validate", "data: the loader of each process has to give the same batches"),
        ("other_labels", "data: the loader of each process has to give the same batches"),
    ],
)
def test_processes_with_other_data_stop(make: str, says: str, tmp_path: Path) -> None:
    words = ["train", "own", "--data", f"{own_tasks.__file__}:{make}", "--net", "mlp", "--device", "cpu", "--quiet"]
    ended = drive(tmp_path, 2, *words, "--out", tmp_path / "run", prepare="driver_cases:own", using=[])
    assert says in one_error(ended)


def test_data_that_fail_in_one_process_end_all(tmp_path: Path) -> None:
    """At the end of a task, where the processes wait for each other while its probe is taken."""
    code = f"{own_tasks.__file__}:samples_that_one_process_cannot_load"
    words = ["train", "own", "--data", code, "--net", "mlp", "--epochs", "1", "--device", "cpu", "--quiet"]
    ended = drive(tmp_path, 2, *words, "--out", tmp_path / "run", prepare="driver_cases:own", using=[])
    assert ended.codes == [2, 1], ended  # an error in the code of the user shows where it is
    assert "task 0, validation: the code that makes the data has failed: ValueError: file 7 is dam" in ended.errors[1]
    assert ended.errors[0] == ""
