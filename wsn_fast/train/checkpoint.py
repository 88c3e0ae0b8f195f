"""Checkpoints of a run: numbered safetensors files, written atomically and checked by a digest when read.

A file holds named tensors and a JSON state. Packed masks are zstd-compressed. Nothing is pickled, so that
reading a file of unknown origin executes nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
import zstandard
from torch import Tensor

FORMAT = "wsn-fast checkpoint 1"
_SUFFIX = ".safetensors"
# What reading a file raises whose digest is right and whose content is not what is expected.
NONSENSE = (
    ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError, ValueError,
    safetensors.SafetensorError, zstandard.ZstdError,
)  # fmt: skip
_MASKS = ("weight_masks", "bias_masks")
_BLANK = "0" * 64  # the digest covers the whole file with this in its own place
_DIGEST = re.compile(rb'"digest":"([0-9a-f]{64})"')


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or read; the message names the file, the reason and the way on."""


@dataclass(frozen=True)
class Checkpoint:
    """What a file held: its number in the run, the JSON state and the tensors (on the CPU)."""

    path: Path
    number: int
    state: dict[str, Any]
    tensors: dict[str, Tensor]


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file so that it is, after a crash at any moment, either the old one or the new one, complete.

    Raises:
        OSError: nothing was changed, and no temporary file is left; ``filename`` is ``path``.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):  # a failed write does not say where
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    _sync_folder(path.parent)


def save(folder: Path, number: int, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Path:
    """Write checkpoint ``number`` of a run, then delete all but it and the one before.

    Args:
        folder: made if it is missing.
        number: one more than the checkpoint the run came from.
        state: anything JSON can hold; floats survive to the bit.
        tensors: any dtype, shape and device; no two may share memory.

    Raises:
        CheckpointError: the disk is full or the like. Earlier checkpoints are untouched.
    """
    path = folder / f"{number:06d}{_SUFFIX}"
    data = _encode(state, tensors)
    try:
        folder.mkdir(exist_ok=True)
        write_atomic(path, data)
        for other in folder.iterdir():
            if other.suffix == ".tmp" or _number(other) not in (None, number - 1, number):
                other.unlink()
    except OSError as error:
        raise CheckpointError(
            f"cannot write the checkpoint {path}: {error.strerror}. Earlier checkpoints are intact: "
            f"once there is room, continue with `wsn-fast train --resume {folder.parent}`"
        ) from error
    return path


def load(path: Path) -> Checkpoint:
    """Read one file.

    Raises:
        CheckpointError: it is missing, damaged, truncated or not a checkpoint of this program.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot read the checkpoint {path}: {error.strerror}") from error
    header_end = 8 + int.from_bytes(raw[:8], "little")
    found = _DIGEST.search(raw, 8, min(header_end, len(raw)))  # a damaged number may not fit into a C integer
    if found is None:
        raise CheckpointError(f"{path} is not a checkpoint of wsn-fast, or its beginning is damaged ({len(raw)} bytes)")
    if _digest(raw, found.start(1)) != found[1]:
        raise CheckpointError(f"{path} is damaged or truncated: its digest does not match its {len(raw)} bytes")
    try:
        return _decode(path, raw)
    except CheckpointError:
        raise
    except NONSENSE as error:
        raise CheckpointError(f"{path} is not a checkpoint of wsn-fast: {type(error).__name__}: {error}") from error


def load_from(folder: Path, name: str | None = None) -> Checkpoint:
    """Read the newest checkpoint of a run, or the one called ``name``.

    Raises:
        CheckpointError: there is none, or it cannot be read; then the newest earlier one that can be is
            offered by name.
    """
    paths = sorted(folder.glob(f"*{_SUFFIX}"), key=lambda path: (_number(path) or 0, path.name))
    names = [path.name for path in paths]
    if not names:
        raise CheckpointError(f"there is no checkpoint in {folder}")
    if name is not None and name not in names:
        raise CheckpointError(f"there is no checkpoint {name!r} in {folder}, only {', '.join(names)}")
    chosen = names.index(name) if name is not None else len(names) - 1
    try:
        return load(paths[chosen])
    except CheckpointError as error:
        earlier = next((path.name for path in reversed(paths[:chosen]) if _intact(path)), None)
        way_on = f"{earlier} is intact: use it with --checkpoint {earlier}" if earlier else "None before is intact"
        raise CheckpointError(f"{error}. {way_on}") from error


def pack_optimizer(state_dict: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Split an optimizer's ``state_dict()`` into what JSON can hold and the tensors."""
    scalars: dict[str, dict[str, Any]] = {}
    tensors: dict[str, Tensor] = {}
    for index, values in state_dict["state"].items():
        of_index = scalars[str(index)] = {}
        for key, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"{index}.{key}"] = value
            else:
                of_index[key] = value
    return {"state": scalars, "param_groups": state_dict["param_groups"]}, tensors


