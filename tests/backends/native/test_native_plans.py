"""What the native backend keeps of an optimizer from step to step has no effect on any result: it is used again as long
as it is right, and not any longer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from elementwise import assert_same_bits
from gated_updates import ADAMW, MOMENTUM, PLAIN, batch_of, make_problem, make_state, moved, operands_of, run_step
from update_twins import (
    CHANGES,
    CHANGES_OF_NEXT,
    GRADIENTS,
    Twins,
    assert_a_change_is_noticed,
    fresh,
    make_problems,
)

from wsn_fast.backends import native
from wsn_fast.backends.native import optimizer_steps
from wsn_fast.backends.updates import AdamWState, Gradient, Plan

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("library")


@pytest.fixture
def described(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one for every tensor that is described to the library."""
    seen: list[int] = []
    describe = optimizer_steps._gated

    def counted(*args: Any) -> Any:
        seen.append(1)
        return describe(*args)

    monkeypatch.setattr(optimizer_steps, "_gated", counted)
    return seen


def with_gaps(gradient: Gradient) -> Gradient:
    """The same gradients in tensors that are not contiguous."""
    both = (None if x is None else torch.stack([x, torch.full_like(x, torch.nan)], -1)[..., 0] for x in gradient[:2])
    return Gradient(*both, gradient.tau)


@pytest.mark.parametrize("following", [False, True], ids=["step", "step and next gate"])
def test_what_stays_is_described_once(following: bool, described: list[int]) -> None:
    """The gradients move, the scale, the settings and the numbers of steps change."""
    twins = Twins(native, make_problems(CPU, following=following))
    for i in range(4):
        for update in (*twins.mine, *twins.twins):
            assert isinstance(update.state, AdamWState)
            update.state.weight_step.fill_(i + 1)
            update.state.scores_step.fill_(2 * i + 1)
        twins.step(fresh(twins.mine), ADAMW._replace(lr=0.01 * i), torch.tensor(0.5 + i))
    assert len(described) == 2 * (1 + 4)  # once with the plan, and at every step without it


def test_momentum_needs_no_other_description(described: list[int]) -> None:
    twins = Twins(native, [p.with_state(make_state(p.update, MOMENTUM)) for p in make_problems(CPU)])
    for settings in (MOMENTUM._replace(first=True), MOMENTUM, PLAIN, MOMENTUM):
        twins.step(fresh(twins.mine), settings)
    assert len(described) == 2 * (1 + 4)


@pytest.mark.parametrize("other", [name for name in GRADIENTS if name != "float32"])
def test_other_gradients_are_described_anew(other: str, described: list[int]) -> None:
    twins = Twins(native, make_problems(CPU))
    for kind in ("float32", other, other, "float32", other):
        twins.step(GRADIENTS[kind](twins.mine))
    assert len(described) == 2 * (4 + 5), "the second of two alike is known"


def test_a_scale_comes_and_goes() -> None:
    twins = Twins(native, make_problems(CPU))
    for scale in (None, torch.tensor(0.3), torch.tensor(0.3, dtype=torch.float64), None):
        twins.step(fresh(twins.mine), scale=scale)


@pytest.mark.parametrize("change", [*CHANGES, *CHANGES_OF_NEXT])
def test_a_changed_update_is_not_taken_for_the_old_one(change: str) -> None:
    assert_a_change_is_noticed(native, change, CPU)


def test_two_sequences_in_turn() -> None:
    whole, part = Twins(native, make_problems(CPU)), Twins(native, make_problems(CPU, (33, 7)))
    part.plan = whole.plan
    for _ in range(3):
        whole.step(fresh(whole.mine))
        part.step(fresh(part.mine))


def test_sums_of_squares_between_steps() -> None:
    twins = Twins(native, make_problems(CPU, (70, 9, 530)))
    for part in (slice(None), slice(None), slice(1), slice(None), slice(1, 3)):
        gradients = fresh(twins.mine[part])
        twins.squares(gradients, part)
        twins.step(gradients, part=part)


def test_gradients_may_lose_their_order_in_memory() -> None:
    """A gradient that is not contiguous is copied, at any step."""

    twins = Twins(native, make_problems(CPU))
    for i in range(5):
        gradients = fresh(twins.mine, given=i > 2)
        twins.step([with_gaps(one) for one in gradients] if i % 2 else gradients)


def test_weights_that_are_not_contiguous_are_copied_at_every_step() -> None:
    problem = make_problem(66)
    flat = problem.with_state(make_state(problem.update, ADAMW))
    update = moved(flat.update, CPU)
    columns = [x.view(6, 11).t().contiguous().t() for x in operands_of(update)]
    state = AdamWState(*columns[2:], *update.state[4:])
    mine = flat._replace(update=update._replace(weight=columns[0], scores=columns[1], state=state))
    plan: Plan = {}
    batch = batch_of([mine.with_gradient(grad=flat.gradient.grad.view(6, 11))], plan=plan)
    for _ in range(2):
        for x in (*columns, *operands_of(flat.update)):  # somebody writes to them between the steps
            x.mul_(0.9)
        run_step(native, batch, ADAMW)
        run_step(native, batch_of([flat]), ADAMW)
        for i, (a, b) in enumerate(zip(columns, operands_of(flat.update), strict=True)):
            assert_same_bits(a.reshape(-1), b, f"operand {i}")
