"""Cold calls of the CUDA selection, against sorting."""

from __future__ import annotations

import ctypes
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from distributions import DENSITIES, DISTRIBUTIONS, RULES, assert_same_mask

from wsn_fast.backends.native import cuda_select
from wsn_fast.reference import specification

from .conftest import Target, assert_thresholds, build_emulation

DTYPES = list(cuda_select.DTYPES)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
every_rule = pytest.mark.parametrize("rule", RULES)


def ranks_of(sizes: list[int], rule: str) -> list[int]:
    """Each density in turn."""
    return [specification.threshold_rank(n, DENSITIES[i % len(DENSITIES)], rule) for i, n in enumerate(sizes)]


@every_dtype
@every_rule
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
class TestDistributions:
    def test_small_sizes_in_one_call(self, target: Target, distribution: str, rule: str, dtype: torch.dtype) -> None:
        sizes = [*range(1, 71), 1000]
        scores = [DISTRIBUTIONS[distribution](n, dtype).to(target.device) for n in sizes]
        ranks = ranks_of(sizes, rule)
        assert_thresholds(target.thresholds(scores, ranks, rule), scores, ranks, rule)

    def test_several_blocks(self, target: Target, distribution: str, rule: str, dtype: torch.dtype) -> None:
        sizes = [2**16 + 1, 8192, 9000]
        scores = [DISTRIBUTIONS[distribution](n, dtype).to(target.device) for n in sizes]
        ranks = [specification.threshold_rank(n, 0.3, rule) for n in sizes]
        assert_thresholds(target.thresholds(scores, ranks, rule, chunk=8192), scores, ranks, rule)


@every_rule
def test_masks_are_those_of_the_reference(target: Target, rule: str) -> None:
    scores = torch.randn(70, 50).to(target.device)
    for density in DENSITIES:
        tau = target.thresholds([scores], [specification.threshold_rank(scores.numel(), density, rule)], rule)[0]
        mask = ~(specification.gate_key(scores, rule) < tau)
        assert_same_mask(mask.cpu(), specification.topc_mask(scores.cpu(), density, rule=rule), f"{rule} {density}")


@every_dtype
def test_every_rank(target: Target, dtype: torch.dtype) -> None:
    scores = [torch.randn(61).to(dtype).to(target.device)] * 61
    ranks = list(range(61))
    assert_thresholds(target.thresholds(scores, ranks, "value"), scores, ranks, "value")


@every_dtype
def test_misaligned_bases(target: Target, dtype: torch.dtype) -> None:
    base = torch.randn(2100).to(dtype).to(target.device)
    scores = [base[start : start + n] for start in range(9) for n in (1, 5, 16, 1023, 1025, 2050)]
    ranks = [n.numel() // 2 for n in scores]
    assert_thresholds(target.thresholds(scores, ranks, "value"), scores, ranks, "value")


def test_neighbours_in_memory_are_not_read_as_scores(target: Target) -> None:
    base = torch.full((1033,), float("nan"), device=target.device)
    base[1:1030] = torch.randn(1029)
    assert_thresholds(target.thresholds([base[1:1030]], [1028], "magnitude"), [base[1:1030]], [1028], "magnitude")


def test_more_tensors_than_a_launch_describes(target: Target) -> None:
    sizes = [1 + 37 * i % 2500 for i in range(300)]
    scores = [torch.randn(n).to(target.device) for n in sizes]
    ranks = [n // 3 for n in sizes]
    assert_thresholds(target.thresholds(scores, ranks, "magnitude"), scores, ranks, "magnitude")


def test_full_lists_are_read_again(target: Target) -> None:
    """Distinct scores that share 20 bits and more: every list overflows in some blocks, and none in others."""
    close = 1 + torch.randint(0, 2**11, (4096,)) * 2.0**-23
    scores = torch.cat([torch.randn(4096), close, torch.randn(1024)]).to(target.device)
    ranks = list(range(4200, 8500, 500))
    same = [scores] * len(ranks)
    assert_thresholds(target.thresholds(same, ranks, "value"), same, ranks, "value")


def test_scores_stay_as_they_are(target: Target) -> None:
    scores = torch.randn(3000).to(target.device)
    before = scores.clone()
    target.thresholds([scores], [100], "magnitude")
    assert torch.equal(scores, before)


@pytest.mark.parametrize("chunk", [1024, 5 * 1024, 2**20])
def test_any_chunk(target: Target, chunk: int) -> None:
    scores = [torch.randn(20_000).to(target.device), torch.randn(1024).to(target.device)]
    assert_thresholds(target.thresholds(scores, [7000, 1], "value", chunk=chunk), scores, [7000, 1], "value")


def test_blocks_of_full_size(tmp_path: Path) -> None:
    full = Target(build_emulation(tmp_path, threads=512), "cpu")
    for dtype in DTYPES:
        scores = [torch.randn(n).to(dtype) for n in (1, 100, 9000)]
        ranks = [0, 70, 8000]
        assert_thresholds(full.thresholds(scores, ranks, "magnitude", chunk=4096), scores, ranks, "magnitude")


def test_any_order_of_the_blocks(cpu: Target) -> None:
    assert cpu.library.lib is not None
    scores = [torch.randn(6000), torch.randn(100)]
    for seed in range(1, 30):
        cpu.library.lib.cuda_on_cpu_configure(ctypes.c_uint(seed * 7919), 1 + seed % 4)
        assert_thresholds(cpu.thresholds(scores, [3000, 50], "value"), scores, [3000, 50], "value")


def test_calls_from_several_threads(cpu: Target) -> None:
    scores = [torch.randn(2500) for _ in range(8)]
    with ThreadPoolExecutor(4) as pool:
        taus = list(pool.map(lambda one: cpu.thresholds([one], [600], "magnitude"), scores))
    assert_thresholds(torch.cat(taus), scores, [600] * 8, "magnitude")


@pytest.mark.parametrize(
    ("dtype", "warm", "sizes", "launches"),
    [
        (torch.float32, False, [5000], 3),
        (torch.float32, False, [1 + 53 * i for i in range(100)], 3),
        (torch.float32, True, [5000], 4),
        (torch.bfloat16, False, [5000], 2),
        (torch.bfloat16, True, [5000], 3),
        (torch.float32, False, [1024, 7], 1),
        (torch.float32, True, [1024, 7], 1),
    ],
)
def test_number_of_launches(cpu: Target, dtype: torch.dtype, warm: bool, sizes: list[int], launches: int) -> None:
    assert cpu.library.lib is not None
    state = cuda_select.WarmStart(len(sizes), "cpu") if warm else None
    before = cpu.library.lib.cuda_on_cpu_launches()
    cpu.thresholds([torch.randn(n).to(dtype) for n in sizes], [0] * len(sizes), "value", state)
    assert cpu.library.lib.cuda_on_cpu_launches() - before == launches


@pytest.mark.slow
@every_rule
def test_beyond_2_to_the_31_elements(target: Target, rule: str) -> None:
    """The threshold is one of the last four elements: 4 GiB of scores, and minutes on the CPU."""
    scores = torch.full((2**31 + 5,), 0.25, dtype=torch.bfloat16, device=target.device)
    scores[-4:] = torch.tensor([0.5, 0.75, -1.0, 2.0], dtype=torch.bfloat16)
    rank = 2**31 + (1 if rule == "magnitude" else 2)
    tau = target.thresholds([scores], [rank], rule, chunk=2**20)
    assert tau.item() == 0.5
