"""Running means in fewer bytes, of shards: see the cases in :mod:`coded_cases`."""

from __future__ import annotations

from math import prod
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from coded_cases import CASES
from processes import needs_gloo, run_cases

from wsn_fast.backends import moments
from wsn_fast.distributed.coded_means import decoded


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_cases("coded_cases", 2, tmp_path_factory.mktemp("two"))


@needs_gloo
@pytest.mark.parametrize("case", CASES)
def test_each_process_stores_the_means_of_its_rows(case: str, seen: list[dict[str, Any]]) -> None:
    assert [one[case] for one in seen] == [None, None]


def cut(out: int, inner: int, world: int) -> list[slice]:
    chunk = -(-out // world)
    return [slice(min(i * chunk, out) * inner, min((i + 1) * chunk, out) * inner) for i in range(world)]


@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq"])
@pytest.mark.parametrize("shape", [(7, 100), (2, 600), (5, 3, 100), (700,)])
@pytest.mark.parametrize("own", [1, 2, 3, 5])
@pytest.mark.parametrize("saved", [1, 2, 3, 4])
def test_another_number_of_processes_reads_the_same_values(
    key: str, shape: tuple[int, ...], own: int, saved: int
) -> None:
    signed, (out, *rest) = key == "exp_avg", shape
    inner, most = prod(rest), -(-(-(-out // saved) * prod(rest)) // moments.BLOCK)
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0)) ** 9
    flat = (values if signed else values.abs()).reshape(-1)
    codes, scales, expected = (
        torch.empty(len(flat), dtype=torch.uint8),
        torch.zeros(saved, most),
        torch.empty(len(flat)),
    )
    for process, rows in enumerate(cut(out, inner, saved)):
        mean = moments.zeros(flat[rows], "8bit", signed)
        moments.encode(flat[rows], mean, signed)
        assert mean.scales is not None
        codes[rows], scales[process, : len(mean.scales)] = mean.values, mean.scales
        expected[rows] = moments.decode(mean, flat[rows], signed)
    for rows in cut(out, inner, own):
        shard: Any = SimpleNamespace(first=rows.start)
        mine = decoded(codes[rows], scales[0] if saved == 1 else scales, key, values, shard)
        assert torch.equal(mine, expected[rows])
