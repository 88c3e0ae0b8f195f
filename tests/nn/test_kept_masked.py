"""The masked weights of a finished task are made once while it is in use, and made again when anything changes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from wsn_fast import WSN, FastSubnetLinear, convert, ops
from wsn_fast.nn.gated import SubnetLayer


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The tensors that are masked by a packed mask from now on."""
    found: list[Tensor] = []
    gate_packed = ops.gate_packed

    def counted(weight: Tensor, *args: Any) -> Tensor:
        found.append(weight)
        return gate_packed(weight, *args)

    monkeypatch.setattr(ops, "gate_packed", counted)
    return found


def make_wsn(**options: Any) -> WSN:
    torch.manual_seed(0)
    wsn = WSN(convert(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)), density=0.5), **options)
    for task in (0, 1):
        wsn.begin_task(task)
        for layer in wsn.subnet_layers().values():
            layer.reset_scores()
        wsn.end_task()
    return wsn.eval()


def fresh(wsn: WSN, x: Tensor, task: int) -> Tensor:
    """The logits of a copy of the model that has kept nothing."""
    twin = copy.deepcopy(wsn)
    with torch.no_grad(), twin.use_task(task):
        return twin(x)


X = torch.randn(3, 6, generator=torch.Generator().manual_seed(1))


def test_the_second_batch_makes_nothing(made: list[Tensor]) -> None:
    wsn = make_wsn()
    with torch.no_grad(), wsn.use_task(0):
        first = wsn(X)
        assert len(made) == 4  # two weights, two biases
        assert torch.equal(wsn(X), first) and len(made) == 4


def test_a_task_that_is_left_keeps_nothing(made: list[Tensor]) -> None:
    wsn = make_wsn()
    with torch.no_grad(), wsn.use_task(0):
        wsn(X)
    assert all(not layer.gate_state.kept for layer in wsn.subnet_layers().values())


def test_it_can_be_switched_off(made: list[Tensor]) -> None:
    wsn = make_wsn(keep_masked=False)
    with torch.no_grad(), wsn.use_task(0):
        assert torch.equal(wsn(X), wsn(X)) and len(made) == 8


def first(wsn: WSN) -> SubnetLayer:
    return wsn.subnet_layers()["0"]


def other_mask(wsn: WSN) -> None:
    first(wsn).weight_masks[0] = first(wsn).weight_masks[1]


def replace_weight(wsn: WSN) -> None:
    first(wsn)._parameters["weight"] = nn.Parameter(torch.randn(8, 6))  # the attribute refuses other values


def load_another_state(wsn: WSN) -> None:
    wsn.load_state_dict({name: 2 * t if name.endswith(".weight") else t for name, t in wsn.state_dict().items()})
    wsn.use_task(0)


