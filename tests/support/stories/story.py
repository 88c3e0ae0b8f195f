"""What all moves share: the model, what is expected of it, and the promise, which is looked at after every move."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant
from small_models import batches, logits, train
from torch import Tensor

from wsn_fast import WSN, ForgottenError
from wsn_fast.nn.task_ids import TaskId

from .models import MODELS, OPTIMIZERS, TASKS, Accident

X = batches(99, 1)[0][0]
"""The input of :func:`small_models.logits`."""


class Good(NamedTuple):
    """A state of the model, with what it is expected to compute: the logits of finished tasks, the task in progress."""

    state: bytes
    known: dict[TaskId, Tensor]
    current: TaskId | None

    @property
    def tensors(self) -> dict[str, Any]:
        """The state, as ``load_state_dict`` takes it."""
        return torch.load(io.BytesIO(self.state), weights_only=True)


FINDERS = ("verify", "the end of the task", "training, and the end of the task", "a copy", "a saved state")
"""The calls that may have to find out that finished tasks have changed."""


class Story(RuleBasedStateMachine):
    """A WSN and what is expected of it: the logits of each finished task, and the task in progress."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.known: dict[TaskId, Tensor] = {}
        self.current: TaskId | None = None
        self.optimizer: torch.optim.Optimizer | None = None
        self.steps = 0
        self.saved: list[Good] = []
        self.best: dict[str, Tensor] | None = None
        self.programs: list[tuple[Callable[[Tensor], Tensor], Tensor]] = []  # exported, with what they computed

    @initialize(
        model=st.sampled_from(list(MODELS)),
        keep_masked=st.sampled_from([True, False, 1, 2]),
        gates_ahead=st.booleans(),
        tasks=st.sampled_from([2, 1, 0]),
    )
    def build(self, model: str, keep_masked: bool | int, gates_ahead: bool, tasks: int) -> None:
        self.make_model, self.owners = MODELS[model]
        self.settings = {"keep_masked": keep_masked, "gates_ahead": gates_ahead}
        self.wsn = self.make()
        for task in ("first", "second")[:tasks]:
            self.begin_now(task)
            self.train_some(1)
            self.end_now()

    # --- what moves are made of ---------------------------------------------------------------------------------------
    def make(self) -> WSN:
        """A WSN without tasks, as this story began with one."""
        return WSN(self.make_model(), **self.owners, **self.settings)

    def some(self, data: st.DataObject) -> TaskId:
        """One of the finished tasks."""
        return data.draw(st.sampled_from(list(self.known)), "task")

    def in_a_task(self) -> None:
        """Begin a task if none is in progress. If many are finished, the first ones go."""
        if self.current is None:
            while len(self.known) > 4:
                self.remove_now(next(iter(self.known)))
            self.begin_now(next(task for task in TASKS if task not in self.known))

    def begin_now(self, task: TaskId, **options: Any) -> None:
        self.wsn.begin_task(task, **options)
        self.current, self.optimizer, self.best = task, None, None

    def train_some(self, count: int, kind: str = "adamw", another: bool = False) -> None:
        """Some steps of the optimizer at hand, or of a new one of this kind. An interrupt of its own may end them."""
        self.wsn.use_task(None)
        if another or self.optimizer is None:
            self.optimizer = OPTIMIZERS[kind](self.wsn)
        self.steps += 1
        try:
            train(self.wsn, self.optimizer, batches(self.steps, count))
        except Accident:
            assert "Cut" in type(self.optimizer).__name__

    def end_now(self, **options: Any) -> None:
        assert self.current is not None
        self.wsn.end_task(**options)
        self.known[self.current] = logits(self.wsn, self.current)
        self.current = self.best = None

    def remove_now(self, task: TaskId, redraw_free: bool = False) -> None:
        self.wsn.remove_task(task, redraw_free=redraw_free)
        del self.known[task]
        self.optimizer, self.programs = None, []  # programs read weights of the model

    def good(self) -> Good:
        """The present state. It is right, because the promise was looked at after the last move."""
        buffer = io.BytesIO()
        torch.save(self.wsn.state_dict(), buffer)
        return Good(buffer.getvalue(), dict(self.known), self.current)

    def restore(self, good: Good, fresh: bool = False) -> None:
        """Go on from a state, in the same model or in a fresh one."""
        self.known, self.current = dict(good.known), good.current
        self.optimizer = self.best = None
        self.programs = []
        if fresh:
            self.wsn = self.make()
        # TaskHeads takes a state without any head for one that leaves the heads alone.
        self.wsn.load_state_dict(good.tensors, strict=fresh or any(".heads." in name for name in good.tensors))

    # --- hazards ------------------------------------------------------------------------------------------------------
    def must_be_found(
        self,
        good: Good,
        names: Iterable[str],
        finder: str,
        fresh: bool = False,
        in_time: bool = True,
        used: TaskId | None = None,
    ) -> None:
        """Finished tasks may have changed. Either ``finder`` raises an error that has one of ``names``, and the story
        goes on from ``good``; or all has been undone, which the promise shows. What the end of a task does not look at
        (not ``in_time``) is found by ``verify``, which also looks at what is shown of the task in use (``used``)."""
        found = False
        try:
            self._find(finder)
            if used is not None and finder == "verify":
                with torch.no_grad():
                    assert torch.equal(self.wsn.eval()(X), self.known[used]), "something else is shown"
            found = in_time and finder.endswith(("verify", "the end of the task"))
            self.wsn.verify()
        except ForgottenError as error:
            assert not found, f"{finder} found nothing, and verify finds {error}"
            assert any(name in str(error) for name in names), f"none of {list(names)} is in: {error}"
            self.restore(good, fresh)

    @staticmethod
    def shown(name: str) -> str:
        """How errors name a tensor, without what they add: ``1.weight`` for ``1.weight_union``."""
        path, _, attribute = name.rpartition(".")
        for end in ("_union", "_view", "_masks", "_tasks", "_live", "_score"):
            attribute = attribute.removesuffix(end)
        return f"{path.partition('.heads.')[0]}.{attribute}"

    def _find(self, finder: str) -> None:
        if finder == "verify":
            self.wsn.verify()
        elif finder == "a copy":
            twin = self.make()
            twin.load_state_dict(self.wsn.state_dict())
            twin.verify()
        elif finder == "a saved state":
            self.restore(self.good())
        elif finder.endswith("the end of the task"):
            self.in_a_task()
            if finder.startswith("training"):
                self.train_some(1, "writes after the step", another=True)
            self.end_now()

    # --- the promise --------------------------------------------------------------------------------------------------
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
        for program, before in self.programs:
            assert torch.equal(program(X), before), "an exported program has changed"
        self.wsn.train(training)
