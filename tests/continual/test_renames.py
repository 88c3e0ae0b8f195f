"""Modules with other names: the error says renamed, and not forgotten, and how to map the names."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_models import CLASSES, convnet, logits, mlp, run_tasks
from torch import Tensor, nn

from wsn_fast import WSN, FastSubnetLinear, ForgottenError, RenamedError, StateError, TaskHeads, rename_state
from wsn_fast.continual import renames


def adamw(params: object) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, 0.01)  # type: ignore[arg-type]


def finished(model: nn.Module) -> WSN:
    wsn = WSN(model)
    run_tasks(wsn, [0, 1], adamw, steps=2)
    return wsn


class Wrapped(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.backbone = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.backbone(x)


class Named(nn.Module):
    def __init__(self, first: str, second: str) -> None:
        super().__init__()
        self.names = (first, second)
        self.add_module(first, FastSubnetLinear(36, 36))
        self.add_module(second, FastSubnetLinear(36, 36))
        self.classifier = TaskHeads(36, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        for name in self.names:
            x = torch.relu(getattr(self, name)(x))
        return self.classifier(x)


def wrap(wsn: WSN) -> None:
    wsn.model = Wrapped(wsn.model)


def wrap_one(wsn: WSN) -> None:
    wsn.model[4] = Wrapped(wsn.model[4])


def move(wsn: WSN) -> None:
    wsn.model = nn.ModuleDict({"features": wsn.model[:6], "rest": wsn.model[6:]})
    wsn.model.forward = lambda x: wsn.model["rest"](wsn.model["features"](x))


CHANGES: dict[str, tuple[Callable[[WSN], None], dict[str, str]]] = {
    "the model": (wrap, {"": "backbone"}),
    "one layer": (wrap_one, {"4": "4.backbone"}),
}


@pytest.mark.parametrize(("change", "names"), CHANGES.values(), ids=CHANGES)
def test_a_module_wrapped_in_place_is_renamed_and_not_forgotten(
    change: Callable[[WSN], None], names: dict[str, str]
) -> None:
    wsn = finished(convnet())
    before = logits(wsn, 0)
    change(wsn)
    with pytest.raises(RenamedError, match=re.escape(f"wsn.rename({names!r})")) as caught:
        wsn.verify()
    assert caught.value.names == names and not isinstance(caught.value, ForgottenError)
    wsn.rename(names)
    assert wsn.verify().tasks == [0, 1]
    assert torch.equal(logits(wsn, 0), before)
    run_tasks(wsn, [2], adamw)
    assert torch.equal(logits(wsn, 0), before)


def test_a_module_of_another_name_is_renamed() -> None:
    wsn = finished(Named("one", "two"))
    wsn.model.first, wsn.model.second = wsn.model.one, wsn.model.two
    del wsn.model.one, wsn.model.two
    wsn.model.names = ("first", "second")
    with pytest.raises(RenamedError) as caught:
        wsn.verify()
    assert caught.value.names == {"one": "first", "two": "second"}
    wsn.rename(caught.value.names)
    wsn.verify()


@pytest.mark.parametrize("when", ["begin", "end"])
def test_a_task_that_begins_or_ends_says_renamed_too(when: str) -> None:
    wsn = finished(convnet())
    if when == "end":
        wsn.begin_task("next")
    wrap(wsn)
    with pytest.raises(RenamedError):
        wsn.begin_task("next") if when == "begin" else wsn.end_task()
    wsn.rename({"": "backbone"})
    wsn.begin_task("next") if when == "begin" else wsn.end_task()
    wsn.verify()


def test_renamed_and_changed_is_forgotten() -> None:
    wsn = finished(convnet())
    wrap(wsn)
    with torch.no_grad():
        wsn.model.backbone[0].weight.add_(1)
    with pytest.raises(ForgottenError, match=r"backbone\.0\.weight"):
        wsn.verify()


@pytest.mark.parametrize("row", [0, 1])
def test_renamed_and_changed_in_one_task_is_forgotten(row: int) -> None:
    wsn = finished(convnet())
    wrap(wsn)
    with torch.no_grad():
        wsn.model.backbone[1].running_mean_tasks[row] += 1
    with pytest.raises(ForgottenError, match=r"backbone\.1\.running_mean"):
        wsn.verify()


def test_a_removed_layer_is_forgotten() -> None:
    wsn = finished(mlp())
    wsn.model[3] = nn.Identity()
    with pytest.raises(ForgottenError, match=r"3\.weight"):
        wsn.verify()


def test_a_model_wrapped_in_place_loads_what_fits_it_now() -> None:
    state = copy.deepcopy(finished(convnet()).state_dict())
    for wsn in (WSN(convnet()), finished(convnet())):
        wrap(wsn)
        with pytest.raises(StateError, match="rename_state"):
            wsn.load_state_dict(state)
        wsn.load_state_dict(rename_state(state, {"": "backbone"}))
        assert wsn.verify().tasks == [0, 1]


@pytest.mark.parametrize("names", [{"0": "x"}, {"": "y"}, {"4.weight": "4.kernel"}])
def test_wrong_names_change_nothing(names: dict[str, str]) -> None:
    wsn = finished(convnet())
    with pytest.raises((ForgottenError, RenamedError)):
        wsn.rename(names)
    wsn.verify()


@pytest.mark.parametrize("names", [None, "0", {"0": 1}, {1: "0"}])
def test_names_are_a_mapping_of_strings(names: Any) -> None:
    with pytest.raises(TypeError, match="names must be a mapping"):
        finished(mlp()).rename(names)


# --- states ----------------------------------------------------------------------------------------------------------
def wrapped_model() -> nn.Module:
    return Wrapped(convnet())


def one_wrapped() -> nn.Module:
    model = convnet()
    model[4] = Wrapped(model[4])
    return model


STATES: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module], dict[str, str]]] = {
    "wrapped": (convnet, wrapped_model, {"": "backbone"}),
    "unwrapped": (wrapped_model, convnet, {"backbone": ""}),
    "one layer wrapped": (convnet, one_wrapped, {"4": "4.backbone"}),
    "renamed": (lambda: Named("one", "two"), lambda: Named("a", "b"), {"one": "a", "two": "b"}),
    "exchanged names": (lambda: Named("one", "two"), lambda: Named("two", "three"), {"one": "two", "two": "three"}),
}


@pytest.mark.parametrize(("before", "after", "names"), STATES.values(), ids=STATES)
def test_a_state_with_other_names_is_refused_with_the_names_that_load_it(
    before: Callable[[], nn.Module], after: Callable[[], nn.Module], names: dict[str, str]
) -> None:
    wsn, other = finished(before()), WSN(after())
    state = copy.deepcopy(wsn.state_dict())
    if names != {"one": "two", "two": "three"}:  # there a name means another layer
        with pytest.raises(StateError, match=re.escape(f"wsn_fast.rename_state(state, {names!r})")):
            other.load_state_dict(state)
    with pytest.raises(StateError):
        other.load_state_dict(state, strict=False)
    assert other.tasks == []
    other.load_state_dict(rename_state(state, names))
    assert other.verify().tasks == [0, 1]
    assert torch.equal(logits(other, 0), logits(wsn, 0))
    assert state.keys() == wsn.state_dict().keys()


def test_a_state_inside_another_is_renamed_with_its_prefix() -> None:
    wsn = finished(convnet())
    state = {f"net.wsn.{name}": value for name, value in wsn.state_dict().items()} | {"net.other": torch.zeros(1)}
    found = rename_state(state, {"": "backbone"}, prefix="net.wsn.")
    assert "net.wsn.model.backbone.0.weight" in found and "net.other" in found
    other = WSN(wrapped_model())
    other.load_state_dict({k.removeprefix("net.wsn."): v for k, v in found.items() if k != "net.other"})
    other.verify()


def test_a_task_in_progress_keeps_its_place() -> None:
    wsn = finished(convnet())
    wsn.begin_task("next")
    other = WSN(wrapped_model())
    other.load_state_dict(rename_state(wsn.state_dict(), {"": "backbone"}))
    assert other.current_task == "next"


@pytest.mark.parametrize(
    ("names", "prefix", "match"),
    [({"0": "4"}, "", "two tensors would be called"), ({}, "wsn.", "has no 'wsn._extra_state'")],
)
def test_names_that_cannot_be_are_refused(names: dict[str, str], prefix: str, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        rename_state(finished(mlp() if prefix else Named("0", "4")).state_dict(), names, prefix=prefix)


# --- names -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "names", "expected"),
    [
        ("0.weight", {"": "a.b"}, "a.b.0.weight"),
        ("a.b.0.weight", {"a.b": ""}, "0.weight"),
        ("ab.weight", {"a": "x"}, "ab.weight"),
        ("a.b.weight", {"a": "x", "a.b": "y"}, "y.weight"),
        ("a.weight (mask)", {"a": "b"}, "b.weight (mask)"),
    ],
)
def test_the_longest_path_counts(name: str, names: dict[str, str], expected: str) -> None:
    assert renames.renamed(name, names) == expected


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ({"a.weight": 1}, {"b.weight": 1}, {"a": "b"}),
        ({"0.weight": 1, "1.weight": 1}, {"x.0.weight": 1, "x.1.weight": 1}, {"": "x"}),
        ({"a.weight": 1}, {"b.weight": 2}, None),
        ({"a.weight": 1}, {"b.bias": 1}, None),
        ({"a.weight": 1}, {"b.weight": 1, "c.weight": 1}, None),
        ({}, {}, None),
        ({"a.b.weight": 1, "a.b.c.weight": 2}, {"z.b.weight": 1, "q.c.weight": 2}, None),
    ],
)
def test_renames_are_found_by_what_is_kept(
    old: dict[str, int], new: dict[str, int], expected: dict[str, str] | None
) -> None:
    assert renames.find(old, new) == expected
