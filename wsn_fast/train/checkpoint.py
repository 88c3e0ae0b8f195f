"""Checkpoints of a run: numbered safetensors files. They are written atomically, and a digest is checked when they are
read. docs/checkpoint-format.md specifies the format.

A file holds named tensors and a JSON state. Packed masks are compressed with zstd. Nothing is pickled, so that no code
runs when a file of unknown origin is read.
"""

from __future__ import annotations

import hashlib
import json
import math
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

from wsn_fast.nn import json_text
from wsn_fast.optim.stored_means import SCALES
from wsn_fast.train.safe_files import check_no_link, open_to_read, write_atomic

FORMAT = "wsn-fast checkpoint 1"
_SUFFIX = ".safetensors"
# The exceptions that come up when a file has the right digest, but not the expected content.
NONSENSE = (
    ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError, ValueError,
    safetensors.SafetensorError, zstandard.ZstdError,
)  # fmt: skip
_MASKS = ("weight_masks", "bias_masks")
# The masks of a file of n bytes take at most _ALWAYS + _EXPANDS * n bytes. Beside its masks a file holds the weights
# and their scores, so those of 2,000 tasks of density 1, which zstd shrinks to nothing, take 32 times its size.
_ALWAYS, _EXPANDS = 16 << 20, 32
_LONGEST_HEADER = 100_000_000  # bytes; safetensors itself reads no longer one
_BLANK = "0" * 64  # stands in the place of the digest while the digest of the file is computed
_DIGEST = re.compile(rb'"digest":"([0-9a-f]{64})"')


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or read. The message names the file, the reason and what to do."""


@dataclass(frozen=True)
class Checkpoint:
    """The content of a file: its number in the run, the JSON state and the tensors (on the CPU)."""

    path: Path
    number: int
    state: dict[str, Any]
    tensors: dict[str, Tensor]

    def part(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose names begin with ``prefix``, by the rest of their names."""
        return {name[len(prefix) :]: t for name, t in self.tensors.items() if name.startswith(prefix)}


