"""The record of a run, read from its folder. The run need not be finished, and neither its data nor its model are
needed."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from wsn_fast.continual.statistics import TaskMasks
from wsn_fast.nn.task_ids import decode_json, task_of_json
from wsn_fast.ops import packed_size
from wsn_fast.train import checkpoint, config, task_logs
from wsn_fast.train.checkpoint import Checkpoint, CheckpointError
from wsn_fast.train.folder import read_config
from wsn_fast.train.progress import Progress
from wsn_fast.train.report import DETAILS, NUMBERS, summarize
from wsn_fast.train.safe_files import read_json
from wsn_fast.train.task_logs import TaskLog

# The single numbers, in percent, and the range of each. A task adds at most 100 / 32 to a capacity.
_SINGLE: Mapping[str, tuple[float, float]] = MappingProxyType(
    {
        "acc": (0, 100),
        "bwt": (-100, 100),
        "fwt": (-100, 100),
        "capacity": (0, 100_000),
        "capacity_paper": (0, 100_000),
        "union_density": (0, 100),
        "compression": (0, 100),
    }
)
_ROUNDING = 1e-6
_PREFIX = "model/model."  # the prefix of the model's tensors in a checkpoint
_SUFFIX = "_masks"


@dataclass(frozen=True)
class Record:
    """A run, as its folder describes it.

    Attributes:
        name: the folder, as the user wrote it.
        settings: the config, without the settings that only say where files are.
        command: the command that repeats the run.
        versions: the versions of the software, and the device.
        results: the content of ``results.json``, or what it would be after the tasks that are finished; None if no task
            is finished.
        finished: whether all tasks are finished.
        tasks: the training of each task that has begun.
        written: the time at which the log last grew; None without a log.
        notes: what could not be read, and why.
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
        if any(detail not in results for detail in DETAILS):  # the first runs did not write them
            measured = _summary(folder, notes) or {}
            if measured.get("reuse") == results["reuse"]:
                results = {**measured, **results}
    if results is not None:
        results |= {"config": settings, "versions": versions}
    log = folder / "metrics.jsonl"
    tasks = task_logs.read(log, notes)
    written = datetime.fromtimestamp(log.stat().st_mtime, timezone.utc) if log.is_file() else None
    command = config.command_line(_with_places(settings))
    return Record(name, settings, command, versions, results, finished, tasks, written, notes)


# --- results.json -----------------------------------------------------------------------------------------
def _read_results(path: Path) -> dict[str, Any]:
    try:
        results: dict[str, Any] = read_json(path)
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
        return _as_text(read_json(path)["versions"])
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {error!r}") from error


def _as_text(versions: Mapping[str, Any]) -> dict[str, str]:
    return {str(key): str(value) for key, value in versions.items()}


def _with_places(settings: Mapping[str, Any]) -> config.TrainConfig:
    return config.from_dict({**settings, "data_dir": None, "out": "run"})


def _check_numbers(results: Mapping[str, Any]) -> None:
    """Raise an exception unless every measurement has the shape and the type that the reports need."""
    matrix, tasks = results["accuracy_matrix"], len(results["accuracy_matrix"])
    layers, overlap = results.get("layers", []), results.get("overlap", matrix)
    if (
        not tasks
        or len(overlap) != tasks
        or any(row[i + 1 :] != [None] * (tasks - i - 1) for i, row in enumerate(matrix))
    ):
        raise ValueError("its matrices are not of one size, or not square")
    for name, (low, high) in _SINGLE.items():
        _check_range([results[name]], 1, low, high)
    _check_range(results["forgetting"], tasks, -100, 100)
    percentages = [(results[name], tasks) for name in ("random_init", "before_training")]
    percentages += [(row[: i + 1], i + 1) for i, row in enumerate(matrix)]
    percentages += [(row, tasks) for row in results.get("overlap", [])]
    named = [task_of_json(share["task"]) for share in results["reuse"]]
    for shares in (results["reuse"], *(layer["tasks"] for layer in layers)):
        percentages += [([share[name] for share in shares], tasks) for name in ("density", "reuse", "new")]
        if [share["task"] for share in shares] != named:
            raise ValueError("a layer has other tasks")
    for values, count in percentages:
        _check_range(values, count, 0, 100)
    _check_range([layer["elements"] for layer in layers], len(layers), 1, 2**63)
    if not all(isinstance(layer["name"], str) for layer in layers):
        raise ValueError("a layer has no name")


def _check_range(values: Sequence[Any], count: int, low: float, high: float) -> None:
    """Raise ``ValueError`` unless ``values`` are ``count`` numbers from ``low`` to ``high``, up to rounding."""
    if len(values) != count or not all(
        type(x) in (int, float) and low - _ROUNDING <= x <= high + _ROUNDING for x in values
    ):
        raise ValueError(f"expected {count} numbers from {low} to {high}, got {reprlib.repr(values)}")


# --- checkpoint -------------------------------------------------------------------------------------------
def _summary(folder: Path, notes: list[str]) -> dict[str, Any] | None:
    """The measurements of the finished tasks in the newest checkpoint; None if there is none."""
    try:
        found = checkpoint.load_from(folder / "checkpoint")
        progress = Progress.from_json(found.state["progress"])
        done = len(progress.matrix)
        if done:
            masks, random_init, before = _masks(found, done), progress.random_init[:done], progress.before[:done]
            measured = summarize(progress.matrix, random_init, before, masks)
            return {**measured, "data_fingerprint": str(found.state["fingerprint"])}
    except CheckpointError as error:
        notes.append(str(error))
    except checkpoint.NONSENSE as error:
        notes.append(f"{folder / 'checkpoint'} is not that of a run: {reprlib.repr(error)}")
    return None


def _masks(found: Checkpoint, tasks: int) -> TaskMasks:
    """The masks in a checkpoint. Raises an exception unless they are those of as many tasks."""
    tensors = found.tensors
    names = [key[len(_PREFIX) : -len(_SUFFIX)] for key in tensors if key.startswith(_PREFIX) and key.endswith(_SUFFIX)]
    names.sort(key=lambda name: [(part.isdecimal(), part.zfill(9)) for part in name.split(".")])
    ids = [task_of_json(record["task"]) for record in decode_json(tensors["model/_extra_state"])["records"]]
    packed = {name: tensors[f"{_PREFIX}{name}{_SUFFIX}"] for name in names}
    sizes = {name: tensors[f"{_PREFIX}{name}"].numel() for name in names}
    for name, rows in packed.items():
        expected = (tasks, packed_size(sizes[name]))
        if len(ids) != tasks or tuple(rows.shape) != expected or rows.dtype != torch.uint8 or not sizes[name]:
            raise ValueError(f"{name} has masks {rows.dtype} {tuple(rows.shape)} of {len(ids)} tasks, not {expected}")
    return TaskMasks(ids, packed, sizes)
