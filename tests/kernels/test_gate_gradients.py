"""The fused gradient masking against the torch backend: the same bits, in every dtype that rounds as a GPU does."""

from __future__ import annotations

import itertools
import os

import pytest
import torch
from distributions import RULES
from elementwise import assert_nothing_beyond, assert_same_bits, planted, poisoned
from torch import Tensor

from wsn_fast.backends import torch as portable
from wsn_fast.kernels import gate_gradients as kernels
from wsn_fast.kernels._elementwise import Config
from wsn_fast.reference import specification

SMALL = Config(32, 1)
"""So that sizes up to 70 have full blocks and a tail."""
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
FLOATS = (torch.float32, torch.bfloat16, torch.float16)

# NumPy, inside the interpreter, warns of the infinities and NaN that are planted here.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")


def assert_gradient(actual: Tensor, expected: Tensor, rounds_to_bf16: bool, what: str) -> None:
    """To the bit; but in the interpreter a conversion to bfloat16 (up to three here) truncates and spoils denormals."""
    if INTERPRETED and rounds_to_bf16:
        torch.testing.assert_close(actual, expected, rtol=3 * 2**-7, atol=1e-36, equal_nan=True)
        finite = ~expected.isnan()
        assert torch.equal(actual.signbit()[finite], expected.signbit()[finite]), what
    else:
        assert_same_bits(actual, expected, what)


def threshold(scores: Tensor, rule: str) -> Tensor:
    return portable.threshold(scores, specification.threshold_rank(scores.numel(), 0.4, rule), rule)


def check(
    grad: Tensor, weight: Tensor, scores: Tensor, union: Tensor | None, rule: str, config: Config, device: torch.device,
    need_weight: bool = True, need_scores: bool = True,
) -> None:  # fmt: skip
    n, tau = weight.numel(), threshold(scores, rule)
    what = f"n={n} {grad.dtype} {weight.dtype} {scores.dtype} {rule} union={union is not None}"
    dw = poisoned(n, weight.dtype, device) if need_weight else None
    ds = poisoned(n, scores.dtype, device) if need_scores else None
    on_device = [x if x is None else x.to(device) for x in (grad, weight, scores, tau, union)]
    kernels.gate_backward(*on_device, dw, ds, rule=rule, config=config)
    expected = portable.gate_backward(grad, weight, scores, tau, union, rule, need_weight, need_scores)
    lossy = torch.bfloat16 in (weight.dtype, scores.dtype)
    for name, actual, gradient in zip(("dW", "dS"), (dw, ds), expected, strict=True):
        assert (actual is None) == (gradient is None)
        if actual is not None:
            assert_gradient(actual.cpu(), gradient, lossy, f"{name} {what}")
            assert_nothing_beyond(actual)


def random_union(n: int) -> Tensor:
    return portable.pack(torch.rand(n) < 0.3)


@pytest.mark.sample(13)
@pytest.mark.parametrize("with_union", [True, False])
@pytest.mark.parametrize("rule", RULES)
def test_every_small_size(rule: str, with_union: bool, device: torch.device) -> None:
    for n in range(1, 71):
        operands = [planted(n, torch.float32) for _ in range(3)]
        check(*operands, random_union(n) if with_union else None, rule, SMALL, device)


@pytest.mark.sample(29)
@pytest.mark.parametrize("grad", FLOATS, ids=str)
@pytest.mark.parametrize("weight", FLOATS, ids=str)
@pytest.mark.parametrize("scores", FLOATS, ids=str)
def test_every_dtype(grad: torch.dtype, weight: torch.dtype, scores: torch.dtype, device: torch.device) -> None:
    for n, rule in itertools.product((6, 75, 400), RULES):
        operands = [planted(n, dtype) for dtype in (grad, weight, scores)]
        check(*operands, random_union(n), rule, SMALL, device)


def test_float64(device: torch.device) -> None:
    for grad in (torch.float32, torch.float64):
        operands = [planted(101, dtype) for dtype in (grad, torch.float64, torch.float64)]
        check(*operands, random_union(101), "magnitude", SMALL, device)


