"""Gradient masking as the epilogue of the product that makes G: to the bit on whole numbers, where every order of
summing agrees; on real ones our error against float64 is at most twice that of torch in fp32."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from distributions import DISTRIBUTIONS, RULES
from elementwise import assert_nothing_beyond, assert_same_bits, poisoned
from torch import Tensor

from wsn_fast.backends import torch as portable
from wsn_fast.kernels import masked_matmul_grad as kernels
from wsn_fast.kernels.split_sum import workspace_numel
from wsn_fast.reference import specification

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
SMALL = kernels.GradMatmulConfig(32, 32, 16, 4, 2, 16)
"""So that small shapes have several tiles and steps, tails in each, and an epilogue in two parts."""
# Whole tiles; tails, with rows of the packed union that begin a byte and not; multiples of 4 and of 2; single elements.
SHAPES = ((64, 64), (40, 72), (37, 45), (36, 44), (34, 46), (1, 1), (1, 65), (33, 1))
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
ALL_CONFIGS = (*kernels.CONFIGS, *kernels.TF32_CONFIGS, *kernels.IEEE_CONFIGS)

# NumPy warns, inside the interpreter, of the infinities and NaN that are planted here, and of how the interpreter of
# Triton 3.6 reads the bound of a loop.
pytestmark = pytest.mark.filterwarnings(
    "ignore:(overflow|invalid value) encountered:RuntimeWarning",
    "ignore:Conversion of an array with ndim > 0 to a scalar:DeprecationWarning",
)


def whole(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """-2, -1, 1 and 2: products and sums of a few of them are exact in every dtype, and a sum is zero as +0.0 alone."""
    return torch.tensor([-2, -1, 1, 2], device=device)[torch.randint(4, shape, device=device)].to(dtype)


def threshold(scores: Tensor, rule: str) -> Tensor:
    return portable.threshold(scores, specification.threshold_rank(scores.numel(), 0.4, rule), rule)


def random_union(n: int, k: int, device: torch.device) -> Tensor:
    return portable.pack(torch.rand(n * k, device=device) < 0.3)


def run(
    dy: Tensor,
    x: Tensor,
    w: Tensor,
    scores: Tensor,
    tau: Tensor,
    union: Tensor | None,
    rule: str = "magnitude",
    *,
    need_weight: bool = True,
    need_scores: bool = True,
    config: kernels.GradMatmulConfig = SMALL,
    splits: int = 1,
    precision: str = "ieee",
) -> tuple[Tensor | None, Tensor | None]:
    """The launcher on poisoned outputs and workspace."""
    dw = poisoned(tuple(w.shape), w.dtype, w.device) if need_weight else None
    ds = poisoned(tuple(w.shape), scores.dtype, w.device) if need_scores else None
    numel = workspace_numel(*w.shape, splits)
    kernels.masked_matmul_grad(
        dy, x, w, dw, ds, scores=scores, tau=tau, union=union, rule=rule, config=config, splits=splits,
        workspace=poisoned(numel, torch.float32, w.device) if numel else None, precision=precision,
    )  # fmt: skip
    assert_nothing_beyond(*(result for result in (dw, ds) if result is not None))
    return dw, ds


def check_bits(
    m: int,
    n: int,
    k: int,
    device: torch.device,
    *,
    compute: torch.dtype = torch.float32,
    weight: torch.dtype = torch.float32,
    scores: torch.dtype | Tensor = torch.float32,
    rule: str = "magnitude",
    with_union: bool = True,
    need_weight: bool = True,
    need_scores: bool = True,
    dy: Tensor | None = None,
    x: Tensor | None = None,
    config: kernels.GradMatmulConfig = SMALL,
    splits: int = 1,
) -> None:
    """The bits of the two-step path: there, too, whole numbers are never rounded."""
    dy = whole(m, n, dtype=compute, device=device) if dy is None else dy
    x = whole(m, k, dtype=compute, device=device) if x is None else x
    w = whole(n, k, dtype=weight, device=device)
    s = scores if isinstance(scores, Tensor) else torch.randn(n, k, device=device).to(scores)
    tau, union = threshold(s, rule), random_union(n, k, device) if with_union else None
    need = {"need_weight": need_weight, "need_scores": need_scores}
    dw, ds = run(dy, x, w, s, tau, union, rule, config=config, splits=splits, **need)
    g = (dy.double().T @ x.double()).to(compute)
    expected = portable.gate_backward(g, w, s, tau, union, rule, need_weight, need_scores)
    for name, actual, gradient in zip(("dW", "dS"), (dw, ds), expected, strict=True):
        assert (actual is None) == (gradient is None)
        if actual is not None:
            assert_same_bits(actual, gradient, name)


@pytest.mark.sample(21)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_shapes(n: int, k: int, rule: str, device: torch.device) -> None:
    check_bits(21, n, k, device, rule=rule)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("k", [40, 45])
def test_without_a_union(k: int, rule: str, device: torch.device) -> None:
    check_bits(21, 37, k, device, rule=rule, with_union=False)


@pytest.mark.sample(13)
@pytest.mark.parametrize("m", [0, 1, 2, 15, 16, 17, 48])
def test_batches(m: int, device: torch.device) -> None:
    check_bits(m, 35, 41, device)


@pytest.mark.sample(29)
@pytest.mark.parametrize("scores", FLOATS, ids=str)
@pytest.mark.parametrize("weight", FLOATS, ids=str)
@pytest.mark.parametrize("compute", FLOATS, ids=str)
def test_dtypes(compute: torch.dtype, weight: torch.dtype, scores: torch.dtype, device: torch.device) -> None:
    for rule in RULES:
        check_bits(5, 20, 40, device, compute=compute, weight=weight, scores=scores, rule=rule)


@pytest.mark.sample(13)
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("need_weight", "need_scores"), [(True, False), (False, True)])
def test_one_gradient_alone(
    need_weight: bool, need_scores: bool, rule: str, splits: int, device: torch.device
) -> None:  # fmt: skip
    check_bits(40, 37, 45, device, rule=rule, need_weight=need_weight, need_scores=need_scores, splits=splits)


@pytest.mark.sample(29)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_distributions_of_scores(name: str, rule: str, device: torch.device) -> None:
    for dtype in FLOATS:
        scores = DISTRIBUTIONS[name](19 * 23, dtype).view(19, 23).to(device)
        check_bits(3, 19, 23, device, scores=scores, rule=rule)


@pytest.mark.sample(17)
@pytest.mark.parametrize("config", ALL_CONFIGS, ids=str)
def test_every_tile(config: kernels.GradMatmulConfig, device: torch.device) -> None:
    check_bits(70, 70, 136, device, compute=torch.float16, config=config)


@pytest.mark.sample(17)
@pytest.mark.parametrize("config", ALL_CONFIGS, ids=str)
def test_every_tile_on_odd_rows(config: kernels.GradMatmulConfig, device: torch.device) -> None:
    check_bits(20, 70, 77, device, compute=torch.float16, config=config)


def test_more_rows_of_tiles_than_a_group(device: torch.device) -> None:
    check_bits(3, 32 * kernels.GROUP + 1, 33, device)


@pytest.mark.sample(17)
@pytest.mark.parametrize("with_union", [True, False])
@pytest.mark.parametrize("splits", [2, 3, 7])  # seven: more than there are steps
def test_split_sums(splits: int, with_union: bool, device: torch.device) -> None:
    check_bits(70, 37, 45, device, splits=splits, with_union=with_union)


@pytest.mark.parametrize("splits", [1, 3])
def test_the_same_call_gives_the_same_bits(splits: int, device: torch.device) -> None:
    dy, x = torch.randn(70, 37, device=device), torch.randn(70, 45, device=device)
    w = torch.randn(37, 45, device=device)
    first, second = (run(dy, x, w, w, w[0, 0].abs(), None, splits=splits) for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


@pytest.mark.parametrize("offset", [0, 3, 8])
def test_rows_with_gaps(offset: int, device: torch.device) -> None:
    """Nothing between the rows of dy and x is read."""
    dy = poisoned((21, 64), torch.float32, device)[:, offset : offset + 40]
    x = poisoned((21, 96), torch.float32, device)[:, offset : offset + 72]
    dy.copy_(whole(21, 40, dtype=torch.float32, device=device))
    x.copy_(whole(21, 72, dtype=torch.float32, device=device))
    check_bits(21, 40, 72, device, dy=dy, x=x)


def test_one_row_broadcast_over_the_batch(device: torch.device) -> None:
    dy = whole(1, 40, dtype=torch.float32, device=device).expand(21, 40)
    x = whole(1, 37, dtype=torch.float32, device=device).expand(21, 37)
    check_bits(21, 40, 37, device, dy=dy, x=x)


def test_single_columns_of_any_stride(device: torch.device) -> None:
    dy = whole(1, 21, dtype=torch.float32, device=device).as_strided((21, 1), (1, 21))
    x = whole(1, 21, dtype=torch.float32, device=device).as_strided((21, 1), (1, 0))
    check_bits(21, 1, 1, device, dy=dy, x=x)


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("rule", RULES)
def test_what_is_not_finite_in_g_stays_outside_the_mask(rule: str, splits: int, device: torch.device) -> None:
    """NaN and infinities in columns that the mask drops and in rows that the union holds: +0.0 in dW, G * W in dS."""
    dy, x = torch.randn(40, 37, device=device), torch.randn(40, 45, device=device)
    x[3, 5], x[7, 44], dy[2, 36], dy[4, 0] = float("nan"), float("inf"), float("-inf"), float("nan")
    scores, w = torch.randn(37, 45, device=device), torch.ones(37, 45, device=device)
    scores[:, [5, 44]] = 0.0 if rule == "magnitude" else float("-inf")
    tau, frozen = threshold(scores, rule), torch.rand(37, 45, device=device) < 0.3
    frozen[[0, 36]] = True
    dw, ds = run(dy, x, w, scores, tau, portable.pack(frozen), rule, splits=splits)
    outside = ~portable.keep_mask(scores, tau, rule) | frozen
    assert_same_bits(dw[outside], torch.zeros_like(dw[outside]), "dW outside the mask")
    assert dw.isfinite().all() and (dw[~outside] != 0).all()
    bad = torch.zeros_like(frozen)
    bad[[0, 36]] = True
    bad[:, [5, 44]] = True  # without a sign, too: infinity times 0
    assert torch.equal(~ds.isfinite(), bad)


def test_what_is_not_finite_in_the_weight_stays_in_its_scores_gradient(device: torch.device) -> None:
    dy, x = torch.randn(9, 8, device=device), torch.randn(9, 16, device=device)
    w, scores = torch.randn(8, 16, device=device), torch.randn(8, 16, device=device)
    w[1, 2], w[7, 15] = float("nan"), float("inf")
    dw, ds = run(dy, x, w, scores, threshold(scores, "value"), None, "value")
    assert dw.isfinite().all()
    assert torch.equal(~ds.isfinite(), ~w.isfinite())


def check_error(actual: Tensor, in_fp32: Tensor, exact: Tensor, scale: Tensor) -> None:
    """At most twice the error of torch in fp32, beside one rounding of the result and one of the largest sum of
    magnitudes, for torch is at times exact by luck. The interpreter truncates to bf16 where a GPU rounds.
    """
    assert actual.isfinite().all()
    truncated = INTERPRETED and actual.dtype is torch.bfloat16
    rounding = torch.finfo(actual.dtype).eps * (1 if truncated else 0.5) * exact.abs()
    allowance = rounding + torch.finfo(torch.float32).eps * scale
    excess = (actual.double() - exact).abs() - 2 * (in_fp32.double() - exact).abs() - allowance
    assert excess.max() <= 0, f"off by {excess.max()} at {divmod(int(excess.argmax()), exact.shape[1])}"


@pytest.mark.sample(29)
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("weight", FLOATS, ids=str)
@pytest.mark.parametrize("compute", FLOATS, ids=str)
def test_error(compute: torch.dtype, weight: torch.dtype, splits: int, device: torch.device) -> None:
    """One rounding, of the end result: twice the error of two-step gradients in bf16 would be far more."""
    dy, x = torch.randn(90, 37, device=device).to(compute), torch.randn(90, 45, device=device).to(compute)
    w, scores = torch.randn(37, 45, device=device).to(weight), torch.randn(37, 45, device=device)
    tau, union = threshold(scores, "magnitude"), random_union(37, 45, device)
    dw, ds = run(dy, x, w, scores.to(weight), tau.to(weight), union, splits=splits)
    g, scale = dy.double().T @ x.double(), dy.double().abs().T @ x.double().abs()
    rest = (scores.to(weight), tau.to(weight), union, "magnitude", True, True)
    exact = portable.gate_backward(g, w.double(), *rest)
    in_fp32 = portable.gate_backward(dy.float().T @ x.float(), w.float(), *rest)
    check_error(dw, in_fp32[0], exact[0], scale)
    exact_ds = g * w.double() * scores.to(weight).sign().double()
    check_error(ds, in_fp32[1], exact_ds, scale * w.double().abs())


@pytest.fixture
def tf32() -> Iterator[None]:
    """torch may multiply fp32 as tf32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("config", kernels.TF32_CONFIGS, ids=str)
