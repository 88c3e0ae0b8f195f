"""Checkpoints of a WSN, written and read by ``torch.distributed.checkpoint`` (DCP), for any number of processes.

A checkpoint has each tensor of the WSN under its name in ``state_dict()``, those that are cut into shards in as many
pieces as there were processes. Masks are packed row by row (:func:`~wsn_fast.distributed.entries.masks_by_row`). What
is whole in each process is written by the first one. One more tensor, ``wsn_fast``, is JSON: the settings of the
optimizer, and a checksum of every other tensor.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter

from ..backends import collectives
from ..continual import alike, loading, saved_fingerprints
from ..continual.loading import StateError
from ..continual.parallel import device_of, together
from ..continual.wsn import WSN
from ..nn.shards import local
from ..nn.task_ids import encode_json
from . import optimizer_entries
from .entries import MODEL, STATE, Entry, checksums, gated_places, of_model, parts_are_known
from .saved_checkpoint import INFO, VERSION, SavedCheckpoint, last_line, without_warning

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Path = str | os.PathLike[str]
_NOTHING = "Nothing has been loaded"


@torch.no_grad()
def save_checkpoint(path: Path | StorageWriter, wsn: WSN, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Save a WSN, and the running means of its optimizer, with ``torch.distributed.checkpoint``. All processes of the
    WSN call this, at the same time in their training. No tensor is gathered: each process writes its own shards.

    :func:`load_checkpoint` loads what is written with any number of processes.

    Args:
        path: a new folder, which all processes see; or a writer of DCP.
        wsn: the model, sharded or not. Tasks may have ended, and one may be in progress.
        optimizer: one of ``wsn``.

    Raises:
        TypeError: an argument has another type; or a module or the optimizer saves something that is neither a tensor
            nor a number.
        ValueError: ``optimizer`` has parameters that are not in ``wsn``.
        FileExistsError: the folder has a checkpoint.
        RuntimeError: the processes have different tasks.
    """
    _check_wsn(wsn)
    group, device = _processes(wsn)
    with together(group, device):
        writer = _writer(path)
        entries = of_model(wsn)
        info: dict[str, Any] = {"version": VERSION}
        if optimizer is not None:
            means, info["optimizer"] = optimizer_entries.of_optimizer(wsn, optimizer)
            entries |= means
    if alike.different_texts(group, {"tasks": repr((wsn.tasks, wsn.current_task))}, device):
        raise RuntimeError("the processes have different tasks: nothing has been saved")
    entries = _as_in_first(wsn, entries)
    info["checksums"] = checksums(entries, wsn)
    entries[INFO] = Entry(encode_json(info))
    first = group is None or group.rank() == 0
    mine = {
        name: one.for_dcp()
        for name, one in entries.items()
        if (one.rows.numel() if one.gate is not None else first)  # DCP takes no piece without elements
    }
    try:
        with without_warning():
            save(mine, storage_writer=writer, process_group=group)
    except CheckpointException as error:  # it is no Exception, so that few programs would see it
        raise RuntimeError(f"the checkpoint was not written: {last_line(error)}") from error


@torch.no_grad()
def load_checkpoint(path: Path | StorageReader, wsn: WSN) -> None:
    """Load what :func:`save_checkpoint` has saved of a WSN, whole or not at all. All processes of ``wsn`` call this.
    Their number may be another one than that of the processes that saved it, and the WSN need not be sharded.

    Everything is read and checked before anything is changed. So this needs once more the memory of what a process
    holds. Build the optimizer afterwards, because it holds the heads that come with this, and call
    :func:`load_optimizer`.

    Args:
        path: the folder, or a reader of DCP. DCP reads its metadata with ``pickle``, which can run any code: load only
            what you trust.
        wsn: a WSN with a model that was built in the same way.

    Raises:
        TypeError: an argument has another type.
        StateError: there is no checkpoint, a file is missing or damaged, the checkpoint does not fit the model, or a
            finished task is not what it was when it ended. The message names the file or the tensor. It is a
            ``RuntimeError`` and a ``ValueError``. Nothing has been loaded.
    """
    _check_wsn(wsn)
    group, device = _processes(wsn)
    with together(group, device):
        saved = SavedCheckpoint(_reader(path))
        staged = _stage(wsn, saved)
    _read(wsn, saved, staged)
    places = gated_places(wsn)
    with together(group, device):
        state = {}
        for name, entry in staged.items():
            own = name.removeprefix(MODEL)
            state[own] = places[own].of_rows(entry.rows) if own in places else entry.rows
        loading.check(wsn, state, "", True, False)
    with together(group, device):
        drifts = saved_fingerprints.drifts(wsn, state)
        if drifts:
            listed = "\n".join(f"  task {one.task!r}: {one.name} {one.how}".rstrip() for one in drifts)
            raise StateError(f"finished tasks are not what they were when they ended:\n{listed}\n{_NOTHING}")
    with parts_are_known(wsn):
        wsn.load_state_dict(state)


