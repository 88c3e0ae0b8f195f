"""Reads a checkpoint that ``torch.distributed.checkpoint`` (DCP) has written, each process what it asks for."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.storage import StorageReader

from ..continual import register_state
from ..continual.loading import StateError
from ..nn.shards import ShardedGate
from ..nn.task_ids import TaskId, decode_json
from .entries import MODEL, Entry

INFO = "wsn_fast"
VERSION = 1
_SHOWN = 10  # names in a message


class SavedCheckpoint:
    """A checkpoint, of which the names, sizes and tasks are known.

    Args:
        reader: that of DCP.

    Attributes:
        sizes: the shapes of all tensors, by name.
        tasks: how many tasks have ended.

    Raises:
        StateError: there is no checkpoint, or it is not one of a WSN, or a file is missing or too short.
    """

    def __init__(self, reader: StorageReader) -> None:
        self._reader = reader
        self._where = str(getattr(reader, "checkpoint_id", type(reader).__name__))
        metadata = self._metadata()
        kinds = metadata.state_dict_metadata
        self._kinds = {name: kind for name, kind in kinds.items() if isinstance(kind, TensorStorageMetadata)}
        self.sizes = {name: tuple(kind.size) for name, kind in self._kinds.items()}
        if INFO not in self._kinds or f"{MODEL}_extra_state" not in self._kinds or len(self._kinds) < len(kinds):
            raise StateError(f"the checkpoint in {self._where} was not written by save_checkpoint")
        if isinstance(reader, FileSystemReader):
            self._check_files(reader, metadata)
        self._info = self._json(INFO)
        if self._info.get("version") != VERSION:
            raise StateError(f"the checkpoint must have version {VERSION}, got {str(self._info.get('version'))[:99]}")
        name = f"{MODEL}_extra_state"
        try:
            self._register = register_state.parse(self._one(name))
        except ValueError as error:
            raise StateError(f"{name} in {self._where} is damaged: {error}") from error
        self.tasks = len(self._register.tasks)

    @property
    def optimizer(self) -> dict[str, Any]:
        """The JSON of the optimizer. Raises ``StateError`` if none was saved."""
        found: dict[str, Any] | None = self._info.get("optimizer")
        if found is None:
            raise StateError(f"the checkpoint in {self._where} has no optimizer: save_checkpoint was not given one")
        return found

    def names(self, prefix: str) -> list[str]:
        """The names that begin with ``prefix``."""
        return [name for name in self._kinds if name.startswith(prefix)]

    def space(self, name: str, gate: ShardedGate | None, device: torch.device, by_process: bool = False) -> Entry:
        """Memory for what this process will hold of a tensor, which is cut as ``gate`` is, or into a row for each
        process."""
        size = self.sizes[name]
        if gate is not None:
            size = (1 if by_process else gate.rows.stop - gate.rows.start, *size[1:])
        if name.endswith("_extra_state"):
            device = torch.device("cpu")
        return Entry(torch.empty(size, dtype=self._kinds[name].properties.dtype, device=device), gate, by_process)

    def check_tasks(self, tasks: list[TaskId], current: TaskId | None) -> None:
        """Raise ``StateError`` if the checkpoint is of other tasks."""
        then = (self._register.current or {}).get("task")
        if (self._register.tasks, then) != (tasks, current):
            raise StateError(
                f"the checkpoint has the finished tasks {self._register.tasks} and {then!r} in progress, and wsn has "
                f"{tasks} and {current!r}: call load_checkpoint first. Nothing has been loaded"
            )

    def read(self, entries: Mapping[str, Entry]) -> None:
        """Fill the entries.

        Raises:
            StateError: it cannot be read; the message names the tensor.
        """
        wanted = {name: one.for_dcp() for name, one in entries.items() if one.rows.numel() or one.gate is None}
        try:
            self._load(wanted)
        except (Exception, CheckpointException):  # the latter is none of the former
            for name, tensor in wanted.items():  # which one is it?
                try:
                    self._load({name: tensor})
                except (Exception, CheckpointException) as error:
                    raise StateError(
                        f"{name} cannot be read from {self._where}: {last_line(error)}. Nothing has been loaded"
                    ) from error
            raise

    def check(self, found: Mapping[str, str]) -> None:
        """Raise ``StateError``, naming the tensors, if the values that were read have other checksums than the saved
        ones."""
        then = self._info.get("checksums", {})
        damaged = [name for name, total in found.items() if then.get(name) != total]
        if damaged:
            more = f" and {len(damaged) - _SHOWN} more" if len(damaged) > _SHOWN else ""
            raise StateError(
                f"the checkpoint in {self._where} is damaged: {', '.join(damaged[:_SHOWN])}{more} are not what was "
                "saved. Nothing has been loaded"
            )

    def _metadata(self) -> Metadata:
        try:
            return self._reader.read_metadata()
        except FileNotFoundError as error:
            raise StateError(
                f"there is no checkpoint in {self._where}: it has no .metadata, which is written last"
            ) from error
        except Exception as error:
            raise StateError(f".metadata in {self._where} is damaged: {last_line(error)}") from error

    def _check_files(self, reader: FileSystemReader, metadata: Metadata) -> None:
        """Raise ``StateError``, naming the file, if one is missing or shorter than it was."""
        ends: dict[str, int] = {}
        for piece in metadata.storage_data.values():
            ends[piece.relative_path] = max(ends.get(piece.relative_path, 0), piece.offset + piece.length)
        for name, end in ends.items():
            path = os.path.join(reader.path, name)
            if not os.path.exists(path):
                raise StateError(f"the checkpoint in {self._where} lacks the file {name}. Nothing has been loaded")
            if os.path.getsize(path) < end:
                raise StateError(
                    f"the file {name} in {self._where} has {os.path.getsize(path)} bytes of {end}. Nothing has been "
                    "loaded"
                )

    def _one(self, name: str) -> torch.Tensor:
        entry = self.space(name, None, torch.device("cpu"))
        self.read({name: entry})
        return entry.rows

    def _json(self, name: str) -> dict[str, Any]:
        try:
            return decode_json(self._one(name))
        except StateError:
            raise
        except ValueError as error:
            raise StateError(f"{name} in {self._where} is damaged: {error}. Nothing has been loaded") from error

    def _load(self, wanted: dict[str, torch.Tensor]) -> None:
        planner = DefaultLoadPlanner(flatten_state_dict=False)
        with without_warning():
            load(wanted, storage_reader=self._reader, planner=planner, no_dist=True)


def last_line(error: BaseException) -> str:
    """The end of the text of an error. The errors of DCP have those of all processes, with the code that ran."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__


@contextmanager
def without_warning() -> Iterator[None]:
    """DCP warns when it works for one process, which is what it is asked for here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        yield
