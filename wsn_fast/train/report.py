"""The report of a run: its measurements, plots, and the console."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from tqdm import tqdm

from wsn_fast import WSN, __version__
from wsn_fast.continual.statistics import TaskMasks, TaskStats, capacity, overlap, task_stats
from wsn_fast.explain import explain
from wsn_fast.optim.subnet_optimizer import SubnetOptimizer
from wsn_fast.train import clock, figures, metrics
from wsn_fast.train.safe_files import write_atomic

# The entries of results.json that are measurements.
NUMBERS = (
    "accuracy_matrix", "acc", "bwt", "fwt", "forgetting", "capacity", "capacity_paper", "union_density",
    "compression", "reuse", "random_init", "before_training",
)  # fmt: skip
_Item = TypeVar("_Item")
_SHOWN = 2000  # characters of a measurement in a message
# The entries that the first runs did not have.
DETAILS = ("layers", "overlap")


def versions(device: torch.device) -> dict[str, str]:
    """The versions of the software, and the device, that a run used."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return {
        "wsn_fast": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": name,
    }


def begin_entry(
    wsn: WSN, optimizer: torch.optim.Optimizer, train_samples: int | None, not_captured: str
) -> dict[str, Any]:
    """The line of ``metrics.jsonl`` for the beginning of a task: the optimizer, and which backend runs each operation
    and why.

    Args:
        wsn: the model, with the task in progress.
        optimizer: its guarded optimizer. It must be built already, because it changes what the layers do.
        train_samples: the number of samples per epoch; None if it is not known yet.
        not_captured: why the training step is not captured in a CUDA graph; nothing if it is.
    """
    layers: dict[tuple[str, str, str], list[str]] = {}
    for route in explain(wsn.model):
        layers.setdefault((route.operation, route.backend, route.reason), []).append(route.layer)
    backend, reason = ("as it is", not_captured) if not_captured else ("CUDA graph", "if it can be captured")
    layers["whole step", backend, reason] = list(wsn.subnet_layers())
    return {
        "train_samples": train_samples,
        "optimizer": _name(optimizer),
        "paths": [
            {"operation": operation, "backend": backend, "reason": reason, "layers": names}
            for (operation, backend, reason), names in layers.items()
        ],
    }


def _name(optimizer: torch.optim.Optimizer) -> str:
    name = f"{type(optimizer).__module__.partition('.')[0]} {type(optimizer).__name__}"
    coded = isinstance(optimizer, SubnetOptimizer) and optimizer.storage.is_coded
    return f"{name}, moments {optimizer.storage}" if coded else name  # type: ignore[attr-defined]


def masks_of(wsn: WSN) -> TaskMasks:
    """The masks of the finished tasks of a model."""
    gates = dict(wsn.gated())
    return TaskMasks(
        wsn.tasks, {name: g.masks for name, g in gates.items()}, {name: g.param.numel() for name, g in gates.items()}
    )


def summarize(
    matrix: Sequence[Sequence[float]], random_init: Sequence[float], before: Sequence[float], masks: TaskMasks
) -> dict[str, Any]:
    """All measurements of a run, in percent.

    Args:
        matrix: row i has the accuracies on the tasks 0..i after task i; T >= 1 rows.
        random_init: per task, the accuracy at random initialisation.
        before: per task, the accuracy just before it was trained.
        masks: the masks of these tasks.

    Returns:
        The entries ``NUMBERS`` and ``DETAILS``. ``NUMBERS`` are the matrix [T, T] (None above the diagonal), ACC, BWT,
        FWT, the forgetting per task, the capacity with the measured and with the paper's compression, and three
        shares per task: its density, the share of its weights that earlier tasks own (reuse), and the share of all
        weights that it was the first to own (new). ``DETAILS`` are the same three shares for each gated tensor, and
        the overlap [T, T] of the masks (see :func:`wsn_fast.continual.statistics.overlap`).
    """
    packed, sizes = list(masks.packed.values()), list(masks.sizes.values())
    used = capacity(packed, sizes)
    return {
        "accuracy_matrix": [[*row, *[None] * (len(matrix) - len(row))] for row in matrix],
        "acc": metrics.average_accuracy(matrix),
        "bwt": metrics.backward_transfer(matrix),
        "fwt": metrics.forward_transfer(before, random_init),
        "forgetting": metrics.forgetting(matrix),
        "capacity": 100 * used.capacity,
        "capacity_paper": 100 * used.capacity_paper,
        "union_density": 100 * used.union_density,
        "compression": 100 * used.compression,
        "reuse": _percent(task_stats(masks.tasks, packed, sizes)),
        "random_init": list(random_init),
        "before_training": list(before),
        "layers": [
            {"name": name, "elements": masks.sizes[name], "tasks": _percent(task_stats(masks.tasks, [rows], [size]))}
            for (name, rows), size in zip(masks.packed.items(), sizes, strict=True)
        ],
        "overlap": [[100 * share for share in row] for row in overlap(packed)],
    }


