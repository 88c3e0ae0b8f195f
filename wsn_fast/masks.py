"""What a set of packed masks tells: densities, reuse, and how far they compress."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from . import ops
from .tasks import TaskId

PAPER_COMPRESSION = 0.78
"""alpha, the constant compression rate in the paper's capacity formula. Masks of density 0.3 measure about 0.12."""

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
    """Of one finished task, as fractions: ``density`` of its mask among all gated elements; ``reuse``, the share of its
    weights that earlier tasks own; ``new``, the share of all gated elements that this task was the first to own."""

    task: TaskId
    density: float
    reuse: float
    new: float


class Capacity(NamedTuple):
    """Capacity after ``tasks`` tasks, as fractions of the dense fp32 model (paper, appendix).

    ``capacity`` uses ``compression``, the measured rate of the stored masks; ``capacity_paper`` the paper's constant
    0.78, and is the only one to compare with the paper's CAP. ``union_density`` is the share of gated elements owned by
    some task.
    """

    capacity: float
    capacity_paper: float
    union_density: float
    compression: float
    tasks: int


def compress(packed: Tensor) -> bytes:
    """A packed mask, compressed with zstd."""
    import zstandard  # here, so that nothing but this needs it

    return zstandard.ZstdCompressor(level=_ZSTD_LEVEL).compress(packed.cpu().numpy().tobytes())


def compression_rate(masks: Iterable[Tensor]) -> float:
    """alpha: the share of bytes that compression saves over the packed masks; 0 when there are none."""
    raw = small = 0
    for packed in masks:
        for row in packed:
            raw += row.numel()
            # A mask that does not compress is stored as it is.
            small += min(row.numel(), len(compress(row)))
    return 1 - small / raw if raw else 0.0


def capacity(masks: Sequence[Tensor], sizes: Sequence[int]) -> Capacity:
    """The capacity used by the packed ``masks`` ([T, bytes] each) of gated tensors with ``sizes`` elements."""
    tasks = masks[0].shape[0] if masks else 0
    owned = sum(int(ops.count_packed(ops.union_packed(rows))) for rows in masks) if tasks else 0
    union_density = owned / sum(sizes) if tasks else 0.0
    alpha = compression_rate(masks)
    return Capacity(
        capacity=union_density + (1 - alpha) * tasks / 32,
        capacity_paper=union_density + (1 - PAPER_COMPRESSION) * tasks / 32,
        union_density=union_density,
        compression=alpha,
        tasks=tasks,
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
    """Entry [i][j] is the share of the weights of row i that row j uses as well, a fraction; 1 on the diagonal.

    Masks drawn at random would share the density of j.
    """
    tasks = range(masks[0].shape[0]) if masks else range(0)
    both = [[sum(int(ops.count_packed(rows[i] & rows[j])) for rows in masks) for j in range(i + 1)] for i in tasks]
    return [[both[max(i, j)][min(i, j)] / max(both[i][i], 1) for j in tasks] for i in tasks]
