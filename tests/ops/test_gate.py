"""Selection is bit-identical to the specification."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from distributions import DENSITIES, DISTRIBUTIONS, DTYPES, LARGE_SIZES, RULES, SMALL_SIZES, assert_same_mask
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from wsn_fast import ops, topc_mask, topc_threshold
from wsn_fast.reference import specification


def check_all_densities(scores: Tensor, rule: str, what: str) -> None:
    """Every density against one sort: the specification read off literally."""
    keys = specification.gate_key(scores, rule)
    ascending = keys.flatten().sort().values
    for density in DENSITIES:
        tau = ascending[specification.threshold_rank(scores.numel(), density, rule)]
        actual_tau = topc_threshold(scores, density, rule=rule)
        assert actual_tau.shape == () and actual_tau.dtype == scores.dtype
        assert torch.equal(actual_tau, tau) or (actual_tau.isnan() and tau.isnan()), f"{what} c={density}"
        assert_same_mask(topc_mask(scores, density, rule=rule), ~(keys < tau), f"{what} c={density}")


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_small_tensors(name: str, dtype: torch.dtype, rule: str) -> None:
    for n in SMALL_SIZES:
        check_all_densities(DISTRIBUTIONS[name](n, dtype), rule, f"{name} n={n}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_a_million_and_one(name: str, dtype: torch.dtype) -> None:
    scores = DISTRIBUTIONS[name](LARGE_SIZES[0], dtype)
    # One rule per case keeps this short; the slow test below takes the whole product.
    rule = RULES[(list(DISTRIBUTIONS).index(name) + DTYPES.index(dtype)) % 2]
    keys = specification.gate_key(scores, rule)
    ascending = keys.sort().values
    for density in (1e-6, 0.3, 1.0):
        tau = ascending[specification.threshold_rank(scores.numel(), density, rule)]
        assert_same_mask(topc_mask(scores, density, rule=rule), ~(keys < tau), f"{name} {rule} c={density}")


@pytest.mark.parametrize("rule", RULES)
def test_above_the_limit_of_torch_quantile(rule: str) -> None:
    scores = torch.randn(LARGE_SIZES[1])
    assert_same_mask(topc_mask(scores, 0.3, rule=rule), specification.topc_mask(scores, 0.3, rule=rule), rule)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("n", LARGE_SIZES)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_large_tensors(name: str, dtype: torch.dtype, rule: str, n: int) -> None:
    check_all_densities(DISTRIBUTIONS[name](n, dtype), rule, f"{name} n={n}")


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides_do_not_matter(dtype: torch.dtype, rule: str) -> None:
    base = torch.randn(6, 5, 8).to(dtype)
    for scores in (base.transpose(0, 2), base[::2, :, 1::3], base.flip(1), base[0, 0, 0], base.expand(2, 6, 5, 8)):
        expected = specification.topc_mask(scores.contiguous(), 0.3, rule=rule)
        assert_same_mask(topc_mask(scores, 0.3, rule=rule), expected, f"strides {scores.stride()}")


floats = st.floats(width=32, allow_nan=True, allow_infinity=True, allow_subnormal=True)
densities = st.floats(min_value=1e-9, max_value=1.0)


@given(
    scores=hnp.arrays(np.float32, st.integers(1, 70), elements=floats),
    density=densities,
    rule=st.sampled_from(RULES),
    dtype=st.sampled_from(DTYPES),
)
def test_any_scores(scores: np.ndarray, density: float, rule: str, dtype: torch.dtype) -> None:
    tensor = torch.from_numpy(scores).to(dtype)
    assert_same_mask(topc_mask(tensor, density, rule=rule), specification.topc_mask(tensor, density, rule=rule), "mask")


@given(n=st.integers(1, 2**40), density=densities, rule=st.sampled_from(RULES))
def test_rank(n: int, density: float, rule: str) -> None:
    rank = ops.threshold_rank(n, density, rule)
    assert rank == specification.threshold_rank(n, density, rule)
    assert 0 <= rank < n


@given(scores=hnp.arrays(np.float64, st.integers(2, 60), elements=st.floats(-1e6, 1e6)), percent=st.integers(1, 99))
def test_value_rule_selects_what_quantile_selects(scores: np.ndarray, percent: int) -> None:
    tensor, density = torch.from_numpy(scores), percent / 100
    if (100 - percent) * (len(scores) - 1) % 100 == 0:
        return  # at an exact rank quantile's own rounding decides (see the specification)
    expected = tensor >= torch.quantile(tensor, 1 - density)
    # Interpolation rounds: between two elements closer than an ulp or so it may land on either.
    gaps = tensor.unique().diff()
    if len(gaps) == 0 or gaps.min() > 1e-6:
        assert_same_mask(topc_mask(tensor, density, rule="value"), expected, "against torch.quantile")


def test_magnitude_rule_is_the_papers_kth_value() -> None:
    scores = torch.randn(100, 784)
    for density in (0.03, 0.05, 0.1, 0.3, 0.5, 0.7):
        k = 1 + round(0.01 * float((1 - density) * 100) * (scores.numel() - 1))
        tau = scores.abs().view(-1).kthvalue(k).values.item()
        assert_same_mask(topc_mask(scores, density), scores.abs() >= tau, f"c={density}")


def test_ties_are_kept() -> None:
    scores = torch.tensor([1.0, 2.0, 2.0, 2.0, 3.0])
    assert topc_mask(scores, 0.5).tolist() == [False, True, True, True, True]


def test_scores_keep_their_graph_out_of_the_mask() -> None:
    scores = torch.randn(8, requires_grad=True)
    assert not topc_mask(scores, 0.5).requires_grad
    assert not topc_threshold(scores, 0.5).requires_grad


@pytest.mark.parametrize("density", [0, -0.1, 1.0001, float("nan"), float("inf"), "0.5", None, True, 1 + 0j])
def test_density_out_of_range(density: object) -> None:
    with pytest.raises(ValueError, match=r"density must be a number in \(0, 1\], got "):
        topc_mask(torch.randn(4), density)  # type: ignore[arg-type]


def test_unknown_rule() -> None:
    with pytest.raises(ValueError, match=r"rule must be one of .* got 'sign'"):
        topc_threshold(torch.randn(4), 0.5, rule="sign")


def test_empty_scores() -> None:
    with pytest.raises(ValueError, match=r"at least one element, got shape \(0, 3\)"):
        topc_mask(torch.empty(0, 3), 0.5)


@pytest.mark.parametrize("scores", [[1.0, 2.0], torch.arange(4), torch.zeros(3, dtype=torch.complex64)])
def test_scores_of_a_wrong_type(scores: object) -> None:
    with pytest.raises(TypeError, match="scores must be"):
        topc_mask(scores, 0.5)  # type: ignore[arg-type]
