"""A run: it is started in a folder, trains task after task, saves checkpoints, and can be resumed after a kill.

What a run computes next depends on its checkpoint alone. The order of the samples follows from seed, task and epoch,
and :meth:`Run.save` writes all the rest. So a resumed run repeats, to the bit, what an undisturbed run does.

Under torchrun several processes make one run. They compute the same model, and the first of them writes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wsn_fast import CapturedStep, launch
from wsn_fast.train import checkpoint, config, paths
from wsn_fast.train.checkpoint import Checkpoint, CheckpointError
from wsn_fast.train.clock import Clock
from wsn_fast.train.config import TrainConfig
from wsn_fast.train.experiment import make_experiment
from wsn_fast.train.folder import append_metrics, check_same_run, check_unused, config_to_go_on, write_json
from wsn_fast.train.lock import FolderLock
from wsn_fast.train.loop import agreeing, evaluate, make_graph, make_optimizer, train_epoch, train_epoch_in_parts
from wsn_fast.train.pace import Pace
from wsn_fast.train.processes import ALONE, Processes
from wsn_fast.train.progress import Progress
from wsn_fast.train.report import Console, begin_entry, masks_of, plot, summarize, versions
from wsn_fast.train.samples import Epoch, KeptSamples, Samples

PROBE = 32
"""The number of samples that a task is probed with: see :meth:`wsn_fast.WSN.verify`."""


class Run:
    """A run in its folder. :meth:`start` or :meth:`resume` makes one, and :meth:`finish` trains it to the end.

    Attributes:
        folder: the folder that everything is written to.
        settings: the config.
        progress: how far the run is.
        stream: the tasks.
        wsn: the model.
        device: the device of the model.
        fingerprint: identifies the data.
        processes: those that make the run.
    """

    def __init__(
        self,
        settings: TrainConfig,
        folder: Path,
        console: Console,
        lock: FolderLock | None = None,
        processes: Processes = ALONE,
    ) -> None:
        self.folder, self.console, self.processes = folder, console, processes
        self._lock = lock or FolderLock(folder, processes)  # held from start or resume until finish returns
        gpu = launch.local_rank() if processes.size > 1 else None
        self._clock = Clock()
        self._waits = partial(self._clock.measures_each, "data")
        with processes.together(), self._clock.measures("data"):
            self.stream, self.wsn, self.device, self.fingerprint = make_experiment(settings, gpu, console.loading)
        processes.agree(self.fingerprint)
        self.settings = replace(settings, tasks=len(self.stream))  # they were 0 for as many as there are
        self._tests = KeptSamples(self.stream.test, self.device)
        self.progress = Progress()
        self._best: Mapping[str, Tensor] = {}
        self._optimizer: torch.optim.Optimizer | None = None
        self._graph: CapturedStep | None = None
        self._number = 0
        self._pace = Pace(settings.checkpoint_seconds)
        self._parts = 1  # the largest number of parts that a batch had to be split into

    @classmethod
    def start(cls, settings: TrainConfig, console: Console, processes: Processes = ALONE) -> Run:
        """Begin a run in ``settings.out``, which must be empty or missing. Nothing is written if the data are bad.

        Raises:
            RunInUseError: another process begins a run there.
            StoppedError: another one of the ``processes`` has failed. All methods raise this.
            ValueError: the folder is not empty, or see :func:`wsn_fast.train.experiment.make_experiment`.
        """
        folder = Path(settings.out)
        processes.first(lambda: check_unused(folder))
        run = cls(settings, folder, console, processes=processes)
        processes.first(lambda: folder.mkdir(parents=True, exist_ok=True))
        with run._lock.held_unless_failed():
            processes.first(run._write_config)
            run._measure_at_random()
        return run

    def _write_config(self) -> None:
        check_unused(self.folder)  # again: another run may have begun while this one read its data
        about = {
            "command": config.command_line(self.settings),
            "config": asdict(self.settings),
            "versions": versions(self.device),
        }
        write_json(self.folder / "config.json", about)

    @classmethod
    def resume(
        cls,
        folder: Path,
        console: Console,
        processes: Processes = ALONE,
        *,
        name: str | None = None,
        **other: str | None,
    ) -> Run:
        """Continue from the newest checkpoint in ``folder``, or from the one called ``name``.

        Args:
            folder: the folder of the run.
            console: shows the progress.
            processes: those that make the run. It may have been made by more or fewer of them before.
            name: the file name of a checkpoint; None means the newest.
            other: what may be other than before (see :func:`wsn_fast.train.folder.config_to_go_on`).

        Raises:
            CheckpointError: the checkpoint cannot be read.
            FileNotFoundError: the folder holds no run.
            RunInUseError: another process works on the run.
            ValueError: config or data are not those of the checkpoint.
        """
        settings = processes.first(lambda: config_to_go_on(folder, **other))
        lock = FolderLock(folder, processes)
        with lock.held_unless_failed():
            run = cls(settings, folder, console, lock, processes)
            if not run.restore_newest(name):
                run._measure_at_random()  # killed before its first checkpoint
        return run

    def restore_newest(self, name: str | None = None) -> bool:
        """Set the run to the state of its newest checkpoint, or of the one called ``name``, and return True; False if
        no name is given and there is none. Raises what :meth:`restore` raises, and ``CheckpointError`` if the file
        cannot be read."""
        files = self.folder / "checkpoint"

        def load() -> Checkpoint | None:
            found = name is not None or list(files.glob("*.safetensors"))
            return checkpoint.load_from(files, name) if found else None

        loaded = self.processes.first(load)
        if loaded is not None:
            with self.processes.together():
                self.restore(loaded)
        return loaded is not None

    def finish(self) -> dict[str, Any]:
        """Train the remaining tasks, then write ``results.json`` and the plots. Returns the results.

        Raises:
            FloatingPointError: a loss, weight or score is not finite. The last checkpoint is kept.
            CheckpointError: a checkpoint cannot be written.
            ForgottenError: a finished task has changed.
            UnmaskedReadError: a task reads something outside of its mask.
            torch.OutOfMemoryError: the memory is too small for a batch, even in parts. The last checkpoint is kept.
        """
        self._lock.acquire()
        try:
            while self.progress.task < len(self.stream):
                self._train_task()
            self.verify()
            results = self.results()
            self.processes.first(lambda: self._write_results(results))
        except torch.OutOfMemoryError as error:
            raise torch.OutOfMemoryError(f"task {self.progress.task}: {error}; {self._kept()}") from error
        finally:
            self._lock.release()
        return results

    def _write_results(self, results: Mapping[str, Any]) -> None:
        write_json(self.folder / "results.json", results)
        plot(results, self.folder)

    def verify(self) -> None:
        """Check that every finished task is what it was when it ended, and reads nothing outside of its mask.

        Raises:
            ForgottenError, UnmaskedReadError: it is not, or it does.
        """
        x = {task: self._tests[int(task)].first(PROBE) for task in self.wsn.tasks}
        with self.processes.together():
            self.wsn.verify(probe=lambda task: self.wsn(x[task]))

    def results(self) -> dict[str, Any]:
        """The measurements of the finished tasks, in percent (see :func:`wsn_fast.train.report.summarize`)."""
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
        with self._clock.measures("data"):
            train, val = (samples.to(self.device) for samples in self.stream.training(task))
        if not self.progress.training:
            self.wsn.begin_task(task)
            self._optimizer = make_optimizer(self.wsn, self.settings)
            self.progress.begin_task(self.settings.lr)
            self._graph, obstacle = make_graph(self.wsn, self._optimizer, self.settings, self.processes)
            entry = begin_entry(self.wsn, self._optimizer, train.count, obstacle)
            self._log(kind="begin", task=task, processes=self.processes.size, **entry)
        progress = self.progress
        batches = train.batches(self.settings.batch_size)
        self.console.task_started(task, len(self.stream), self.settings.epochs, batches, progress.epoch)
        while progress.epoch < self.settings.epochs and progress.lr >= self.settings.lr_min:
            self._train_epoch(train, val)
            if self._pace.is_due():
                self.save()
        with self.processes.together():
            self.wsn.load_trainable_state(self._best)
        with self.processes.together():  # a block of its own: the processes wait for each other in the next one
            probe = val.first(PROBE)
        with self.processes.together():
            self.wsn.end_task(probe=probe)
        self._end_task(time.perf_counter() - started)

    def _end_task(self, seconds: float) -> None:
        progress, task = self.progress, self.progress.task
        progress.matrix.append(self.measure_last_row())
        if task + 1 < len(self.stream):
            with self.wsn.use_head(task + 1):
                progress.before.append(self._test(task + 1))
        spent = self._clock.take()
        self._log(kind="task", task=task, epochs=progress.epoch, best_epoch=progress.best_epoch,
                  test_acc=progress.matrix[-1], seconds=seconds, time=spent)  # fmt: skip
        self.console.task_ended(task, len(self.stream), progress.matrix[-1][-1], progress.best_epoch, spent)
        progress.task, progress.training = task + 1, False
        self._best, self._optimizer, self._graph = {}, None, None
        self.save()

    def _train_epoch(self, train: Samples, val: Samples) -> None:
        progress, settings, started = self.progress, self.settings, time.perf_counter()
        assert self._optimizer is not None
        epoch = Epoch(settings.seed, progress.task, progress.epoch)
        augment, share = settings.augment == "crops", self.processes.share
        with self._clock.measures("training"):
            batches = self._waits(train.epoch(settings.batch_size, epoch, augment=augment, share=share))
            if train.each_process_loads_all and self.processes.size > 1:
                batches = agreeing(batches, self.processes)
            part = self.wsn, self._optimizer, batches, self.console.step
            if self.processes.size > 1:
                train_loss = train_epoch_in_parts(*part, self.processes, epoch)
            else:
                train_loss = train_epoch(*part, self._graph, self._note_split)
        progress.epoch += 1
        with self._clock.measures("evaluation"):
            val_loss, val_acc = evaluate(self.wsn, val, self.processes, self._waits)
        with self.processes.together():
            self._check_finite(train_loss, val_loss)
        used_lr = progress.lr
        self._follow_validation(val_loss)
        self._log(kind="epoch", task=progress.task, epoch=progress.epoch, loss=train_loss, val_loss=val_loss,
                  val_acc=val_acc, lr=used_lr, seconds=time.perf_counter() - started, processes=self.processes.size,
                  captured_steps=0 if self._graph is None else self._graph.replays)  # fmt: skip
        self.console.epoch_ended(progress.epoch, train_loss, val_acc, used_lr)

    def _follow_validation(self, val_loss: float) -> None:
        """Keep the values of the best epoch, and lower lr after ``lr_patience`` epochs without a better loss."""
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
        number = f", {self._number:06d}," if self.processes.is_first else ""  # no other one saves
        return f"the last good checkpoint{number} is kept in {self.folder / 'checkpoint'}"

    # --- measuring ----------------------------------------------------------------------------------------
    def _test(self, task: int) -> float:
        with self._clock.measures("data"):
            samples = self._tests[task]
        with self._clock.measures("evaluation"):
            return evaluate(self.wsn, samples, self.processes, self._waits)[1]

    def measure_random_init(self) -> list[float]:
        """The accuracy on every task, in percent, with the present values. Call this before training."""
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
        """Write the next checkpoint, if this is the first process. ``CheckpointError`` if it cannot be written."""
        if self.processes.is_first:
            with self._clock.measures("checkpoints"), self._pace.saves():
                self._save()

    def _save(self) -> None:
        self.progress.time = self._clock.so_far()
        tensors = {f"model/{name}": tensor for name, tensor in self.wsn.state_dict().items()}
        tensors |= {f"best/{name}": tensor for name, tensor in self._best.items()}
        tensors["rng/cpu"] = torch.get_rng_state()
        if self.device.type == "cuda":
            tensors["rng/cuda"] = torch.cuda.get_rng_state(self.device)
        state: dict[str, Any] = {
            "config": asdict(self.settings),
            "fingerprint": self.fingerprint,
            "progress": asdict(self.progress),
            "paths": paths.in_use(self.wsn, self.device, self.processes.size),
        }
        if self._optimizer is not None:
            state["optimizer"], packed = checkpoint.pack_optimizer(self._optimizer.state_dict())
            tensors |= {f"optimizer/{name}": tensor for name, tensor in packed.items()}
        self._number += 1
        checkpoint.save(self.folder / "checkpoint", self._number, state, tensors)

    def restore(self, loaded: Checkpoint) -> None:
        """Set the run to the state in which it wrote a checkpoint.

        Raises:
            CheckpointError: the checkpoint does not hold what this program writes.
            ValueError: config or data have changed since.
        """
        check_same_run(loaded, self.settings, self.folder, self.fingerprint)
        try:
            self._take_over(loaded)
        except checkpoint.NONSENSE as error:
            raise CheckpointError(f"{loaded.path} cannot be restored: {type(error).__name__}: {error}") from error

    def _take_over(self, loaded: Checkpoint) -> None:
        self._number = loaded.number
        self._pace.resumes()
        self.progress = Progress.from_json(loaded.state["progress"], len(self.stream))
        self._clock.add(self.progress.time)
        self.wsn.load_state_dict(loaded.part("model/"))
        self._best = {name: tensor.to(self.device) for name, tensor in loaded.part("best/").items()}
        if "paths" in loaded.state:  # older checkpoints do not say
            for difference in paths.take(self.wsn, loaded.state["paths"], self.device, self.processes.size):
                self.console.say(difference)
        if self.progress.training:
            self._optimizer = make_optimizer(self.wsn, self.settings)
            packed = checkpoint.unpack_optimizer(loaded.state["optimizer"], loaded.part("optimizer/"))
            checkpoint.check_optimizer(packed, self._optimizer, self.progress.lr)
            self._optimizer.load_state_dict(packed)
            self._graph, _ = make_graph(self.wsn, self._optimizer, self.settings, self.processes)
        torch.set_rng_state(loaded.tensors["rng/cpu"])
        if self.device.type == "cuda" and "rng/cuda" in loaded.tensors:
            torch.cuda.set_rng_state(loaded.tensors["rng/cuda"], self.device)

    def _log(self, **entry: Any) -> None:
        if not self.processes.is_first:
            return
        self.progress.metrics_bytes = append_metrics(self.folder, entry, self.progress.metrics_bytes)
