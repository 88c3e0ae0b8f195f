"""Threshold, gate and its backward in the native library, bitwise against the reference and the portable backend."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from distributions import DENSITIES, DISTRIBUTIONS, DTYPES, LARGE_SIZES, RULES, SMALL_SIZES, assert_same_mask
from torch import Tensor

from wsn_fast.backends import native
from wsn_fast.backends import torch as portable
from wsn_fast.reference import specification

SIZES = [*SMALL_SIZES, 1024, 8193, 100_003]  # bisection, and windows with lists
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def assert_same_bits(actual: Tensor, expected: Tensor, what: str) -> None:
    """Bitwise equality of floats, but for which NaN a NaN is."""
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape), what
    integer = INTEGERS[actual.element_size()]
    a, b = (torch.where(x.isnan(), 0, x.contiguous().view(integer)) for x in (actual, expected))
    assert_same_mask(actual.isnan(), expected.isnan(), f"{what}: NaN")
    assert_same_mask(a == b, torch.ones_like(a == b), what)


def random_union(n: int) -> Tensor:
    return portable.pack(torch.rand(n) < 0.3)


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
class TestSelection:
    @pytest.mark.parametrize("rule", RULES)
    def test_mask_is_the_definition(self, distribution: str, dtype: torch.dtype, rule: str) -> None:
        for n in SIZES:
            scores = DISTRIBUTIONS[distribution](n, dtype)
            for density in DENSITIES:
                tau = native.threshold(scores, specification.threshold_rank(n, density, rule), rule)
                expected = specification.topc_mask(scores, density, rule=rule)
                assert_same_mask(native.keep_mask(scores, tau, rule), expected, f"n={n}, density={density}")

    @pytest.mark.parametrize("rule", RULES)
    def test_threshold_equals_that_of_the_portable_backend(
        self, distribution: str, dtype: torch.dtype, rule: str
    ) -> None:
        scores = DISTRIBUTIONS[distribution](8193, dtype)
        for rank in (0, 1, 100, 4096, 8191, 8192):
            tau = native.threshold(scores, rank, rule)
            assert (tau.shape, tau.dtype) == ((), dtype)
            torch.testing.assert_close(tau, portable.threshold(scores, rank, rule), rtol=0, atol=0, equal_nan=True)


@pytest.mark.usefixtures("library", "threads")
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_threads_do_not_change_the_mask(distribution: str) -> None:
    n = LARGE_SIZES[0]
    scores = DISTRIBUTIONS[distribution](n, torch.float32)
    for density in (0.03, 0.5):
        rank = specification.threshold_rank(n, density)
        tau = native.threshold(scores, rank, "magnitude")
        expected = portable.keep_mask(scores, portable.threshold(scores, rank, "magnitude"), "magnitude")
        assert_same_mask(native.keep_mask(scores, tau, "magnitude"), expected, f"density={density}")


@pytest.mark.slow
@pytest.mark.usefixtures("library", "threads")
@pytest.mark.parametrize("dtype", DTYPES)
def test_large_mask(dtype: torch.dtype) -> None:
    n = LARGE_SIZES[1]
    scores = torch.randn(n).to(dtype)
    rank = specification.threshold_rank(n, 0.3)
    tau = native.threshold(scores, rank, "magnitude")
    assert_same_mask(
        native.keep_mask(scores, tau, "magnitude"), specification.topc_mask(scores, 0.3), "the mask of a large tensor"
    )


@pytest.mark.usefixtures("library")
def test_zero_thresholds_are_positive() -> None:
    tau = native.threshold(torch.tensor([-0.0, -0.0, -0.0]), 1, "value")
    assert tau.item() == 0 and not tau.signbit()


@pytest.mark.usefixtures("level")
def test_denormals_are_compared_as_they_are_whatever_the_processor_flushes() -> None:
    scores = torch.tensor([1, 2, 3, 4], dtype=torch.int32).view(torch.float32)
    torch.set_flush_denormal(True)
    try:
        mask = native.keep_mask(scores, native.threshold(scores, 2, "magnitude"), "magnitude")
    finally:
        torch.set_flush_denormal(False)
    assert mask.tolist() == [False, False, True, True]


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize(
    ("dtype", "scores_dtype", "rule"),
    [
        pytest.param(*dtypes, rule, marks=[] if RULES[number % 2] == rule else pytest.mark.ci)
        for number, dtypes in enumerate(zip(DTYPES * 4, [x for x in DTYPES for _ in DTYPES], strict=True))
        for rule in RULES
    ],
)
class TestAgainstTorch:
    """Every combination of dtypes, on weights and gradients of all kinds."""

    def test_gate(self, dtype: torch.dtype, scores_dtype: torch.dtype, rule: str) -> None:
        for distribution in ("normal", "denormal", "infinities", "nan", "zeros_of_both_signs"):
            for n in (1, 8, 31, 1025):
                weight = DISTRIBUTIONS[distribution](n, dtype)
                scores = DISTRIBUTIONS["normal"](n, scores_dtype)
                tau = portable.threshold(scores, n // 2, rule)
                for out in DTYPES:
                    expected = portable.gate(weight, scores, tau, rule, out)
                    what = f"{distribution}, n={n}, {out}"
                    assert_same_bits(native.gate(weight, scores, tau, rule, out), expected, what)
                    packed = portable.pack(portable.keep_mask(scores, tau, rule))
                    assert_same_bits(native.gate_packed(weight, packed, out), expected, f"{what}, from packed")

    def test_gate_backward(self, dtype: torch.dtype, scores_dtype: torch.dtype, rule: str) -> None:
        for distribution in ("normal", "denormal", "infinities", "nan", "zeros_of_both_signs"):
            for n in (1, 8, 31, 1025):
                grad64 = DISTRIBUTIONS["zeros_of_both_signs"](n, torch.float64)
                weight = DISTRIBUTIONS[distribution](n, dtype)
                scores = DISTRIBUTIONS[distribution](n, scores_dtype)
                tau = portable.threshold(scores, n // 2, rule)
                for grad_dtype in DTYPES:
                    for union in (None, random_union(n)):
                        args = (grad64.to(grad_dtype), weight, scores, tau, union, rule, True, True)
                        for name, ours, theirs in zip(
                            ("dW", "dS"), native.gate_backward(*args), portable.gate_backward(*args), strict=True
                        ):
                            assert_same_bits(ours, theirs, f"{name}, {distribution}, n={n}, {grad_dtype}")


@pytest.mark.usefixtures("library", "threads")
@pytest.mark.parametrize("n", [100_003, 2**20 + 5])
def test_threads_do_not_change_the_gate(n: int) -> None:
    grad, weight, scores = torch.randn(3, n)
    union, tau = random_union(n), portable.threshold(scores, n // 3, "magnitude")
    args = (grad, weight, scores, tau, union, "magnitude", True, True)
    assert_same_bits(
        native.gate(weight, scores, tau, "magnitude", torch.bfloat16),
        portable.gate(weight, scores, tau, "magnitude", torch.bfloat16),
        "gate",
    )
    for ours, theirs in zip(native.gate_backward(*args), portable.gate_backward(*args), strict=True):
        assert_same_bits(ours, theirs, "backward")


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize(("need_weight", "need_scores"), [(True, False), (False, True), (False, False)])
def test_gradients_that_are_not_needed_are_none(need_weight: bool, need_scores: bool) -> None:
    x = torch.randn(5)
    dw, ds = native.gate_backward(x, x, x, x[0], None, "value", need_weight, need_scores)
    assert (dw is not None, ds is not None) == (need_weight, need_scores)


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize(
    "strided",
    [
        lambda x: x.t(),
        lambda x: x[:, ::2],
        lambda x: x[:1].expand(6, 10),
        lambda x: x.view(1, 3, 4, 5).contiguous(memory_format=torch.channels_last),
    ],
    ids=["transposed", "sliced", "expanded", "channels last"],
)
def test_strided_tensors(strided: Callable[[Tensor], Tensor]) -> None:
    """The values of the portable backend, and the strides of ``torch.empty_like``."""
    weight, scores, grad = (strided(torch.randn(6, 10)) for _ in range(3))
    tau = scores.flatten()[0]
    union = random_union(weight.numel())
    gate, backward = (weight, scores, tau, "value", torch.float64), (grad, weight, scores, tau, union, "value")
    results = [
        (native.keep_mask(scores, tau, "value"), portable.keep_mask(scores, tau, "value")),
        (native.gate(*gate), portable.gate(*gate)),
        *zip(native.gate_backward(*backward, True, True), portable.gate_backward(*backward, True, True), strict=True),
    ]
    for ours, theirs in results:
        assert torch.equal(ours, theirs)
        assert ours.stride() == torch.empty_like(weight).stride()


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("n", [0, 1])
def test_empty_and_scalar_tensors(n: int) -> None:
    x, tau = torch.ones(n) if n == 0 else torch.ones(()), torch.tensor(0.5)
    assert torch.equal(native.gate(x, x, tau, "value", torch.float32), x)
    assert torch.equal(native.keep_mask(x, tau, "value"), x.bool())


@pytest.mark.slow
@pytest.mark.usefixtures("library")
def test_more_elements_than_fit_32_bits() -> None:
    n = 2**31 + 9
    scores = torch.zeros(n, dtype=torch.float16)
    scores[-9:] = torch.arange(1, 10)
    tau = native.threshold(scores, n - 3, "magnitude")
    assert tau.item() == 7
    assert native.keep_mask(scores, tau, "magnitude")[-9:].tolist() == [False] * 6 + [True] * 3


X = torch.ones(4)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: native.threshold(X.int(), 0, "value"), TypeError, "scores must be float32"),
        (lambda: native.threshold([1.0], 0, "value"), TypeError, "scores must be a tensor, got list"),
        (lambda: native.threshold(X, 4, "value"), ValueError, r"rank must be in \[0, 4\), got 4"),
        (lambda: native.threshold(X, 0, "size"), ValueError, "rule must be one of"),
        (lambda: native.threshold(X.to("meta"), 0, "value"), ValueError, "scores must be on the CPU, got meta"),
        (lambda: native.keep_mask(X, X, "value"), ValueError, "tau must be one element of torch.float32"),
        (lambda: native.keep_mask(X, X[0].double(), "value"), ValueError, "tau must be one element of torch.float32"),
        (lambda: native.gate(X, X[:2], X[0], "value", X.dtype), ValueError, r"scores must have shape \(4,\)"),
        (lambda: native.gate(X, X, X[0], "value", torch.int8), TypeError, "dtype must be float32"),
        (lambda: native.gate_packed(X, X, X.dtype), TypeError, "packed must be a torch.uint8 tensor"),
        (
            lambda: native.gate_backward(X[:3], X, X, X[0], None, "value", True, True),
            ValueError,
            r"grad must have shape \(4,\), got \(3,\)",
        ),
        (
            lambda: native.gate_backward(X, X, X, X[0], X.byte(), "value", True, True),
            ValueError,
            "union must have 1 bytes for 4 elements, got 4",
        ),
    ],
)
def test_bad_input_is_refused(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
