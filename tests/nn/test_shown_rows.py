"""While a finished task is shown: a forward pass in training mode changes nothing of it, and a program that is exported
or traced keeps its values."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from wsn_fast import WSN, ForgottenError, convert, to_dense
from wsn_fast.nn import per_task

X = torch.randn(12, 8, generator=torch.Generator().manual_seed(5))


class Averages(nn.Module):
    """Subtracts a running mean, which it also updates in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.mean.mul_(0.9).add_(x.mean(0) * 0.1)
        return x - self.mean


class Clamps(nn.Module):
    """Writes to its parameter in training."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((8,), 2.0))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.scale.data.mul_(0.9)
        return x * self.scale


class ReadByItsParent(nn.Module):
    """Normalises with the tensors of a child that it does not call."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.out = nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(nn.functional.layer_norm(x, (8,), self.norm.weight, self.norm.bias))


class Instances(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.InstanceNorm1d(4, affine=True, track_running_stats=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.view(-1, 4, 2)).flatten(1)


PARTS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "batch norm": (lambda: nn.BatchNorm1d(8), {}),
    "batch norm, cumulative": (lambda: nn.BatchNorm1d(8, momentum=None), {}),
    "instance norm": (Instances, {}),
    "a running mean of its own": (Averages, {"per_task": "1.mean"}),
    "a parameter that is written to": (Clamps, {"per_task": "1.scale"}),
    "a norm that its parent reads": (ReadByItsParent, {}),
    "a dense layer per task": (lambda: nn.Linear(8, 8), {"per_task": "1.*"}),
}
MOVED = [name for name in PARTS if name not in ("a norm that its parent reads", "a dense layer per task")]


def train(wsn: WSN, task: int) -> None:
    wsn.begin_task(task)
    optimizer = wsn.guard(torch.optim.SGD(wsn.parameters(), 0.1))
    wsn.train()
    for _ in range(3):
        optimizer.zero_grad()
        (wsn(X + task) - 1).square().mean().backward()
        optimizer.step()
    wsn.end_task()
    wsn.eval()


def finished(part: str, tasks: tuple[int, ...] = (1, 2)) -> WSN:
    torch.manual_seed(0)
    make, owners = PARTS[part]
    net = nn.Sequential(nn.Linear(8, 8), make(), nn.ReLU(), nn.Linear(8, 3))
    exclude = "1" if isinstance(net[1], nn.Linear) else ()
    wsn = WSN(convert(net, density=0.3, heads="3", exclude_modules=exclude), **owners)
    for task in tasks:
        train(wsn, task)
    return wsn


# --- a forward pass in training mode ---------------------------------------------------------------------------------
def with_gradients(wsn: WSN) -> None:
    x = (X * 3 + 1).requires_grad_()
    (wsn(x).square().sum() + wsn(x).sum()).backward()
    assert x.grad is not None


CALLS: dict[str, Callable[[WSN], object]] = {
    "the wsn": lambda wsn: wsn(X * 3 + 1),
    "the model": lambda wsn: wsn.model(X * 3 + 1),
    "the module by itself": lambda wsn: wsn.model[1](X * 3 + 1),
    "with gradients": with_gradients,
}


@pytest.mark.parametrize("part", MOVED)
@pytest.mark.parametrize("call", CALLS)
def test_after_a_forward_pass_in_training_mode_the_task_is_what_was_kept(part: str, call: str) -> None:
    wsn = finished(part)
    wsn.use_task(1)
    before = wsn(X).detach().clone()
    wsn.train()
    CALLS[call](wsn)
    wsn.eval()
    assert torch.equal(wsn(X), before)
    wsn.verify()
    wsn.use_task(None)


def test_a_part_alone_in_training_mode() -> None:
    wsn = finished("batch norm")
    wsn.use_task(2)
    before = wsn(X)
    wsn.model[1].train()
    wsn(X * 3)
    wsn.model[1].eval()
    assert torch.equal(wsn(X), before)


def test_a_forward_pass_that_fails_later() -> None:
    wsn = finished("batch norm")
    wsn.use_task(1)
    before = wsn(X)
    wsn.train()
    hook = wsn.model[2].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        wsn(X * 3)
    hook.remove()
    wsn.eval()
    assert torch.equal(wsn(X), before)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # torch 2.11
