"""What goes wrong around a run: kills, full disks, other people's files, numbers that are none, a second process.

The run stops with a message or is killed, and resumed it ends as the undisturbed one did, to the bit. More of it is in
test_resume.py (real processes killed by the clock, torn writes) and test_checkpoint.py (the file alone).
"""

from __future__ import annotations

import errno
import gc
import json
import os
import pickle
import random
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from same_end import assert_same_end
from stopping_console import Stop, StoppingConsole
from torch import Tensor

from wsn_fast.continual.wsn import WSN
from wsn_fast.train import checkpoint, loop, run
from wsn_fast.train.checkpoint import CheckpointError
from wsn_fast.train.command_line import main
from wsn_fast.train.config import resolve
from wsn_fast.train.lock import FolderLock, RunInUseError
from wsn_fast.train.report import Console
from wsn_fast.train.run import Run
from wsn_fast.train.samples import Batch

ROOT = Path(__file__).parents[2]
DYING_RUN = ROOT / "tests" / "support" / "dying_run.py"
SMALL = ["--checkpoint-seconds", "0", "--epochs", "3", "--batch-size", "128", "--device", "cpu", "--quiet"]
OPTIONS = ["permuted", "--tasks", "3", *SMALL, "--preset", "clarena", "--optimizer", "adamw", "--weight-decay", "0.01"]


def run_command(*arguments: object) -> subprocess.CompletedProcess[str]:
    words, environment = list(map(str, arguments)), {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(words, env=environment, text=True, capture_output=True, check=False)


class Undisturbed(NamedTuple):
    """A run in its folder, and how many moments each place of it has."""

    folder: Path
    moments: dict[str, int]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    done = run_command(sys.executable, DYING_RUN, "anywhere", 0, "train", *OPTIONS, "--out", folder)
    assert done.returncode == 0, done.stderr
    return Undisturbed(folder, json.loads(done.stdout))


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run, stopped in its last epoch: each has 11 steps."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    settings = {"tasks": 3, "epochs": 3, "batch_size": 128, "device": "cpu", "preset": "clarena"}
    with pytest.raises(Stop):
        given = resolve(**settings, optimizer="adamw", weight_decay=0.01, checkpoint_seconds=0.0, out=str(folder))
        Run.start(given, StoppingConsole(95)).finish()
    return folder


@pytest.fixture
def nearly_done(stopped: Path, tmp_path: Path) -> Path:
    return shutil.copytree(stopped, tmp_path / "run")


# --- kills -----------------------------------------------------------------------------------------------------------
def kill_and_resume(undisturbed: Undisturbed, folder: Path, seed: int) -> None:
    """SIGKILL at a random moment of a place (the places take turns), then go on to the undisturbed end."""
    place = list(undisturbed.moments)[seed % len(undisturbed.moments)]
    moment = random.Random(seed).randint(1, undisturbed.moments[place])
    killed = run_command(sys.executable, DYING_RUN, place, moment, "train", *OPTIONS, "--out", folder)
    assert killed.returncode == -signal.SIGKILL, (place, moment, killed.stderr)
    begun = (folder / "config.json").exists()
    again = ["--resume", str(folder), "--quiet"] if begun else [*OPTIONS, "--out", str(folder)]
    assert main(["train", *again]) == 0, (place, moment)
    assert_same_end(folder, undisturbed.folder)


# Seed 0 dies anywhere, and seed 2 inside end_task. test_resume.py has runs that die in the write of a checkpoint.
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.ci) for seed in range(1, 6))])
def test_a_run_killed_at_a_random_moment_ends_the_same(undisturbed: Undisturbed, tmp_path: Path, seed: int) -> None:
    kill_and_resume(undisturbed, tmp_path / "run", seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 150))
def test_fifty_more_kills(undisturbed: Undisturbed, tmp_path: Path, seed: int) -> None:
    kill_and_resume(undisturbed, tmp_path / "run", seed)


