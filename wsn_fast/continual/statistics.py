"""Statistics of packed masks: density, reuse, compression and capacity."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..nn.gated import SubnetLayer
from ..nn.sharding import Sharding
from ..nn.task_ids import TaskId

PAPER_COMPRESSION = 0.78
"""alpha, the constant compression rate in the paper's capacity formula. A random mask of density 0.3 has an entropy of
0.88 bits per element, so no lossless compression can save more than 0.12 of it."""

LITTLE = 0.01
"""The share of a layer that is little."""

_ZSTD_LEVEL = 19


class TaskMasks(NamedTuple):
    """The masks of the finished ``tasks``, from a model or from a checkpoint.

    Attributes:
        tasks: the ids, in the order in which they ended.
        packed: ``uint8`` [T, ceil(n / 8)], by the name of the gated tensor.
        sizes: n, the elements of each gated tensor, by the same names.
    """

    tasks: Sequence[TaskId]
    packed: Mapping[str, Tensor]
    sizes: Mapping[str, int]


class TaskStats(NamedTuple):
    """Statistics of one finished task, as fractions.

    Attributes:
        task: its id.
        density: the share of all gated elements that its mask keeps.
        reuse: the share of its weights that earlier tasks use too.
        new: the share of all gated elements that this task was the first to use.
    """

    task: TaskId
    density: float
    reuse: float
    new: float


class Capacity(NamedTuple):
    """Capacity after ``tasks`` tasks, as fractions of the dense fp32 model (paper, appendix).

    ``capacity`` uses ``compression``, which is measured on the stored masks. ``capacity_paper`` uses the paper's
    constant 0.78, and only it may be compared with the paper's CAP. ``union_density`` is the share of gated elements
    that some task uses.
    """

    capacity: float
    capacity_paper: float
    union_density: float
    compression: float
    tasks: int


def compress(packed: Tensor) -> bytes:
    """Compress a packed mask with zstd."""
    import zstandard  # imported here, because nothing else needs it

    return zstandard.ZstdCompressor(level=_ZSTD_LEVEL).compress(packed.cpu().numpy().tobytes())


def compressed_bytes(masks: Iterable[Tensor]) -> int:
    """The bytes that packed masks take after compression, each by itself. One that does not compress is stored as it
    is."""
    return sum(min(row.numel(), len(compress(row))) for row in masks)


def compression_rate(masks: Sequence[Tensor], compressed: int | None = None) -> float:
    """The paper's alpha: the share of the bytes of the packed masks that compression saves; 0 without masks. They take
    ``compressed`` bytes afterwards, if that is known."""
    raw = sum(packed.numel() for packed in masks)
    if compressed is None:
        compressed = compressed_bytes(row for packed in masks for row in packed)
    return 1 - compressed / raw if raw else 0.0


def capacity(masks: Sequence[Tensor], sizes: Sequence[int], compressed: int | None = None) -> Capacity:
    """The capacity that the packed ``masks`` ([T, bytes] each) of gated tensors with ``sizes`` elements use. They take
    ``compressed`` bytes after compression, if that is known: to measure it is slow."""
    tasks = masks[0].shape[0] if masks else 0
    owned = sum(int(ops.count_packed(ops.union_packed(rows))) for rows in masks) if tasks else 0
    union_density = owned / sum(sizes) if tasks else 0.0
    alpha = compression_rate(masks, compressed)
    return Capacity(
        capacity=union_density + (1 - alpha) * tasks / 32,
        capacity_paper=union_density + (1 - PAPER_COMPRESSION) * tasks / 32,
        union_density=union_density,
        compression=alpha,
        tasks=tasks,
    )


def warn_if_full(layers: Mapping[str, SubnetLayer], sharding: Sharding | None = None) -> None:
    """Warn of layers of which less than ``LITTLE`` is free: a new task can do little more there than choose among the
    weights of earlier ones. Where weights are not trained, no task does more than that."""
    full = []
    unions = [[g for g in layer.gated() if g.union is not None and g.param.requires_grad] for layer in layers.values()]
    counts = [sum(int(ops.count_packed(gate.union)) for gate in gates if gate.union is not None) for gates in unions]
    if sharding is not None:
        counts = sharding.sums(torch.tensor(counts, device=sharding.device)).tolist()
    for name, gates, owned in zip(layers, unions, counts, strict=True):
        total = sum(gate.param.numel() for gate in gates)
        if total - owned < LITTLE * total:
            full.append(f"{name} ({100 * (1 - owned / total):.2f} %)")
    if full:
        shown = ", ".join(full[:10]) + (f" and {len(full) - 10} more" if len(full) > 10 else "")
        warnings.warn(
            f"less than 1 % of these layers is free: {shown}. A new task can only choose among the weights of earlier "
            "tasks there. docs/how-to/density.md says under 'When a layer is full' what to do",
            stacklevel=4,  # the caller of begin_task, which has a decorator
        )


def task_stats(tasks: Sequence[TaskId], masks: Sequence[Tensor], sizes: Sequence[int]) -> list[TaskStats]:
    """Density, reuse and new weights of each task, in the order in which they ended."""
    total = sum(sizes)
    unions = [rows.new_zeros(rows.shape[1]) for rows in masks]
    stats = []
    for row, task in enumerate(tasks):
        kept = sum(int(ops.count_packed(rows[row])) for rows in masks)
        reused = sum(int(ops.count_packed(rows[row] & union)) for rows, union in zip(masks, unions, strict=True))
        unions = [union | rows[row] for rows, union in zip(masks, unions, strict=True)]
        stats.append(TaskStats(task, kept / total, reused / kept if kept else 0.0, (kept - reused) / total))
    return stats


def overlap(masks: Sequence[Tensor]) -> list[list[float]]:
    """How much the masks of the tasks overlap: entry [i][j] is the fraction of the weights of task i that task j uses
    as well, so the diagonal is 1. Between random masks it would be the density of task j.
    """
    tasks = range(masks[0].shape[0]) if masks else range(0)
    both = [[sum(int(ops.count_packed(rows[i] & rows[j])) for rows in masks) for j in range(i + 1)] for i in tasks]
    return [[both[max(i, j)][min(i, j)] / max(both[i][i], 1) for j in tasks] for i in tasks]