def test_compiled_code_in_training_mode() -> None:
    torch.compiler.reset()
    wsn = finished("batch norm")
    wsn.compile(backend="aot_eager", fullgraph=True)
    wsn.use_task(1)
    before = wsn(X).detach().clone()
    wsn.train()
    with_gradients(wsn)
    wsn.eval()
    assert torch.equal(wsn(X), before)


@pytest.mark.parametrize("training", [False, True])
def test_a_model_is_compiled_in_one_piece(training: bool) -> None:
    torch.compiler.reset()
    pieces: list[Any] = []
    wsn = finished("batch norm")
    wsn.compile(backend=lambda graph, inputs: pieces.append(graph) or graph)
    wsn.use_task(1)
    wsn.train(training)
    with torch.no_grad():
        wsn(X)
    assert len(pieces) == 1


def test_live_statistics_of_the_task_in_training_still_follow_its_batches() -> None:
    wsn = finished("batch norm")
    wsn.begin_task(3)
    wsn.train()
    before = wsn.model[1].running_mean.clone()
    with wsn.use_task(1):
        wsn(X * 3)
    assert torch.equal(wsn.model[1].running_mean, before)
    wsn(X * 3)
    assert not torch.equal(wsn.model[1].running_mean, before)


def test_compiled_code_serves_any_number_of_tasks_with_norms() -> None:
    """More tasks than torch recompiles for."""
    torch.compiler.reset()
    wsn = finished("batch norm", tuple(range(10)))
    compiled = torch.compile(wsn.model, fullgraph=True, dynamic=False, backend="aot_eager")
    with torch.no_grad():
        for task in range(10):
            wsn.use_task(None)
            compiled(X)
            with wsn.use_task(task):
                assert torch.equal(compiled(X), wsn.model(X))


# --- verify looks at what is shown -----------------------------------------------------------------------------------
def write_to_statistics(wsn: WSN) -> None:
    wsn.model[1].running_var.add_(1)


def write_to_a_parameter(wsn: WSN) -> None:
    wsn.model[1].bias.data.add_(1)


def write_to_a_masked_weight(wsn: WSN) -> None:
    wsn.model[0].gate_state.kept["weight"].masked.add_(1)


def take_another_mask(wsn: WSN) -> None:
    wsn.model[0].active_row = 1


def take_the_mask_of_the_scores(wsn: WSN) -> None:
    wsn.model[0].active_row = None


def take_another_head(wsn: WSN) -> None:
    wsn.model[3].active = 2


SHOWN = {
    write_to_statistics: r"task 1: 1\.running_var \(as shown",
    write_to_a_parameter: r"task 1: 1\.bias \(as shown",
    write_to_a_masked_weight: r"task 1: 0\.weight \(masked\) \(as shown",
    take_another_mask: r"task 1: 0\.weight \(mask\) \(as shown",
    take_the_mask_of_the_scores: r"task 1: 0\.weight \(mask\) \(as shown",
    take_another_head: r"task 1: 3 \(head\) \(as shown",
}


@pytest.mark.parametrize("change", SHOWN, ids=lambda f: f.__name__)
def test_verify_finds_what_is_shown_and_was_not_kept(change: Callable[[WSN], None]) -> None:
    wsn = finished("batch norm")
    wsn.use_task(1)
    before = wsn(X)
    wsn.verify()
    change(wsn)
    with pytest.raises(ForgottenError, match=SHOWN[change]):
        wsn.verify()
    wsn.use_task(1)
    wsn.verify()
    assert torch.equal(wsn(X), before)


def test_values_of_the_task_in_training_may_be_anything() -> None:
    wsn = finished("batch norm")
    wsn.begin_task(3)
    write_to_statistics(wsn)
    wsn.verify()


# --- programs --------------------------------------------------------------------------------------------------------
def saved_and_loaded(program: Any) -> Any:
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    return torch.export.load(buffer).module()