# --- full disks ------------------------------------------------------------------------------------------------------
ON_A_SMALL_DISK = """
mount -t tmpfs -o size=1200k none "$1" || exit
"${@:3}"
code=$?
cp -r "$1/run" "$2"
exit $code
"""


def test_a_disk_that_fills_up_stops_a_run_that_can_go_on_elsewhere(undisturbed: Undisturbed, tmp_path: Path) -> None:
    """A disk of its own, in a mount namespace of its own: room for two of the three checkpoints it takes at once."""
    if shutil.which("unshare") is None:
        pytest.skip("there is no unshare")
    disk, saved = tmp_path / "disk", tmp_path / "saved"
    disk.mkdir()
    command = [sys.executable, "-m", "wsn_fast.train", "train", *OPTIONS, "--out", disk / "run"]
    alone = ["unshare", "--mount", "--map-root-user", "bash", "-c", ON_A_SMALL_DISK, "bash", disk, saved]
    done = run_command(*alone, *command)
    if not saved.exists():
        pytest.skip(f"a disk may not be mounted here: {done.stderr}")
    assert done.returncode == 2
    assert "No space left on device" in done.stderr and "Traceback" not in done.stderr
    assert not list(saved.rglob("*.tmp"))
    assert main(["train", "--resume", str(saved), "--quiet"]) == 0
    assert_same_end(saved, undisturbed.folder)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="nothing tells the name of an open file")
