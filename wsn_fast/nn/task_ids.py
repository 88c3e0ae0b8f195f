"""Task identifiers: which values may name a task, and how they are written in module names and tensors."""

from __future__ import annotations

import json
import operator
from typing import Any
from urllib.parse import quote, unquote

import torch
from torch import Tensor

from . import json_text

TaskId = int | str


def check_task(task: object) -> TaskId:
    """Return ``task`` as a plain ``int`` or ``str``.

    Raises:
        TypeError: for anything but an integer (numpy and 0-d tensor integers included) or a string. ``bool`` is
            refused, since ``True`` would be the same task as ``1``.
        ValueError: for an empty string, or an integer with more digits than a reader takes.
    """
    if isinstance(task, str):
        if not task:
            raise ValueError("task must not be an empty string")
        return str(task)
    if not isinstance(task, bool):
        try:
            number = operator.index(task)  # type: ignore[arg-type]
        except TypeError:
            pass
        else:
            if abs(number) >= 10 ** (json_text.DIGITS - 1):
                raise ValueError(f"task must have fewer than {json_text.DIGITS} digits")
            return number
    raise TypeError(f"task must be an int or a str, got {task!r} of type {type(task).__name__}")


def task_key(task: TaskId) -> str:
    """A name for ``task`` that may be part of module and buffer names: it has no dots, and ``1`` and ``"1"`` differ."""
    if isinstance(task, int):
        return f"i{task}"
    return "s" + quote(task, safe="").replace(".", "%2E")


def task_from_key(key: str) -> TaskId:
    """The inverse of :func:`task_key`. Raises ``ValueError`` for a string that is not the key of a task."""
    task: TaskId | None = None
    if key.startswith("i") and key[1:].removeprefix("-").isdecimal() and len(key) <= json_text.DIGITS:
        task = int(key[1:])
    elif key.startswith("s") and len(key) > 1:
        task = unquote(key[1:])
    if task is not None and task_key(task) == key:
        return task
    raise ValueError(f"{key[:99]!r} is not the key of a task: expected one like 'i7' (for 7) or 'sNAME' (for 'NAME')")


def encode_json(value: dict[str, Any]) -> Tensor:
    """``value`` as the UTF-8 bytes of its JSON text, a 1-d ``uint8`` tensor."""
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def decode_json(encoded: object) -> dict[str, Any]:
    """The inverse of :func:`encode_json`. Raises ``ValueError`` if the bytes are not a JSON object, or if
    :func:`wsn_fast.nn.json_text.parse` refuses it."""
    if not isinstance(encoded, Tensor) or encoded.dtype != torch.uint8 or encoded.ndim != 1 or encoded.is_meta:
        what = f"{encoded.dtype} {tuple(encoded.shape)}" if isinstance(encoded, Tensor) else type(encoded).__name__
        raise ValueError(f"expected the bytes of a JSON object as a 1-d uint8 tensor, got {what}")
    value = json_text.parse(encoded.cpu().numpy().tobytes())
    if not isinstance(value, dict):
        raise ValueError(f"expected the bytes of a JSON object, got a {type(value).__name__}")
    return value


def task_of_json(value: object) -> TaskId:
    """A task id as JSON holds it. Raises ``ValueError`` for anything but an integer or a string that is not empty."""
    if type(value) is int or (type(value) is str and value):
        return value
    raise ValueError(f"expected the id of a task, an integer or a string, got {str(value)[:99]!r}")