@pytest.mark.parametrize("config", kernels.CONFIGS, ids=str)
def test_every_tile_shape(config: Config, device: torch.device) -> None:
    for n in (2 * config.block, 2 * config.block + 3):
        operands = [planted(n, dtype) for dtype in (torch.bfloat16, torch.float32, torch.float32)]
        check(*operands, random_union(n), "magnitude", config, device)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("need_weight", "need_scores"), [(True, False), (False, True)])
def test_one_gradient_alone(need_weight: bool, need_scores: bool, rule: str, device: torch.device) -> None:
    operands = [planted(75, torch.float32) for _ in range(3)]
    check(*operands, random_union(75), rule, SMALL, device, need_weight, need_scores)


def test_specials_outside_the_mask_and_inside_the_union(device: torch.device) -> None:
    nan, inf = float("nan"), float("inf")
    grad = torch.tensor([nan, -inf, -0.0, nan, -1.0, 2.0], device=device)
    scores = torch.tensor([0.0, 0.1, -0.2, 5.0, -6.0, 7.0], device=device)
    union = torch.tensor([0b011000], dtype=torch.uint8, device=device)
    dw = poisoned(6, torch.float32, device)
    tau = torch.tensor(1.0, device=device)
    kernels.gate_backward(grad, torch.ones_like(grad), scores, tau, union, dw, None, rule="magnitude")
    assert_same_bits(dw, torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, 2.0]), "dW")


def test_the_sign_of_nan_and_of_zeros_is_zero(device: torch.device) -> None:
    scores = torch.tensor([float("nan"), 0.0, -0.0, 3.0, -3.0], device=device)
    ds = poisoned(5, torch.float32, device)
    ones, tau = torch.ones_like(scores), torch.tensor(1.0, device=device)
    kernels.gate_backward(-ones, ones, scores, tau, None, None, ds, rule="magnitude")
    assert_same_bits(ds, torch.tensor([-0.0, -0.0, -0.0, -1.0, 1.0]), "dS")


@pytest.mark.sample(17)
@pytest.mark.parametrize("with_union", [True, False])
@pytest.mark.parametrize(("need_weight", "need_scores"), [(True, True), (True, False), (False, True)])
def test_many_tensors_in_one_launch(
    need_weight: bool, need_scores: bool, with_union: bool, device: torch.device
) -> None:  # fmt: skip
    sizes = (1, 32, 0, 70, 7, 64, 200)
    grads = [planted(n, torch.bfloat16).to(device) for n in sizes]
    weights, scores = ([planted(n, torch.float32).to(device) for n in sizes] for _ in range(2))
    taus = [torch.tensor(0.1 * i, device=device) for i in range(len(sizes))]
    unions = [random_union(n).to(device) for n in sizes] if with_union else None
    dws = [poisoned(n, torch.float32, device) for n in sizes] if need_weight else None
    dss = [poisoned(n, torch.float32, device) for n in sizes] if need_scores else None
    table = kernels.gate_backward_table(weights, scores, unions, SMALL).to(device)
    moving = [[0 if x is None else x.data_ptr() for x in row or [None] * 7] for row in (grads, dws, dss, taus)]
    aligned = all(address % 16 == 0 for row in moving[:3] for address in row)
    kernels.gate_backward_multi(
        table,
        torch.tensor(moving, device=device),
        grad=torch.bfloat16,
        needed=(need_weight, need_scores),
        aligned=aligned,
        rule="magnitude",
    )
    for i, operands in enumerate(zip(grads, weights, scores, taus, strict=True)):
        union = unions[i] if unions else None
        dw, ds = portable.gate_backward(*operands, union, "magnitude", need_weight, need_scores)
        if dws:
            assert_same_bits(dws[i], dw, f"dW {i}")
        if dss:
            assert_same_bits(dss[i], ds, f"dS {i}")
    assert_nothing_beyond(*(dws or []), *(dss or []))


def test_launcher_asserts_its_operands(device: torch.device) -> None:
    x, tau = torch.zeros(4, 6, device=device), torch.zeros((), device=device)
    with pytest.raises(AssertionError):
        kernels.gate_backward(x, x, x, tau, None, None, None, rule="magnitude")
    with pytest.raises(AssertionError):
        kernels.gate_backward(x.t(), x, x, tau, None, torch.empty_like(x), None, rule="magnitude")
    with pytest.raises(AssertionError):
        kernels.gate_backward(x, x, x, tau, None, torch.empty_like(x, dtype=torch.half), None, rule="magnitude")