@pytest.mark.parametrize("name", ["checkpoint/{}.safetensors.tmp", "results.json.tmp", "capacity.png.tmp"])
def test_a_write_to_a_full_disk_stops_a_run_that_can_go_on(
    undisturbed: Undisturbed, nearly_done: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    newest = sorted((nearly_done / "checkpoint").iterdir())[-1]
    full, fsync = nearly_done / name.format(f"{int(newest.stem) + 1:06d}"), os.fsync

    def no_room(handle: int) -> None:
        if os.readlink(f"/proc/self/fd/{handle}") == str(full.resolve()):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(handle)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", no_room)
        assert main(["train", "--resume", str(nearly_done), "--quiet"]) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert not full.exists()
    assert main(["train", "--resume", str(nearly_done), "--quiet"]) == 0
    assert_same_end(nearly_done, undisturbed.folder)


def test_a_line_of_the_log_that_was_cut_short_is_written_again(undisturbed: Undisturbed, nearly_done: Path) -> None:
    with open(nearly_done / "metrics.jsonl", "ab") as log:
        log.write(b'{"kind": "ep')
    assert main(["train", "--resume", str(nearly_done), "--quiet"]) == 0
    assert_same_end(nearly_done, undisturbed.folder)


# --- other files than those of the run -------------------------------------------------------------------------------
def idx(*shape: int, high: int) -> bytes:
    values = torch.randint(high, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(len(shape)))
    return bytes([0, 0, 8, len(shape)]) + struct.pack(f">{len(shape)}I", *shape) + values.numpy().tobytes()


def test_data_files_that_changed_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, folder = tmp_path / "data", str(tmp_path / "run")
    data.mkdir()
    for part, count in (("train", 200), ("t10k", 50)):
        (data / f"{part}-images-idx3-ubyte").write_bytes(idx(count, 6, 6, high=256))
        (data / f"{part}-labels-idx1-ubyte").write_bytes(idx(count, high=10))
    settings = resolve(data="mnist", data_dir=str(data), tasks=2, epochs=1, batch_size=50, device="cpu", out=folder)
    Run.start(settings, Console(quiet=True))
    labels = data / "train-labels-idx1-ubyte"
    good = labels.read_bytes()
    labels.write_bytes(good[:-1] + bytes([(good[-1] + 1) % 10]))
    assert main(["train", "--resume", folder, "--quiet"]) == 2
    assert "the files of 'mnist' have changed" in capsys.readouterr().err
    labels.write_bytes(good)
    assert main(["train", "--resume", folder, "--quiet"]) == 0


def test_a_checkpoint_of_another_run_is_refused(nearly_done: Path, tmp_path: Path) -> None:
    settings = resolve(tasks=3, epochs=1, seed=5, device="cpu", out=str(tmp_path / "other"))
    other = Run.start(settings, Console(quiet=True)).folder / "checkpoint" / "000001.safetensors"
    shutil.copy(other, nearly_done / "checkpoint" / "900000.safetensors")
    with pytest.raises(ValueError, match=r"the settings of 900000.*changed: .*seed"):
        Run.resume(nearly_done, Console(quiet=True))


class Malicious:
    """Makes a file when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.trace,)


@pytest.mark.parametrize("dump", [pickle.dump, torch.save], ids=["pickle", "torch"])
def test_a_checkpoint_that_would_execute_code_is_refused(nearly_done: Path, tmp_path: Path, dump: Any) -> None:
    with open(nearly_done / "checkpoint" / "900000.safetensors", "wb") as file:
        dump(Malicious(tmp_path / "trace"), file)
    with pytest.raises(CheckpointError, match=r"900000\.safetensors is not a checkpoint of wsn-fast"):
        Run.resume(nearly_done, Console(quiet=True))
    assert not (tmp_path / "trace").exists()


def test_nothing_is_unpickled_to_resume_a_run(nearly_done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unpickle(*_: object, **__: object) -> None:
        raise AssertionError

    for module, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(module, name, unpickle)
    assert Run.resume(nearly_done, Console(quiet=True)).progress.task == 2


# --- numbers that are none -------------------------------------------------------------------------------------------
def poison_score(wsn: WSN) -> None:
    wsn.subnet_layers()["features.3"].weight_score.data[2, 1] = torch.nan


def poison_unused_weight(wsn: WSN) -> None:
    layer = wsn.subnet_layers()["features.3"]
    layer.weight.data[~layer.masks_of_scores()["weight"]] = torch.inf


def poison_head(wsn: WSN) -> None:
    next(iter(wsn.model.head.head(2).parameters())).data[0] = torch.nan


@pytest.mark.parametrize(("poison", "named"), [
    (None, "features.1.weight has values that are not finite"),
    (poison_score, "features.3.weight_score has values that are not finite"),
    (poison_unused_weight, "features.3.weight has values that are not finite"),
    (poison_head, "the loss is not finite, though all gated values are"),
], ids=["inputs", "score", "weight", "head"])  # fmt: skip
def test_nan_stops_the_run_with_the_layers_name_and_the_last_checkpoint_is_good(
    undisturbed: Undisturbed,
    nearly_done: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    poison: Callable[[WSN], None] | None,
    named: str,
) -> None:
    left = sorted((nearly_done / "checkpoint").iterdir())

    def one_is_nan(batch: Batch, part: slice) -> tuple[Tensor, Tensor]:
        x, y = batch.take(part)
        return x.index_fill(0, torch.tensor([3]), torch.nan), y

    def train_epoch(wsn: WSN, optimizer: torch.optim.Optimizer, batches: Iterable[Batch], *rest: Any) -> float:
        if poison is None:
            batches = [replace(batch, take=partial(one_is_nan, batch)) for batch in batches]
        loss = loop.train_epoch(wsn, optimizer, batches, *rest)
        if poison is not None:
            poison(wsn)
        return loss

    with monkeypatch.context() as patch:
        patch.setattr(run, "train_epoch", train_epoch)
        assert main(["train", "--resume", str(nearly_done), "--quiet"]) == 1
    assert f"task 2, epoch 3: {named}; the last good checkpoint, {left[-1].stem}, is" in capsys.readouterr().err
    assert sorted((nearly_done / "checkpoint").iterdir()) == left
    assert main(["train", "--resume", str(nearly_done), "--quiet"]) == 0
    assert_same_end(nearly_done, undisturbed.folder)


# --- two processes ---------------------------------------------------------------------------------------------------
def test_a_second_process_is_refused_and_one_that_was_killed_is_not_in_the_way(
    nearly_done: Path, undisturbed: Undisturbed, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "long"
    command = [sys.executable, "-m", "wsn_fast.train", "train", *OPTIONS, "--epochs", "100000", "--out", str(folder)]
    first = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)})
    try:
        while not (folder / "metrics.jsonl").exists():
            assert first.poll() is None
            time.sleep(0.01)
        for second in (["--resume", str(folder)], [*OPTIONS, "--out", str(folder)]):
            assert main(["train", *second]) == 2
        errors = capsys.readouterr().err.splitlines()
        assert "is in use: another process is at work on this run" in errors[0]
        assert "expected an empty or new folder" in errors[1]
    finally:
        first.kill()
        first.wait()
    assert Run.resume(folder, Console(quiet=True)).settings.epochs == 100000


def test_two_runs_do_not_begin_in_one_folder(tmp_path: Path) -> None:
    settings = resolve(tasks=2, epochs=1, device="cpu", out=str(tmp_path))
    first = FolderLock(tmp_path)
    first.acquire()
    with pytest.raises(RunInUseError, match="is in use"):
        Run.start(settings, Console(quiet=True))
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    first.release()
    assert Run.start(settings, Console(quiet=True)).progress.task == 0


def test_the_lock_is_given_back_at_the_end(nearly_done: Path) -> None:
    resumed = Run.resume(nearly_done, Console(quiet=True))
    with pytest.raises(RunInUseError):
        Run.resume(nearly_done, Console(quiet=True))
    resumed.finish()
    Run.resume(nearly_done, Console(quiet=True))


def test_a_run_that_nobody_holds_gives_its_lock_back_at_once(tmp_path: Path) -> None:
    settings = resolve(tasks=2, epochs=1, device="cpu", out=str(tmp_path))
    gc.collect()
    gc.disable()  # what refers to itself would wait for the garbage collector, and hold the lock as long
    try:
        Run.start(settings, Console(quiet=True))
        Run.resume(tmp_path, Console(quiet=True))
        Run.resume(tmp_path, Console(quiet=True))
    finally:
        gc.enable()


END_BESIDE_A_CHILD = """
import os, sys, time
from pathlib import Path
from wsn_fast.train.lock import FolderLock
lock = FolderLock(Path(sys.argv[1]))
lock.acquire()
child = os.fork()
if child == 0:
    time.sleep(60)
os.write(1, str(child).encode())
os._exit(9)
"""


def test_the_children_of_a_killed_run_do_not_hold_its_lock(tmp_path: Path) -> None:
    """The workers of a DataLoader live on for seconds, and a run is resumed at once."""
    command = [sys.executable, "-c", END_BESIDE_A_CHILD, str(tmp_path)]
    ended = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE)
    assert ended.stdout is not None
    assert ended.wait() == 9
    child = int(os.read(ended.stdout.fileno(), 20))
    try:
        FolderLock(tmp_path).acquire()
    finally:
        os.kill(child, signal.SIGKILL)
        ended.stdout.close()


@pytest.mark.parametrize("method", ["restore", "_train_task"])
def test_the_lock_is_given_back_at_an_error(nearly_done: Path, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt) as kept:
        patch.setattr(Run, method, interrupt)
        Run.resume(nearly_done, Console(quiet=True)).finish()
    Run.resume(nearly_done, Console(quiet=True))
    assert kept.traceback, "which keeps the run alive, and would keep its lock"


def test_a_run_can_be_measured_while_it_is_at_work(nearly_done: Path) -> None:
    lock = FolderLock(nearly_done)
    lock.acquire()
    assert main(["eval", str(nearly_done)]) == 0
    lock.release()
    assert len(checkpoint.load_from(nearly_done / "checkpoint").state["progress"]["matrix"]) == 2
