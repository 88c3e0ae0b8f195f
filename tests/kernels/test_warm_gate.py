"""Gates that are made again and again: those of a fresh select and gate, to the bit, whatever the window says."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from distributions import DISTRIBUTIONS, RULES
from elementwise import assert_same_bits, poisoned
from interleaved import interleaved
from torch import Tensor

from wsn_fast.backends import torch as portable
from wsn_fast.backends import triton
from wsn_fast.backends.mask import GateOrder
from wsn_fast.backends.triton import many
from wsn_fast.kernels import _layout as layout
from wsn_fast.kernels import warm_gate
from wsn_fast.kernels.update_table import Config

pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero) encountered:RuntimeWarning")

EACH_DTYPE = [(torch.float32, torch.float32), (torch.float32, torch.float16), (torch.bfloat16, torch.bfloat16)]
EACH_DTYPE += [(torch.float16, torch.float16)]
CHANGES = (lambda s: s, lambda s: s, lambda s: s * 1.01, lambda s: s.flip(0) + 1)


def order_of(scores: Tensor, rule: str, masked: torch.dtype, share: float, device: torch.device) -> GateOrder:
    scores, n = scores.to(device), scores.numel()
    weight = torch.randn(n, device=device).to(scores.dtype)
    return GateOrder(weight, scores, int(share * (n - 1)), rule, poisoned(n, masked, device))


def assert_right(order: GateOrder, tau: Tensor, what: str) -> None:
    expected = portable.threshold(order.scores.cpu(), order.rank, order.rule)
    expected = torch.where(expected == 0, torch.zeros_like(expected), expected)
    assert_same_bits(tau.cpu(), expected, f"tau {what}")
    # By the kernel's own gate: in the interpreter, the torch backend rounds to bfloat16 in another way.
    gated = triton.gate(order.weight, order.scores, tau, order.rule, order.masked.dtype)
    assert_same_bits(order.masked, gated.cpu(), f"masked {what}")
    assert order.masked._base is not None
    assert bool(order.masked._base[order.weight.numel() :].isnan().all()), f"beyond {what}"


def windows(plan: dict[Any, Any]) -> Tensor:
    """Those of the only gates that share launches."""
    (made,) = [made for made in plan.values() if isinstance(made, many._Warm)]
    return made.windows


@pytest.mark.sample(17)
@pytest.mark.parametrize(("dtype", "masked"), EACH_DTYPE, ids=str)
def test_every_distribution(dtype: torch.dtype, masked: torch.dtype, device: torch.device) -> None:
    """Cold, warm with the same scores, warm after all changed a little, and after they changed places."""
    sizes, shares = (600, 300, 37) * 4, (0.5, 0.1, 0.999, 0.0) * 3
    orders = [
        order_of(DISTRIBUTIONS[name](n, dtype), RULES[i % 2], masked, share, device)
        for i, (name, n, share) in enumerate(zip(DISTRIBUTIONS, sizes, shares, strict=False))
    ]
    plan: dict[Any, Any] = {}
    for i, change in enumerate(CHANGES):
        for order in orders:
            order.scores.copy_(change(order.scores))
        for name, order, tau in zip(DISTRIBUTIONS, orders, triton.gates(orders, plan), strict=False):
            assert_right(order, tau, f"{name} {i}")


@pytest.mark.ci
@pytest.mark.parametrize("rule", RULES)
def test_tensors_of_several_programs(rule: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole blocks, parts of one, and a single element, with addresses that are multiples of 16 bytes and not."""
    monkeypatch.setattr(warm_gate, "CONFIG", Config(1024, 2048, 4, 512, 8))
    monkeypatch.setattr(many.update_table, "spread", lambda config, *_: config)
    sizes = (1, 1023, 1024, 1025, 2048, 2049, 4096 + 5)
    for off in (0, 1):
        orders = []
        for n in sizes:
            order = order_of(torch.randn(n), rule, torch.float32, 0.4, device)
            scores = torch.randn(n + off, device=device)[off:]
            orders.append(order._replace(scores=scores))
        plan: dict[Any, Any] = {}
        for i in range(3):
            for order, tau in zip(orders, triton.gates(orders, plan), strict=True):
                assert_right(order, tau, f"{order.weight.numel()} {off} {i}")
                order.scores.mul_(1.001)