@torch.no_grad()
def load_optimizer(path: Path | StorageReader, wsn: WSN, optimizer: torch.optim.Optimizer) -> None:
    """Load the running means and the settings of an optimizer that :func:`save_checkpoint` has saved, whole or not at
    all. All processes call this, after :func:`load_checkpoint`. Their number may be another one.

    Args:
        path: the folder, or a reader of DCP.
        wsn: the model, with the tasks of the checkpoint.
        optimizer: one that was built for ``wsn`` in the same way as the saved one.

    Raises:
        TypeError: an argument has another type.
        ValueError: ``optimizer`` has parameters that are not in ``wsn``.
        StateError: as for :func:`load_checkpoint`; or the checkpoint has no optimizer, or one with other parameters or
            settings, or other tasks than ``wsn``. Nothing has been loaded.
    """
    _check_wsn(wsn)
    group, device = _processes(wsn)
    with together(group, device):
        optimizer_entries.names_in(wsn, optimizer)  # it checks the type
        saved = SavedCheckpoint(_reader(path))
        info = saved.optimizer
        saved.check_tasks(wsn.tasks, wsn.current_task)
        optimizer_entries.check(wsn, optimizer, info)
        cut = optimizer_entries.expected(wsn, info, saved.sizes)
        staged = {name: saved.space(name, how.gate, device_of(wsn), how.by_process) for name, how in cut.items()}
    _read(wsn, saved, staged)
    with together(group, device):
        state = optimizer_entries.state_for(wsn, optimizer, info, staged, saved.sizes)
    optimizer.load_state_dict(state)


def _as_in_first(wsn: WSN, entries: dict[str, Entry]) -> dict[str, Entry]:
    """The entries in the order of those of the first process. A process that has no rows of a tensor may have no
    running means of it either.

    Raises:
        RuntimeError: the processes have other names.
    """
    group, device = _processes(wsn)
    names: list[str] = collectives.texts_of(group, "\n".join(entries))[0].split("\n")
    none = tuple(f"{STATE}{name}." for name, param in wsn.named_parameters() if not local(param).numel())
    lacking = [name for name in names if name not in entries]
    with together(group, device):
        differ = {name for name in lacking if not name.startswith(none)} | (entries.keys() - {*names})
        if differ:
            raise RuntimeError(
                f"only some of the processes have {alike.listed(sorted(differ))}: nothing has been saved"
            )
    params = dict(wsn.named_parameters())
    for name in lacking:
        entries[name] = optimizer_entries.lacking(name, params[name.removeprefix(STATE).rpartition(".")[0]])
    return {name: entries[name] for name in names}


# --- reading
def _stage(wsn: WSN, saved: SavedCheckpoint) -> dict[str, Entry]:
    """Memory for all of a saved WSN that this process will hold."""
    places, device = gated_places(wsn), device_of(wsn)
    gated = {name for name in saved.names(MODEL) if name.endswith("_score")}
    differ = sorted(gated ^ {f"{MODEL}{name}" for name in places if name.endswith("_score")})
    if differ:  # before there is memory for any of it
        listed = alike.listed([name.removeprefix(MODEL).removesuffix("_score") for name in differ])
        raise StateError(f"only one of the checkpoint and the model has these gated tensors: {listed}. {_NOTHING}")
    staged = {}
    for name in saved.names(MODEL):
        own = name.removeprefix(MODEL)
        place = places.get(own)
        if place is not None and saved.sizes[name] != place.expected(saved.tasks):
            raise StateError(
                f"size mismatch for {own}: the checkpoint has {saved.sizes[name]}, and the model "
                f"{place.expected(saved.tasks)}. The checkpoint is of another architecture. {_NOTHING}"
            )
        staged[name] = saved.space(name, None if place is None else place.gate, device)
    return staged


def _read(wsn: WSN, saved: SavedCheckpoint, staged: dict[str, Entry]) -> None:
    """Read these entries, and compare their checksums. All processes call this."""
    group, device = _processes(wsn)
    with together(group, device):
        saved.read(staged)
    with together(group, device):
        saved.check(checksums(staged, wsn))


# --- arguments
def _check_wsn(wsn: object) -> None:
    if not isinstance(wsn, WSN):
        raise TypeError(f"wsn must be a wsn_fast.WSN, got {type(wsn).__name__}")


def _processes(wsn: WSN) -> tuple[ProcessGroup | None, torch.device]:
    """The processes that have this WSN, and where they exchange tensors."""
    sharding = wsn.gates.sharding
    if sharding is not None:
        return sharding.group, sharding.device
    group = torch.distributed.group.WORLD if collectives.is_initialized() else None
    return group, device_of(wsn)


def _writer(path: object) -> StorageWriter:
    if isinstance(path, StorageWriter):
        return path
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"path must be a str, a path or a StorageWriter, got {type(path).__name__}")
    writer = FileSystemWriter(path)
    if os.path.exists(os.path.join(path, ".metadata")):
        raise FileExistsError(
            f"path must be a new folder, got {os.fspath(path)!r}, which has a checkpoint: if writing another one over "
            "it were interrupted, neither would be left"
        )
    return writer


def _reader(path: object) -> StorageReader:
    if isinstance(path, StorageReader):
        return path
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"path must be a str, a path or a StorageReader, got {type(path).__name__}")
    return FileSystemReader(path)
