"""Fingerprints of what a finished task computes with. They are taken when the task ends, and ``WSN.verify`` compares
them with the present ones."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .. import ops
from ..nn import per_task
from ..nn.gate import Gated
from ..nn.heads import TaskHeads
from ..nn.shards import shard_of
from ..nn.task_ids import TaskId
from .model_parts import ModelParts


class Drift(NamedTuple):
    """A tensor that a finished task uses and that has changed since the task ended. ``how`` gives both dtypes if the
    dtype has changed (or "absent"); it is empty if only values have changed."""

    task: TaskId
    name: str
    how: str = ""


_ADVICE = "Call wsn.guard(optimizer) for every optimizer of this model, and do not write to weights by hand."


class ForgottenError(RuntimeError):
    """A finished task was changed: ``drifts`` lists each task with each of its tensors that changed."""

    def __init__(self, drifts: list[Drift], advice: str = _ADVICE) -> None:
        listed = "\n".join(f"  task {d.task!r}: {d.name} {d.how}".rstrip() for d in drifts)
        super().__init__(f"these tensors of finished tasks have changed:\n{listed}\n{advice}")
        self.drifts = drifts


class VerifyReport(NamedTuple):
    """What was verified: the finished tasks, the number of tensors compared, and the names declared ``shared``, which
    may change."""

    tasks: list[TaskId]
    tensors: int
    shared: list[str]


def digest(tensor: Tensor) -> str:
    """The dtype of a tensor and a 128-bit BLAKE2b hash (hex) of its bytes in row-major order."""
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8).cpu().numpy()
    return f"{str(tensor.dtype).removeprefix('torch.')} {hashlib.blake2b(data.data, digest_size=16).hexdigest()}"


def fingerprint(parts: ModelParts, task: TaskId, row: int) -> dict[str, str]:
    """The digests, by tensor name, of everything that the finished ``task`` computes with.

    That is: its masks (in ``row``), the weights inside them, its head, its per-task values, and the frozen tensors.
    """
    prints: dict[str, str] = {}
    for name, gate in parts.gated():
        prints |= gated_digests(name, gate, row)
    for prefix, heads in parts.heads.items():
        prints |= head_digests(prefix, heads, task)
    for item in parts.owned:
        if item.kind == "per_task":
            # Without a row the module was added or replaced, and the name is absent.
            if row < per_task.count(item.module, item.attribute):
                prints[item.name] = digest(per_task.value(item.module, item.attribute, row))
        elif item.kind == "frozen":
            prints[item.name] = digest(item.tensor)
    return prints


def gated_digests(name: str, gate: Gated, row: int) -> dict[str, str]:
    """The digests of the elements of a gated tensor that a task uses, and of its mask, named as in a fingerprint. If
    the tensor is cut into shards they are those of the whole tensor."""
    param, mask, shard = gate.param.detach(), gate.masks[row], shard_of(gate.score)
    if shard is None:
        values = param[ops.unpack_mask(mask, param.shape)]
    else:
        values, mask = shard.masked_values(param, mask), shard.whole_masks(mask[None])[0]
    return {name: digest(values), f"{name} (mask)": digest(mask)}


def head_digests(name: str, heads: TaskHeads, task: TaskId) -> dict[str, str]:
    """The digests of the head of ``task``, named as in a fingerprint; ``name`` is that of ``heads`` in the model."""
    if task not in heads.tasks:
        return {}
    head = heads.head(task)
    tensors = (*head.named_parameters(), *head.named_buffers())
    return {f"{name}.{attribute}".lstrip("."): digest(tensor) for attribute, tensor in tensors}


def wrong_unions(parts: ModelParts) -> list[str]:
    """The names of the gated tensors whose union is not that of the masks of all finished tasks. Nothing protects what
    it lacks."""
    finished = [(name, gate) for name, gate in parts.gated() if len(gate.masks)]
    return [
        name
        for name, gate in finished
        if gate.union is None or not torch.equal(gate.union, ops.union_packed(gate.masks))
    ]


def frozen_buffers(parts: ModelParts) -> dict[str, str]:
    """The digests of the buffers that are ``frozen``, declared or not, by name."""
    return {
        item.name: digest(item.tensor)
        for item in parts.owned
        if item.kind == "frozen" and not isinstance(item.tensor, nn.Parameter)
    }


def check_frozen_buffers(parts: ModelParts, then: Mapping[str, str]) -> None:
    """Raise ``RuntimeError``, which lists them, if buffers have other digests than :func:`frozen_buffers` returned
    earlier, or have come since."""
    now = frozen_buffers(parts)
    declared = {item.name for item in parts.owned if not item.constant}
    gone = {name: digest_then for name, digest_then in then.items() if name not in now}
    come = {name: digest_now for name, digest_now in now.items() if name not in then}
    if sorted(gone.values()) == sorted(come.values()):  # they have other names
        gone, come = {}, {}
    problems = [f"{name} was a buffer when the task began, and is gone: declare it per_task or shared" for name in gone]
    for name, digest_now in now.items():
        if name in come:
            problems.append(
                f"{name} is a buffer that did not exist when the task began: run a batch before begin_task, or declare "
                "it per_task or shared"
            )
        elif then.get(name, digest_now) != digest_now and name in declared:
            problems.append(f"{name} is a buffer declared frozen and has changed: declare it per_task")
        elif then.get(name, digest_now) != digest_now:
            problems.append(f"{name} is a buffer that changes in training: declare it per_task (or shared)")
    if problems:
        raise RuntimeError("\n".join(problems))


def compare(task: TaskId, then: Mapping[str, str], now: Mapping[str, str]) -> list[Drift]:
    """The differences between two fingerprints of a task."""
    drifts = []
    for name in sorted(then.keys() | now.keys()):
        before, after = then.get(name, "absent -"), now.get(name, "absent -")
        if before != after:
            was, is_now = before.split()[0], after.split()[0]
            drifts.append(Drift(task, name, "" if was == is_now else f"({was}, now {is_now})"))
    return drifts
