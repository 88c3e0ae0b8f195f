"""Calls that an error ends at any of their operations: what was begun is finished by the next call, and training goes
on as if there had been no error."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from wsn_fast import WSN, convert
from wsn_fast.optim import SubnetAdamW, SubnetSGD

X = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
Y = torch.randint(3, (8,), generator=torch.Generator().manual_seed(2))
KINDS: dict[str, Callable[[WSN], torch.optim.Optimizer]] = {
    "one pass": lambda wsn: SubnetAdamW(wsn, 0.02, one_pass=True),
    "standard": lambda wsn: SubnetAdamW(wsn, 0.02),
    "guarded": lambda wsn: wsn.guard(torch.optim.AdamW([p for p in wsn.parameters() if p.requires_grad], 0.02)),
}
each_kind = pytest.mark.parametrize("kind", KINDS)
ERRORS = pytest.mark.parametrize("error", [torch.OutOfMemoryError, KeyboardInterrupt])


class FailsAt(TorchDispatchMode):
    """Raises ``error`` in place of the operation number ``at``, counted from 0."""

    def __init__(self, at: int, error: type[BaseException]) -> None:
        super().__init__()
        self.at, self.error, self.count = at, error, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        if self.count == self.at + 1:
            raise self.error("injected")
        return func(*args, **(kwargs or {}))


def make_wsn() -> WSN:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 9), nn.BatchNorm1d(9), nn.Linear(9, 3))
    return WSN(convert(net, density=0.4, heads="2"), gates_ahead=True)


def step(wsn: WSN, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    F.cross_entropy(wsn(X), Y).backward()
    optimizer.step()


def begin(wsn: WSN, task: int) -> None:
    torch.manual_seed(task)  # for the new head
    wsn.begin_task(task)


def in_second_task(kind: str) -> tuple[WSN, torch.optim.Optimizer]:
    wsn = make_wsn()
    begin(wsn, 0)
    optimizer = KINDS[kind](wsn)
    step(wsn, optimizer)
    wsn.end_task()
    begin(wsn, 1)
    optimizer = KINDS[kind](wsn)
    step(wsn, optimizer)
    return wsn, optimizer


def assert_same(mine: WSN, theirs: WSN) -> None:
    others = theirs.state_dict()
    for name, value in mine.state_dict().items():
        assert torch.equal(value, others[name]), name


POINTS = 12
"""At how many operations a call fails, at most."""


def fail_everywhere(
    make: Callable[[], Any], call: Callable[[Any], object], then: Callable[[Any], WSN], error: type[BaseException]
) -> None:
    """If ``call`` fails at any of its operations, what ``then`` leads to is what it leads to without an error.

    ``then`` repeats the call if that is what a user would do.
    """
    made = make()
    with FailsAt(-1, error) as counter:
        call(made)
    expected, operations = then(made), counter.count
    assert operations > 0
    for at in range(0, operations, max(1, operations // POINTS)):
        made = make()
        with pytest.raises(error, match="injected"), FailsAt(at, error):
            call(made)
        assert_same(then(made), expected)


@each_kind
@ERRORS
@pytest.mark.parametrize("stay", [False, True], ids=["with", "call"])
def test_training_goes_on_after_an_evaluation_that_failed(kind: str, error: type[BaseException], stay: bool) -> None:
    def call(made: tuple[WSN, torch.optim.Optimizer]) -> None:
        wsn = made[0]
        if stay:
            wsn.use_task(0)
            wsn.use_task(None)
        else:
            with wsn.use_task(0):
                pass

    def then(made: tuple[WSN, torch.optim.Optimizer]) -> WSN:
        wsn, optimizer = made
        if stay:
            wsn.use_task(None)
        step(wsn, optimizer)
        return wsn

    fail_everywhere(lambda: in_second_task(kind), call, then, error)


@each_kind
def test_an_evaluation_that_never_began_leaves_the_task_in_training(kind: str) -> None:
    wsn, optimizer = in_second_task(kind)
    twin, other = in_second_task(kind)
    for at in range(20):
        try:
            with FailsAt(at, torch.OutOfMemoryError):
                wsn.use_task(0)
        except torch.OutOfMemoryError:
            assert all(layer.active_row is None for layer in wsn.subnet_layers().values())
            step(wsn, optimizer)
            step(twin, other)
            assert_same(wsn, twin)
        else:
            assert at > 0
            return


@ERRORS
def test_a_task_whose_beginning_failed_can_be_begun(error: type[BaseException]) -> None:
    def make() -> WSN:
        wsn = make_wsn()
        begin(wsn, 0)
        step(wsn, KINDS["standard"](wsn))
        wsn.end_task()
        return wsn

    def then(wsn: WSN) -> WSN:
        if wsn.current_task is None:
            begin(wsn, 1)
        step(wsn, KINDS["one pass"](wsn))
        wsn.end_task()
        wsn.verify()
        return wsn

    fail_everywhere(make, lambda wsn: begin(wsn, 1), then, error)


@each_kind
@ERRORS
def test_a_task_whose_end_failed_can_be_trained_on_and_ended(kind: str, error: type[BaseException]) -> None:
    def then(made: tuple[WSN, torch.optim.Optimizer]) -> WSN:
        wsn, _ = made
        if wsn.current_task is not None:
            wsn.end_task()
        wsn.verify()
        return wsn

    fail_everywhere(lambda: in_second_task(kind), lambda made: made[0].end_task(), then, error)


@each_kind
@pytest.mark.parametrize("call", ["trainable_state", "verify", "state_dict", "capacity", "task_stats", "forward_tasks"])
def test_a_question_that_failed_changes_nothing(kind: str, call: str) -> None:
    def ask(made: tuple[WSN, torch.optim.Optimizer]) -> object:
        wsn = made[0].eval()
        return wsn.forward_tasks(X, [0] * len(X)) if call == "forward_tasks" else getattr(wsn, call)()

    def then(made: tuple[WSN, torch.optim.Optimizer]) -> WSN:
        wsn, optimizer = made
        step(wsn.train(), optimizer)
        return wsn

    fail_everywhere(lambda: in_second_task(kind), ask, then, torch.OutOfMemoryError)


@each_kind
def test_an_optimizer_whose_making_failed_can_be_made(kind: str) -> None:
    def make() -> WSN:
        return in_second_task(kind)[0]

    def then(wsn: WSN) -> WSN:
        step(wsn, KINDS[kind](wsn))
        return wsn

    made = make()
    expected = then(copy.deepcopy(made))

    class Broken(Exception):
        pass

    def broken(*_: object) -> Tensor:
        raise Broken

    for layer in made.subnet_layers().values():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(layer.gate_state), "belongs_to", broken)
            with pytest.raises(Broken):
                KINDS[kind](made)
    assert_same(then(made), expected)


@pytest.mark.parametrize("width", [0, -2, 2.5, "3", True])
def test_a_wrong_width_is_refused_and_the_task_can_be_begun(width: Any) -> None:
    wsn = make_wsn()
    with pytest.raises(ValueError, match="out_features must be a positive int"):
        wsn.begin_task(0, out_features=width)
    wsn.begin_task(0, out_features=4)
    assert wsn(X).shape == (8, 4)


@each_kind
@pytest.mark.parametrize("redraw_free", [False, True])
@pytest.mark.parametrize("task", [0, 1])
def test_a_removal_that_failed_has_removed_nothing(kind: str, redraw_free: bool, task: int) -> None:
    def make() -> WSN:
        wsn, _ = in_second_task(kind)
        wsn.end_task()
        return wsn

    expected, made = make(), make()
    with FailsAt(-1, KeyboardInterrupt) as counter:
        made.remove_task(task, redraw_free=redraw_free)
    for at in range(0, counter.count, max(1, counter.count // POINTS)):
        made = make()
        with pytest.raises(KeyboardInterrupt, match="injected"), FailsAt(at, KeyboardInterrupt):
            made.remove_task(task, redraw_free=redraw_free)
        assert_same(made, expected)
        made.verify()
        made.remove_task(task, redraw_free=redraw_free)
        begin(made, task)
        step(made, KINDS[kind](made))
        made.end_task()
        made.verify()


@pytest.mark.parametrize("kind", ["one pass", "standard"])
@pytest.mark.parametrize("base", [SubnetAdamW, SubnetSGD])
def test_a_first_step_that_failed_can_be_made_again(kind: str, base: type[SubnetAdamW | SubnetSGD]) -> None:
    """No parameter keeps a half of the state that the optimizer makes for it in its first step."""

    def make() -> tuple[WSN, torch.optim.Optimizer]:
        wsn, _ = in_second_task(kind)
        optimizer = base(wsn, 0.02, one_pass=kind == "one pass", **({} if base is SubnetAdamW else {"momentum": 0.9}))
        optimizer.zero_grad()
        F.cross_entropy(wsn(X), Y).backward()
        return wsn, optimizer

    wsn, optimizer = make()
    with FailsAt(-1, KeyboardInterrupt) as counter:
        optimizer.step()
    for at in range(0, counter.count, max(1, counter.count // 40)):
        wsn, optimizer = make()
        with pytest.raises(KeyboardInterrupt, match="injected"), FailsAt(at, KeyboardInterrupt):
            optimizer.step()
        step(wsn, optimizer)
        wsn.end_task()
        wsn.verify()