def save(folder: Path, number: int, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Path:
    """Write checkpoint ``number`` of a run, then delete all others except the one before it.

    Args:
        folder: the folder of the checkpoints. It is made if it is missing.
        number: the number of the checkpoint that the run came from, plus one.
        state: anything that JSON can hold. Floats keep every bit.
        tensors: tensors of any dtype, shape and device. No two may share memory.

    Raises:
        CheckpointError: the file cannot be written, because the disk is full for example. Earlier checkpoints are
            untouched.
    """
    path = folder / f"{number:06d}{_SUFFIX}"
    pieces = _encode(state, tensors)
    try:
        check_no_link(folder)
        folder.mkdir(exist_ok=True)
        write_atomic(path, *pieces)
        for other in folder.iterdir():
            old = other.suffix == ".tmp" or _number(other) not in (None, number - 1, number)
            if old and (other.is_symlink() or not other.is_dir()):
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
        CheckpointError: the file is missing, damaged or truncated, or it is no checkpoint of this program.
    """
    try:
        with open_to_read(path) as file:
            size = path.stat().st_size
            raw = file.read(8)
            raw += file.read(min(int.from_bytes(raw, "little"), size, _LONGEST_HEADER))
            found = _DIGEST.search(raw, 8)
            if found is not None:  # nothing else is read of a file that is no checkpoint
                raw += file.read()
    except OSError as error:
        raise CheckpointError(f"cannot read the checkpoint {path}: {error.strerror}") from error
    if found is None:
        raise CheckpointError(f"{path} is not a checkpoint of wsn-fast, or its beginning is damaged ({size} bytes)")
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
        CheckpointError: there is none, or it cannot be read. In the second case the message names the newest earlier
            one that can be read.
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
    """Split the ``state_dict()`` of an optimizer into a part for JSON and the tensors."""
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


def check_optimizer(state_dict: Mapping[str, Any], optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Raise ``ValueError`` if a state is not one of this new ``optimizer``, at the learning rate ``lr``.

    Its settings follow from the settings of the run, so they must be those of the new optimizer.
    """
    own = optimizer.state_dict()["param_groups"]
    groups, params = state_dict["param_groups"], [p for group in optimizer.param_groups for p in group["params"]]
    if len(groups) != len(own):
        raise ValueError(f"the optimizer has {len(own)} groups of parameters, its state has {len(groups)}")
    for ours, theirs in zip(own, groups, strict=True):
        for name, value in ours.items():
            found = theirs.get(name, value)
            expected = lr if name == "lr" else value
            as_json = list(expected) if isinstance(expected, tuple) else expected
            if type(found) is not type(as_json) or found != as_json:
                raise ValueError(f"the optimizer has {name} {value!r}, its state has {str(found)[:99]}")
    for index, values in state_dict["state"].items():
        for name, tensor in values.items():
            # A count of steps is one number, everything else has a value for each element of the parameter. The scales
            # of running means are left to the optimizer.
            fits = not isinstance(tensor, Tensor) or not tensor.ndim or tensor.shape == params[index].shape
            if not fits and not (name.endswith(SCALES) and tensor.ndim == 1):
                raise ValueError(f"{name} of parameter {index} has the shape {tuple(tensor.shape)}")
            if not isinstance(tensor, Tensor | int | float | None):
                raise ValueError(f"{name} of parameter {index} is a {type(tensor).__name__}")


def _encode(state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> list[Any]:
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
    view = memoryview(raw)  # the file is written in pieces, because a joint one would be another copy of the state
    return [view[: found.start(1)], _digest(raw, found.start(1)), view[found.end(1) :]]


def _decode(path: Path, raw: bytes) -> Checkpoint:
    header = json_text.parse(raw[8 : 8 + int.from_bytes(raw[:8], "little")])["__metadata__"]
    if header["format"] != FORMAT:
        raise CheckpointError(f"{path} has the format {str(header['format'])[:99]!r}, this program reads {FORMAT!r}")
    shapes = json_text.parse(header["compressed"])
    _check_sizes(shapes, len(raw))
    state, order = json_text.parse(header["state"]), json_text.parse(header.get("order", "[]"))
    if not isinstance(state, dict):
        raise TypeError(f"its state is a {type(state).__name__}")
    tensors = safetensors.torch.load(raw)
    for name, shape in shapes.items():
        tensors[name] = _decompress(name, tensors[name], shape)
    # Safetensors keeps no order, but the state of an optimizer follows the order of the model's names.
    ordered = {name: tensors[name] for name in order}
    return Checkpoint(path, _number(path) or 0, state, ordered | tensors)


def _check_sizes(shapes: Mapping[str, Any], size: int) -> None:
    """Raise ``ValueError`` if the compressed tensors of a file of ``size`` bytes claim shapes that are none, or more
    memory than masks ever take."""
    for name, shape in shapes.items():
        if not isinstance(shape, list) or not all(type(length) is int and length >= 0 for length in shape):
            raise ValueError(f"{name[:99]} has a shape that is none")
    wanted, most = sum(map(math.prod, shapes.values())), _ALWAYS + _EXPANDS * size
    if wanted > most:
        raise ValueError(
            f"its masks would take {wanted} bytes, and those of a file of {size} bytes take at most {most}"
        )


def _decompress(name: str, packed: Tensor, shape: list[int]) -> Tensor:
    frame = packed.numpy().tobytes()
    content = np.empty(math.prod(shape), np.uint8)
    if zstandard.frame_content_size(frame) != len(content):
        raise ValueError(f"{name} is not of the shape {shape}")
    reader, filled = zstandard.ZstdDecompressor().stream_reader(frame), 0
    while filled < len(content) and (count := reader.readinto(content[filled:].data)):
        filled += count
    if filled < len(content):
        raise ValueError(f"{name} ends after {filled} of {len(content)} bytes")
    return torch.from_numpy(content).reshape(shape)


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
