"""Moves that save, load and copy; and states that must not be loaded."""

from __future__ import annotations

import contextlib
import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule
from small_models import batches, logits, train

from wsn_fast import WSN, StateError

from .models import MODELS, OPTIMIZERS, Accident
from .story import Good, Story

State = dict[str, Any]
COPIES: dict[str, Callable[[WSN], WSN]] = {
    "deep copy": copy.deepcopy,
    "pickle": lambda wsn: pickle.loads(pickle.dumps(wsn)),
}


def without(state: State, part: str) -> State:
    return {name: value for name, value in state.items() if part not in name}


def shorter(state: State, part: str) -> State:
    """Without the last row of each tensor whose name has ``part``."""
    return {name: value[:-1] if part in name else value for name, value in state.items()}


def renamed(state: State) -> State:
    """The first layer with a mask has another name."""
    name = next(name for name in state if name.endswith("weight_masks")).removesuffix("weight_masks")
    return {key.replace(name, "model.other.") if key.startswith(name) else key: value for key, value in state.items()}


WRONG: dict[str, Callable[[State], State]] = {
    "no register": lambda state: {name: value for name, value in state.items() if name != "_extra_state"},
    "no extra states": lambda state: without(state, "_extra_state"),
    "no masks": lambda state: without(state, "weight_masks"),
    "too few masks": lambda state: shorter(state, "weight_masks"),
    "too few rows of biases": lambda state: shorter(state, "bias_masks"),
    "too few values": lambda state: shorter(state, "_tasks"),
    "no weights": lambda state: {n: v for n, v in state.items() if not n.endswith(".weight") or ".heads." in n},
    "renamed layers": renamed,
    "fewer heads": lambda state: {n: v for n, v in state.items() if ".heads." not in n} | {"model.none": torch.ones(1)},
    "other dtypes": lambda state: {
        n: v.bfloat16() if v.is_floating_point() and n.endswith(".weight") else v for n, v in state.items()
    },
}


class States(Story):
    """States are saved, loaded and refused, and models are copied."""

    @rule()
    def save(self) -> None:
        self.saved = [*self.saved[-2:], self.good()]

    def some_state(self, data: st.DataObject) -> Good:
        return self.saved[data.draw(st.integers(0, len(self.saved) - 1), "state")]

    @precondition(lambda self: self.saved)
    @rule(data=st.data(), fresh=st.booleans())
    def load(self, data: st.DataObject, fresh: bool) -> None:
        self.restore(self.some_state(data), fresh)

    @rule(kind=st.sampled_from(list(OPTIMIZERS)), strict=st.booleans())
    def load_the_state_of_another_run(self, kind: str, strict: bool) -> None:
        """The optimizer may have left copies of values that the model has no more."""
        self.in_a_task()
        self.train_some(1, kind, another=True)
        other = self.make()
        other.begin_task("elsewhere")
        train(other, other.guard(torch.optim.SGD(other.parameters(), 0.1)), batches(self.steps, 1))
        other.end_task()
        self.wsn.load_state_dict(other.state_dict(), strict=strict)
        self.known, self.current = {"elsewhere": logits(other, "elsewhere")}, None
        self.optimizer, self.best, self.programs = None, None, []

    @rule(kind=st.sampled_from(list(COPIES)))
    def copy(self, kind: str) -> None:
        original, self.wsn = self.wsn, COPIES[kind](self.wsn)
        self.optimizer, self.programs = None, []
        with torch.no_grad():
            for tensor in original.state_dict().values():
                tensor.zero_()  # which is none of the copy's business

    @precondition(lambda self: self.saved and self.known)
    @rule(data=st.data(), damage=st.sampled_from(list(WRONG)), strict=st.booleans())
    def load_a_wrong_state(self, data: st.DataObject, damage: str, strict: bool) -> None:
        good = self.some_state(data)
        state = WRONG[damage](good.tensors)
        if state.keys() == good.tensors.keys() and all(
            value.dtype == good.tensors[name].dtype and torch.equal(value, good.tensors[name])
            for name, value in state.items()
        ):
            return  # this state has nothing that could be missing
        before = self.good()
        try:
            self.wsn.load_state_dict(state, strict=strict)
        except StateError:
            now = self.good().tensors
            assert all(torch.equal(value, now[name]) for name, value in before.tensors.items()), "nothing was loaded"
            self.optimizer = self.optimizer if before.current == self.current else None
        else:  # it does not lack anything that finished tasks need
            assert not strict
            register = "_extra_state" in state
            self.known, self.current = (good.known, good.current) if register else (before.known, before.current)
            self.known, self.optimizer, self.best, self.programs = dict(self.known), None, None, []

    @precondition(lambda self: self.known)
    @rule(model=st.sampled_from(list(MODELS)), strict=st.booleans())
    def load_the_state_of_another_architecture(self, model: str, strict: bool) -> None:
        make, owners = MODELS[model]
        if (make, owners) == (self.make_model, self.owners):
            return
        other = WSN(make(), **owners)
        other.begin_task("elsewhere")
        other.end_task()
        before = self.good()
        with pytest.raises(StateError):
            self.wsn.load_state_dict(other.state_dict(), strict=strict)
        now = self.good().tensors
        assert all(torch.equal(value, now[name]) for name, value in before.tensors.items())

    @precondition(lambda self: self.saved)
    @rule(data=st.data(), fresh=st.booleans())
    def an_accident_in_a_load(self, data: st.DataObject, fresh: bool) -> None:
        """A hook raises when a part of a state has been loaded. ``verify`` says so, unless it made no difference."""
        before, good = self.good(), self.some_state(data)
        names = [name for name, _ in self.wsn.model.named_modules() if ".heads." not in name]
        module = self.wsn.model.get_submodule(data.draw(st.sampled_from(names), "module"))

        def fail(*_: object) -> None:
            raise Accident

        hook = module.register_load_state_dict_pre_hook(fail)
        with pytest.raises(Accident):
            self.wsn.load_state_dict(good.tensors, strict=False)
        hook.remove()
        with contextlib.suppress(RuntimeError, ValueError):
            for task in self.wsn.verify().tasks:
                assert any(
                    torch.equal(logits(self.wsn, task), of.known[task]) for of in (before, good) if task in of.known
                )
        self.restore(before, fresh)