def _percent(stats: Sequence[TaskStats]) -> list[dict[str, Any]]:
    return [{"task": s.task, "density": 100 * s.density, "reuse": 100 * s.reuse, "new": 100 * s.new} for s in stats]


def differences(stored: Mapping[str, Any], measured: Mapping[str, Any]) -> list[str]:
    """One line for each measurement that differs between the two; empty if all are exactly the same."""
    return [
        f"{name}: results.json has {_shown(stored.get(name))}, the checkpoint gives {_shown(measured[name])}"
        for name in (*NUMBERS, *(detail for detail in DETAILS if detail in stored))
        if stored.get(name) != measured[name]
    ]


def _shown(value: object) -> str:
    text = str(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def in_words(results: Mapping[str, Any]) -> str:
    """The main numbers of a run, one line each."""
    reuse = sum(task["reuse"] for task in results["reuse"]) / len(results["reuse"])
    return "\n".join(
        (
            f"ACC {results['acc']:.2f} %   BWT {results['bwt']:+.2f}   FWT {results['fwt']:+.2f}",
            f"CAP {results['capacity_paper']:.2f} % with the paper's constant compression, "
            f"{results['capacity']:.2f} % with the measured one ({results['compression']:.1f} %)",
            f"{results['union_density']:.2f} % of the gated weights are owned by some task; on average "
            f"{reuse:.2f} % of a task's weights are reused from earlier ones",
        )
    )


# --- plots ------------------------------------------------------------------------------------------------
def plot(results: Mapping[str, Any], folder: Path) -> None:
    """Write ``accuracy_matrix.png`` and ``capacity.png`` into ``folder``."""
    for name, draw in (("accuracy_matrix", figures.accuracy_matrix), ("capacity", figures.capacity)):
        write_atomic(folder / f"{name}.png", figures.png(draw, results))


# --- while it works -----------------------------------------------------------------------------------------
class Console:
    """Shows the progress of a run: bars on a terminal, a line per task elsewhere, and nothing if ``quiet``.

    A run goes on without words when nobody reads them any more (``wsn-fast train | head -1``).
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet = quiet
        self._bar: Any = None

    def say(self, text: str) -> None:
        """Print a line, unless quiet."""
        if self._quiet:
            return
        try:
            print(text, flush=True)
        except BrokenPipeError:
            self._quiet = True
            with open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), sys.stdout.fileno())  # Python writes the rest there when it ends

    def loading(self, items: Iterable[_Item], total: int, what: str) -> Iterable[_Item]:
        """See :class:`wsn_fast.train.data.loading.Shows`. A bar comes up on a terminal after a second."""
        if self._quiet or not sys.stderr.isatty():
            return items
        bar: Iterable[_Item] = tqdm(items, total=total, desc=what, unit="", delay=1, leave=False, dynamic_ncols=True)
        return bar

    def task_started(self, task: int, tasks: int, epochs: int, batches: int | None, done: int) -> None:
        """A task of ``epochs`` times ``batches`` steps begins, or continues after ``done`` epochs."""
        if not self._quiet and sys.stderr.isatty():
            total, initial = (None, 0) if batches is None else (epochs * batches, done * batches)
            self._bar = tqdm(
                total=total, initial=initial, desc=f"task {task} ({task + 1}/{tasks})", unit="batch",
                leave=False, dynamic_ncols=True,
            )  # fmt: skip

    def step(self) -> None:
        """One batch was trained."""
        if self._bar is not None:
            self._bar.update()

    def epoch_ended(self, epoch: int, loss: float, val_acc: float, lr: float) -> None:
        """Show loss, accuracy and learning rate of the last epoch in the bar."""
        if self._bar is not None:
            self._bar.set_postfix_str(f"epoch {epoch}, loss {loss:.4f}, validation {val_acc:.1f} %, lr {lr:.1e}")

    def task_ended(self, task: int, tasks: int, acc: float, best_epoch: int, time: Mapping[str, float]) -> None:
        """Print a line about the task, which says where its time went (see :class:`wsn_fast.train.clock.Clock`)."""
        self.close()
        about = f"best epoch {best_epoch}, {clock.in_words(time)}"
        self.say(f"task {task} ({task + 1}/{tasks}): test accuracy {acc:.2f} % ({about})")

    def close(self) -> None:
        """Remove the bar, if there is one."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
