"""The same updates twice, with a plan of a backend and without one, and what may change between two steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from elementwise import assert_same_bits
from gated_updates import ADAMW, Problem, make_problem, make_state, moved, operands_of, run_step
from torch import Tensor

from wsn_fast.backends import torch as portable
from wsn_fast.backends.updates import WINDOW, AdamWState, Batch, Gradient, Next, Plan, Update

SIZES = (70, 9)


def make_problems(device: torch.device, sizes: Sequence[int] = SIZES, following: bool = False) -> list[Problem]:
    problems = []
    for n in sizes:
        problem = moved(make_problem(n), device)
        update = problem.update._replace(state=moved(make_state(problem.update, ADAMW), device))
        if following:
            window = torch.zeros(WINDOW, dtype=torch.int64, device=device)
            tau = torch.zeros((), device=device)
            update = update._replace(next=Next(torch.empty(n, device=device), tau, n // 2, window))
        problems.append(problem._replace(update=update))
    return problems


def written_by(update: Update) -> list[Tensor]:
    """What a step writes to, but for the window, which has no effect on results."""
    following = update.next
    return [*operands_of(update), *(() if following is None else (following.masked, following.tau))]


class Twins:
    """The same updates twice, on one backend: with a plan, and without."""

    def __init__(self, backend: Any, problems: Sequence[Problem]) -> None:
        self.backend = backend
        self.mine = [problem.update for problem in problems]
        self.twins = [moved(update, update.weight.device) for update in self.mine]
        self.plan: Plan = {}
        self.kept: list[object] = []  # so that no tensor gets the address of an earlier one

    def step(
        self,
        gradients: Sequence[Gradient],
        settings: Any = ADAMW,
        scale: Tensor | None = None,
        part: slice = slice(None),
    ) -> None:
        """A step of all tensors as one batch, or of a part of them."""
        mine = self.mine if part == slice(None) else self.mine[part]
        run_step(self.backend, Batch(mine, gradients, scale, self.plan), settings)
        run_step(self.backend, Batch(self.twins[part], gradients, scale), settings)
        self.kept += gradients
        self.assert_same()

    def squares(self, gradients: Sequence[Gradient], part: slice) -> None:
        with_plan = self.backend.gradient_squares(Batch(self.mine[part], gradients, None, self.plan))
        assert torch.equal(with_plan, self.backend.gradient_squares(Batch(self.twins[part], gradients)))

    def assert_same(self) -> None:
        for i, (update, twin) in enumerate(zip(self.mine, self.twins, strict=True)):
            for k, (a, b) in enumerate(zip(written_by(update), written_by(twin), strict=True)):
                assert_same_bits(a, b, f"operand {k} of tensor {i}")

    def replace(self, i: int, change: Callable[[Update], Update]) -> None:
        """Change an update. The sequence of updates becomes another one, as the caller of a plan has to see to."""
        self.kept.append(self.mine[i])
        self.mine = [change(update) if k == i else update for k, update in enumerate(self.mine)]
        self.twins = [change(update) if k == i else update for k, update in enumerate(self.twins)]


def fresh(updates: Sequence[Update], grad: torch.dtype = torch.float32, given: bool = False) -> list[Gradient]:
    gradients = []
    for update in updates:
        g, ds = (torch.randn_like(update.weight) for _ in range(2))
        tau = None if given else portable.threshold(update.scores.cpu(), len(g) // 2, "magnitude").to(g.device)
        gradients.append(Gradient(g if given else g.to(grad), ds if given else None, tau))
    return gradients


# Gradients of several dtypes and forms.
GRADIENTS: dict[str, Callable[[Sequence[Update]], list[Gradient]]] = {
    "float32": fresh,
    "bfloat16": lambda updates: fresh(updates, torch.bfloat16),
    "one in float16": lambda updates: [*fresh(updates[:1], torch.float16), *fresh(updates[1:])],
    "dW and dS": lambda updates: fresh(updates, given=True),
    "one with dW and dS": lambda updates: [*fresh(updates[:1]), *fresh(updates[1:], given=True)],
}


def another_state(update: Update) -> Update:
    assert isinstance(update.state, AdamWState)
    return update._replace(state=AdamWState(*(tensor.clone().mul_(0.5) for tensor in update.state)))


def another_count(update: Update) -> Update:
    assert isinstance(update.state, AdamWState)
    return update._replace(state=update.state._replace(scores_step=torch.full_like(update.state.scores_step, 9.0)))


def another_next(name: str, dtype: torch.dtype = torch.float32) -> Callable[[Update], Update]:
    def change(update: Update) -> Update:
        following, weight = update.next, update.weight
        assert following is not None
        made = {
            "rank": len(weight) // 3,
            "masked": torch.empty_like(weight, dtype=dtype),
            "tau": torch.zeros_like(following.tau),
            "window": torch.zeros_like(following.window),
        }
        return update._replace(next=following._replace(**{name: made[name]}))

    return change


# What may become of an update between two steps.
CHANGES: dict[str, Callable[[Update], Update]] = {
    "another weight": lambda u: u._replace(weight=u.weight.clone().neg_()),
    "other scores": lambda u: u._replace(scores=u.scores.clone().neg_()),
    "another union": lambda u: u._replace(union=~u.union),  # type: ignore[operator]
    "no union": lambda u: u._replace(union=None),
    "another rule": lambda u: u._replace(rule="value"),
    "another state": another_state,
    "another count": another_count,
}
# The same for an update with a next gate.
CHANGES_OF_NEXT: dict[str, Callable[[Update], Update]] = {
    "another rank": another_next("rank"),
    "another masked weight": another_next("masked"),
    "a masked weight in half precision": another_next("masked", torch.float16),
    "another threshold": another_next("tau"),
    "another window": another_next("window"),
    "no next": lambda u: u._replace(next=None),
}


def assert_a_change_is_noticed(backend: Any, change: str, device: torch.device) -> None:
    """After a change of one of two updates, steps are those of the new ones, and nothing of the old one is written."""
    twins = Twins(backend, make_problems(device, following=change in CHANGES_OF_NEXT))
    twins.step(fresh(twins.mine))
    old = twins.mine[1]
    twins.replace(1, (CHANGES | CHANGES_OF_NEXT)[change])
    gone = [tensor for tensor in written_by(old) if all(tensor is not t for t in written_by(twins.mine[1]))]
    before = [tensor.clone() for tensor in gone]
    for _ in range(2):
        twins.step(fresh(twins.mine))
    for i, (now, then) in enumerate(zip(gone, before, strict=True)):
        assert_same_bits(now, then, f"operand {i} of the update that is gone")
