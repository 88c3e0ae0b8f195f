"""Whatever is done with a model, in whatever order: what a finished task computes stays the same to the bit.

Hypothesis makes up the stories: tasks begin, train and end, are used, saved, loaded, copied and taken out as dense
models. After each step every finished task is run again, and ``verify`` looks at its tensors.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from small_models import CLASSES, batches, convnet, logits, mlp, train
from torch import Tensor, nn

from wsn_fast import WSN, FastSubnetLinear, TaskHeads, convert, to_dense
from wsn_fast.optim import SubnetAdamW, SubnetSGD
from wsn_fast.tasks import TaskId


def converted() -> nn.Module:
    body = nn.Sequential(nn.Flatten(), nn.Linear(36, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, CLASSES))
    return convert(body, 0.2, rule="value", heads="4")


def partly_dense() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 16), FastSubnetLinear(16, 12), nn.ReLU(), TaskHeads(12, CLASSES))


MODELS: dict[str, Callable[[], WSN]] = {
    "mlp": lambda: WSN(mlp()),
    "convnet": lambda: WSN(convnet(0.1, "value"), reinit_scores=True),
    "converted": lambda: WSN(converted()),
    "frozen": lambda: WSN(partly_dense(), frozen="1.*"),
}


class CutShort(torch.optim.AdamW):
    """Updates everything, frozen or not, and then raises as an interrupted step does."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step()
        raise KeyboardInterrupt


OPTIMIZERS: dict[str, Callable[[WSN], torch.optim.Optimizer]] = {
    "adamw": lambda wsn: wsn.guard(torch.optim.AdamW(wsn.parameters(), 0.01, weight_decay=0.1)),
    "nesterov": lambda wsn: wsn.guard(
        torch.optim.SGD(wsn.parameters(), 0.05, momentum=0.9, nesterov=True, weight_decay=0.01)
    ),
    "cut short": lambda wsn: wsn.guard(CutShort(wsn.parameters(), 0.01)),
    "subnet adamw": lambda wsn: SubnetAdamW(wsn, 0.01, weight_decay=0.1),
    "one-pass adamw": lambda wsn: SubnetAdamW(wsn, 0.01, weight_decay=0.1, one_pass=True),
    "one-pass sgd": lambda wsn: SubnetSGD(wsn, 0.05, momentum=0.9, weight_decay=0.01, one_pass=True),
}
COPIES: dict[str, Callable[[WSN], WSN]] = {
    "deep copy": copy.deepcopy,
    "pickle": lambda wsn: pickle.loads(pickle.dumps(wsn)),
}
TASKS: list[TaskId] = [0, 1, -7, "a", "0", "b.c d"]


def stored(wsn: WSN) -> bytes:
    buffer = io.BytesIO()
    torch.save(wsn.state_dict(), buffer)
    return buffer.getvalue()


