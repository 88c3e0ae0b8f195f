"""What the folder of a run says about it, finished or not, read without its data or model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from wsn_fast.masks import TaskMasks
from wsn_fast.tasks import decode_json
from wsn_fast.train import checkpoint, config
from wsn_fast.train.checkpoint import Checkpoint, CheckpointError
from wsn_fast.train.report import DETAILS, NUMBERS, summarize
from wsn_fast.train.run import read_config

_SINGLE = ("acc", "bwt", "fwt", "capacity", "capacity_paper", "union_density", "compression")
_PREFIX = "model/model."  # of the model's tensors in a checkpoint
_SUFFIX = "_masks"


@dataclass(frozen=True)
class TaskLog:
    """The training of one task so far, from ``metrics.jsonl``.

    Attributes:
        task: its id.
        epochs: how many have ended.
        best_epoch: that of the least validation loss; None while it is in training.
        seconds: of all these epochs, each with its validation.
        train_samples: samples per epoch; None if the run did not write it down.
        optimizer: package and class; None likewise.
        paths: what ran each operation (see :func:`wsn_fast.train.report.begin_entry`).
    """

    task: int
    epochs: int
    best_epoch: int | None
    seconds: float
    train_samples: int | None
    optimizer: str | None
    paths: Sequence[Mapping[str, Any]]

    @property
    def epoch_seconds(self) -> float | None:
        """Seconds per epoch; None before the first has ended."""
        return self.seconds / self.epochs if self.epochs else None

    @property
    def samples_per_second(self) -> float | None:
        """Training samples per second; None if it cannot be known."""
        if not self.train_samples or not self.seconds:
            return None
        return self.train_samples * self.epochs / self.seconds


@dataclass(frozen=True)
class Record:
    """A run.

    Attributes:
        name: its folder as the user wrote it.
        settings: the config, without the places of one machine.
        command: what repeats it.
        versions: what it was made with.
        results: what ``results.json`` holds, or would hold after the tasks that are finished; None if none is.
        finished: whether all tasks are.
        tasks: the training of each task that has begun.
        written: when its log last grew; None without a log.
        notes: what could not be read.
    """

    name: str
    settings: Mapping[str, Any]
    command: str
    versions: Mapping[str, str]
    results: Mapping[str, Any] | None
    finished: bool
    tasks: Sequence[TaskLog]
    written: datetime | None
    notes: Sequence[str]


def read(name: str) -> Record:
    """Read the run in the folder ``name``.

    Raises:
        OSError: the folder holds no run (``FileNotFoundError``), or cannot be read.
        ValueError: ``config.json`` or ``results.json`` is damaged.
    """
    folder = Path(name)
    notes: list[str] = []
    finished = (folder / "results.json").is_file()
    results = _read_results(folder / "results.json") if finished else None
    if results is None:
        settings, versions = config.portable(read_config(folder)), _versions(folder / "config.json")
        results = _summary(folder, notes)
    else:
        settings, versions = results["config"], results["versions"]
        if any(detail not in results for detail in DETAILS):  # which the first runs did not write down
            measured = _summary(folder, notes) or {}
            if measured.get("reuse") == results["reuse"]:
                results = {**measured, **results}
    if results is not None:
        results |= {"config": settings, "versions": versions}
    log = folder / "metrics.jsonl"
    tasks = _read_log(log, notes)
    written = datetime.fromtimestamp(log.stat().st_mtime, timezone.utc) if log.is_file() else None
    command = config.command_line(_with_places(settings))
    return Record(name, settings, command, versions, results, finished, tasks, written, notes)


# --- results.json -----------------------------------------------------------------------------------------
def _read_results(path: Path) -> dict[str, Any]:
    try:
        results: dict[str, Any] = json.loads(path.read_text("utf-8"))
        missing = {"config", "versions", *NUMBERS} - results.keys()
        if missing:
            raise ValueError(f"it has no {', '.join(sorted(missing))}")
        _check_numbers(results)
        results["config"] = config.portable(_with_places(results["config"]))
        results["versions"] = _as_text(results["versions"])
    except (ValueError, TypeError, AttributeError, KeyError, IndexError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    return results


def _versions(path: Path) -> dict[str, str]:
    try:
        return _as_text(json.loads(path.read_text("utf-8"))["versions"])
    except (ValueError, AttributeError, KeyError) as error:
        raise ValueError(f"{path} is damaged: {error!r}") from error


def _as_text(versions: Mapping[str, Any]) -> dict[str, str]:
    return {str(key): str(value) for key, value in versions.items()}


def _with_places(settings: Mapping[str, Any]) -> config.TrainConfig:
    return config.from_dict({**settings, "data_dir": None, "out": "run"})


def _check_numbers(results: Mapping[str, Any]) -> None:
    """Raise what comes unless every measurement has the shape and the kind that reports count on."""
    matrix, tasks = results["accuracy_matrix"], len(results["accuracy_matrix"])
    layers, overlap = results.get("layers", []), results.get("overlap", matrix)
    if (
        not tasks
        or len(overlap) != tasks
        or any(row[i + 1 :] != [None] * (tasks - i - 1) for i, row in enumerate(matrix))
    ):
        raise ValueError("its matrices are not of one size, or not square")
    single = [results[name] for name in _SINGLE]
    expected = [(single, len(single)), ([layer["elements"] for layer in layers], len(layers))]
    expected += [(results[name], tasks) for name in ("forgetting", "random_init", "before_training")]
    expected += [(row[: i + 1], i + 1) for i, row in enumerate(matrix)]
    expected += [(row, tasks) for row in results.get("overlap", [])]
    for shares in (results["reuse"], *(layer["tasks"] for layer in layers)):
        expected += [([share[name] for share in shares], tasks) for name in ("density", "reuse", "new")]
        named = [share["task"] for share in shares]
        if named != [share["task"] for share in results["reuse"]]:
            raise ValueError(f"a layer has other tasks: {named}")
    for values, count in expected:
        if len(values) != count or not all(isinstance(x, (int, float)) and not isinstance(x, bool) for x in values):
            raise ValueError(f"expected {count} numbers, got {values!r}")
    if not all(isinstance(layer["name"], str) for layer in layers):
        raise ValueError("a layer has no name")


# --- checkpoint -------------------------------------------------------------------------------------------
def _summary(folder: Path, notes: list[str]) -> dict[str, Any] | None:
    """The measurements of the finished tasks by the newest checkpoint; None if there is none."""
    try:
        found = checkpoint.load_from(folder / "checkpoint")
        progress = found.state["progress"]
        done = len(progress["matrix"])
        if done:
            random_init, before = progress["random_init"][:done], progress["before"][:done]
            measured = summarize(progress["matrix"], random_init, before, _masks(found))
            return {**measured, "data_fingerprint": found.state["fingerprint"]}
    except CheckpointError as error:
        notes.append(str(error))
    except (ValueError, TypeError, KeyError) as error:
        notes.append(f"{folder / 'checkpoint'} is not that of a run: {error!r}")
    return None


def _masks(found: Checkpoint) -> TaskMasks:
    tensors = found.tensors
    names = [key[len(_PREFIX) : -len(_SUFFIX)] for key in tensors if key.startswith(_PREFIX) and key.endswith(_SUFFIX)]
    names.sort(key=lambda name: [(part.isdecimal(), part.zfill(9)) for part in name.split(".")])
    tasks = [record["task"] for record in decode_json(tensors["model/_extra_state"])["records"]]
    return TaskMasks(
        tasks,
        {name: tensors[f"{_PREFIX}{name}{_SUFFIX}"] for name in names},
        {name: tensors[f"{_PREFIX}{name}"].numel() for name in names},
    )


# --- metrics.jsonl ----------------------------------------------------------------------------------------
def _read_log(path: Path, notes: list[str]) -> list[TaskLog]:
    """What the log says of each task, in order; lines of other kinds are for others."""
    try:
        text = path.read_text("utf-8", errors="replace")
    except OSError as error:
        notes.append(f"cannot read {path}: {error.strerror}")
        return []
    begun: dict[int, dict[str, Any]] = {}
    epochs: dict[int, dict[int, float]] = {}
    best: dict[int, int] = {}
    # The last line may still be on its way.
    for number, line in enumerate(text[: text.rfind("\n") + 1].splitlines(), 1):
        try:
            entry = json.loads(line)
            kind, task = entry["kind"], int(entry["task"])
            if kind == "begin":
                begun[task] = _checked_begin(entry)
            elif kind == "epoch":
                epochs.setdefault(task, {})[int(entry["epoch"])] = float(entry["seconds"])
            elif kind == "task":
                best[task] = int(entry["best_epoch"])
        except (ValueError, TypeError, KeyError) as error:
            notes.append(f"{path}, line {number} is damaged: {error!r}")
    tasks = sorted({*begun, *epochs})
    nothing: dict[str, Any] = {"train_samples": None, "optimizer": None, "paths": []}
    return [
        TaskLog(
            task=task,
            epochs=len(epochs.get(task, {})),
            best_epoch=best.get(task),
            seconds=sum(epochs.get(task, {}).values()),
            **begun.get(task, nothing),
        )
        for task in tasks
    ]


def _checked_begin(entry: Mapping[str, Any]) -> dict[str, Any]:
    words = ("operation", "backend", "reason")
    paths = [
        {**{word: str(path[word]) for word in words}, "layers": [str(layer) for layer in path["layers"]]}
        for path in entry["paths"]
    ]
    return {"train_samples": int(entry["train_samples"]), "optimizer": str(entry["optimizer"]), "paths": paths}
