"""The gate kernels against the torch backend and the specification, to the bit."""

from __future__ import annotations

import itertools
import os

import pytest
import torch
from distributions import DISTRIBUTIONS, DTYPES, RULES, assert_same_mask
from elementwise import assert_nothing_beyond, assert_same_bits, bits, planted, poisoned
from torch import Tensor

from wsn_fast.backends import torch as portable
from wsn_fast.kernels import gate as kernels
from wsn_fast.kernels._elementwise import Config
from wsn_fast.reference import specification

SMALL = Config(32, 1)
"""So that sizes up to 70 have full blocks and a tail."""
SIZES = range(1, 71)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
FLOATS = (torch.float32, torch.bfloat16, torch.float16)

# NumPy warns, inside the interpreter, of the infinities and NaN that are planted here, and of how the interpreter of
# Triton 3.6 reads the bound of a loop.
pytestmark = pytest.mark.filterwarnings(
    "ignore:(overflow|invalid value) encountered:RuntimeWarning",
    "ignore:Conversion of an array with ndim > 0 to a scalar:DeprecationWarning",
)


def assert_converted(actual: Tensor, expected: Tensor, source: torch.dtype, what: str) -> None:
    """To the bit; but the interpreter truncates where a conversion to bfloat16 rounds, and flushes denormals there."""
    if INTERPRETED and expected.dtype is torch.bfloat16 and source is not torch.bfloat16:
        assert torch.equal(actual.isnan(), expected.isnan()), what
        truncated = (bits(actual).int() - bits(expected).int()).abs() <= 1
        flushed = (expected.abs() < torch.finfo(torch.bfloat16).smallest_normal) & (actual == 0)
        actual = torch.where(truncated | flushed, expected, actual)
    assert_same_bits(actual, expected, what)


