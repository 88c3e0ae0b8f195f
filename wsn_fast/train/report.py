"""The report of a run: its measurements, a table that compares them with the paper, plots, and the console."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import wrap
from types import MappingProxyType
from typing import Any

import torch
from tqdm import tqdm

from wsn_fast import WSN, __version__
from wsn_fast.continual.statistics import TaskMasks, TaskStats, capacity, overlap, task_stats
from wsn_fast.explain import explain
from wsn_fast.optim.subnet_optimizer import SubnetOptimizer
from wsn_fast.train import clock, figures, metrics
from wsn_fast.train.choices import FIVE_DATASETS
from wsn_fast.train.config import resolve
from wsn_fast.train.safe_files import write_atomic

# The paper, mean over seeds: (stream, data, tasks) -> density -> (ACC, CAP), in percent. BWT is 0 everywhere.
PAPER_RESULTS: Mapping[tuple[str, str, int], Mapping[float, tuple[float, float]]] = MappingProxyType(
    {
        ("permuted", "mnist", 10): MappingProxyType(
            {
                0.03: (94.84, 19.87),
                0.05: (95.65, 26.49),
                0.1: (96.14, 40.41),
                0.3: (96.41, 77.73),
                0.5: (96.24, 98.1),
            }
        ),
        ("split", "cifar100", 10): MappingProxyType(
            {
                0.03: (70.65, 18.56),
                0.05: (72.44, 25.09),
                0.1: (74.55, 39.87),
                0.3: (75.98, 80.26),
                0.5: (76.38, 99.13),
            }
        ),
        ("superclass", "cifar100", 20): MappingProxyType(
            {
                0.03: (54.99, 22.3),
                0.05: (57.99, 27.37),
                0.1: (60.45, 38.55),
                0.3: (61.47, 63.47),
                0.5: (61.79, 80.93),
            }
        ),
        ("split", "omniglot", 100): MappingProxyType(  # Omniglot Rotation
            {
                0.03: (80.68, 75.87),
                0.05: (87.28, 79.85),
                0.1: (83.1, 83.08),
                0.3: (81.89, 102.2),
                0.5: (79.8, 121.2),
            }
        ),
        ("datasets", FIVE_DATASETS, 5): MappingProxyType(
            {
                0.03: (90.57, 12.11),
                0.05: (91.61, 17.26),
                0.1: (92.67, 28.01),
                0.3: (93.22, 62.3),
                0.5: (93.41, 86.1),
            }
        ),
        ("split", "folder", 40): MappingProxyType(  # TinyImageNet
            {
                0.03: (68.72, 37.19),
                0.05: (71.22, 41.98),
                0.1: (71.96, 48.65),
                0.3: (70.92, 73.44),
                0.5: (69.06, 92.03),
            }
        ),
    }
)
# The settings that make the paper's method. Numbers of a run with others cannot be compared with the paper.
_METHOD = ("rule", "reinit_scores", "score_init")
# The settings that a run may choose and still be compared with the paper.
_FREE = ("density", "seed", "device", "threads", "one_pass", "memory_format", "checkpoint_seconds", "preset")
# The entries of results.json that are measurements.
NUMBERS = (
    "accuracy_matrix", "acc", "bwt", "fwt", "forgetting", "capacity", "capacity_paper", "union_density",
    "compression", "reuse", "random_init", "before_training",
)  # fmt: skip
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


def begin_entry(wsn: WSN, optimizer: torch.optim.Optimizer, train_samples: int, not_captured: str) -> dict[str, Any]:
    """The line of ``metrics.jsonl`` for the beginning of a task: the optimizer, and which backend runs each operation
    and why.

    Args:
        wsn: the model, with the task in progress.
        optimizer: its guarded optimizer. It must be built already, because it changes what the layers do.
        train_samples: the number of samples per epoch.
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


def beside_paper(results: Mapping[str, Any]) -> tuple[float, float, str] | None:
    """The paper's (ACC, CAP) for the setting of a finished run, and in what the run differs from it; None if the paper
    has no numbers for the setting."""
    settings = results["config"]
    stream, data, tasks = settings["stream"], settings["data"], settings["tasks"]
    if len(results["accuracy_matrix"]) < tasks:  # the run is not finished
        return None
    row = PAPER_RESULTS.get((stream, data, tasks), {}).get(settings["density"])
    paper = resolve(stream=stream, data=data)
    if row is None or any(settings[name] != getattr(paper, name) for name in _METHOD):
        return None
    other = [
        f"{name} {value} (paper: {getattr(paper, name)})"
        for name, value in settings.items()
        if name not in _FREE and value != getattr(paper, name)
    ]
    if data == "folder":
        other.insert(0, "if the folder is TinyImageNet")
    return *row, ", ".join(other)


def table(runs: Mapping[str, Mapping[str, Any]], columns: int | None = None) -> str:
    """A table of runs as text. A run with the paper's setting has the paper's numbers beside its own.

    Args:
        runs: the results of runs by name.
        columns: characters of a line. A table that is wider becomes a paragraph for each run. None means any number.
    """
    rows = [("run", "setting", "c", "ACC", "BWT", "FWT", "CAP", "CAP*", "paper: ACC", "CAP", "differs in")]
    for name, results in runs.items():
        settings, paper = results["config"], beside_paper(results)
        stream = f"{settings['stream']} {settings['data']} x{settings['tasks']} {settings['preset']}"
        done = len(results["accuracy_matrix"])
        stream += "" if done == settings["tasks"] else f", {done} done"
        acc, bwt, fwt, cap, measured = (
            f"{results[key]:.2f}" for key in ("acc", "bwt", "fwt", "capacity_paper", "capacity")
        )
        beside = (f"{paper[0]:.2f}", f"{paper[1]:.2f}", paper[2]) if paper else ("-", "-", "")
        rows.append((name, stream, f"{settings['density']:g}", acc, bwt, fwt, cap, measured, *beside))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    if columns is not None and sum(widths) + 2 * len(widths) - 2 > columns:
        return "\n\n".join(
            [*(_paragraph(rows[0], row, columns) for row in rows[1:]), "\n".join(wrap(_CAPTION, columns))]
        )
    left = (0, 1, 10)
    lines = [
        "  ".join(
            text.ljust(width) if i in left else text.rjust(width)
            for i, (text, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join([*lines, _CAPTION])


_CAPTION = "In percent. CAP with the paper's constant mask compression of 78 %, CAP* with the measured one."


def _paragraph(names: Sequence[str], values: Sequence[str], columns: int) -> str:
    """A row of a table as lines of ``columns`` characters: its name, its setting, and its numbers with their names."""
    numbers = [
        f"{'paper: ' * (name == names[9] and i == 9)}{name} {value}"
        for i, (name, value) in enumerate(zip(names, values, strict=True))
        if i > 1 and value not in ("", "-")
    ]
    text = [values[0], values[1], ", ".join(numbers)]
    return "\n".join(
        line
        for i, part in enumerate(text)
        for line in wrap(part, columns, initial_indent="  " * (i > 0), subsequent_indent="    ")
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

    def task_started(self, task: int, tasks: int, epochs: int, batches: int, done: int) -> None:
        """A task of ``epochs`` times ``batches`` steps begins, or continues after ``done`` epochs."""
        if not self._quiet and sys.stderr.isatty():
            self._bar = tqdm(
                total=epochs * batches, initial=done * batches, desc=f"task {task} ({task + 1}/{tasks})", unit="batch",
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
