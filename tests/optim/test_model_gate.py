"""One autograd Function for the gates of a whole model: everything that works with a Function per layer works with it,
to the bit."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from wsn_fast import WSN, convert
from wsn_fast.nn.model_gates import ModelGates
from wsn_fast.ops import autograd
from wsn_fast.optim import SubnetAdamW

X = torch.randn(6, 5, generator=torch.Generator().manual_seed(3))
Y = torch.randint(3, (6,), generator=torch.Generator().manual_seed(4))
KINDS: dict[str, Callable[[WSN], torch.optim.Optimizer]] = {
    "one pass": lambda wsn: SubnetAdamW(wsn, 0.02, weight_decay=0.1, one_pass=True),
    "standard": lambda wsn: SubnetAdamW(wsn, 0.02, weight_decay=0.1),
    "guarded": lambda wsn: wsn.guard(torch.optim.AdamW(wsn.parameters(), 0.02, weight_decay=0.1)),
}
each_kind = pytest.mark.parametrize("kind", KINDS)
STANDARD = pytest.mark.parametrize("kind", ["standard", "guarded"])


class Net(nn.Module):
    """A layer that a forward pass calls twice, and one that it may leave out."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.twice, self.last = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.seldom = nn.Linear(8, 8, bias=False)
        self.use_seldom = True
        self.run: Callable[..., Tensor] = lambda part, x: part(x)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        x = self.run(self._middle, x)
        return self.last(x + self.seldom(x) if self.use_seldom else x)

    def _middle(self, x: Tensor) -> Tensor:
        return torch.tanh(self.twice(torch.tanh(self.twice(x))))


