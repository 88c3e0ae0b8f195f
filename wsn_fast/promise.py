"""The promise, checked: fingerprints of what a finished task computes with, taken when it ends and compared at any
time."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from . import ops, per_task
from .heads import TaskHeads
from .layers import SubnetLayer
from .ownership import Owned
from .tasks import TaskId


class Drift(NamedTuple):
    """A tensor that a finished task uses and that is no longer what it was when the task ended."""

    task: TaskId
    name: str


class ForgottenError(RuntimeError):
    """The promise is broken: ``drifts`` lists each task and tensor that changed after the task had ended."""

    def __init__(self, drifts: list[Drift]) -> None:
        listed = "\n".join(f"  task {d.task!r}: {d.name}" for d in drifts)
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
    """A 128-bit BLAKE2b hash (hex) of the bytes of a tensor in row-major order."""
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8).cpu().numpy()
    return hashlib.blake2b(data.data, digest_size=16).hexdigest()


def fingerprint(
    layers: Mapping[str, SubnetLayer],
    heads: Iterable[tuple[str, TaskHeads]],
    owned: Iterable[Owned],
    task: TaskId,
    row: int,
) -> dict[str, str]:
    """Digests, by tensor name, of all that the finished ``task`` (the masks' ``row``) computes with: masks, the weights
    inside them, its head, its per-task copies, and what is frozen."""
    prints: dict[str, str] = {}
    for prefix, layer in layers.items():
        for gate in layer.gated():
            name = f"{prefix}.{gate.name}".lstrip(".")
            mask = ops.unpack_mask(gate.masks[row], gate.param.shape)
            prints[name] = digest(gate.param.detach()[mask])
            prints[f"{name} (mask)"] = digest(gate.masks[row])
    for prefix, module in heads:
        if task in module.tasks:
            for name, param in module.head(task).named_parameters():
                prints[f"{prefix}.{name}".lstrip(".")] = digest(param)
    for item in owned:
        if item.kind == "per_task":
            prints[item.name] = digest(per_task.value(item.module, item.attribute, row))
        elif item.kind == "frozen":
            prints[item.name] = digest(item.tensor)
    return prints


def named_heads(model: nn.Module) -> list[tuple[str, TaskHeads]]:
    """The ``TaskHeads`` of a model with their names."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, TaskHeads)]
