"""How many kernels a step launches, counted on a stand-in for the GPU. The bounds are upper bounds."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import counted_steps as steps
import pytest
import torch
from stand_in_cuda import StandIn
from torch import nn

from wsn_fast import WSN, convert


class Launches(NamedTuple):
    """Launches of a step: for any number of layers, and those of each layer."""

    fixed: int
    of_a_layer: int

    def of(self, layers: int) -> int:
        return self.fixed + layers * self.of_a_layer


MOST = {"one-pass": Launches(4, 0), "standard": Launches(6, 0), "guarded": Launches(6, 0)}
"""Of a warm step. One or two of them write addresses of gradients, which have moved, to a table."""

COMPILED = {"one-pass": (8, 3, 1), "standard": (10, 3, 2), "guarded": (10, 3, 2)}
"""The most kernels that are compiled in the first steps, when the second task begins, and in its steps."""

LAYERS = [4, 12, pytest.param(16, marks=pytest.mark.ci), pytest.param(48, marks=pytest.mark.ci)]


def without_writes(kernels: Counter[str]) -> Counter[str]:
    """Without those that write addresses of gradients to a table: the allocator may give the same ones as before."""
    return Counter({kernel: n for kernel, n in kernels.items() if kernel != "write_kernel"})


class Counts(NamedTuple):
    """Of one step: Triton's launches by kernel, and torch's operators."""

    kernels: Counter[str]
    operators: Counter[str]


@pytest.fixture(autouse=True)
def _steps_run(stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    steps.allow_steps(stand_in, monkeypatch)


def count(mode: str, layers: int, stand_in: StandIn) -> Counts:
    """A warm step. Of a captured one the kernels are those of its graph."""
    net, x = steps.mlp(layers), torch.randn(4, 32)
    step = steps.dense_step(mode, net, x) if mode.startswith("dense") else steps.step_of(mode, steps.subnet(net), x)
    steps.warm_up(step, stand_in)
    kernels = stand_in.kernels()
    with pytest.MonkeyPatch.context() as patch, steps.Operators(patch) as operators:
        step()
    return Counts(kernels, +operators.launching)


@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("mode", MOST)
def test_a_step_launches_few_kernels(mode: str, layers: int, stand_in: StandIn) -> None:
    kernels = count(mode, layers, stand_in).kernels
    assert 0 < kernels.total() <= MOST[mode].of(layers), kernels


@pytest.mark.parametrize(("few", "many"), [(4, 12), pytest.param(16, 48, marks=pytest.mark.ci)])
def test_one_pass_launches_no_kernel_for_a_layer(few: int, many: int, stand_in: StandIn) -> None:
    of_few, of_many = (count("one-pass", layers, stand_in).kernels for layers in (few, many))
    assert without_writes(of_few) == without_writes(of_many) and of_many["write_kernel"] <= 1


@pytest.mark.parametrize(("few", "many"), [(4, 12), pytest.param(16, 48, marks=pytest.mark.ci)])
def test_one_pass_runs_the_operators_of_a_dense_layer(few: int, many: int, stand_in: StandIn) -> None:
    of_layers = {
        mode: count(mode, many, stand_in).operators - count(mode, few, stand_in).operators
        for mode in ("one-pass", "dense")
    }
    assert of_layers["one-pass"] == of_layers["dense"]


@pytest.mark.parametrize("mode", ["standard", "guarded"])
def test_selection_and_gates_do_not_grow_with_the_layers(mode: str, stand_in: StandIn) -> None:
    few, many = (count(mode, layers, stand_in).kernels for layers in (2, 12))
    per_tensor: set[str] = set()
    few, many = without_writes(few), without_writes(many)
    assert {kernel: n for kernel, n in few.items() if kernel not in per_tensor} == {
        kernel: n for kernel, n in many.items() if kernel not in per_tensor
    }
    # The step of SubnetAdamW makes the gates itself, without a launch of their own.
    assert many["gate_by_guess_kernel"] == (mode == "guarded") and many["settle_kernel"] == 1
    assert many["gate_multi_kernel"] == many["gate_kernel"] == 0
    assert many["gate_backward_multi_kernel"] == 1 and many["gate_backward_kernel"] == 0


def test_frozen_values_are_saved_and_put_back_at_once(stand_in: StandIn) -> None:
    few, many = (count("guarded", layers, stand_in) for layers in (2, 12))
    assert few.kernels["restore_frozen_multi_kernel"] == many.kernels["restore_frozen_multi_kernel"] == 1
    assert not many.kernels["restore_frozen_kernel"]
    assert few.operators["_foreach_copy_"] == many.operators["_foreach_copy_"] == 1


def test_a_captured_step_holds_the_launches_of_an_eager_one(stand_in: StandIn) -> None:
    captured, eager = (count(mode, 4, stand_in) for mode in ("captured", "one-pass"))
    assert without_writes(captured.kernels) == without_writes(eager.kernels)
    # The batch is copied to where the graph reads it, the learning rate too, and the loss is copied out.
    assert captured.operators == {"copy_": 1, "fill_": 1, "clone": 1}


@pytest.mark.parametrize("layers", LAYERS)
def test_a_finished_task_costs_what_a_dense_net_costs(layers: int, stand_in: StandIn) -> None:
    finished, dense = (count(mode, layers, stand_in) for mode in ("evaluation", "dense-evaluation"))
    assert not finished.kernels and finished.operators == dense.operators


def test_a_mixed_batch_of_kept_tasks_launches_nothing(stand_in: StandIn) -> None:
    wsn = WSN(convert(steps.mlp(2), density=0.5), keep_masked=3).eval()
    for task in range(3):
        wsn.begin_task(task)
        wsn.end_task()
    x, tasks = torch.randn(6, 32), [0, 1, 2, 2, 0, 1]
    for launches in ({"gate_packed_kernel": 3 * 4}, {}):
        stand_in.forget()
        wsn.forward_tasks(x, tasks)
        assert stand_in.kernels() == launches


def test_the_first_batch_of_a_finished_task_gates_each_tensor_once(stand_in: StandIn) -> None:
    step = steps.step_of("evaluation", steps.subnet(steps.mlp(2)), torch.randn(4, 32))
    stand_in.forget()
    step()
    assert stand_in.kernels() == {"gate_packed_kernel": 4}


def odd_net() -> nn.Sequential:
    """Tensors whose sizes and addresses are multiples of 16 or not, and one of a single element."""
    return nn.Sequential(nn.Linear(32, 33), nn.ReLU(), nn.Linear(33, 1), nn.Linear(1, 6, bias=False), nn.Linear(6, 16))


@pytest.mark.parametrize(
    "mode", ["one-pass", *(pytest.param(m, marks=pytest.mark.ci) for m in COMPILED if m[0] != "o")]
)
def test_few_kernels_are_compiled_whatever_the_sizes(
    mode: str, stand_in: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_first, at_begin, later = COMPILED[mode]
    x = torch.randn(4, 32)
    with stand_in.empty_cache(monkeypatch) as compiled:
        for net in (steps.mlp(4), nn.Linear(32, 7, bias=False), steps.mlp(8), odd_net()):
            wsn = steps.subnet(net)
            wsn.begin_task(0)
            steps.warm_up(steps.training_step(mode, wsn, x), stand_in)
            assert compiled.total() <= at_first, compiled
        compiled.clear()
        wsn.end_task()
        wsn.begin_task(1)
        assert compiled.total() <= at_begin, compiled
        compiled.clear()
        steps.warm_up(steps.training_step(mode, wsn, x), stand_in)
        assert compiled.total() <= later, compiled


# --- the rule by which operators are counted
def test_operators_that_make_or_write_a_tensor_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.ones(4, 4)
    with steps.Operators(monkeypatch) as operators:
        x.view(16).t().detach().unsqueeze(0).expand(2, 16), torch.empty(3), torch.empty_like(x), x.new_empty(2)
        x.unbind(), x.split(2), x.is_same_size(x)
        assert not +operators.launching
        x.add_(1), x.view(2, 8).copy_(torch.zeros(2, 8)), x + x, x.contiguous(), x.clone(), x.max(0)
        torch._foreach_add_([x, x], 1), torch.add(x, x, out=torch.empty(4, 4))
        assert operators.waits == 0
        x.sum().item()
    counted = {"add_": 1, "copy_": 1, "zeros": 1, "add": 2, "clone": 1, "max": 1, "_foreach_add_": 1, "sum": 1}
    assert +operators.launching == counted and operators.waits == 1
