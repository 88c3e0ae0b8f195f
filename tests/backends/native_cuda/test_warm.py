"""Warm calls: always exact, and quick where the thresholds move little."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from distributions import DISTRIBUTIONS, RULES
from torch import Tensor

from wsn_fast.backends.native.cuda_select import DTYPES, Statistics, WarmStart

from .conftest import Target, assert_thresholds

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def follow(
    target: Target,
    scores: list[Tensor],
    step: Callable[[Tensor], Tensor],
    steps: int = 8,
    rule: str = "magnitude",
) -> list[Statistics]:
    """Let ``step`` change the scores, check every threshold on the way, and tell how it went."""
    ranks = [tensor.numel() * 2 // 3 for tensor in scores]
    state = WarmStart(len(scores), target.device)
    scores = [tensor.to(target.device) for tensor in scores]
    for _ in range(steps):
        assert_thresholds(target.thresholds(scores, ranks, rule, state), scores, ranks, rule)
        scores = [step(tensor) for tensor in scores]
    return state.statistics()


@every_dtype
@pytest.mark.parametrize("rule", RULES)
def test_slow_scores_hit(target: Target, rule: str, dtype: torch.dtype) -> None:
    scores = [torch.randn(n).to(dtype) for n in (1, 1000, 5000)]
    for statistics in follow(target, scores, lambda x: (x.float() * 1.001).to(dtype), rule=rule):
        assert (statistics.hits, statistics.misses, statistics.cold_calls) == (7, 0, 1)


def test_every_tensor_has_a_record_of_its_own(target: Target) -> None:
    """Also those that one launch does not describe: they differ in scale, so that another's window would miss."""
    scores = [torch.randn(200) * 1.1**i for i in range(140)]
    assert {statistics[:3] for statistics in follow(target, scores, lambda x: x * 1.0001, steps=3)} == {(2, 0, 1)}


def test_window_narrows_as_the_threshold_calms_down(target: Target) -> None:
    calm = follow(target, [torch.randn(20_000)], lambda x: x * 1.00001, steps=30)
    wild = follow(target, [torch.randn(20_000)], lambda x: x * 1.001, steps=30)
    assert calm[0].hits == wild[0].hits == 29
    assert 0 < calm[0].inside < wild[0].inside


def test_jump_misses_and_is_followed_again(target: Target) -> None:
    scores = torch.randn(3000).to(target.device)
    state = WarmStart(1, target.device)
    for factor in (1.0, 1.0001, 1.5, 1.50001):
        moved = [scores * factor]
        assert_thresholds(target.thresholds(moved, [2000], "value", state), moved, [2000], "value")
    assert state.statistics()[0][:3] == (1, 1, 2)  # after a jump as wide as that there is no window


def test_threshold_that_always_jumps_is_left_alone(target: Target) -> None:
    statistics = follow(target, [torch.randn(3000)], lambda x: x * 2, steps=8)[0]
    assert statistics[:3] == (0, 1, 7)


def test_window_comes_back_after_jumps(target: Target) -> None:
    scores = torch.randn(3000).to(target.device)
    state = WarmStart(1, target.device)
    for i in range(60):
        moved = [scores * (2 if i == 1 else 1)]
        assert_thresholds(target.thresholds(moved, [1500], "magnitude", state), moved, [1500], "magnitude")
    assert state.statistics()[0].hits > 10


@every_dtype
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_scores_at_rest_hit(target: Target, distribution: str, dtype: torch.dtype) -> None:
    scores = [DISTRIBUTIONS[distribution](n, dtype) for n in (40, 3000)]
    for statistics in follow(target, scores, lambda x: x, steps=4):
        assert (statistics.hits, statistics.misses, statistics.cold_calls) == (3, 0, 1)


@pytest.mark.parametrize("values", [[0.3], [0.3, -0.3], [0.2, 0.7], [1.0, 1.0 + 2**-20]])
def test_equal_scores_that_move_hit(target: Target, values: list[float]) -> None:
    """More equal keys than a list has room for, at another place each time."""
    scores = torch.tensor(values)[torch.randint(len(values), (5000,))]
    assert follow(target, [scores], lambda x: x * 1.0005, steps=8)[0][:3] == (7, 0, 1)


def test_crowded_window_hits(target: Target) -> None:
    """All scores are in the window, and distinct: eight times what the lists have room for."""
    scores = 1 + torch.randperm(2**18)[:5000] * 2.0**-23
    statistics = follow(target, [scores], lambda x: x * 1.0005, steps=6)[0]
    assert statistics[:3] == (5, 0, 1)
    assert statistics.inside > 5000


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("edge", [0.0, float("inf"), float("-inf"), float("nan")])
def test_window_at_the_ends_of_the_order(target: Target, edge: float, rule: str) -> None:
    assert follow(target, [torch.full((2000,), edge)], lambda x: x, steps=4, rule=rule)[0][:3] == (3, 0, 1)


@pytest.mark.parametrize("rule", RULES)
def test_random_walks(target: Target, rule: str) -> None:
    """Steps of every size, many tensors, some in one block and some in several."""
    scores = [torch.randn(n) for n in (5, 900, 1024, 1025, 4000)]
    sizes = iter([1e-7, 1e-6, 1e-2, 1e-4, 1.0, 1e-5, 1e-5, 1e-3, 10.0, 1e-6, 1e-6, 0.0] * 5)
    follow(target, scores, lambda x: x + next(sizes) * torch.randn_like(x), steps=12, rule=rule)


def test_state_serves_other_tensors_ranks_and_rules(target: Target) -> None:
    state = WarmStart(2, target.device)
    for rank, rule, n in ((10, "value", 2000), (1500, "value", 1600), (3, "magnitude", 50), (2000, "magnitude", 2500)):
        for dtype in DTYPES:
            scores = [torch.randn(n).to(dtype).to(target.device) for _ in range(2)]
            assert_thresholds(target.thresholds(scores, [rank, 0], rule, state), scores, [rank, 0], rule)


def test_counters_are_left_clear(cpu: Target) -> None:
    state = WarmStart(2, "cpu")
    scores = [torch.randn(3000), torch.randn(10)]
    for factor in (1, 1.01, 5):
        cpu.thresholds([x * factor for x in scores], [1000, 5], "value", state)
    assert not state._state[2 * 80 :].any()
