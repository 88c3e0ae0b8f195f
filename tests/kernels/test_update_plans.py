"""What the Triton backend keeps of an optimizer from step to step has no effect on any result: it is used again as long
as it is right, and not any longer."""

from __future__ import annotations

from collections.abc import Callable
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

from wsn_fast.backends import triton
from wsn_fast.backends.triton import optimizer_steps
from wsn_fast.backends.triton.plans import Entry
from wsn_fast.backends.updates import AdamWState, Batch, Plan, SGDState
from wsn_fast.kernels import addresses


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tensors each batch has that the backend had to look at, because it did not know it."""
    seen: list[int] = []
    calls = optimizer_steps._calls

    def counted(batch: Batch, copies: Any) -> Any:
        seen.append(len(batch.updates))
        return calls(batch, copies)

    monkeypatch.setattr(optimizer_steps, "_calls", counted)
    return seen


def tables_in(plan: Plan) -> int:
    return sum(isinstance(kept, Entry) for kept in plan.values())


# --- the same sequence of updates again
@pytest.mark.parametrize("count", [2, 45], ids=["by a launch", "by a copy"])
def test_gradients_move_and_come_back(count: int, device: torch.device) -> None:
    """Those of 45 tensors have more addresses than one launch writes."""
    assert 2 * 45 < addresses.VALUES < 3 * 45, "the addresses of dW go into the first launch, those of dS into both"
    twins = Twins(triton, [moved(make_problem(2), device).with_state(SGDState(None, None)) for _ in range(count)])
    here, there = fresh(twins.mine, given=True), fresh(twins.mine, given=True)
    for gradients in (here, there, here):
        twins.step(gradients, PLAIN)


@pytest.mark.parametrize("following", [False, True], ids=["step", "step and next gate"])
def test_the_calls_of_a_batch_are_used_again(following: bool, planned: list[int], device: torch.device) -> None:
    """The gradients move, the scale, the settings and the numbers of steps change."""
    twins = Twins(triton, make_problems(device, following=following))
    for i in range(4):
        for update in (*twins.mine, *twins.twins):
            assert isinstance(update.state, AdamWState)
            update.state.weight_step.fill_(i + 1)
            update.state.scores_step.fill_(2 * i + 1)
        twins.step(fresh(twins.mine), ADAMW._replace(lr=0.01 * i), torch.tensor(0.5 + i, device=device))
    assert planned == [2] + [2] * 4  # once with the plan, and at every step without it
    assert tables_in(twins.plan) == 1


def test_momentum_begins_without_another_plan(planned: list[int], device: torch.device) -> None:
    twins = Twins(triton, [p.with_state(moved(make_state(p.update, MOMENTUM), device)) for p in make_problems(device)])
    for settings in (MOMENTUM._replace(first=True), MOMENTUM, PLAIN, MOMENTUM):
        twins.step(fresh(twins.mine), settings)
    assert planned == [2] * 5


@pytest.mark.parametrize("other", [name for name in GRADIENTS if name != "float32"])
def test_other_gradients_get_calls_of_their_own(other: str, planned: list[int], device: torch.device) -> None:
    twins = Twins(triton, make_problems(device))
    for kind in ("float32", other, other, "float32", other):
        twins.step(GRADIENTS[kind](twins.mine))
    assert len(planned) == 5 + 4, "the second of two alike is known"


def test_a_scale_of_another_dtype_gets_calls_of_its_own(planned: list[int], device: torch.device) -> None:
    twins = Twins(triton, make_problems(device))
    for dtype in (None, torch.float32, torch.float32, torch.float64, None):
        scale = None if dtype is None else torch.tensor(0.3, dtype=dtype, device=device)
        twins.step(fresh(twins.mine), scale=scale)
    assert len(planned) == 5 + 4


# --- another sequence of updates
@pytest.mark.sample(2)
@pytest.mark.parametrize("change", [*CHANGES, *CHANGES_OF_NEXT])
def test_a_changed_update_is_not_taken_for_the_old_one(change: str, planned: list[int], device: torch.device) -> None:
    assert_a_change_is_noticed(triton, change, device)
    assert len(planned) == 3 + 2


def test_the_order_of_the_tensors_may_change(device: torch.device) -> None:
    twins = Twins(triton, make_problems(device, following=True))
    twins.step(fresh(twins.mine))
    twins.mine, twins.twins = twins.mine[::-1], twins.twins[::-1]
    twins.step(fresh(twins.mine))
    twins.step(fresh(twins.mine))


def test_two_sequences_in_turn(device: torch.device) -> None:
    whole, part = Twins(triton, make_problems(device)), Twins(triton, make_problems(device, (33, 7)))
    part.plan = whole.plan
    for _ in range(3):
        whole.step(fresh(whole.mine))
        part.step(fresh(part.mine))
    assert tables_in(whole.plan) == 2


def test_a_table_at_old_addresses_is_right_for_new_tensors(device: torch.device) -> None:
    """A tensor may lie where another one lay before: with other sizes, another rank and other dtypes."""
    memory = torch.empty(5, 1024, device=device)
    plan: Plan = {}
    for i, n in enumerate((530, 530, 70, 531, 70, 530)):
        update, gradient = moved(make_problem(n), device)
        state = moved(make_state(update, ADAMW), device)
        weight, scores, *means = (row[:n].copy_(x) for row, x in zip(memory, (*update[:2], *state[:3]), strict=True))
        state = AdamWState(*means, *state[3:])
        mine = update._replace(weight=weight, scores=scores, state=state)
        twin = moved(mine, device)
        run_step(triton, Batch([mine], [gradient], None, plan), ADAMW)
        run_step(triton, Batch([twin], [gradient]), ADAMW)
        for k, (a, b) in enumerate(zip(operands_of(mine), operands_of(twin), strict=True)):
            assert_same_bits(a, b, f"operand {k} of step {i}")


# --- tensors that come and go
def test_a_plan_changes_nothing(device: torch.device) -> None:
    """Gradients that move, tensors that come and go, settings that change: as without a plan."""
    twins = Twins(triton, make_problems(device, (70, 9, 530)))
    for i, part in enumerate([slice(3), slice(3), slice(1), slice(3), slice(1, 3), slice(3)]):
        gradients = fresh(twins.mine[part])
        twins.squares(gradients, part)
        twins.step(gradients, ADAMW._replace(lr=0.01 * i), part=part)
    assert tables_in(twins.plan) == 6, "three sets of tensors, for steps and for squares"


def test_a_plan_does_not_grow_for_ever(device: torch.device) -> None:
    plan: Plan = {}
    # All at once, so that each has an address of its own.
    problems = [moved(make_problem(4), device) for _ in range(optimizer_steps.TABLES + 3)]
    for problem in problems:
        triton.gradient_squares(batch_of([problem], plan=plan))
        run_step(triton, batch_of([problem.with_state(SGDState(None, None))], plan=plan), PLAIN)
    assert tables_in(plan) == optimizer_steps.TABLES


def test_a_table_that_the_plan_has_dropped_serves_its_own_batch(device: torch.device) -> None:
    """The batch of the last step is known even where squares of other tensors have filled the plan."""
    twins = Twins(triton, make_problems(device))
    for _ in range(2):
        twins.step(fresh(twins.mine))
        others = [moved(make_problem(4), device) for _ in range(optimizer_steps.TABLES + 1)]
        twins.kept += others
        for problem in others:
            triton.gradient_squares(batch_of([problem], plan=twins.plan))
    assert tables_in(twins.plan) == optimizer_steps.TABLES
    twins.step(fresh(twins.mine))


def test_a_plan_writes_only_what_moved(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    problems = [moved(make_problem(4), device) for _ in range(9)]
    batch = batch_of([p.with_state(moved(make_state(p.update, MOMENTUM), device)) for p in problems], plan={})
    moves: list[Callable[[Batch], object]] = [triton.gradient_squares, lambda batch: run_step(triton, batch, MOMENTUM)]
    for move in moves:
        move(batch)
    written: list[int] = []
    kernel = addresses.write_kernel

    class Counted:
        def __getitem__(self, grid: Any) -> Any:
            written.append(1)
            return kernel[grid]

    monkeypatch.setattr(addresses, "write_kernel", Counted())
    for i, move in enumerate(moves):
        written.clear()
        move(batch)
        assert not written
        gradients = list(batch.gradients)
        gradients[i] = gradients[i]._replace(grad=gradients[i].grad.clone())
        move(batch._replace(gradients=gradients))
        assert len(written) == 1
