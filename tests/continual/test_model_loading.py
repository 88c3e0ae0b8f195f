"""The model inside of a WSN is loaded by itself: nothing that its finished tasks use may change."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_models import convnet, logits, mlp, run_tasks
from torch import nn

from wsn_fast import WSN, StateError

State = dict[str, Any]


def adamw(params: object) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, 0.01)  # type: ignore[arg-type]


def finished(*tasks: int, seed: int = 0) -> WSN:
    torch.manual_seed(seed)
    wsn = WSN(convnet())
    run_tasks(wsn, tasks, adamw, steps=1)
    return wsn


def of(*tasks: int) -> State:
    return dict(finished(*tasks, seed=1).model.state_dict())


def but(state: State, part: str) -> State:
    return {name: value for name, value in state.items() if part not in name}


WRONG: dict[str, Callable[[State], State]] = {
    "fewer tasks": lambda s: of(0),
    "more tasks": lambda s: of(0, 1, 2),
    "other tasks": lambda s: of(7, 8),
    "the same tasks, trained otherwise": lambda s: of(0, 1),
    "one layer of another model": lambda s: {**s, **{n: v for n, v in of(0).items() if n.startswith("4.")}},
    "no head for a task": lambda s: but(s, "heads.i1."),
    "another head": lambda s: {**s, "7.heads.i0.bias": torch.randn(3)},
    "another frozen weight": lambda s: {**s, "4.weight": torch.randn(12, 64)},
    "another mask": lambda s: {**s, "4.weight_masks": 255 - s["4.weight_masks"]},
    "other rows": lambda s: {**s, "1.weight_tasks": s["1.weight_tasks"] + 1},
    "fewer rows": lambda s: {**s, "1.weight_tasks": s["1.weight_tasks"][:1]},
    "another shape": lambda s: {**s, "0.weight_score": torch.randn(4)},
    "no tensor": lambda s: {**s, "0.weight": 3},
    "another dtype": lambda s: {**s, "4.weight_masks": s["4.weight_masks"].long()},
}


@pytest.mark.parametrize("how", [{}, {"strict": False}, {"assign": True}], ids=str)
@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_a_wrong_state_changes_nothing(wrong: Callable[[State], State], how: dict[str, bool]) -> None:
    wsn = finished(0, 1)
    before = copy.deepcopy(wsn.state_dict())
    parameters = list(wsn.parameters())
    state = wrong(copy.deepcopy(dict(wsn.model.state_dict())))
    with pytest.raises(StateError, match=r"WSN with the tasks \[0, 1\]\. Load .* wsn\.load_state_dict\(state\)"):
        wsn.model.load_state_dict(state, **how)
    assert all(torch.equal(value, before[name]) for name, value in wsn.state_dict().items())
    assert all(a is b for a, b in zip(parameters, wsn.parameters(), strict=True))
    wsn.verify()


HOLDERS: dict[str, Callable[[WSN], WSN]] = {
    "itself": lambda wsn: wsn,
    "a copy": copy.deepcopy,
    "unpickled": lambda wsn: pickle.loads(pickle.dumps(wsn)),
}


@pytest.mark.parametrize("hold", HOLDERS.values(), ids=HOLDERS)
def test_a_copy_guards_its_own_model(hold: Callable[[WSN], WSN]) -> None:
    original = finished(0, 1)
    wsn = hold(original)
    if wsn is not original:
        run_tasks(original, [5], adamw, steps=1)  # the two are not the same any more
    wsn.model.load_state_dict(copy.deepcopy(wsn.model.state_dict()))
    with pytest.raises(StateError, match=r"the tasks \[0, 1\]"):
        wsn.model.load_state_dict(of(0))


def test_a_compiled_model_and_a_parent_of_the_model_are_watched() -> None:
    wsn = finished(0, 1)
    parent = nn.ModuleDict({"inner": wsn.model})
    wsn.model = torch.compile(wsn.model, backend="eager")  # type: ignore[assignment]
    for module, path in ((wsn.model, "_orig_mod."), (parent, "inner.")):
        with pytest.raises(StateError, match=r"wsn\.load_state_dict"):
            module.load_state_dict({f"{path}{name}": value for name, value in of(0).items()})
    wsn.verify()


def test_what_changes_no_finished_task_is_loaded() -> None:
    wsn = finished(0, 1)
    state = copy.deepcopy(dict(wsn.model.state_dict()))
    state["4.weight_score"] = torch.randn(12, 64)
    expected = logits(wsn, 0)
    wsn.model.load_state_dict(state)
    assert torch.equal(wsn.model[4].weight_score, state["4.weight_score"])
    assert torch.equal(logits(wsn, 0), expected)


def test_a_task_in_use_is_left_before_its_model_is_loaded() -> None:
    wsn = finished(0, 1)
    wsn.begin_task(2)
    state = copy.deepcopy(dict(wsn.model.state_dict()))
    with wsn.use_task(0):
        wsn.model.load_state_dict(state)
        assert wsn._view.task is None and wsn.model[-1].active == 2
    assert wsn.model[0].active_row is None and wsn.model[-1].active == 2
    assert all(torch.equal(value, state[name]) for name, value in wsn.model.state_dict().items())


def test_the_state_of_a_wsn_is_not_checked_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    from wsn_fast.continual import loading

    wsn, state = finished(0, 1), finished(0, 1, 2, seed=1).state_dict()
    checks: list[str] = []
    check = loading.check
    monkeypatch.setattr(loading, "check", lambda *args: checks.append(args[2]) or check(*args))
    wsn.load_state_dict(state)
    nn.ModuleDict({"around": wsn}).load_state_dict({f"around.{name}": value for name, value in state.items()})
    assert checks == ["", "around."] and wsn.tasks == [0, 1, 2]


def test_a_refused_state_of_the_wsn_leaves_its_model_watched() -> None:
    wsn = finished(0, 1)
    with pytest.raises(StateError):
        wsn.load_state_dict({"nope": torch.zeros(1)})
    with pytest.raises(StateError, match=r"wsn\.load_state_dict"):
        wsn.model.load_state_dict(of(0))


def test_a_model_without_a_wsn_or_with_another_one_is_free() -> None:
    wsn = finished(0, 1)
    model, wsn.model = wsn.model, copy.deepcopy(wsn.model)
    model.load_state_dict(of(0))
    lonely = finished(0, 1).model
    gc.collect()
    lonely.load_state_dict(of(0))
    assert WSN(lonely).tasks == [0]


def test_a_model_is_as_it_was_without_tasks() -> None:
    """A WSN without tasks has nothing to keep; the next call notices the tasks of the layers."""
    wsn = WSN(mlp())
    other = WSN(mlp())
    run_tasks(other, [0], adamw, steps=1)
    wsn.model.load_state_dict(other.model.state_dict())
    with pytest.raises(RuntimeError, match=r"make a new WSN\(model\)"):
        wsn.begin_task(1)
    assert WSN(wsn.model).tasks == [0]
