"""Compiled code where numbers become symbolic: several densities, several batch sizes, with and without a bias."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from layer_cases import CASES
from small_models import batches, convnet
from torch import Tensor, nn

from wsn_fast import WSN, TaskHeads, ops
from wsn_fast.optim import SubnetAdamW, SubnetSGD

NAMES = ("linear", "transposed", "conv1d", "conv2d", "conv3d", "up1d", "up2d", "up3d")
STATIC = pytest.param(False, marks=pytest.mark.ci)
DYNAMIC = pytest.mark.parametrize("dynamic", [None, STATIC, True], ids=["automatic", "static", "dynamic"])


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compiled(module: nn.Module, dynamic: bool | None) -> Callable[[Tensor], Tensor]:
    return torch.compile(module, fullgraph=True, dynamic=dynamic, backend="aot_eager")  # type: ignore[return-value]


def assert_same(layer: nn.Module, run: Callable[[Tensor], Tensor], x: Tensor) -> None:
    """Outputs and all gradients are those of the eager layer."""
    found: list[list[Any]] = []
    for function in (layer, run):
        x = x.detach().requires_grad_()
        out = function(x)
        out.square().sum().backward()
        found.append([out.detach(), x.grad, *(p.grad for p in layer.parameters())])
        layer.zero_grad()
    for eager, traced in zip(*found, strict=True):
        torch.testing.assert_close(traced, eager)


@DYNAMIC
@pytest.mark.parametrize("bias", [True, pytest.param(False, marks=pytest.mark.ci)])
@pytest.mark.parametrize("name", [*NAMES[:2], NAMES[3], *(pytest.param(n, marks=pytest.mark.ci) for n in NAMES[4:])])
def test_a_second_density_and_a_second_batch_size(name: str, bias: bool, dynamic: bool | None) -> None:
    make, _, shape = CASES[name]
    for density in (0.4, 0.3):  # two layers share the code, as with regional compilation
        layer = make(density=density, bias=bias)
        run = compiled(layer, dynamic)
        assert_same(layer, run, torch.randn(shape))
        layer.density = 0.7
        assert_same(layer, run, torch.randn(shape[0] + 2, *shape[1:]))


def train(wsn: WSN, one_pass: bool, run: Callable[[Tensor], Tensor]) -> list[Tensor]:
    torch.manual_seed(3)
    for task in (0, 1):
        wsn.begin_task(task, density=0.5 - 0.2 * task)
        update = wsn.guard(SubnetSGD(wsn, 0.1, one_pass=one_pass))
        for size in (16, 9, 16):
            x, y = batches(task, 1, size)[0]
            update.zero_grad()
            F.cross_entropy(run(x), y).backward()
            update.step()
        wsn.end_task()
    return [p.detach().clone() for p in wsn.parameters()]


@DYNAMIC
@pytest.mark.parametrize("one_pass", [False, True])
def test_two_tasks_of_two_densities(one_pass: bool, dynamic: bool | None) -> None:
    """A convolution, batch and layer norms per task, a linear layer and heads."""
    results = []
    for compile_it in (False, True):
        torch.manual_seed(1)
        wsn = WSN(convnet(), reinit_scores=True)
        run = compiled(wsn.model, dynamic) if compile_it else wsn
        results.append(train(wsn, one_pass, run))
        wsn.verify()
        for task in (0, 1):
            with wsn.use_task(task):
                for size in (4, 7):
                    x = batches(9, 1, size)[0][0]
                    torch.testing.assert_close(run(x), wsn(x))
    for eager, traced in zip(*results, strict=True):
        torch.testing.assert_close(traced, eager, rtol=1e-4, atol=1e-5)


@DYNAMIC
def test_a_layer_by_itself_in_the_one_pass_mode(dynamic: bool | None) -> None:
    make, _, shape = CASES["linear"]
    ends = []
    for compile_it in (False, True):
        torch.manual_seed(2)
        layers = [make(density=density, bias=density > 0.35) for density in (0.4, 0.3)]
        for layer in layers:
            wsn = WSN(layer)
            wsn.begin_task(0)
            update = wsn.guard(SubnetAdamW(wsn, 0.01, one_pass=True))
            run = compiled(layer, dynamic) if compile_it else layer
            for rows in (5, 3):
                run(torch.randn(rows, *shape[1:])).square().sum().backward()
                update.step()
                update.zero_grad()
        ends.append([p.detach() for layer in layers for p in layer.parameters()])
    for eager, traced in zip(*ends, strict=True):
        torch.testing.assert_close(traced, eager, rtol=1e-4, atol=1e-5)


@DYNAMIC
def test_heads_of_several_widths(dynamic: bool | None) -> None:
    heads = TaskHeads(4, tasks={0: 2, 1: 3, "b": 5})
    run = compiled(heads, dynamic)
    for rows, task in enumerate(heads.tasks, 2):
        heads.active = task
        assert_same(heads, run, torch.randn(rows, 4))


@DYNAMIC
@pytest.mark.parametrize("name", ["linear", "conv2d"])
def test_a_finished_task_and_the_current_one(name: str, dynamic: bool | None) -> None:
    make, _, shape = CASES[name]
    layer = make(density=0.4)
    run = compiled(layer, dynamic)
    assert_same(layer, run, torch.randn(shape))
    layer.append_task(0, {n: ops.pack_mask(m) for n, m in layer.masks_of_scores().items()})
    assert_same(layer, run, torch.randn(shape))
    layer.reset_scores()
    layer.active_row = 0
    x = torch.randn(shape)
    torch.testing.assert_close(run(x), layer(x))


@pytest.mark.compiler
def test_inductor_takes_a_second_density_and_batch_size() -> None:
    make, _, shape = CASES["linear"]
    for density, rows in ((0.4, 5), (0.3, 7)):
        layer = make(density=density)
        run: Any = torch.compile(layer, fullgraph=True, dynamic=True, backend="inductor")
        assert_same(layer, run, torch.randn(rows, *shape[1:]))