def test_tf32(config: kernels.GradMatmulConfig, tf32: None, device: torch.device) -> None:
    """Where both sides may round to tf32, the error as a whole is at most three times torch's: see the test of the
    product itself."""
    dy, x = torch.randn(200, 70, device=device), torch.randn(200, 40, device=device)
    ones = torch.ones(70, 40, device=device)
    dw, _ = run(dy, x, ones, ones, ones[0, 0], None, config=config, precision="tf32", need_scores=False)
    exact = dy.double().T @ x.double()
    assert (dw - exact).norm() <= 3 * (dy.T @ x - exact).norm()


def test_launcher_asserts_its_operands(device: torch.device) -> None:
    dy, x, w = torch.zeros(3, 8, device=device), torch.zeros(3, 16, device=device), torch.zeros(8, 16, device=device)
    tau, union = torch.zeros((), device=device), torch.zeros(16, dtype=torch.uint8, device=device)
    good = {"dy": dy, "x": x, "w": w, "dw": torch.empty_like(w), "ds": None, "scores": w, "tau": tau, "union": union}
    kernels.masked_matmul_grad(**good, rule="value", config=SMALL)
    for bad in (
        {"dw": None},  # nothing to compute
        {"dw": torch.empty_like(w, dtype=torch.half)},
        {"ds": torch.empty_like(w, dtype=torch.half)},
        {"x": x[:2]},
        {"x": x.half()},
        {"dy": torch.zeros((), device=device).expand(3, 8)},  # the gradient of a plain sum
        {"w": torch.zeros(16, 8, device=device).T},
        {"tau": tau.double()},
        {"union": union[:15]},
        {"rule": "sign"},
        {"splits": 2},  # without a workspace
    ):
        with pytest.raises(AssertionError):
            kernels.masked_matmul_grad(**{**good, "rule": "value", "config": SMALL, **bad})
