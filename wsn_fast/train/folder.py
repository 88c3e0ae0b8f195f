"""The files in the folder of a run: ``config.json``, ``results.json`` and ``metrics.jsonl``.

Checkpoints are in :mod:`wsn_fast.train.checkpoint`, the lock is in :mod:`wsn_fast.train.lock`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from wsn_fast.train import checkpoint, config
from wsn_fast.train.checkpoint import Checkpoint, CheckpointError
from wsn_fast.train.config import TrainConfig
from wsn_fast.train.lock import NAME as LOCK
from wsn_fast.train.safe_files import open_to_append, read_json, write_atomic


def check_unused(folder: Path) -> None:
    """Raise ``ValueError`` unless a run may begin in ``folder``.

    The folder may be missing. It may also hold the lock and temporary files, which a run leaves behind when it is
    killed at its start.
    """
    if folder.exists() and any(path.suffix != ".tmp" and path.name != LOCK for path in folder.iterdir()):
        raise ValueError(
            f"out: expected an empty or new folder, got {str(folder)!r}; to continue the run in it, use "
            f"`wsn-fast train --resume {folder}`"
        )


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
        settings = config.from_dict(read_json(path)["config"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    return settings


def config_to_go_on(
    folder: Path, *, data: str | None = None, data_dir: str | None = None, device: str | None = None
) -> TrainConfig:
    """The config of the run in ``folder``, with what is given in the place of what it says.

    Args:
        folder: the folder of the run.
        data: the code that makes the tasks of a stream ``own``. It has to be given then, since the folder may come from
            anywhere, and no code runs because a file in it says so.
        data_dir: another folder of the data; None means the same.
        device: another device; None means the same.

    Raises:
        FileNotFoundError: there is none.
        ValueError: ``config.json`` is damaged, or ``data`` is missing or may not be given.
    """
    settings = read_config(folder)
    if settings.stream == "own" and data is None:
        raise ValueError(
            "data: expected --data FILE.py:FUNCTION, the code that makes the tasks, because the folder of a run cannot "
            f"decide which code is run; it was {settings.data!r}"
        )
    if settings.stream != "own" and data is not None:
        raise ValueError(f"data: expected none, since those of the run are {settings.data!r}, got {data!r}")
    return replace(
        settings,
        data=settings.data if data is None else data,
        data_dir=settings.data_dir if data_dir is None else data_dir,
        device=settings.device if device is None else device,
    )


def check_same_run(loaded: Checkpoint, settings: TrainConfig, folder: Path, fingerprint: str) -> None:
    """Check that a checkpoint is of the run in ``folder``.

    Args:
        loaded: the checkpoint.
        settings: the config of the run now.
        folder: the folder of the run.
        fingerprint: that of its data now.

    Raises:
        CheckpointError: it does not say of which run it is.
        ValueError: config or data have changed since.
    """
    try:
        saved, trained_on = config.from_dict(loaded.state["config"]), loaded.state["fingerprint"]
    except KeyError as error:
        raise CheckpointError(f"{loaded.path} is not that of a run: it has no {error}") from error
    except checkpoint.NONSENSE as error:
        raise CheckpointError(f"{loaded.path} holds no settings of a run: {error}") from error
    own = config.portable(settings)
    free = ("device", "data") if settings.stream == "own" else ("device",)
    changed = [name for name, x in config.portable(saved).items() if own[name] != x and name not in free]
    if changed:
        raise ValueError(
            f"{folder / 'config.json'}: expected the settings of {loaded.path.name}, but these were "
            f"changed: {', '.join(changed)}"
        )
    if trained_on != fingerprint:
        raise ValueError(
            f"data: expected those with fingerprint {str(trained_on)[:99]}, on which this run was "
            f"trained, got {fingerprint}: the files of {settings.data!r} have changed"
        )


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file atomically."""
    write_atomic(path, json.dumps(content, indent=2).encode() + b"\n")


def append_metrics(folder: Path, entry: Mapping[str, Any], size: int) -> int:
    """Add a line to ``metrics.jsonl``, and wait until it is on the disk.

    Args:
        folder: the folder of the run.
        entry: the line, as JSON.
        size: the length of the file in bytes as far as it counts. Whatever an interrupted run wrote after its last
            checkpoint is cut off, because the resumed run writes it again.

    Returns:
        The length of the file in bytes.

    Raises:
        OSError: the file cannot be written; ``filename`` is its path.
    """
    path = folder / "metrics.jsonl"
    try:
        with open_to_append(path) as file:
            file.truncate(min(file.tell(), size))
            file.write(json.dumps(entry).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
            return file.tell()
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
