"""Whatever writes to frozen values, a guarded optimizer keeps them: nested steps, parameters without a gradient,
wrappers, hooks, writes between the steps."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import foreign_optimizers as foreign
import pytest
import torch
import torch.nn.functional as F
from small_models import batches, convnet, logits, mlp
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from wsn_fast import WSN
from wsn_fast.backends import ENVIRONMENT_VARIABLE, forget
from wsn_fast.optim import SubnetAdamW, SubnetSGD

Params = list[nn.Parameter]


def adamw(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, 0.01)


def steps(wsn: WSN, optimizer: Any, task: int, count: int = 4) -> None:
    wsn.train()
    for x, y in batches(task, count):

        def closure(x: torch.Tensor = x, y: torch.Tensor = y) -> torch.Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(wsn(x), y)
            loss.backward()
            return loss

        if isinstance(optimizer, foreign.SAM):
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()


def gated_weight(wsn: WSN) -> torch.Tensor:
    return next(gate.param for _, gate in wsn.gated())


def check_kept(
    make: Callable[[WSN], Any], model: Callable[[], nn.Module] = mlp, step: Callable[..., None] = steps
) -> None:
    """Train three tasks, each with a new optimizer that holds all parameters, finished heads included."""
    wsn, known = WSN(model()), {}
    for task in range(3):
        wsn.begin_task(task)
        optimizer, before = make(wsn), gated_weight(wsn).clone()
        step(wsn, optimizer, task)
        assert not torch.equal(gated_weight(wsn), before), "the optimizer did train"
        wsn.end_task()
        known[task] = logits(wsn, task)
        assert [t for t, then in known.items() if not torch.equal(logits(wsn, t), then)] == []
    wsn.verify()


@pytest.fixture
def _torch_backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Everything runs on the torch backend. Choices are remembered: forget them."""
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "torch")
    forget()
    yield
    forget()


@pytest.mark.usefixtures("_torch_backend")
def test_values_are_put_back_where_gradients_are_enabled() -> None:
    """The hooks of a step run in the grad mode of the training loop, in which PyTorch refuses to write to a leaf."""
    check_kept(lambda wsn: wsn.guard(foreign.MuonLike(wsn.parameters())))


FOREIGN: dict[str, Callable[[Params], Any]] = {
    "a subclass that writes after its parent's step": foreign.DecaysAfter,
    "a subclass that writes before it": foreign.DecaysBefore,
    "a subclass of a subclass": foreign.DecaysTwice,
    "Muon-like": foreign.MuonLike,
    "old style, through .data": foreign.DecaysAll,
    "a flat buffer": foreign.FlatBuffer,
    "SAM": foreign.SAM,
    "Lookahead": lambda p: foreign.Lookahead(adamw(p)),
    "Lookahead, a torch optimizer without hooks": lambda p: foreign.LookaheadOptimizer(adamw(p)),
    "Lookahead, a torch optimizer with hooks": lambda p: foreign.LookaheadWithHooks(adamw(p)),
    "Lookahead around Lookahead": lambda p: foreign.Lookahead(foreign.LookaheadOptimizer(adamw(p))),  # type: ignore[arg-type]
    "a delegate": lambda p: foreign.Delegate(adamw(p)),
    "a delegate of a delegate": lambda p: foreign.Delegate(foreign.Delegate(adamw(p))),
    "a delegate of a subclass": lambda p: foreign.Delegate(foreign.DecaysAfter(p)),
    "schedule-free": foreign.ScheduleFree,
    "several in one": foreign.Several,
}


@pytest.mark.parametrize("model", [mlp, convnet])
@pytest.mark.parametrize("name", FOREIGN)
def test_optimizers_of_others(name: str, model: Callable[[], nn.Module]) -> None:
    adamw([nn.Parameter(torch.zeros(1))])  # from now on AdamW runs the hooks of its subclasses, too
    check_kept(lambda wsn: wsn.guard(FOREIGN[name](list(wsn.parameters()))), model)


def unpatched(kind: type[torch.optim.Optimizer]) -> type[torch.optim.Optimizer]:
    """A copy of a class of torch, whose step nothing has wrapped yet."""
    step = kind.step
    while getattr(step, "hooked", False):
        step = step.__wrapped__
    return type(kind.__name__, (kind,), {"step": step})


@pytest.mark.parametrize("parent_first", [True, False])
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD, torch.optim.RMSprop])
def test_nested_steps_in_any_order_of_making_them(kind: type[torch.optim.Optimizer], parent_first: bool) -> None:
    """Torch wraps the step of a class when the first optimizer of that class is made."""
    parent = unpatched(kind)

    class Child(parent):  # type: ignore[misc, valid-type]
        def step(self, closure: Any = None) -> Any:
            loss = super().step(closure)
            foreign.decay(foreign.every(self))
            return loss

    if parent_first:
        parent([nn.Parameter(torch.zeros(1))], lr=0.1)
    check_kept(lambda wsn: wsn.guard(Child(wsn.parameters(), lr=0.01)))


