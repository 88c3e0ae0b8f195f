"""Changes of what a gate depends on, all of which Python can see: a gate that was made before is stale after each."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from one_pass_models import layer_of
from torch import Tensor, nn

from wsn_fast import WSN


def edit(name: str, how: Callable[[Tensor], object]) -> Callable[[WSN], None]:
    @torch.no_grad()
    def change(wsn: WSN) -> None:
        for layer in wsn.subnet_layers().values():
            how(getattr(layer, name))

    return change


def in_inference_mode(wsn: WSN) -> None:
    with torch.inference_mode():
        layer_of(wsn).weight_score.mul_(-1).add_(0.1)


def stepped_by(make: Callable[[list[Tensor]], torch.optim.Optimizer]) -> Callable[[WSN], None]:
    """An optimizer that nobody guards, on some scores and weights of one layer."""

    def change(wsn: WSN) -> None:
        params = [layer_of(wsn).weight_score, layer_of(wsn).bias]
        other = make(params)
        for p in params:
            p.grad = torch.randn_like(p)
        other.step()
        other.zero_grad()

    return change


def shrunk(wsn: WSN) -> None:
    for layer in wsn.subnet_layers().values():
        layer.density = 0.2


def ruled(wsn: WSN) -> None:
    for layer in wsn.subnet_layers().values():
        layer.rule = "value"


def for_one_task(wsn: WSN) -> None:
    layer_of(wsn).task_density = 0.15


def other_state(wsn: WSN) -> dict[str, Tensor]:
    """Of this model, with other weights and scores."""
    other = copy.deepcopy(wsn)
    with torch.no_grad():
        for layer in other.subnet_layers().values():
            layer.weight_score.copy_(torch.randn_like(layer.weight_score))
    return other.state_dict()


def loaded_by_layer(wsn: WSN) -> None:
    state = {k.removeprefix("model.0."): v for k, v in other_state(wsn).items() if k.startswith("model.0.")}
    layer_of(wsn).load_state_dict(state)


def loaded(wsn: WSN) -> None:
    wsn.load_state_dict(other_state(wsn))


def loaded_around(wsn: WSN) -> None:
    nn.ModuleDict({"inner": wsn}).load_state_dict({f"inner.{k}": v for k, v in other_state(wsn).items()})


def reset(wsn: WSN) -> None:
    for layer in wsn.subnet_layers().values():
        layer.reset_scores("N01")


def tensors_replaced(wsn: WSN) -> None:
    """As Module.to does it."""
    wsn._apply(lambda t: t * 2 - 0.1 if t.is_floating_point() else t)


def from_a_vector(wsn: WSN) -> None:
    params = [layer_of(wsn).weight_score]
    vector = nn.utils.parameters_to_vector(params).detach()
    nn.utils.vector_to_parameters(vector.flip(0), params)


def swapped(wsn: WSN) -> None:
    """Weights and scores of two layers of one shape change places."""
    a, b = layer_of(wsn).weight_score, torch.randn_like(layer_of(wsn).weight_score)
    a.data, b.data = b.data, a.data


CHANGES: dict[str, Callable[[WSN], None]] = {
    "load_state_dict": loaded,
    "load_state_dict of a layer": loaded_by_layer,
    "load_state_dict of a parent": loaded_around,
    "reset_scores": reset,
    "weights": edit("weight", lambda t: t.mul_(-2)),
    "scores": edit("weight_score", lambda t: t.copy_(torch.randn_like(t))),
    "scores of the bias": edit("bias_score", lambda t: t.copy_(torch.randn_like(t))),
    "one score": edit("weight_score", lambda t: t[0, 1:2].fill_(9.0)),
    "a transposed view": edit("weight_score", lambda t: t.t()[1].zero_()),
    "a detached alias": edit("weight", lambda t: t.detach().view(-1)[3:5].neg_()),
    "foreach": edit("weight_score", lambda t: torch._foreach_mul_([t], -0.5)),
    "out": edit("weight_score", lambda t: torch.add(t, torch.randn_like(t), out=t)),
    "init": edit("weight_score", lambda t: nn.init.uniform_(t)),
    "index_put": edit("weight_score", lambda t: t.__setitem__(t < 0, 0.7)),
    "inference mode": in_inference_mode,
    "an optimizer, in a loop": stepped_by(lambda params: torch.optim.SGD(params, 3.0, foreach=False)),
    "an optimizer, foreach": stepped_by(lambda params: torch.optim.SGD(params, 3.0, foreach=True)),
    "density": shrunk,
    "density of the task": for_one_task,
    "rule": ruled,
    "tensors replaced": tensors_replaced,
    "vector_to_parameters": from_a_vector,
    "data swapped": swapped,
}