PROGRAMS: dict[str, Callable[[Any], Callable[[Tensor], Tensor]]] = {
    "jit": lambda model: torch.jit.trace(model, (X,)),
    "frozen jit": lambda model: torch.jit.freeze(torch.jit.trace(model, (X,)).eval()),
    "export": lambda model: torch.export.export(model, (X,)).module(),
    "saved export": lambda model: saved_and_loaded(torch.export.export(model, (X,))),
    "fx": lambda model: make_fx(lambda x: model(x))(X),
}


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore:No complete tensor found in the group")  # the mask in use is a row of all masks
@pytest.mark.parametrize(
    "part", [part for part in PARTS if part != "a running mean of its own"]
)  # never twice the same
@pytest.mark.parametrize("kind", PROGRAMS)
@pytest.mark.parametrize("whole", [True, False], ids=["wsn", "model"])
def test_a_program_of_a_task_keeps_its_values(part: str, kind: str, whole: bool) -> None:
    wsn = finished(part)
    with torch.no_grad():
        with wsn.use_task(1):
            expected = wsn(X)
            program = PROGRAMS[kind](wsn if whole else wsn.model)
            assert torch.equal(program(X), expected)
            wsn.verify()
        assert torch.equal(program(X), expected)
        with wsn.use_task(2):
            assert torch.equal(program(X), expected)
    train(wsn, 3)
    with torch.no_grad():
        assert torch.equal(program(X), expected)


@pytest.mark.parametrize("kind", ["jit", "fx"])
def test_a_program_writes_to_no_tensor_of_the_model(kind: str) -> None:
    wsn = finished("a running mean of its own")
    with torch.no_grad(), wsn.use_task(1):
        program = torch.jit.trace(wsn, (X,), check_trace=False) if kind == "jit" else PROGRAMS[kind](wsn)
    before = {name: tensor.clone() for name, tensor in wsn.state_dict().items() if tensor.ndim}
    first, second = program(X), program(X)
    assert not torch.equal(first, second)
    assert all(torch.equal(tensor, before[name]) for name, tensor in wsn.state_dict().items() if tensor.ndim)


def test_a_program_of_a_part_keeps_its_values() -> None:
    wsn = finished("batch norm")
    with torch.no_grad():
        with wsn.use_task(1):
            expected = wsn.model[:2](X)
            program = torch.jit.trace(nn.Sequential(wsn.model[0], wsn.model[1]).eval(), (X,))
        assert torch.equal(program(X), expected)


def test_the_model_has_its_own_tensors_after_an_export() -> None:
    wsn = finished("batch norm")
    norm = wsn.model[1]
    before = {name: getattr(norm, name) for name in per_task.marked(norm)}
    with wsn.use_task(1), torch.no_grad():
        torch.export.export(wsn, (X,))
        assert all(getattr(norm, name) is tensor for name, tensor in before.items())


def test_a_trace_that_fails_leaves_the_model_as_it_was() -> None:
    wsn = finished("batch norm")
    norm = wsn.model[1]
    weight, live = norm.weight, norm.weight.detach().clone()
    fails = norm.register_forward_pre_hook(lambda *_: 1 / 0)
    with wsn.use_task(1), pytest.raises(ZeroDivisionError):
        norm._forward_pre_hooks.move_to_end(fails.id)  # after those that lend copies
        torch.jit.trace(wsn, (X,))
    fails.remove()
    assert norm.weight is weight
    assert torch.equal(weight, live)


def test_a_strict_export_is_refused_with_the_way_out() -> None:
    wsn = finished("batch norm")
    with wsn.use_task(1), pytest.raises(Exception, match="use strict=False, or export to_dense") as error:
        torch.export.export(wsn, (X,), strict=True)
    assert "AssertionError" not in type(error.value).__name__


# --- copies ----------------------------------------------------------------------------------------------------------
def test_a_dense_copy_that_is_made_meanwhile_is_an_ordinary_module() -> None:
    wsn = finished("batch norm")
    with wsn.use_task(1):
        dense = to_dense(wsn, 2)
    plain = nn.BatchNorm1d(8)
    assert dense[1].__dict__.keys() == plain.__dict__.keys()
    for module in dense.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
        assert not any("per_task" in name for name in module.__dict__)


def test_a_copy_that_is_made_meanwhile_shows_the_task_by_itself() -> None:
    wsn = finished("batch norm")
    with wsn.use_task(1):
        before = wsn(X)
        twin = copy.deepcopy(wsn)
    twin.train()
    twin(X * 3)
    twin.eval()
    assert torch.equal(twin(X), before)
    twin.use_task(None)
    assert not any(module._forward_hooks for module in twin.modules())


def test_when_the_task_is_left_there_are_no_hooks() -> None:
    wsn = finished("batch norm")
    with wsn.use_task(1):
        assert any(module._forward_hooks for module in wsn.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in wsn.modules())
