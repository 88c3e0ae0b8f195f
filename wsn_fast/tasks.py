"""Task identifiers: what may name a task, and how such a name travels through module names and tensors."""

from __future__ import annotations

import json
import operator
from typing import Any
from urllib.parse import quote, unquote

import torch
from torch import Tensor

TaskId = int | str


def check_task(task: object) -> TaskId:
    """Return ``task`` as a plain ``int`` or ``str``.

    Raises:
        TypeError: for anything but an integer (numpy and 0-d tensor integers included) or a string. ``bool`` is
            refused, since ``True`` would be the same task as ``1``.
        ValueError: for an empty string.
    """
    if isinstance(task, str):
        if not task:
            raise ValueError("task must not be an empty string")
        return str(task)
    if not isinstance(task, bool):
        try:
            return operator.index(task)  # type: ignore[arg-type]
        except TypeError:
            pass
    raise TypeError(f"task must be an int or a str, got {task!r} of type {type(task).__name__}")


def task_key(task: TaskId) -> str:
    """A name for ``task`` that is safe inside module and buffer names: no dots, and ``1`` differs from ``"1"``."""
    if isinstance(task, int):
        return f"i{task}"
    return "s" + quote(task, safe="").replace(".", "%2E")


def task_from_key(key: str) -> TaskId:
    """The inverse of :func:`task_key`. Raises ``ValueError`` for a string that no task has as its key."""
    if key.startswith("i"):
        return int(key[1:])
    if key.startswith("s") and len(key) > 1:
        return unquote(key[1:])
    raise ValueError(f"not a task key: {key!r}")


def encode_json(value: dict[str, Any]) -> Tensor:
    """``value`` as the UTF-8 bytes of its JSON text, a 1-d ``uint8`` tensor."""
    return torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8, device="cpu")


def decode_json(encoded: Tensor) -> dict[str, Any]:
    """The inverse of :func:`encode_json`. Raises ``ValueError`` when the bytes are not those of a JSON object."""
    value = json.loads(bytes(encoded.cpu().tolist()))
    if not isinstance(value, dict):
        raise ValueError(f"expected the bytes of a JSON object, got {value!r}")
    return value
