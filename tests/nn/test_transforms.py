"""Subnet layers under ``torch.func``: functional_call in training, transforms with respect to inputs for a finished
task, and a reason for all else."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from small_models import batches, convnet, run_tasks
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vjp, vmap

from wsn_fast import WSN, FastSubnetConv2d, FastSubnetLinear, TaskHeads, to_dense
from wsn_fast.optim import SubnetSGD

Function = Callable[[Tensor], Tensor]
X = batches(0, 1, 3)[0][0]


def total(function: Function) -> Function:
    return lambda x: function(x).square().sum()


OF_INPUTS: dict[str, Callable[[Function], Any]] = {
    "grad": lambda f: grad(total(f))(X),
    "vjp": lambda f: vjp(f, X)[1](torch.ones(3, 3))[0],
    "vmap": lambda f: vmap(lambda x: f(x[None]))(X),
    "jvp": lambda f: jvp(f, (X,), (X,))[1],
    "jacrev": lambda f: jacrev(f)(X),
    "jacfwd": lambda f: jacfwd(f)(X),
    "hessian": lambda f: hessian(total(f))(X),
    "grad of each sample": lambda f: vmap(grad(lambda x: total(f)(x[None])))(X),
}
REFUSED = r"transforms of torch\.func .* do not go through a subnet layer in training.*use_task"


@pytest.fixture(scope="module")
def wsn() -> WSN:
    trained = WSN(convnet())
    run_tasks(trained, [0, 1], lambda params: torch.optim.SGD(params, 0.1), steps=2)
    trained.begin_task(2)
    return trained.eval()


@pytest.mark.parametrize("kept", [False, True], ids=["first", "kept"])
@pytest.mark.parametrize("transform", OF_INPUTS.values(), ids=OF_INPUTS)
def test_a_finished_task_is_transformed_with_respect_to_inputs(
    wsn: WSN, transform: Callable[[Function], Any], kept: bool
) -> None:
    dense = to_dense(wsn, 0).eval()
    with wsn.use_task(0):
        if kept:
            wsn(X)
        torch.testing.assert_close(transform(wsn), transform(dense))
        assert torch.equal(wsn(X), dense(X)), "nothing of the transform may stay"


@pytest.mark.parametrize("transform", OF_INPUTS.values(), ids=OF_INPUTS)
def test_a_task_in_training_is_refused(wsn: WSN, transform: Callable[[Function], Any]) -> None:
    with pytest.raises(RuntimeError, match=REFUSED):
        transform(wsn)
    wsn(X).sum().backward()


@pytest.mark.parametrize("one_pass", [False, True])
def test_gates_that_were_made_ahead_are_refused_too(one_pass: bool) -> None:
    wsn = WSN(convnet(), gates_ahead=True)
    wsn.begin_task(0)
    optimizer = wsn.guard(SubnetSGD(wsn, 0.1, one_pass=one_pass))
    wsn(X).sum().backward()
    optimizer.step()
    wsn.eval()
    with pytest.raises(RuntimeError, match=REFUSED):
        grad(total(wsn))(X)


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Sequential(nn.Flatten(), FastSubnetLinear(36, 3)),
    "without bias": lambda: nn.Sequential(nn.Flatten(), FastSubnetLinear(36, 3, bias=False)),
    "conv": lambda: nn.Sequential(FastSubnetConv2d(1, 2, 3), nn.Flatten()),
}


def call(layer: nn.Module, tensors: Mapping[str, Tensor]) -> Tensor:
    return functional_call(layer, dict(tensors), (X,)).square().sum()  # type: ignore[no-any-return]


OF_WEIGHTS: dict[str, Callable[[nn.Module, dict[str, Tensor]], Any]] = {
    "grad": lambda layer, p: grad(lambda p: call(layer, p))(p),
    "jvp": lambda layer, p: jvp(lambda p: call(layer, p), (p,), (p,)),
    "jacrev": lambda layer, p: jacrev(lambda p: call(layer, p))(p),
    "an ensemble": lambda layer, p: vmap(lambda p: call(layer, p))(stack_module_state([layer, layer])[0]),  # type: ignore[list-item]
}


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize("transform", OF_WEIGHTS.values(), ids=OF_WEIGHTS)
@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_transforms_with_respect_to_weights_are_refused(
    make: Callable[[], nn.Module], transform: Callable[[nn.Module, dict[str, Tensor]], Any], finished: bool
) -> None:
    model = make()
    wsn = WSN(model)
    wsn.begin_task(0)
    if finished:
        wsn.end_task()
        wsn.use_task(0)
    with pytest.raises(RuntimeError, match=REFUSED):
        transform(model, {name: p.detach() for name, p in model.named_parameters()})


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_functional_call_computes_with_what_it_is_given(make: Callable[[], nn.Module]) -> None:
    model, other = make(), make()
    tensors = {name: p.detach().clone().requires_grad_() for name, p in other.named_parameters()}
    gradients = torch.autograd.grad(call(model, tensors), list(tensors.values()))
    other(X).square().sum().backward()
    for found, parameter in zip(gradients, other.parameters(), strict=True):
        torch.testing.assert_close(found, parameter.grad)


def test_heads_are_transformed_like_linear_layers() -> None:
    heads = TaskHeads(4, 3, tasks=[0])
    heads.active = 0
    x = torch.randn(5, 4)
    torch.testing.assert_close(vmap(heads)(x), heads(x))
