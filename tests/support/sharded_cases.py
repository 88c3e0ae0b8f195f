"""Thresholds of tensors that are cut into shards, in several processes."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from distributions import DISTRIBUTIONS, DTYPES, RULES
from host_waits import RefusesHostWaits
from processes import counting
from torch import Tensor

from wsn_fast import topc_threshold

DENSITIES = (1e-6, 0.03, 0.3, 0.5, 0.999, 1.0)
SIZES = (1, 3, 33, 1000)
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
BYTES = {torch.float32: 20 << 10, torch.bfloat16: 2 << 10, torch.float16: 2 << 10, torch.float64: 40 << 10}


def shard(tensor: Tensor, rank: int, cut: random.Random) -> Tensor:
    """The part of this process, of any length. Each process draws the same borders."""
    n = len(tensor)
    borders = [0, *sorted(cut.choice((0, n, cut.randint(0, n))) for _ in range(dist.get_world_size() - 1)), n]
    return tensor[borders[rank] : borders[rank + 1]]


def differ(found: Tensor, expected: Tensor) -> bool:
    """Whether two thresholds have other bits. There is one NaN, and one zero."""
    if found.shape != expected.shape or found.dtype is not expected.dtype:
        return True
    if expected.isnan():
        return not bool(found.isnan())
    bits = _BITS[found.element_size()]
    return not torch.equal((found + 0.0).view(bits), (expected + 0.0).view(bits))


def of_lists(dtype: torch.dtype, rule: str, rank: int) -> list[str]:
    """All distributions, sizes and densities in one call."""
    torch.manual_seed(3)
    cut = random.Random(5)
    wanted = [(name, n, c) for name in DISTRIBUTIONS for n in SIZES for c in DENSITIES]
    whole = [DISTRIBUTIONS[name](n, dtype) for name, n, _ in wanted]
    shards = [shard(tensor, rank, cut) for tensor in whole]
    found = topc_threshold(shards, [c for *_, c in wanted], rule=rule, group=dist.group.WORLD)
    expected = [topc_threshold(tensor, c, rule=rule) for tensor, (*_, c) in zip(whole, wanted, strict=True)]
    return [str(what) for what, a, b in zip(wanted, found, expected, strict=True) if differ(a, b)]


def of_one_strided_tensor(rank: int) -> bool:
    whole = torch.randn(3000, 2)
    mine = whole.chunk(dist.get_world_size())[rank].t()[1]
    return differ(topc_threshold(mine, 0.3, group=dist.group.WORLD), topc_threshold(whole[:, 1], 0.3))


def of_more_than_a_part(rank: int) -> bool:
    """More elements than are encoded at once."""
    whole = torch.randn(dist.get_world_size(), (1 << 20) + 77)
    return differ(topc_threshold(whole[rank], 0.3, group=dist.group.WORLD), topc_threshold(whole, 0.3))


def on_the_wire(dtype: torch.dtype, rank: int) -> tuple[int, int]:
    """The bytes for each of 5 tensors, and the number of collectives."""
    with counting() as sent:
        topc_threshold([torch.randn(40).to(dtype)] * 5, 0.4, group=dist.group.WORLD)
    return sent.bytes // 5, len(sent.sizes)


def without_waiting(rank: int) -> None:
    shards = [torch.randn(50), torch.randn(rank), torch.randn(7)]
    with RefusesHostWaits():
        topc_threshold(shards, [0.3, 0.5, 0.3], rule="value", group=dist.group.WORLD)


def of_nothing(rank: int) -> list[float]:
    taus = topc_threshold([torch.empty(0), torch.empty(0)], 0.5, rule="value", group=dist.group.WORLD)
    return [*map(float, taus), len(topc_threshold([], 0.5, group=dist.group.WORLD))]


def in_a_group_without_this_process(rank: int) -> Any:
    others: Any = dist.new_group([0])
    return float(topc_threshold(torch.ones(3), 0.5, group=others))


def in_two_groups(rank: int) -> bool:
    """The last process has a tensor of its own, and the others share one."""
    last = dist.get_world_size() - 1
    groups = [dist.new_group([*range(last)]), dist.new_group([last])]
    wholes = [torch.randn(40, 2), torch.randn(30)]
    mine = wholes[1] if rank == last else wholes[0].chunk(last)[rank]
    own = int(rank == last)
    return differ(topc_threshold(mine, 0.3, group=groups[own]), topc_threshold(wholes[own], 0.3))


def wrong(rank: int, **arguments: Any) -> None:
    given = {"scores": torch.ones(3), "density": 0.5, "group": dist.group.WORLD, **arguments}
    topc_threshold(given.pop("scores"), given.pop("density"), **given)


def of_two_devices(rank: int) -> None:
    wrong(rank, scores=[torch.ones(3), torch.ones(3, device="meta")])


def of_two_dtypes(rank: int) -> None:
    wrong(rank, scores=[torch.ones(3), torch.ones(3, dtype=torch.bfloat16)])


CASES: dict[str, Callable[[int], Any]] = {
    **{f"{dtype} {rule}": lambda r, d=dtype, u=rule: of_lists(d, u, r) for dtype in DTYPES for rule in RULES},
    "strided": of_one_strided_tensor,
    "parts": of_more_than_a_part,
    "groups": in_two_groups,
    **{f"wire {dtype}": lambda rank, d=dtype: on_the_wire(d, rank) for dtype in DTYPES},
    "no host waits": without_waiting,
    "nothing": of_nothing,
    "another group": in_a_group_without_this_process,
    "two devices": of_two_devices,
    "two dtypes": of_two_dtypes,
    "integers": lambda rank: wrong(rank, scores=torch.arange(3)),
    "a backend": lambda rank: wrong(rank, backend="native"),
    "no group": lambda rank: wrong(rank, group="WORLD"),
    "too few densities": lambda rank: wrong(rank, scores=[torch.ones(3)] * 3, density=[0.5, 0.2]),
    "a density": lambda rank: wrong(rank, scores=[torch.ones(3)] * 2, density=[0.5, 2]),
    "a long shard": lambda rank: wrong(rank, scores=torch.ones(1).expand(1 << 31)),
}
