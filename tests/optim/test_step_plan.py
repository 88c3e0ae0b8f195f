"""A step is planned once, and again whenever anything that the plan depends on has changed: training is always that of
torch's optimizer under the guard."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from one_pass_models import MODES, each_backend
from optimizer_pairs import batch
from plan_changes import ALL_CHANGES, CASES, MISSING, Run, assert_alike, make_run, remember, train

from wsn_fast import ops

__all__ = ["each_backend"]
CLOSE = 1e-11


def both(kind: str, one_pass: bool, backend: str | None) -> tuple[Run, Run]:
    """Ours and torch's."""
    ours, theirs = (make_run(kind, one_pass, mine, backend) for mine in (True, False))
    return ours, theirs


# --- what a step does after a change
@MODES
@pytest.mark.parametrize(("kind", "change"), CASES)
def test_a_step_after_a_change_is_that_of_torch(kind: str, change: str, one_pass: bool, each_backend: str) -> None:
    ours, theirs = both(kind, one_pass, each_backend)
    for run in (ours, theirs):
        train(run, change)
    assert_alike(ours, theirs, CLOSE)
    # On a CPU no backend keeps addresses, so that the training alone would not show a plan that is out of date.
    # The step after a change may make states, which takes another plan.
    new = [after is not before for before, after in pairwise(ours.plans)]
    assert new[2::3] == [part is not remember for part in ALL_CHANGES[change]] and not any(new[1::3])


@pytest.mark.parametrize(
    ("missing", "one_pass"),
    [(missing, mode) for missing in MISSING for mode in (True, False) if (missing, mode) != ("a weight", True)],
)
@pytest.mark.parametrize("kind", ["adamw", "dampened"])
def test_steps_without_some_gradients_are_those_of_torch(
    kind: str, missing: str, one_pass: bool, each_backend: str
) -> None:
    ours, theirs = both(kind, one_pass, each_backend)
    for run in (ours, theirs):
        for step in range(6):  # gradients are missing in the first step, then in others
            run.step(*([MISSING[missing]] if step % 3 == 0 else []))
    assert_alike(ours, theirs, CLOSE)


@MODES
@pytest.mark.parametrize("kind", ["adamw", "dampened"])
def test_a_union_may_be_all_that_changes(kind: str, one_pass: bool, each_backend: str) -> None:
    """Without heads, an optimizer may go on in the next task as it is. The union appears, and later grows in place."""
    ours, theirs = (make_run(kind, one_pass, mine, each_backend, heads=None) for mine in (True, False))
    for run in (ours, theirs):
        for task in range(1, 4):
            for _ in range(3):
                run.step()
            run.wsn.end_task()
            run.wsn.begin_task(task)
    assert_alike(ours, theirs, CLOSE)
    assert [after is not before for before, after in pairwise(ours.plans[2:])] == [True, *[False] * 5]
    ours.wsn.verify()


@MODES
def test_a_layer_may_get_another_backend(one_pass: bool, each_backend: str) -> None:
    """Its tensors then have a call of their own."""
    ours, theirs = both("adamw", one_pass, None)
    for run in (ours, theirs):
        run.step()
        run.layer("2").backend = each_backend
        run.step()
    assert [[call.key.backend for call in plan.calls] for plan in ours.plans] == [[None], [None, each_backend]]
    assert_alike(ours, theirs, CLOSE)


# --- what needs no new plan
@MODES
@pytest.mark.parametrize("kind", ["adamw", "dampened"])
def test_a_plan_holds_whatever_a_step_reads_anew(kind: str, one_pass: bool, each_backend: str) -> None:
    """Other settings, gradients elsewhere, clipping, finished tasks that are used in between."""
    run = make_run(kind, one_pass, True, each_backend)
    for _ in range(2):  # the first one makes states
        run.step()
    for group in run.optimizer.param_groups:
        group["lr"], group["weight_decay"] = 0.02, 0.3
    kept = [param.grad for param in run.wsn.parameters()]
    run.step(before=lambda: run.optimizer.clip_grad_norm_(0.01))
    run.wsn.eval()
    with torch.no_grad():
        run.wsn(batch(0, 0)[0])
    run.wsn.train()
    run.step()
    assert kept and all(plan is run.plans[1] for plan in run.plans[1:])


# --- the first step
def test_the_momentum_of_several_calls_begins_with_the_gradient() -> None:
    """A call for each of two backends. With dampening the first step is another one."""
    ours, theirs = both("dampened", False, "torch")
    ours.layer("0").backend = "native"
    for run in (ours, theirs):
        run.step()
    assert len(ours.plans[0].calls) == 2
    assert_alike(ours, theirs, CLOSE)


@MODES
@pytest.mark.parametrize("kind", ["adamw", "dampened"])
def test_a_first_step_that_failed_may_be_made_again(kind: str, one_pass: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise MemoryError

    ours, theirs = both(kind, one_pass, "torch")

    def after_a_failure() -> None:
        with monkeypatch.context() as patch, pytest.raises(MemoryError):
            for name in ("adamw_step", "sgd_step"):
                patch.setattr(ops, name, fail)
            ours.optimizer.step()

    ours.step(before=after_a_failure)
    theirs.step()
    assert_alike(ours, theirs, CLOSE)


def test_momentum_that_is_loaded_before_the_first_step_is_used() -> None:
    """Clipping makes buffers, which are no longer new once others are loaded."""
    ours, theirs = both("dampened", True, "torch")
    for run in (ours, theirs):
        run.step()
    again = make_run("dampened", True, True, "torch")
    again.wsn.load_state_dict(ours.wsn.state_dict())
    again.seed = 1

    def load() -> None:
        again.optimizer.clip_grad_norm_(1e9)
        again.optimizer.load_state_dict(ours.optimizer.state_dict())

    again.masks = list(theirs.masks)
    again.step(before=load)
    theirs.step()
    assert_alike(again, theirs, CLOSE)