def unpack_optimizer(packed: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The inverse of :func:`pack_optimizer`, for ``load_state_dict``."""
    state: dict[int, dict[str, Any]] = {int(index): dict(values) for index, values in packed["state"].items()}
    for name, tensor in tensors.items():
        index, key = name.split(".", 1)
        state[int(index)][key] = tensor
    return {"state": state, "param_groups": packed["param_groups"]}


def _encode(state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> bytes:
    stored: dict[str, Tensor] = {}
    compressed: dict[str, list[int]] = {}
    for name, tensor in tensors.items():
        stored[name] = tensor.detach().cpu().contiguous()
        if name.endswith(_MASKS):
            compressed[name] = list(tensor.shape)
            stored[name] = _bytes(zstandard.ZstdCompressor().compress(stored[name].numpy().tobytes()))
    texts = {"state": json.dumps(state), "compressed": json.dumps(compressed), "order": json.dumps(list(stored))}
    raw = safetensors.torch.save(stored, {"format": FORMAT, "digest": _BLANK, **texts})
    found = _DIGEST.search(raw)
    assert found is not None
    return b"".join((raw[: found.start(1)], _digest(raw, found.start(1)), raw[found.end(1) :]))


def _decode(path: Path, raw: bytes) -> Checkpoint:
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])["__metadata__"]
    if header["format"] != FORMAT:
        raise CheckpointError(f"{path} has the format {header['format']!r}, this program reads {FORMAT!r}")
    tensors = safetensors.torch.load(raw)
    for name, shape in json.loads(header["compressed"]).items():
        packed = tensors[name].numpy().tobytes()
        if zstandard.frame_content_size(packed) != math.prod(shape):  # before memory is taken for it
            raise ValueError(f"{name} is not of the shape {shape}")
        tensors[name] = _bytes(zstandard.ZstdDecompressor().decompress(packed)).reshape(shape)
    state = json.loads(header["state"])
    if not isinstance(state, dict):
        raise TypeError(f"its state is a {type(state).__name__}")
    # Safetensors returns them in no order, and the order of a model's names is that of an optimizer's state.
    ordered = {name: tensors[name] for name in json.loads(header.get("order", "[]"))}
    return Checkpoint(path, _number(path) or 0, state, ordered | tensors)


def _digest(raw: bytes, at: int) -> bytes:
    view = memoryview(raw)
    digest = hashlib.blake2b(view[:at], digest_size=32)
    digest.update(_BLANK.encode())
    digest.update(view[at + len(_BLANK) :])
    return digest.hexdigest().encode()


def _bytes(data: bytes) -> Tensor:
    return torch.from_numpy(np.frombuffer(data, np.uint8).copy())


def _intact(path: Path) -> bool:
    try:
        load(path)
    except CheckpointError:
        return False
    return True


def _number(path: Path) -> int | None:
    return int(path.stem) if path.suffix == _SUFFIX and path.stem.isdecimal() else None


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