@pytest.mark.parametrize("raises_at", ["pre", "post", "closure"])
def test_nested_steps_go_on_after_an_exception(raises_at: str) -> None:
    adamw([nn.Parameter(torch.zeros(1))])

    def step(wsn: WSN, optimizer: torch.optim.Optimizer, task: int) -> None:
        def fail(*_: object) -> None:
            raise ValueError

        if raises_at == "closure":
            with pytest.raises(ValueError):
                optimizer.step(fail)  # type: ignore[arg-type]
        else:
            handle = getattr(optimizer, f"register_step_{raises_at}_hook")(fail)
            with pytest.raises(ValueError):
                steps(wsn, optimizer, task, 1)
            handle.remove()
        steps(wsn, optimizer, task)

    check_kept(lambda wsn: wsn.guard(foreign.DecaysAfter(wsn.parameters())), step=step)


@pytest.mark.parametrize("replaced", ["in the object", "in the class", "by a function that calls itself the same"])
@pytest.mark.parametrize("guarded_first", [True, False])
def test_a_step_that_was_replaced(replaced: str, guarded_first: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def make(wsn: WSN) -> torch.optim.Optimizer:
        optimizer = adamw(wsn.parameters())
        if guarded_first:
            wsn.guard(optimizer)
        before = torch.optim.AdamW.step if replaced == "in the class" else optimizer.step

        def step(*args: Any) -> Any:
            loss = before(*args)  # type: ignore[operator]
            foreign.decay(foreign.every(optimizer))
            return loss

        if replaced == "in the class":
            monkeypatch.setattr(torch.optim.AdamW, "step", step)
        elif replaced == "in the object":
            optimizer.step = step  # type: ignore[method-assign]
        else:
            optimizer.step = functools.wraps(before)(step)  # type: ignore[method-assign]
        return wsn.guard(optimizer)

    def then(wsn: WSN, optimizer: torch.optim.Optimizer, task: int) -> None:
        steps(wsn, optimizer, task)
        monkeypatch.undo()

    check_kept(make, step=then)


# --- hooks -----------------------------------------------------------------------------------------------------------
def writes(optimizer: torch.optim.Optimizer, *_: object) -> None:
    foreign.decay(foreign.every(optimizer))


def gives_gradients(optimizer: torch.optim.Optimizer, *_: object) -> None:
    for param in foreign.every(optimizer):
        param.grad = torch.ones_like(param) if param.grad is None else param.grad


@pytest.mark.parametrize("when", ["register_step_pre_hook", "register_step_post_hook"])
@pytest.mark.parametrize("hook", [writes, gives_gradients])
@pytest.mark.parametrize("guarded_first", [True, False])
@pytest.mark.parametrize("kind", ["torch", "subnet"])
def test_hooks_of_the_user(when: str, hook: Callable[..., None], guarded_first: bool, kind: str) -> None:
    def make(wsn: WSN) -> torch.optim.Optimizer:
        if kind == "subnet":
            optimizer: torch.optim.Optimizer = SubnetAdamW(wsn, 0.01)
            getattr(optimizer, when)(hook)
            return optimizer
        optimizer = adamw(wsn.parameters())
        if guarded_first:
            wsn.guard(optimizer)
        getattr(optimizer, when)(hook)
        return wsn.guard(optimizer)

    check_kept(make)


@pytest.fixture
def global_hooks() -> Iterator[list[Any]]:
    handles: list[Any] = []
    yield handles
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("register", [register_optimizer_step_pre_hook, register_optimizer_step_post_hook])
@pytest.mark.parametrize("make", [adamw, foreign.DecaysAfter])
def test_hooks_of_all_optimizers(register: Any, make: Callable[..., Any], global_hooks: list[Any]) -> None:
    global_hooks.append(register(writes))
    check_kept(lambda wsn: wsn.guard(make(wsn.parameters())))


@pytest.mark.parametrize("register", [register_optimizer_step_pre_hook, register_optimizer_step_post_hook])
def test_hooks_of_all_optimizers_that_come_after_the_guard(register: Any, global_hooks: list[Any]) -> None:
    def make(wsn: WSN) -> torch.optim.Optimizer:
        optimizer = wsn.guard(adamw(wsn.parameters()))
        if not global_hooks:
            global_hooks.append(register(writes))
        return optimizer

    check_kept(make)


def test_a_hook_that_is_there_from_the_second_step(global_hooks: list[Any]) -> None:
    def step(wsn: WSN, optimizer: torch.optim.Optimizer, task: int) -> None:
        steps(wsn, optimizer, task, 1)
        global_hooks.append(register_optimizer_step_post_hook(writes))
        steps(wsn, optimizer, task)
        global_hooks.pop().remove()
        steps(wsn, optimizer, task)

    check_kept(lambda wsn: wsn.guard(adamw(wsn.parameters())), step=step)


# --- between the steps -----------------------------------------------------------------------------------------------
def test_a_schedule_free_optimizer_that_changes_its_mode() -> None:
    def step(wsn: WSN, optimizer: foreign.ScheduleFree, task: int) -> None:
        for _ in range(2):
            optimizer.train()
            steps(wsn, optimizer, task, 3)
            optimizer.eval()
            with torch.no_grad():
                wsn.eval()(batches(task, 1)[0][0])

    check_kept(lambda wsn: wsn.guard(foreign.ScheduleFree(wsn.parameters())), step=step)


def test_one_optimizer_over_all_tasks_that_writes_between_them() -> None:
    wsn = WSN(mlp())
    for task in range(3):
        wsn.model[-1].add(task)  # type: ignore[union-attr, operator]
    optimizer, known = wsn.guard(foreign.ScheduleFree(wsn.parameters())), {}
    for task in range(3):
        wsn.begin_task(task)
        optimizer.train()
        steps(wsn, optimizer, task)
        optimizer.eval()
        wsn.end_task()
        optimizer.train()
        optimizer.eval()
        known[task] = logits(wsn, task)
        assert [t for t, then in known.items() if not torch.equal(logits(wsn, t), then)] == []
    wsn.verify()


def test_sam_in_two_calls() -> None:
    """Its own step, around which its hooks run, is not called."""

    def step(wsn: WSN, optimizer: foreign.SAM, task: int) -> None:
        for x, y in batches(task, 4):
            F.cross_entropy(wsn(x), y).backward()
            optimizer.first_step()
            F.cross_entropy(wsn(x), y).backward()
            optimizer.second_step()
            optimizer.zero_grad()

    check_kept(lambda wsn: wsn.guard(foreign.SAM(wsn.parameters())), step=step)


def test_the_weights_of_the_next_forward_pass_are_right() -> None:
    """Also where the last write of a step went through ``.data``."""
    wsn = WSN(mlp())
    wsn.begin_task(0)
    wsn.end_task()
    wsn.begin_task(1)
    optimizer = wsn.guard(foreign.Delegate(foreign.DecaysTwice(wsn.parameters())))
    then = [(gate, gate.param.detach().clone()) for _, gate in wsn.gated()]
    steps(wsn, optimizer, 1, 2)
    wsn(batches(1, 1)[0][0])
    for gate, before in then:
        mask = next(layer.mask(gate.name, 0) for layer in wsn.subnet_layers().values() if layer.weight is gate.param
                    or layer.bias is gate.param)  # fmt: skip
        assert torch.equal(gate.param[mask], before[mask])
        assert not torch.equal(gate.param[~mask], before[~mask])


# --- the library's own -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("one_pass", [True, False])
@pytest.mark.parametrize("base", [SubnetAdamW, SubnetSGD])
def test_a_subclass_of_a_subnet_optimizer(base: type[torch.optim.Optimizer], one_pass: bool) -> None:
    class Mine(base):  # type: ignore[misc, valid-type]
        def step(self, closure: Any = None) -> Any:
            loss = super().step(closure)
            foreign.decay(foreign.every(self))
            return loss

    check_kept(lambda wsn: Mine(wsn, 0.01, one_pass=one_pass), convnet)


@pytest.mark.parametrize("one_pass", [True, False])
@pytest.mark.parametrize(
    "wrap", [foreign.Lookahead, foreign.LookaheadOptimizer, foreign.LookaheadWithHooks, foreign.Delegate]
)
def test_a_wrapper_around_a_subnet_optimizer(wrap: Callable[..., Any], one_pass: bool) -> None:
    check_kept(lambda wsn: wsn.guard(wrap(SubnetAdamW(wsn, 0.01, one_pass=one_pass))), convnet)


@pytest.mark.parametrize("make", [lambda o: o, foreign.Lookahead, foreign.Delegate])
def test_lbfgs_is_refused_in_a_wrapper_too(make: Callable[..., Any]) -> None:
    wsn = WSN(mlp())
    with pytest.raises(TypeError, match="must not be LBFGS"):
        wsn.guard(make(torch.optim.LBFGS(wsn.parameters())))


@pytest.mark.parametrize("thing", [{}, nn.Linear(1, 1), torch.optim.lr_scheduler.LambdaLR, object()])
def test_what_is_no_optimizer_is_refused(thing: object) -> None:
    with pytest.raises(TypeError, match=r"must be a torch\.optim\.Optimizer, or an object that has its step and"):
        WSN(mlp()).guard(thing)


@pytest.mark.filterwarnings("ignore:Profiler record function")
@pytest.mark.parametrize("whole", [True, False])
def test_a_compiled_step(whole: bool) -> None:
    torch.compiler.reset()

    def step(wsn: WSN, optimizer: torch.optim.Optimizer, task: int) -> None:
        call: Callable[[], Any] = (lambda: optimizer.step()) if whole else optimizer.step  # type: ignore[call-arg, assignment]
        compiled = torch.compile(call, backend="eager")
        for x, y in batches(task, 3):
            F.cross_entropy(wsn(x), y).backward()
            compiled()

    check_kept(lambda wsn: wsn.guard(adamw(wsn.parameters())), step=step)