@pytest.fixture
def count(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The Functions that run forward from now on, by name."""
    found: list[str] = []
    for name in ("ModelGate", "SubnetGate", "RawGate"):
        function = getattr(autograd, name)
        apply = function.apply

        def counted(*args: Any, apply: Callable[..., Any] = apply, name: str = name) -> Any:
            found.append(name)
            return apply(*args)

        monkeypatch.setattr(function, "apply", counted)
    yield found


def begun(kind: str) -> tuple[WSN, torch.optim.Optimizer]:
    """In its second task, of which two steps are done: the gates of the next pass are ready."""
    torch.manual_seed(0)
    wsn = WSN(convert(Net(), density=0.4), gates_ahead=True)
    for task in (0, 1):
        wsn.begin_task(task)
        optimizer = KINDS[kind](wsn)
        for _ in range(2):
            step(wsn, optimizer)
        if task == 0:
            wsn.end_task()
    return wsn, optimizer


def step(wsn: WSN, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    loss_of(wsn).backward()
    optimizer.step()


def loss_of(wsn: WSN) -> Tensor:
    return F.cross_entropy(wsn(X), Y)


def without(wsn: WSN, monkeypatch: pytest.MonkeyPatch, work: Callable[[], Any]) -> Any:
    """What ``work`` does if no gates are given to the model."""
    with monkeypatch.context() as patch:
        patch.setattr(ModelGates, "give", lambda self: False)
        return work()


def gradients(wsn: WSN) -> dict[str, Tensor | None]:
    return {name: None if p.grad is None else p.grad.clone() for name, p in wsn.named_parameters()}


def assert_same(mine: dict[str, Tensor | None], theirs: dict[str, Tensor | None]) -> None:
    for name, gradient in mine.items():
        other = theirs[name]
        assert (gradient is None) == (other is None), name
        assert gradient is None or other is None or torch.equal(gradient, other), name


def both(
    kind: str, monkeypatch: pytest.MonkeyPatch, work: Callable[[WSN], object]
) -> tuple[dict[str, Tensor | None], dict[str, Tensor | None]]:
    """The gradients that ``work`` leaves, with one Function for the model and with a Function per layer."""
    found = []
    for alone in (False, True):
        wsn, optimizer = begun(kind)
        optimizer.zero_grad()
        if alone:
            without(wsn, monkeypatch, lambda wsn=wsn: work(wsn))
        else:
            work(wsn)
        found.append(gradients(wsn))
    return found[0], found[1]


# --- which Functions run
@each_kind
def test_one_function_serves_the_model(kind: str, count: list[str]) -> None:
    wsn, _ = begun(kind)
    count.clear()
    loss_of(wsn).backward()
    alone = "RawGate" if kind == "one pass" else "SubnetGate"
    assert count == ["ModelGate", alone, alone]  # the layer that is called twice adds up in the dtype of the weight


def test_nothing_is_given_outside_a_forward_pass(count: list[str]) -> None:
    wsn, _ = begun("standard")
    count.clear()
    loss_of(wsn)
    wsn.model.first(X)
    assert count[-2:] == ["SubnetGate", "SubnetGate"]
    assert not any(layer.gate_state.given for layer in wsn.subnet_layers().values())


def test_an_error_in_the_model_takes_back_what_was_given() -> None:
    wsn, _ = begun("one pass")
    with pytest.raises(RuntimeError, match="shapes"):
        wsn(torch.randn(2, 7))
    assert not any(layer.gate_state.given for layer in wsn.subnet_layers().values())


def test_several_processes_get_a_function_per_layer(count: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Their gradients are reduced while backward still runs."""
    wsn, _ = begun("standard")
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    count.clear()
    loss_of(wsn)
    assert "ModelGate" not in count


# --- the same gradients
@each_kind
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_gradients_are_the_same_to_the_bit(
    kind: str, dtype: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(wsn: WSN) -> None:
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            loss = loss_of(wsn)
        loss.backward()

    assert_same(*both(kind, monkeypatch, work))


@each_kind
def test_a_layer_that_the_loss_does_not_need_gets_no_gradient(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def work(wsn: WSN) -> None:
        wsn.model.use_seldom = False
        loss_of(wsn).backward()
        assert wsn.model.seldom.weight.grad is None

    assert_same(*both(kind, monkeypatch, work))


@each_kind
def test_accumulation(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def work(wsn: WSN) -> None:
        for part in (X[:2], X[2:]):
            wsn(part).square().mean().backward()
        (wsn(X[:3]).mean() + wsn(X[3:]).mean()).backward()

    assert_same(*both(kind, monkeypatch, work))


@each_kind
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(kind: str, reentrant: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def work(wsn: WSN) -> None:
        wsn.model.run = lambda part, x: checkpoint(part, x, use_reentrant=reentrant)
        loss_of(wsn).backward()

    assert_same(*both(kind, monkeypatch, work))


@each_kind
def test_what_is_saved_for_backward_may_be_moved(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def work(wsn: WSN) -> None:
        with torch.autograd.graph.save_on_cpu():
            loss = loss_of(wsn)
        loss.backward()

    assert_same(*both(kind, monkeypatch, work))


@STANDARD
def test_autograd_grad_of_one_weight(kind: str) -> None:
    wsn, optimizer = begun(kind)
    optimizer.zero_grad()
    params = [wsn.model.first.weight, wsn.model.last.bias_score]
    asked = torch.autograd.grad(loss_of(wsn), params)
    assert all(p.grad is None for p in wsn.parameters())
    loss_of(wsn).backward()
    assert all(torch.equal(mine, p.grad) for mine, p in zip(asked, params, strict=True) if p.grad is not None)


@STANDARD
def test_a_graph_that_is_retained_may_run_twice(kind: str) -> None:
    wsn, optimizer = begun(kind)
    optimizer.zero_grad()
    loss = loss_of(wsn)
    loss.backward(retain_graph=True)
    once = gradients(wsn)
    loss.backward()
    assert_same(gradients(wsn), {name: None if g is None else g + g for name, g in once.items()})


@each_kind
def test_hooks_of_weights_see_their_gradient(kind: str) -> None:
    wsn, optimizer = begun(kind)
    optimizer.zero_grad()
    seen: list[Tensor] = []
    weight = wsn.model.last.weight
    weight.register_hook(lambda grad: seen.append(grad.clone()))
    weight.register_post_accumulate_grad_hook(lambda param: seen.append(param.grad.clone()))
    loss_of(wsn).backward()
    assert len(seen) == 2 and all(torch.equal(one, weight.grad) for one in seen)


@STANDARD
@pytest.mark.parametrize("part", ["weight", "weight_score"])
def test_a_frozen_tensor_gets_no_gradient(kind: str, part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def work(wsn: WSN) -> None:
        getattr(wsn.model.first, part).requires_grad_(False)
        loss_of(wsn).backward()
        assert getattr(wsn.model.first, part).grad is None

    assert_same(*both(kind, monkeypatch, work))


@each_kind
def test_a_second_derivative_is_refused(kind: str) -> None:
    wsn, _ = begun(kind)
    (first,) = torch.autograd.grad(loss_of(wsn), [wsn.model.last.weight], create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        first.sum().backward()


@STANDARD
@pytest.mark.parametrize("part", ["weight", "weight_score"])
def test_a_weight_that_changed_before_backward_is_refused(kind: str, part: str) -> None:
    wsn, _ = begun(kind)
    loss = loss_of(wsn)
    with torch.no_grad():
        getattr(wsn.model.first, part).mul_(1.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@each_kind
def test_a_weight_that_changes_within_the_pass_is_gated_anew(kind: str) -> None:
    wsn, _ = begun(kind)

    def clamp(layer: nn.Module, args: object) -> None:
        with torch.no_grad():
            layer.param("weight").clamp_(-0.1, 0.1)  # type: ignore[operator]

    twin = copy.deepcopy(wsn)
    for model in (wsn, twin):
        model.model.last.register_forward_pre_hook(clamp)
    assert torch.equal(wsn(X), twin(X))


def test_functional_call_computes_with_what_it_is_given() -> None:
    wsn, _ = begun("standard")
    others = {name: (2 * p.detach()).requires_grad_() for name, p in wsn.named_parameters()}
    twin = copy.deepcopy(wsn)
    assert torch.equal(torch.func.functional_call(wsn, others, (X,)), torch.func.functional_call(twin, others, (X,)))


def test_a_copy_trains_by_itself() -> None:
    wsn, optimizer = begun("one pass")
    twin = copy.deepcopy(wsn)
    other = KINDS["one pass"](twin)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for _ in range(3):
        step(wsn, optimizer)
        step(twin, other)
    assert_same(dict(wsn.state_dict()), dict(twin.state_dict()))


# --- compiled code
class Graphs:
    """A backend of ``torch.compile`` that notes which of our operators the graphs call that have run."""

    def __init__(self) -> None:
        self.called: list[str] = []

    def __call__(self, module: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        names = [str(node.target) for part in module.modules() if isinstance(part, torch.fx.GraphModule)
                 for node in part.graph.nodes if "wsn_fast" in str(node.target)]  # fmt: skip

        def run(*args: Any) -> Any:
            self.called += names
            return module(*args)

        return run


# Torch looks at the gradient of whatever it compiles for.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@each_kind
def test_compiled_code_makes_no_gate_that_was_made_ahead(kind: str) -> None:
    torch._dynamo.reset()
    wsn, optimizer = begun(kind)
    twin, other = begun(kind)
    graphs = Graphs()
    wsn.compile(backend=graphs, fullgraph=True)
    for model, by in ((wsn, optimizer), (twin, other)):
        step(model, by)
        graphs.called.clear()
        step(model, by)
    assert not [name for name in graphs.called if "gate" in name]
    for (name, mine), theirs in zip(wsn.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, msg=lambda text, name=name: f"{name}: {text}")


def test_compiled_code_makes_no_gate_that_is_kept() -> None:
    torch._dynamo.reset()
    wsn, _ = begun("standard")
    graphs = Graphs()
    with torch.no_grad(), wsn.use_task(0):
        expected = wsn(X)
        wsn.compile(backend=graphs, fullgraph=True)
        wsn(X)
        graphs.called.clear()
        assert torch.equal(wsn(X), expected) and not graphs.called
        wsn.model.first.weight.data.mul_(2)
        wsn.model.first.weight.add_(0)  # now autograd knows
        changed = wsn(X)
        assert torch.equal(changed, copy.deepcopy(wsn.model)(X)) and not torch.equal(changed, expected)
