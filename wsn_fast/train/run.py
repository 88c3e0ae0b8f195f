"""A run in its folder: started, saved, resumed after a kill at any moment, and measured again.

What a run computes next depends on its checkpoint alone: the order of an epoch's samples follows from seed,
task and epoch, all else from what :meth:`Run.save` writes. So a resumed run repeats an undisturbed one.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wsn_fast import CapturedStep
from wsn_fast.train import checkpoint, config
from wsn_fast.train.checkpoint import Checkpoint, CheckpointError, write_atomic
from wsn_fast.train.config import TrainConfig
from wsn_fast.train.lock import NAME as LOCK
from wsn_fast.train.lock import FolderLock
from wsn_fast.train.loop import evaluate, make_graph, make_optimizer, sample_order, train_epoch
from wsn_fast.train.report import Console, begin_entry, masks_of, plot, summarize, versions
from wsn_fast.train.workshop import prepare


@dataclass
class Progress:
    """How far a run is: with the checkpoint's tensors, all it needs to go on. Accuracies in percent.

    Attributes:
        task: index of the task at hand; the number of tasks when all are done.
        training: whether that task has begun.
        epoch: its finished epochs.
        lr: the learning rate of the next epoch.
        best_loss: the least validation loss so far, of epoch ``best_epoch``; None before the first epoch.
        best_epoch: epoch of the least validation loss, counted from 1.
        bad_epochs: epochs since the last improvement or change of lr.
        matrix: row i has the accuracies on the tasks 0..i after task i.
        random_init: per task, the accuracy at random initialisation.
        before: per task up to the one at hand, the accuracy just before it is trained.
        metrics_bytes: length of ``metrics.jsonl``.
    """

    task: int = 0
    training: bool = False
    epoch: int = 0
    lr: float = 0.0
    best_loss: float | None = None
    best_epoch: int = 0
    bad_epochs: int = 0
    matrix: list[list[float]] = field(default_factory=list)
    random_init: list[float] = field(default_factory=list)
    before: list[float] = field(default_factory=list)
    metrics_bytes: int = 0


class Run:
    """A run in its folder. ``Run.start`` or ``Run.resume`` makes one, ``finish`` does the work.

    Attributes:
        folder: where everything is written.
        settings: the config.
        progress: how far it is.
    """

    def __init__(self, settings: TrainConfig, folder: Path, console: Console, lock: FolderLock | None = None) -> None:
        self.settings, self.folder, self.console = settings, folder, console
        self._lock = lock or FolderLock(folder)  # held from start or resume to the end of finish
        self.stream, self.wsn, self.device, self.fingerprint = prepare(settings)
        self.progress = Progress()
        self._best: Mapping[str, Tensor] = {}
        self._optimizer: torch.optim.Optimizer | None = None
        self._graph: CapturedStep | None = None
        self._number = 0
        self._saved_at = -math.inf
        self._parts = 1  # the most that a batch had to be split into

    @classmethod
    def start(cls, settings: TrainConfig, console: Console) -> Run:
        """Begin in ``settings.out``, which must be empty or missing; nothing is written if the data are bad.

        Raises:
            RunInUseError: another process begins there.
            ValueError: the folder is not empty, or see :func:`wsn_fast.train.workshop.prepare`.
        """
        folder = Path(settings.out)
        _check_unused(folder)
        run = cls(settings, folder, console)
        folder.mkdir(parents=True, exist_ok=True)
        with run._lock.held_unless_failed():
            _check_unused(folder)  # again: another may have begun while this one read its data
            about = {
                "command": config.command_line(settings),
                "config": asdict(settings),
                "versions": versions(run.device),
            }
            write_json(folder / "config.json", about)
            run._measure_at_random()
        return run

    @classmethod
    def resume(
        cls,
        folder: Path,
        console: Console,
        *,
        name: str | None = None,
        data_dir: str | None = None,
        device: str | None = None,
    ) -> Run:
        """Go on from the newest checkpoint in ``folder``, or from the one called ``name``.

        Raises:
            CheckpointError: it cannot be read.
            FileNotFoundError: the folder holds no run.
            RunInUseError: another process is at work on the run.
            ValueError: config or data are not those of the checkpoint.
        """
        settings, lock = _moved(read_config(folder), data_dir, device), FolderLock(folder)
        with lock.held_unless_failed():
            run = cls(settings, folder, console, lock)
            if name is None and not list((folder / "checkpoint").glob("*.safetensors")):
                run._measure_at_random()  # killed before its first checkpoint
            else:
                run.restore(checkpoint.load_from(folder / "checkpoint", name))
        return run

    def finish(self) -> dict[str, Any]:
        """Train what is left, then write ``results.json`` and the plots. Returns the results.

        Raises:
            FloatingPointError: a loss, weight or score is not finite; the last checkpoint is kept.
            CheckpointError: a checkpoint cannot be written.
            ForgottenError: a finished task has changed.
            torch.OutOfMemoryError: even with batches in parts; the last checkpoint is kept.
        """
        self._lock.acquire()
        try:
            while self.progress.task < len(self.stream):
                self._train_task()
            self.wsn.verify()
            results = self.results()
            write_json(self.folder / "results.json", results)
            plot(results, self.folder)
        except torch.OutOfMemoryError as error:
            raise torch.OutOfMemoryError(f"task {self.progress.task}: {error}; {self._kept()}") from error
        finally:
            self._lock.release()
        return results

    def results(self) -> dict[str, Any]:
        """The numbers of the finished tasks, in percent (see :func:`wsn_fast.train.report.summarize`)."""
        k = len(self.progress.matrix)
        return {
            **summarize(
                self.progress.matrix, self.progress.random_init[:k], self.progress.before[:k], masks_of(self.wsn)
            ),
            "data_fingerprint": self.fingerprint,
            "command": config.command_line(self.settings),
            "config": config.portable(self.settings),
            "versions": versions(self.device),
        }

    def measure_last_row(self) -> list[float]:
        """The test accuracy of every finished task, in percent, measured now."""
        row = []
        for task in self.wsn.tasks:
            with self.wsn.use_task(task):
                row.append(self._test(int(task)))
        return row

    # --- training -----------------------------------------------------------------------------------------
    def _train_task(self) -> None:
        task, started = self.progress.task, time.perf_counter()
        samples = self.stream[task]
        train_x, train_y, val_x, val_y = (
            part.to(self.device) for part in (samples.train_x, samples.train_y, samples.val_x, samples.val_y)
        )
        if not self.progress.training:
            self.wsn.begin_task(task)
            self._optimizer = make_optimizer(self.wsn, self.settings)
            self.progress = replace(
                self.progress,
                training=True,
                epoch=0,
                lr=self.settings.lr,
                best_loss=None,
                best_epoch=0,
                bad_epochs=0,
            )
            self._graph = make_graph(self.wsn, self._optimizer, self.settings)
            entry = begin_entry(self.wsn, self._optimizer, len(train_x), captures=self._graph is not None)
            self._log(kind="begin", task=task, **entry)
        progress = self.progress
        batches = math.ceil(len(train_x) / self.settings.batch_size)
        self.console.task_started(task, len(self.stream), self.settings.epochs, batches, progress.epoch)
        while progress.epoch < self.settings.epochs and progress.lr >= self.settings.lr_min:
            self._train_epoch(train_x, train_y, val_x, val_y)
            if time.monotonic() - self._saved_at >= self.settings.checkpoint_seconds:
                self.save()
        self.wsn.load_trainable_state(self._best)
        self.wsn.end_task()
        self._end_task(time.perf_counter() - started)

    def _end_task(self, seconds: float) -> None:
        progress, task = self.progress, self.progress.task
        progress.matrix.append(self.measure_last_row())
        if task + 1 < len(self.stream):
            with self.wsn.use_head(task + 1):
                progress.before.append(self._test(task + 1))
        self._log(kind="task", task=task, epochs=progress.epoch, best_epoch=progress.best_epoch,
                  test_acc=progress.matrix[-1], seconds=seconds)  # fmt: skip
        self.console.task_ended(task, len(self.stream), progress.matrix[-1][-1], progress.best_epoch, seconds)
        progress.task, progress.training = task + 1, False
        self._best, self._optimizer, self._graph = {}, None, None
        self.save()

    def _train_epoch(self, train_x: Tensor, train_y: Tensor, val_x: Tensor, val_y: Tensor) -> None:
        progress, started = self.progress, time.perf_counter()
        assert self._optimizer is not None
        order = sample_order(len(train_x), self.settings.seed, progress.task, progress.epoch)
        batches = torch.split(order.to(self.device), self.settings.batch_size)
        train_loss = train_epoch(
            self.wsn, self._optimizer, train_x, train_y, batches, self.console.step, self._graph, self._note_split
        )
        progress.epoch += 1
        val_loss, val_acc = evaluate(self.wsn, val_x, val_y)
        self._check_finite(train_loss, val_loss)
        used_lr = progress.lr
        self._follow_validation(val_loss)
        self._log(kind="epoch", task=progress.task, epoch=progress.epoch, loss=train_loss, val_loss=val_loss,
                  val_acc=val_acc, lr=used_lr, seconds=time.perf_counter() - started,
                  captured_steps=0 if self._graph is None else self._graph.replays)  # fmt: skip
        self.console.epoch_ended(progress.epoch, train_loss, val_acc, used_lr)

    def _follow_validation(self, val_loss: float) -> None:
        """Keep the best epoch's values; lower lr after ``lr_patience`` epochs without a better one."""
        progress = self.progress
        if progress.best_loss is None or val_loss < progress.best_loss:
            progress.best_loss, progress.best_epoch, progress.bad_epochs = val_loss, progress.epoch, 0
            self._best = self.wsn.trainable_state()
            return
        progress.bad_epochs += 1
        if progress.bad_epochs >= self.settings.lr_patience:
            progress.lr, progress.bad_epochs = progress.lr / self.settings.lr_factor, 0
            assert self._optimizer is not None
            for group in self._optimizer.param_groups:
                group["lr"] = progress.lr

    def _note_split(self, parts: int) -> None:
        if parts > self._parts:
            self._parts = parts
            self._log(kind="split", task=self.progress.task, epoch=self.progress.epoch + 1, parts=parts)
            self.console.say(
                f"task {self.progress.task}: out of memory: batches that do not fit are trained in {parts} parts"
            )

    def _check_finite(self, *losses: float) -> None:
        where = f"task {self.progress.task}, epoch {self.progress.epoch}"
        try:
            self.wsn.check_finite()
        except FloatingPointError as error:
            raise FloatingPointError(f"{where}: {error}; {self._kept()}") from None
        if not all(map(math.isfinite, losses)):
            raise FloatingPointError(f"{where}: the loss is not finite, though all gated values are; {self._kept()}")

    def _kept(self) -> str:
        return f"the last good checkpoint, {self._number:06d}, is kept in {self.folder / 'checkpoint'}"

    # --- measuring ----------------------------------------------------------------------------------------
    def _test(self, task: int) -> float:
        x, y = self.stream.test_data(task)
        return evaluate(self.wsn, x.to(self.device), y.to(self.device))[1]

    def measure_random_init(self) -> list[float]:
        """The accuracy on every task, in percent, with the values as they are: call this before training."""
        accuracies = []
        for task in self.stream.task_ids:
            with self.wsn.use_head(task):
                accuracies.append(self._test(task))
        return accuracies

    def _measure_at_random(self) -> None:
        self.progress.random_init = self.measure_random_init()
        self.progress.before = self.progress.random_init[:1]
        self.save()

    # --- what a killed run needs --------------------------------------------------------------------------
    def save(self) -> None:
        """Write the next checkpoint. Raises ``CheckpointError`` if it cannot be written."""
        tensors = {f"model/{name}": tensor for name, tensor in self.wsn.state_dict().items()}
        tensors |= {f"best/{name}": tensor for name, tensor in self._best.items()}
        tensors["rng/cpu"] = torch.get_rng_state()
        if self.device.type == "cuda":
            tensors["rng/cuda"] = torch.cuda.get_rng_state(self.device)
        state: dict[str, Any] = {
            "config": asdict(self.settings),
            "fingerprint": self.fingerprint,
            "progress": asdict(self.progress),
        }
        if self._optimizer is not None:
            state["optimizer"], packed = checkpoint.pack_optimizer(self._optimizer.state_dict())
            tensors |= {f"optimizer/{name}": tensor for name, tensor in packed.items()}
        self._number += 1
        checkpoint.save(self.folder / "checkpoint", self._number, state, tensors)
        self._saved_at = time.monotonic()

    def restore(self, loaded: Checkpoint) -> None:
        """Become what the run was when it wrote a checkpoint.

        Raises:
            CheckpointError: it holds other things than this program writes.
            ValueError: config or data are others.
        """
        try:
            self._check_same_run(loaded)
            self._take_over(loaded)
        except ValueError:
            raise
        except checkpoint.NONSENSE as error:
            raise CheckpointError(f"{loaded.path} cannot be restored: {type(error).__name__}: {error}") from error

    def _take_over(self, loaded: Checkpoint) -> None:
        self._number, self._saved_at = loaded.number, time.monotonic()
        self.progress = Progress(**loaded.state["progress"])
        self.wsn.load_state_dict(_part(loaded, "model/"))
        self._best = {name: tensor.to(self.device) for name, tensor in _part(loaded, "best/").items()}
        if self.progress.training:
            self._optimizer = make_optimizer(self.wsn, self.settings)
            packed = checkpoint.unpack_optimizer(loaded.state["optimizer"], _part(loaded, "optimizer/"))
            self._optimizer.load_state_dict(packed)
            self._graph = make_graph(self.wsn, self._optimizer, self.settings)
        torch.set_rng_state(loaded.tensors["rng/cpu"])
        if self.device.type == "cuda" and "rng/cuda" in loaded.tensors:
            torch.cuda.set_rng_state(loaded.tensors["rng/cuda"], self.device)

    def _check_same_run(self, loaded: Checkpoint) -> None:
        saved, own = config.from_dict(loaded.state["config"]), config.portable(self.settings)
        changed = [name for name, x in config.portable(saved).items() if own[name] != x and name != "device"]
        if changed:
            raise ValueError(
                f"{self.folder / 'config.json'}: expected the settings of {loaded.path.name}, but these were "
                f"changed: {', '.join(changed)}"
            )
        if loaded.state["fingerprint"] != self.fingerprint:
            raise ValueError(
                f"data: expected those with fingerprint {loaded.state['fingerprint']}, on which this run was "
                f"trained, got {self.fingerprint}: the files of {self.settings.data!r} have changed"
            )

    def _log(self, **entry: Any) -> None:
        path = self.folder / "metrics.jsonl"
        try:
            with open(path, "ab") as file:
                # What an interrupted run wrote after its last checkpoint will be written again.
                file.truncate(min(file.tell(), self.progress.metrics_bytes))
                file.write(json.dumps(entry).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
                self.progress.metrics_bytes = file.tell()
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from error


def evaluate_run(
    folder: Path, *, name: str | None = None, data_dir: str | None = None, device: str | None = None
) -> dict[str, Any]:
    """Measure a run anew from its checkpoint; writes nothing.

    The last row of the matrix, the accuracies at random initialisation, capacity and reuse are measured,
    earlier rows come from the checkpoint, and every task is verified.

    Returns:
        What ``results.json`` should hold.

    Raises:
        CheckpointError: the checkpoint cannot be read.
        FileNotFoundError: the folder holds no run.
        ForgottenError: a task is not what it was when it ended.
        ValueError: the data are not those of the run, or no task has been finished yet.
    """
    run = Run(_moved(read_config(folder), data_dir, device), folder, Console(quiet=True))
    random_init = run.measure_random_init()
    run.restore(checkpoint.load_from(folder / "checkpoint", name))
    if not run.progress.matrix:
        raise ValueError(f"{folder}: no task has been finished yet; go on with `wsn-fast train --resume {folder}`")
    run.wsn.verify()
    run.progress.random_init = random_init
    run.progress.matrix[-1] = run.measure_last_row()
    return run.results()


def read_config(folder: Path) -> TrainConfig:
    """The config of the run in ``folder``.

    Raises:
        FileNotFoundError: there is none.
        ValueError: ``config.json`` is damaged.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no run: there is no {path}")
    try:
        return config.from_dict(json.loads(path.read_text("utf-8"))["config"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def _check_unused(folder: Path) -> None:
    """Raise ``ValueError`` unless a run may begin in ``folder``: it is missing, or holds no more than what one that
    was killed at once has left."""
    if folder.exists() and any(path.suffix != ".tmp" and path.name != LOCK for path in folder.iterdir()):
        raise ValueError(
            f"out: expected an empty or new folder, got {str(folder)!r}; to continue the run in it, use "
            f"`wsn-fast train --resume {folder}`"
        )


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file atomically."""
    write_atomic(path, json.dumps(content, indent=2).encode() + b"\n")


def _moved(settings: TrainConfig, data_dir: str | None, device: str | None) -> TrainConfig:
    return replace(settings, data_dir=data_dir or settings.data_dir, device=device or settings.device)


def _part(loaded: Checkpoint, prefix: str) -> dict[str, Tensor]:
    return {name[len(prefix) :]: t for name, t in loaded.tensors.items() if name.startswith(prefix)}
