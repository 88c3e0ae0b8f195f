"""The native codes of running means against their specification, and the same bits from AVX2 and AVX-512."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from elementwise import assert_same_bits
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from wsn_fast.backends import moments, native
from wsn_fast.backends import torch as portable
from wsn_fast.backends.moments import BLOCK, Stored
from wsn_fast.backends.native.shared_library import NativeLibrary
from wsn_fast.backends.updates import WINDOW, AdamW, Batch, CodedAdamWState, Gradient, Next, Plan, Update

SIZE = 2 * BLOCK + 88  # whole blocks and a part of one
STORAGES = ("float32", "bfloat16", "8bit")

number = st.floats(width=32)
close = st.floats(width=32, min_value=2.0**-20, max_value=1.0)
places = st.dictionaries(st.integers(0, SIZE - 1), number | close, max_size=40)
storage = st.sampled_from(STORAGES)

pytestmark = pytest.mark.usefixtures("library")
# The fixtures open a library and choose among its instructions, which no example changes.
examples = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50, deadline=None)


class Layer(NamedTuple):
    """A gated tensor in training."""

    update: Update
    plan: Plan

    def step(self, grad: Tensor, adamw: AdamW) -> None:
        state, following = self.update.state, self.update.next
        assert isinstance(state, CodedAdamWState) and following is not None
        state.weight_step.add_(1), state.scores_step.add_(1)
        batch = Batch([self.update], [Gradient(grad, None, following.tau)], None, self.plan)
        native.adamw_coded_step(batch, [(adamw, adamw)])


def layer(weight: Tensor, scores: Tensor, union: Tensor | None, rule: str, stored: str) -> Layer:
    n, rank = weight.numel(), weight.numel() // 2
    means = [moments.zeros(weight, stored, signed) for signed in (True, False, True, False)]
    tau = portable.threshold(scores, rank, rule)
    following = Next(torch.full((n,), torch.nan), tau, rank, torch.zeros(WINDOW, dtype=torch.int64))
    state = CodedAdamWState(*means, torch.zeros(()), torch.zeros(()))
    return Layer(Update(weight, scores, None if union is None else portable.pack(union), rule, state, following), {})


@pytest.mark.usefixtures("level")
@examples
@given(places, st.sampled_from(["bfloat16", "8bit"]), st.integers(0, 1000))
def test_any_numbers_are_stored_as_the_specification_says(chosen: dict[int, float], stored: str, count: int) -> None:
    """With these settings a first moment becomes a quarter of the gradient and a second one its square, and then both
    shrink."""
    grad = torch.zeros(SIZE)
    for place, value in chosen.items():
        grad[place] = value + 0.0  # not -0.0
    ones = torch.ones(SIZE)
    one = layer(ones.clone(), ones.clone(), None, "value", stored)
    state = one.update.state
    assert isinstance(state, CodedAdamWState)
    for number_of_updates in (state.weight_step, state.scores_step):
        number_of_updates.fill_(count)
    expected = [moments.zeros(grad, stored, signed) for signed in (True, False)]
    update = torch.tensor(float(count + 1))
    one.step(grad, AdamW(0.0, 0.75, 0.0, 1.0, 0.0, True))
    for values, place, signed in zip((grad * 0.25, grad * grad), expected, (True, False), strict=True):
        moments.encode(values, place, signed, update)
    assert_stored(state, expected)
    one.update.weight.fill_(1), one.update.scores.fill_(1)  # 0 times infinity has moved them
    first, second = (moments.decode(place, grad, signed) for place, signed in zip(expected, (True, False), strict=True))
    first = (first * 0.75).where(first.isfinite(), torch.nan)  # infinity - infinity
    for values, place, signed in zip((first, second * 0.5), expected, (True, False), strict=True):
        moments.encode(values, place, signed, update + 1)
    one.step(torch.zeros(SIZE), AdamW(0.0, 0.75, 0.5, 1.0, 0.0, True))
    assert_stored(state, expected)


def assert_stored(state: CodedAdamWState, expected: list[Stored]) -> None:
    """Both of the weight and both of the scores."""
    for found, right in zip(state[:4], expected * 2, strict=True):
        assert isinstance(found, Stored)
        assert_same_bits(found.values, right.values, "codes")
        if found.scales is not None and right.scales is not None:
            assert_same_bits(found.scales, right.scales, "scales")


def trained(level: int, library: NativeLibrary, seed: int, n: int, rule: str, stored: str) -> list[Tensor]:
    """All that some steps have written with instructions up to this level; what is frozen has stayed as it was."""
    assert library.lib is not None
    library.lib.wsn_limit_instructions(level)
    torch.manual_seed(seed)
    weight, union = torch.randn(n), torch.rand(n) < 0.3
    before = weight.clone()
    one = layer(weight, torch.randn(n), union, rule, stored)
    state, following = one.update.state, one.update.next
    assert state is not None and following is not None
    for step in range(4):
        grad = torch.randn(n) * 2.0 ** torch.randint(-30, 4, (n,))
        grad = torch.where(torch.rand(n) < 0.2, 0.0, grad)
        one.step(grad, AdamW(1e-2, 0.9 if step < 2 else 0.3, 0.999, 1e-8, 0.01, True))
        assert_same_bits(weight[union], before[union], "frozen weight")
        tau = portable.threshold(one.update.scores, following.rank, rule)
        masked = portable.gate(weight, one.update.scores, tau, rule, torch.float32)
        assert_same_bits(following.tau, tau, "threshold")
        assert_same_bits(following.masked, masked, "masked weight")
    means = [part for mean in state[:4] for part in mean if part is not None]  # type: ignore[union-attr]
    return [weight, one.update.scores, *means]


@examples
@given(st.integers(0, 2**31), st.integers(1, 5 * BLOCK), st.sampled_from(["magnitude", "value"]), storage)
def test_frozen_weights_stay_and_both_loops_give_the_same_bits(
    library: NativeLibrary, seed: int, n: int, rule: str, stored: str
) -> None:
    """AVX2 and AVX-512 fuse the same products and sums, in different loops. The plain ones round a few sums twice."""
    trained(0, library, seed, n, rule, stored)
    both = [trained(level, library, seed, n, rule, stored) for level in (1, 2)]
    for k, (a, b) in enumerate(zip(*both, strict=True)):
        assert_same_bits(a, b, f"operand {k}")
