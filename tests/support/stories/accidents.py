"""Moves that an exception ends: anywhere in a step, in hooks, and at any operation of a call."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import foreign_optimizers as foreign
import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule
from small_models import batches
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from wsn_fast import WSN, to_dense
from wsn_fast.ops.same_bits import same_bits

from .models import OPTIMIZERS, Accident, FailsAt
from .story import Story, X

SOUND = [kind for kind in OPTIMIZERS if "cut" not in kind]
"""Optimizers whose step has no accident of its own."""
USES = ("use", "rows", "one pass", "verify", "probe", "dense", "copy", "state")


def fail(*_: object) -> None:
    raise Accident


def one_step(wsn: WSN, optimizer: Any) -> None:
    x, y = batches(5, 1)[0]
    optimizer.zero_grad()
    F.cross_entropy(wsn.train()(x), y).backward()
    optimizer.step()


def in_forward(wsn: WSN, optimizer: Any, data: st.DataObject) -> Any:
    called = [name for name, _ in wsn.model.named_modules() if "heads" not in name.split(".")]
    return wsn.model.get_submodule(data.draw(st.sampled_from(called), "module")).register_forward_hook(fail)


def in_backward(wsn: WSN, optimizer: Any, data: st.DataObject) -> Any:
    trained = [name for name, p in wsn.named_parameters() if p.requires_grad and p.grad is not None]
    return wsn.get_parameter(data.draw(st.sampled_from(trained), "parameter")).register_hook(fail)


def before_the_step(wsn: WSN, optimizer: Any, data: st.DataObject) -> Any:
    return getattr(optimizer, "inner", optimizer).register_step_pre_hook(fail)


def after_the_step(wsn: WSN, optimizer: Any, data: st.DataObject) -> Any:
    return getattr(optimizer, "inner", optimizer).register_step_post_hook(fail)


def of_all_optimizers(wsn: WSN, optimizer: Any, data: st.DataObject) -> Any:
    def write_and_fail(stepping: Any, *_: object) -> None:
        foreign.decay(foreign.every(stepping))
        raise Accident

    register = data.draw(st.sampled_from([register_optimizer_step_pre_hook, register_optimizer_step_post_hook]), "hook")
    return register(write_and_fail)


HOOKS = {
    "in forward": in_forward,
    "in backward": in_backward,
    "before the step": before_the_step,
    "after the step": after_the_step,
    "in a hook of all optimizers": of_all_optimizers,
}


class Accidents(Story):
    """Whatever an accident leaves behind, finished tasks stay what they are, and training goes on."""

    @contextmanager
    def accident(self, at: int) -> Iterator[None]:
        """An accident at the operation number ``at`` of the block, if it has so many."""
        try:
            with FailsAt(at):
                yield
        except Accident:
            pass

    @rule(data=st.data(), kind=st.sampled_from(SOUND), where=st.sampled_from(list(HOOKS)), gone=st.booleans())
    def an_accident_in_a_hook(self, data: st.DataObject, kind: str, where: str, gone: bool) -> None:
        self.in_a_task()
        self.wsn.use_task(None)
        self.optimizer = OPTIMIZERS[kind](self.wsn)
        one_step(self.wsn, self.optimizer)
        hook = HOOKS[where](self.wsn, self.optimizer, data)
        try:
            with pytest.raises(Accident):
                one_step(self.wsn, self.optimizer)
        finally:
            hook.remove()
        if gone:
            self.optimizer = None
        else:
            one_step(self.wsn, self.optimizer)

    @rule(kind=st.sampled_from(SOUND), at=st.integers(0, 120), gone=st.booleans())
    def an_accident_in_a_step(self, kind: str, at: int, gone: bool) -> None:
        """Go on with the same optimizer if it is one of ours. One of torch may be left with a half of its state."""
        self.in_a_task()
        self.wsn.use_task(None)
        self.optimizer = OPTIMIZERS[kind](self.wsn)
        with self.accident(at):
            one_step(self.wsn, self.optimizer)
        ours = "subnet" in kind or "one-pass" in kind
        self.train_some(1, kind, another=gone or not ours)

    @rule(kind=st.sampled_from(SOUND), at=st.integers(0, 400))
    def an_accident_while_a_task_ends(self, kind: str, at: int) -> None:
        """The task is in progress after it, or it has ended."""
        self.in_a_task()
        assert self.current is not None
        self.train_some(1, kind, another=True)
        optimizer, tasks = self.optimizer, self.wsn.tasks
        with self.accident(at):
            self.wsn.end_task()
        if self.wsn.tasks == tasks:
            assert self.wsn.current_task == self.current
            self.end_now()
        else:
            self.known[self.current] = self._logits(self.current)
            self.current = self.best = None
        self._go_on(optimizer)

    def _go_on(self, optimizer: Any) -> None:
        """Train in a further task, with the optimizer of the one before, which holds its head."""
        self.wsn.use_task(None)
        self.begin_now("after the accident")
        optimizer = self.wsn.guard(torch.optim.AdamW(self.wsn.parameters(), 0.01))
        one_step(self.wsn, optimizer)
        for param in self.wsn.parameters():
            param.grad = torch.ones_like(param) if param.grad is None else param.grad
        self.end_now()
        self.nothing_is_forgotten()
        self.remove_now("after the accident")

    @torch.no_grad()
    def _present(self) -> torch.Tensor:
        """What is computed now, if a task is in progress."""
        return torch.zeros(1) if self.current is None else self.wsn.eval()(X)

    @torch.no_grad()
    def _logits(self, task: Any) -> torch.Tensor:
        self.wsn.eval()
        with self.wsn.use_task(task):
            return self.wsn(X).clone()

    @precondition(lambda self: self.current is None)
    @rule(at=st.integers(0, 80))
    def an_accident_while_a_task_begins(self, at: int) -> None:
        with self.accident(at):
            self.wsn.begin_task("late")
        if self.wsn.current_task is None:
            self.wsn.begin_task("late")
        self.current, self.optimizer, self.best = "late", None, None
        self.train_some(1)
        self.end_now()
        self.remove_now("late")

    @precondition(lambda self: self.known)
    @rule(data=st.data(), call=st.sampled_from(USES), at=st.integers(0, 120))
    def an_accident_while_a_finished_task_is_used(self, data: st.DataObject, call: str, at: int) -> None:
        task = self.some(data)
        calls: dict[str, Callable[[], object]] = {
            "use": lambda: self._logits(task),
            "rows": lambda: self.wsn.forward_tasks(X, [task, *list(self.known)[:1] * (len(X) - 1)], one_pass=False),
            "one pass": lambda: self.wsn.forward_tasks(X, [task] * len(X)),
            "verify": self.wsn.verify,
            "probe": lambda: self.wsn.verify(probe=X),
            "dense": lambda: to_dense(self.wsn, task),
            "copy": lambda: copy.deepcopy(self.wsn),
            "state": lambda: self.wsn.load_trainable_state(self.wsn.trainable_state()),
        }
        self.wsn.use_task(None)
        live, present = self.wsn.trainable_state(), self._present()
        with self.accident(at):
            calls[call]()
        assert same_bits(self._present(), present), "the task in progress is what is computed"
        now = self.wsn.trainable_state()
        assert all(torch.equal(tensor, live[name]) for name, tensor in now.items()), "what is trained is the same"

    @precondition(lambda self: self.known and self.current is None)
    @rule(data=st.data(), at=st.integers(0, 150), redraw_free=st.booleans(), fresh=st.booleans())
    def an_accident_while_a_task_is_removed(self, data: st.DataObject, at: int, redraw_free: bool, fresh: bool) -> None:
        """Every task is there as it was, or the one is gone; then its state of before can be loaded."""
        good, task = self.good(), self.some(data)
        with self.accident(at):
            self.wsn.remove_task(task, redraw_free=redraw_free)
        if task not in self.wsn.tasks:
            del self.known[task]
            self.programs = []  # they read weights of the model
        self.nothing_is_forgotten()
        self.restore(good, fresh)