CHANGES: dict[str, Callable[[WSN], object]] = {
    "in place": lambda wsn: first(wsn).weight.mul_(2),
    "in place through detach": lambda wsn: first(wsn).weight.detach().mul_(2),
    "a bias": lambda wsn: first(wsn).bias.add_(1),  # type: ignore[union-attr]
    "another Parameter": replace_weight,
    "double": lambda wsn: wsn.double(),
    "there and back": lambda wsn: wsn.half().float(),
    "another mask": other_mask,
    "another task": lambda wsn: wsn.use_task(1),
    "another backend": lambda wsn: setattr(first(wsn), "backend", "torch"),
    "a state": load_another_state,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
@torch.no_grad()
def test_what_changes_is_seen(change: Callable[[WSN], object]) -> None:
    wsn = make_wsn()
    wsn.use_task(0)
    wsn(X)
    change(wsn)
    x = X.to(first(wsn).weight.dtype)
    assert torch.equal(wsn(x), fresh(wsn, x, wsn._view.task))  # type: ignore[arg-type]


def test_every_compute_dtype_gets_its_own() -> None:
    wsn = make_wsn()
    with torch.no_grad(), wsn.use_task(0):
        full = wsn(X)
        with torch.autocast("cpu", torch.bfloat16):
            assert wsn(X).dtype is torch.bfloat16
        assert torch.equal(wsn(X), full)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_what_one_mode_keeps_serves_another(mode: Callable[[], Any]) -> None:
    wsn = make_wsn()
    with wsn.use_task(0):
        with torch.inference_mode():
            kept = wsn(X).clone()
        with mode():
            assert torch.equal(wsn(X), kept)
        x = X.clone().requires_grad_()
        wsn(x).sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()


def test_parameters_of_another_copy_get_their_own() -> None:
    wsn = make_wsn()
    others = {name: 2 * p.detach() for name, p in wsn.named_parameters()}
    with torch.no_grad(), wsn.use_task(0):
        before = wsn(X)
        called = torch.func.functional_call(wsn, others, (X,))
        assert not torch.equal(called, before) and torch.equal(wsn(X), before)


def test_a_copy_and_a_pickle_have_none() -> None:
    wsn = make_wsn()
    with torch.no_grad(), wsn.use_task(0):
        wsn(X)
        assert first(wsn).gate_state.kept and not first(copy.deepcopy(wsn)).gate_state.kept


def test_traced_and_compiled_models_hold_no_kept_tensor() -> None:
    wsn = make_wsn()
    with torch.no_grad(), wsn.use_task(0):
        expected = wsn(X)
        compiled = torch.compile(wsn, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(X), expected)
    with torch.no_grad(), wsn.use_task(1):
        torch.testing.assert_close(compiled(X), fresh(wsn, X, 1))


def test_a_mixed_batch_does_not_read_what_is_kept() -> None:
    wsn = make_wsn()
    tasks = [0, 1, 0]
    expected = wsn.forward_tasks(X, tasks, one_pass=False)
    with torch.no_grad(), wsn.use_task(1):
        wsn(X), wsn(X)
        torch.testing.assert_close(wsn.forward_tasks(X, tasks, one_pass=True), expected)


@pytest.mark.parametrize("layer", [nn.Linear(6, 8, bias=False), nn.Conv1d(6, 8, 1), nn.ConvTranspose1d(6, 8, 1)])
def test_other_layers_keep_theirs(layer: nn.Module, made: list[Tensor]) -> None:
    wsn = WSN(convert(nn.Sequential(layer), density=0.5))
    wsn.begin_task(0)
    wsn.end_task()
    x = torch.randn(2, 6, 6)
    with torch.no_grad(), wsn.use_task(0):
        before = wsn(x)
        count = len(made)
        assert count and torch.equal(wsn(x), before) and len(made) == count


def test_a_weight_that_is_computed_is_not_kept() -> None:
    wsn = make_wsn()
    with torch.no_grad(), wsn.use_task(0):
        wsn(X)
        torch.nn.utils.parametrize.register_parametrization(first(wsn), "weight", nn.Tanh(), unsafe=True)
        before = wsn(X)
        first(wsn).parametrizations.weight.original.mul_(3)  # type: ignore[union-attr]
        assert not torch.equal(wsn(X), before)


@pytest.mark.parametrize("ended_in", [torch.inference_mode, torch.no_grad])
def test_a_mask_that_was_made_in_inference_mode_is_applied(ended_in: Callable[[], Any]) -> None:
    """Autograd counts no versions of such a mask, so nothing of it is kept."""
    wsn = make_wsn()
    layer = first(wsn)
    with ended_in():
        layer.weight_view = layer.weight_masks[0].clone()
        here = layer(X)
    expected = torch.nn.functional.linear(X, layer.weight * layer.mask("weight", 0), layer.masked("bias", X.dtype))
    assert torch.equal(layer(X), here) and torch.allclose(here, expected)


def test_masks_that_a_task_gets_in_inference_mode_are_ordinary_tensors() -> None:
    layer = FastSubnetLinear(6, 8)
    with torch.inference_mode():
        layer.append_task("a", {k: ops.pack_mask(m) for k, m in layer.masks_of_scores().items()})
    assert not layer.weight_masks.is_inference() and not layer.bias_masks.is_inference()
    layer.active_row = 0
    assert layer(X).requires_grad is False