def test_the_last_block_of_a_program_is_counted_and_corrected(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One program with two whole blocks and five elements, among which the threshold is. They change places, and the
    threshold moves, so that the guess is wrong about some of them, but it stays in the window."""
    monkeypatch.setattr(warm_gate, "CONFIG", Config(512, 2048, 4, 512, 8))
    monkeypatch.setattr(many.update_table, "spread", lambda config, *_: config)
    scores = torch.cat([torch.full((512,), 0.1), torch.full((512,), 0.9), 0.5 + 1e-6 * torch.arange(5)])
    order = order_of(scores, "magnitude", torch.float32, 514 / 1028, device)
    plan: dict[Any, Any] = {}
    for i in range(6):
        (tau,) = triton.gates([order], plan)
        assert_right(order, tau, str(i))
        order.scores[1024:] = order.scores[1024:].roll(1) + 1.5e-6
    assert windows(plan)[0, layout.WINDOW_HITS.value :].tolist() == [5, 1]


def test_a_threshold_is_expected_where_it_was(device: torch.device) -> None:
    """The first call knows nothing; the next ones find the threshold in the window, until all scores leap."""
    order, plan = order_of(torch.randn(3000), "magnitude", torch.float32, 0.5, device), dict[Any, Any]()
    for i in range(5):
        order.scores.mul_(1.0001 if i < 4 else 7.0)
        (tau,) = triton.gates([order], plan)
        assert_right(order, tau, str(i))
    assert windows(plan)[0, layout.WINDOW_HITS.value :].tolist() == [3, 2]


def test_without_a_plan_nothing_is_kept_and_the_result_is_the_same(device: torch.device) -> None:
    order = order_of(torch.randn(700), "value", torch.float16, 0.3, device)
    for i in range(2):
        (tau,) = triton.gates([order])
        assert_right(order, tau, str(i))


@pytest.mark.parametrize(
    ("weight", "scores", "masked"),
    [(torch.float32, torch.bfloat16, torch.float32), (torch.float64, torch.float64, torch.float32)],
    ids=str,
)
def test_what_has_no_window_is_selected_and_gated(
    weight: torch.dtype, scores: torch.dtype, masked: torch.dtype, device: torch.device
) -> None:
    """A weight and scores of different dtypes, or a dtype that no search knows."""
    order = order_of(torch.randn(300).to(scores), "magnitude", masked, 0.5, device)
    order, plan = order._replace(weight=order.weight.to(weight)), dict[Any, Any]()
    if scores is torch.float64:
        with pytest.raises(TypeError, match="float64"):
            triton.gates([order], plan)
    else:
        for i in range(2):
            (tau,) = triton.gates([order], plan)
            assert_right(order, tau, str(i))
        assert not [made for made in plan.values() if isinstance(made, many._Warm)]


@pytest.mark.sample(5)
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="a GPU chooses the order itself")
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("alone", [16, 8192])
def test_any_order_of_programs(alone: int, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    config = Config(128, 128, 1, 32, 4, alone=alone, fix_block=16)
    monkeypatch.setattr(warm_gate, "CONFIG", config)
    names = list(DISTRIBUTIONS)[seed::3]
    orders = [
        order_of(DISTRIBUTIONS[name](300 - 3 * i, torch.float32), RULES[i % 2], torch.float32, 0.4, torch.device("cpu"))
        for i, name in enumerate(names)
    ]
    plan: dict[Any, Any] = {}
    for i in range(2):
        for order in orders:
            order.scores.mul_(1 + 0.01 * i)
        with interleaved(seed):
            taus = triton.gates(orders, plan)
        for name, order, tau in zip(names, orders, taus, strict=True):
            assert_right(order, tau, f"{name} {i}")
