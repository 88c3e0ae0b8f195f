"""The promise, checked: fingerprints of what a finished task computes with, taken when it ends and compared at any
time."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from . import ops, per_task
from .parts import ModelParts
from .tasks import TaskId


class Drift(NamedTuple):
    """A tensor that a finished task uses and that is no longer what it was when the task ended; ``how`` says more where
    more is known."""

    task: TaskId
    name: str
    how: str = ""


class ForgottenError(RuntimeError):
    """The promise is broken: ``drifts`` lists each task and tensor that changed after the task had ended."""

    def __init__(self, drifts: list[Drift]) -> None:
        listed = "\n".join(f"  task {d.task!r}: {d.name} {d.how}".rstrip() for d in drifts)
        super().__init__(
            f"parameters of finished tasks have changed:\n{listed}\nTrain with wsn.guard(optimizer), which every "
            "optimizer that steps on this model needs, and write to no weight by hand."
        )
        self.drifts = drifts


class VerifyReport(NamedTuple):
    """What was verified: the finished tasks, the number of tensors compared, and the names declared ``shared``, for
    which there is no promise."""

    tasks: list[TaskId]
    tensors: int
    shared: list[str]


def digest(tensor: Tensor) -> str:
    """The dtype, and a 128-bit BLAKE2b hash (hex) of the bytes of a tensor in row-major order."""
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8).cpu().numpy()
    return f"{str(tensor.dtype).removeprefix('torch.')} {hashlib.blake2b(data.data, digest_size=16).hexdigest()}"


def fingerprint(parts: ModelParts, task: TaskId, row: int) -> dict[str, str]:
    """Digests, by tensor name, of all that the finished ``task`` (the masks' ``row``) computes with: masks, the weights
    inside them, its head, its per-task copies, and what is frozen."""
    prints: dict[str, str] = {}
    for name, gate in parts.gated():
        mask = ops.unpack_mask(gate.masks[row], gate.param.shape)
        prints[name] = digest(gate.param.detach()[mask])
        prints[f"{name} (mask)"] = digest(gate.masks[row])
    for prefix, heads in parts.heads.items():
        if task in heads.tasks:
            head = heads.head(task)
            for name, tensor in (*head.named_parameters(), *head.named_buffers()):
                prints[f"{prefix}.{name}".lstrip(".")] = digest(tensor)
    for item in parts.owned:
        if item.kind == "per_task":
            prints[item.name] = digest(per_task.value(item.module, item.attribute, row))
        elif item.kind == "frozen":
            prints[item.name] = digest(item.tensor)
    return prints


def compare(task: TaskId, then: Mapping[str, str], now: Mapping[str, str]) -> list[Drift]:
    """What changed between two fingerprints of a task."""
    drifts = []
    for name in sorted(then.keys() | now.keys()):
        before, after = then.get(name, "absent -"), now.get(name, "absent -")
        if before != after:
            was, is_now = before.split()[0], after.split()[0]
            drifts.append(Drift(task, name, "" if was == is_now else f"({was}, now {is_now})"))
    return drifts