def check_gate(
    weight: Tensor, scores: Tensor, tau: Tensor, dtype: torch.dtype, rule: str, config: Config, device: torch.device
) -> None:
    n = weight.numel()
    out, packed = poisoned(n, dtype, device), poisoned((n + 7) // 8, torch.uint8, device)
    kernels.gate(
        weight.to(device), scores.to(device), tau.to(device), out, packed, rule=rule, config=config
    )  # fmt: skip
    what = f"n={n} {weight.dtype} {scores.dtype} {dtype} {rule}"
    assert_converted(out, portable.gate(weight, scores, tau, rule, dtype), weight.dtype, what)
    assert_same_bits(packed, portable.pack(portable.keep_mask(scores, tau, rule)), what)
    assert_nothing_beyond(out, packed)


def threshold(scores: Tensor, rule: str, density: float = 0.4) -> Tensor:
    return portable.threshold(scores, specification.threshold_rank(scores.numel(), density, rule), rule)


# --- the gate
@pytest.mark.parametrize("rule", RULES)
def test_gate_of_every_small_size(rule: str, device: torch.device) -> None:
    for n in SIZES:
        scores = planted(n, torch.float32)
        check_gate(planted(n, torch.float32), scores, threshold(scores, rule), torch.float32, rule, SMALL, device)


@pytest.mark.sample(25)
@pytest.mark.parametrize("out", [*FLOATS, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gate_converts_to_the_compute_dtype(dtype: torch.dtype, out: torch.dtype, device: torch.device) -> None:
    for n, rule in itertools.product((5, 40, 1000), RULES):
        scores = planted(n, dtype)
        check_gate(planted(n, dtype), scores, threshold(scores, rule), out, rule, SMALL, device)


@pytest.mark.parametrize("scores_dtype", FLOATS, ids=str)
def test_gate_of_scores_in_another_dtype(scores_dtype: torch.dtype, device: torch.device) -> None:
    scores = planted(77, scores_dtype)
    tau = threshold(scores, "magnitude")
    check_gate(planted(77, torch.float32), scores, tau, torch.float16, "magnitude", SMALL, device)


@pytest.mark.parametrize("config", kernels.CONFIGS, ids=str)
def test_gate_with_every_tile_shape(config: Config, device: torch.device) -> None:
    for n in (2 * config.block, 2 * config.block + 3):
        scores = planted(n, torch.float32)
        tau = threshold(scores, "magnitude")
        check_gate(planted(n, torch.float32), scores, tau, torch.float16, "magnitude", config, device)


@pytest.mark.sample(29)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_the_packed_mask_is_the_specified_one(
    name: str, dtype: torch.dtype, rule: str, device: torch.device
) -> None:  # fmt: skip
    scores = DISTRIBUTIONS[name](203, dtype)
    packed = poisoned(26, torch.uint8, device)
    tau, out = threshold(scores, rule, 0.3), torch.empty_like(scores, device=device)
    kernels.gate(torch.ones_like(out), scores.to(device), tau.to(device), out, packed, rule=rule)
    expected = specification.topc_mask(scores, 0.3, rule=rule)
    assert_same_mask(portable.unpack(packed.cpu(), 203), expected, name)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("tau", [float("nan"), float("inf"), float("-inf"), 0.0, -0.0])
def test_gate_with_an_extreme_threshold(tau: float, rule: str, device: torch.device) -> None:
    scores = planted(99, torch.float32)
    check_gate(planted(99, torch.float32), scores, torch.tensor(tau), torch.float32, rule, SMALL, device)


def test_gate_without_a_packed_mask(device: torch.device) -> None:
    weight, scores, tau = planted(45, torch.float32), planted(45, torch.float32), torch.tensor(0.5)
    out = poisoned(45, torch.float32, device)
    kernels.gate(weight.to(device), scores.to(device), tau.to(device), out, None, rule="value", config=SMALL)
    assert_same_bits(out, portable.gate(weight, scores, tau, "value", torch.float32), "out")
    assert_nothing_beyond(out)


def test_gate_of_shapes_and_unaligned_views(device: torch.device) -> None:
    weight, scores, tau = planted(211, torch.float32)[1:], planted(213, torch.float32)[3:], torch.tensor(0.5)
    out, packed = poisoned((3, 7, 10), torch.float32, device), poisoned(27, torch.uint8, device)
    shaped = [x.to(device)[-210:].view(3, 7, 10) for x in (weight, scores)]
    kernels.gate(*shaped, tau.to(device), out, packed, rule="magnitude", config=SMALL)
    expected = portable.gate(weight, scores, tau, "magnitude", torch.float32)
    assert_same_bits(out, expected.view(3, 7, 10), "out")


@pytest.mark.parametrize("with_mask", [True, False])
def test_gate_of_many_tensors_in_one_launch(with_mask: bool, device: torch.device) -> None:
    sizes = (1, 32, 0, 70, 7, 64, 200)
    weights = [planted(n, torch.float32).to(device) for n in sizes]
    scores = [planted(n, torch.float32).to(device) for n in sizes]
    taus = [torch.tensor(0.1 * i, device=device) for i in range(len(sizes))]
    outs = [poisoned(n, torch.float16, device) for n in sizes]
    masks = [poisoned((n + 7) // 8, torch.uint8, device) for n in sizes]
    table = kernels.gate_table(weights, scores, taus, outs, masks if with_mask else None, SMALL).to(device)
    kernels.gate_multi(table, rule="magnitude")
    for weight, score, tau, out, packed in zip(weights, scores, taus, outs, masks, strict=True):
        assert_same_bits(out, portable.gate(weight, score, tau, "magnitude", torch.float16), "out")
        mask = portable.pack(portable.keep_mask(score, tau, "magnitude"))
        assert_same_bits(packed, mask if with_mask else torch.full_like(mask, 0xFF), "packed")
    assert_nothing_beyond(*outs, *masks)


def test_a_table_sees_unaligned_tensors(device: torch.device) -> None:
    buffer = torch.zeros(64, device=device)
    tau = torch.zeros((), device=device)
    for start, aligned in ((0, True), (1, False), (4, True)):
        x = buffer[start : start + 8]
        assert kernels.gate_table([x], [x], [tau], [x], None).aligned is aligned


@pytest.mark.sample(21)
@pytest.mark.parametrize("out_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_gate_packed(dtype: torch.dtype, out_dtype: torch.dtype, device: torch.device) -> None:
    for n in (*range(1, 20), 32, 64, 70, 1000):
        weight, packed = planted(n, dtype), portable.pack(torch.rand(n) < 0.5)
        out = poisoned(n, out_dtype, device)
        kernels.gate_packed(weight.to(device), packed.to(device), out, config=SMALL)
        assert_converted(out, portable.gate_packed(weight, packed, out_dtype), dtype, f"n={n}")
        assert_nothing_beyond(out)


@pytest.mark.parametrize("config", kernels.CONFIGS, ids=str)
def test_gate_packed_with_every_tile_shape(config: Config, device: torch.device) -> None:
    n = 2 * config.block + 5
    weight, packed = planted(n, torch.float32), portable.pack(torch.rand(n) < 0.5)
    out = poisoned(n, torch.float32, device)
    kernels.gate_packed(weight.to(device), packed.to(device), out, config=config)
    assert_same_bits(out, portable.gate_packed(weight, packed, torch.float32), "out")


# --- what launchers refuse
def test_launchers_assert_their_layout(device: torch.device) -> None:
    x, tau = torch.zeros(4, 6, device=device), torch.zeros((), device=device)
    bytes_ = torch.zeros(3, dtype=torch.uint8, device=device)
    with pytest.raises(AssertionError):
        kernels.gate(x.t(), x, tau, torch.empty_like(x), None, rule="magnitude")
    with pytest.raises(AssertionError):
        kernels.gate(x, x, tau.double(), torch.empty_like(x), None, rule="magnitude")
    with pytest.raises(AssertionError):
        kernels.gate_packed(x, bytes_[:2], torch.empty_like(x))