class Promise(RuleBasedStateMachine):
    """A WSN and what is expected of it: the logits of each finished task, and the task in progress."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.known: dict[TaskId, Tensor] = {}
        self.current: TaskId | None = None
        self.optimizer: torch.optim.Optimizer | None = None
        self.steps = 0
        self.saved: list[tuple[bytes, dict[TaskId, Tensor], TaskId | None]] = []
        self.best: dict[str, Tensor] | None = None

    @initialize(model=st.sampled_from(list(MODELS)))
    def build(self, model: str) -> None:
        self.make = MODELS[model]
        self.wsn = self.make()

    def some(self, data: st.DataObject) -> TaskId:
        return data.draw(st.sampled_from(list(self.known)))

    # --- the life of a task ------------------------------------------------------------------------------------------
    @rule(task=st.sampled_from(TASKS), density=st.sampled_from([None, 0.03, 1.0]))
    def begin(self, task: TaskId, density: float | None) -> None:
        if task in self.known or self.current is not None:
            with pytest.raises((ValueError, RuntimeError), match=r"has been trained already|is in progress"):
                self.wsn.begin_task(task, density=density)
            return
        self.wsn.begin_task(task, density=density)
        self.current, self.optimizer, self.best = task, None, None

    @precondition(lambda self: self.current is not None)
    @rule(kind=st.sampled_from(list(OPTIMIZERS)), another=st.booleans())
    def train(self, kind: str, another: bool) -> None:
        self.wsn.use_task(None)
        if another or self.optimizer is None:
            self.optimizer = OPTIMIZERS[kind](self.wsn)
        self.steps += 1
        try:
            train(self.wsn, self.optimizer, batches(self.steps, 2))
        except KeyboardInterrupt:
            assert isinstance(self.optimizer, CutShort)

    @precondition(lambda self: self.current is not None and self.known)
    @rule(data=st.data(), kind=st.sampled_from(list(OPTIMIZERS)))
    def step_while_a_finished_task_is_in_use(self, data: st.DataObject, kind: str) -> None:
        optimizer = self.optimizer = OPTIMIZERS[kind](self.wsn)
        with self.wsn.use_task(self.some(data)), pytest.raises(RuntimeError, match="finished and in use"):
            optimizer.step()

    @precondition(lambda self: self.current is not None)
    @rule()
    def end(self) -> None:
        assert self.current is not None
        self.wsn.end_task()
        self.known[self.current] = logits(self.wsn, self.current)
        self.current = self.best = None

    @precondition(lambda self: self.current is None)
    @rule()
    def end_what_was_not_begun(self) -> None:
        with pytest.raises(RuntimeError, match="no task is in progress"):
            self.wsn.end_task()

    @precondition(lambda self: self.current is not None)
    @rule()
    def keep_the_best_epoch(self) -> None:
        self.best = self.wsn.trainable_state()

    @precondition(lambda self: self.best is not None)
    @rule()
    def restore_the_best_epoch(self) -> None:
        assert self.best is not None
        self.wsn.load_trainable_state(self.best)

    # --- use ---------------------------------------------------------------------------------------------------------
    @precondition(lambda self: self.known)
    @rule(data=st.data())
    def use(self, data: st.DataObject) -> None:
        self.wsn.use_task(self.some(data))

    @rule()
    def use_the_current_scores(self) -> None:
        self.wsn.use_task(None)

    @precondition(lambda self: self.known)
    @rule(data=st.data(), training=st.booleans())
    def use_in_blocks(self, data: st.DataObject, training: bool) -> None:
        self.wsn.train(training)
        with self.wsn.use_task(self.some(data)), self.wsn.use_head(self.some(data)):
            self.wsn.use_task(self.some(data))
            self.wsn(batches(7, 1)[0][0])

    @precondition(lambda self: self.known)
    @rule(data=st.data())
    def use_by_rows(self, data: st.DataObject) -> None:
        task, x = self.some(data), batches(99, 1)[0][0]
        assert torch.equal(self.wsn.eval().forward_tasks(x, [task] * len(x), one_pass=False), self.known[task])

    @precondition(lambda self: self.known)
    @rule(data=st.data())
    def take_out_as_a_dense_model(self, data: st.DataObject) -> None:
        task = self.some(data)
        with torch.no_grad():
            assert torch.equal(to_dense(self.wsn, task).eval()(batches(99, 1)[0][0]), self.known[task])

    # --- saving, loading, copying ------------------------------------------------------------------------------------
    @rule()
    def save(self) -> None:
        self.saved = [*self.saved[-2:], (stored(self.wsn), dict(self.known), self.current)]

    @precondition(lambda self: self.saved)
    @rule(data=st.data(), fresh=st.booleans())
    def load(self, data: st.DataObject, fresh: bool) -> None:
        saved, known, self.current = self.saved[data.draw(st.integers(0, len(self.saved) - 1))]
        self.known, self.optimizer, self.best = dict(known), None, None
        if fresh:
            self.wsn = self.make()
        state = torch.load(io.BytesIO(saved), weights_only=True)
        # TaskHeads takes a state without any head for one that leaves the heads alone.
        self.wsn.load_state_dict(state, strict=fresh or any(".heads." in name for name in state))

    @rule(kind=st.sampled_from(list(COPIES)))
    def copy(self, kind: str) -> None:
        original, self.wsn = self.wsn, COPIES[kind](self.wsn)
        self.optimizer = None
        with torch.no_grad():
            for tensor in original.state_dict().values():
                tensor.zero_()  # which is none of the copy's business

    @precondition(lambda self: self.current is None)
    @rule()
    def wrap_the_model_anew(self) -> None:
        owners = {"frozen": "1.*"} if self.make is MODELS["frozen"] else {}
        self.wsn = WSN(self.wsn.model, reinit_scores=self.wsn.reinit_scores, **owners)

    # --- the promise -------------------------------------------------------------------------------------------------
    @invariant()
    def nothing_is_forgotten(self) -> None:
        if not hasattr(self, "wsn"):
            return
        assert (self.wsn.tasks, self.wsn.current_task) == ([*self.known], self.current)
        training, live = self.wsn.training, self.wsn.trainable_state()
        for task, before in self.known.items():
            assert torch.equal(logits(self.wsn, task), before), f"task {task!r} has changed"
        assert self.wsn.verify().tasks == [*self.known]
        assert all(torch.equal(tensor, live[name]) for name, tensor in self.wsn.trainable_state().items()), "by looking"
        self.wsn.train(training)


Promise.TestCase.settings = settings(max_examples=150, stateful_step_count=40)
test_the_promise_in_any_order = Promise.TestCase
