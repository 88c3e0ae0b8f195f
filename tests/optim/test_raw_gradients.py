"""In the one-pass mode the gradient of a weight is that of the masked weight and nothing else: whatever came past the
layer is refused with the name of the tensor, and whatever training loops do with gradients is accepted."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from wsn_fast import WSN, convert
from wsn_fast.optim import SubnetAdamW, SubnetSGD

X = torch.randn(12, 9, generator=torch.Generator().manual_seed(5))
REFUSED = r"^enc\.{} has a gradient that did not come through its layer"


class Net(nn.Module):
    def __init__(self, extra: Callable[[nn.Module, Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.enc, self.conv, self.out = nn.Linear(9, 9), nn.Conv1d(1, 2, 3, padding=1), nn.Linear(18, 9)
        self.extra = extra

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(self.enc(x).tanh()[:, None]).flatten(1)
        y = self.out(y)
        return y if self.extra is None else self.extra(self, y)


def begun(extra: Any = None, steps: int = 0, **how: Any) -> tuple[WSN, Any]:
    """With ``steps``, the gates of the next pass are made ahead, and one Function gives all of them."""
    torch.manual_seed(0)
    wsn = WSN(convert(Net(), density=0.4))
    wsn.begin_task(1)
    optimizer = SubnetAdamW(wsn, 0.01, one_pass=True, **how)
    for _ in range(steps):
        backward(wsn)
        optimizer.step()
        optimizer.zero_grad()
    wsn.model.extra = extra
    return wsn, optimizer


def loss_of(wsn: WSN, x: Tensor = X) -> Tensor:
    return wsn(x).square().mean()


def backward(wsn: WSN, more: Any = 0.0) -> None:
    (loss_of(wsn) + more).backward()


def weight(wsn: WSN, name: str = "weight") -> Any:
    return getattr(wsn.model.enc, name)


def penalty(wsn: WSN, name: str = "weight") -> Tensor:
    return weight(wsn, name).square().sum()


AHEAD = pytest.mark.parametrize("steps", [0, 2], ids=["a Function per layer", "one Function"])


# --- refused ---------------------------------------------------------------------------------------------------------
def in_the_same_loss(wsn: WSN) -> None:
    backward(wsn, penalty(wsn))


def before_the_layer_is_used(wsn: WSN) -> None:
    more = penalty(wsn)  # backward reaches it last, or first
    (more + loss_of(wsn)).backward()


def in_a_pass_of_its_own_before(wsn: WSN) -> None:
    penalty(wsn).backward()
    backward(wsn)


def in_a_pass_of_its_own_after(wsn: WSN) -> None:
    backward(wsn)
    penalty(wsn).backward()


def in_the_last_of_several_passes(wsn: WSN) -> None:
    backward(wsn)
    backward(wsn)
    backward(wsn, penalty(wsn))


def in_the_first_of_several_passes(wsn: WSN) -> None:
    backward(wsn, penalty(wsn))
    backward(wsn)


def between_two_passes(wsn: WSN) -> None:
    backward(wsn)
    penalty(wsn).backward()
    backward(wsn)


def of_a_loss_that_does_not_use_the_layer(wsn: WSN) -> None:
    wsn(X)
    penalty(wsn).backward()


def with_a_gradient_that_is_scaled_later(wsn: WSN) -> None:
    backward(wsn, penalty(wsn))
    nn.utils.clip_grad_norm_(wsn.parameters(), 0.1)


def through_a_transposed_view(wsn: WSN) -> None:
    """Its gradient has another layout than the weight."""
    (F.linear(X, weight(wsn).t()).square().mean() + loss_of(wsn)).backward()


def under_autocast(wsn: WSN) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        more = F.linear(X, weight(wsn)).float().square().mean()
        loss = loss_of(wsn).float()
    (loss + more).backward()


def after_gradients_were_zeroed_in_place(wsn: WSN) -> None:
    backward(wsn)
    wsn.zero_grad(set_to_none=False)
    backward(wsn, penalty(wsn))


BYPASSES = [
    in_the_same_loss, before_the_layer_is_used, in_a_pass_of_its_own_before, in_a_pass_of_its_own_after,
    in_the_last_of_several_passes, in_the_first_of_several_passes, between_two_passes,
    of_a_loss_that_does_not_use_the_layer, with_a_gradient_that_is_scaled_later, through_a_transposed_view,
    under_autocast, after_gradients_were_zeroed_in_place,
]  # fmt: skip


@AHEAD
@pytest.mark.parametrize("bypass", BYPASSES, ids=lambda f: f.__name__)
def test_a_gradient_that_came_past_the_layer_is_refused(bypass: Callable[[WSN], None], steps: int) -> None:
    wsn, optimizer = begun(steps=steps)
    before = {name: tensor.clone() for name, tensor in wsn.state_dict().items()}
    bypass(wsn)
    for _ in range(2):  # the same again
        with pytest.raises(RuntimeError, match=REFUSED.format("weight")):
            optimizer.step()
    assert all(torch.equal(tensor, before[name]) for name, tensor in wsn.state_dict().items())
    optimizer.zero_grad()
    backward(wsn)
    optimizer.step()  # and training goes on


@AHEAD
def test_biases_are_refused_too(steps: int) -> None:
    wsn, optimizer = begun(steps=steps)
    backward(wsn, penalty(wsn, "bias"))
    with pytest.raises(RuntimeError, match=REFUSED.format("bias")):
        optimizer.step()


@AHEAD
def test_a_tied_decoder_that_reads_the_weight_is_masked_and_not_refused(steps: int) -> None:
    wsn, optimizer = begun(lambda net, y: F.linear(y, net.enc.weight.t()), steps=steps)
    backward(wsn)
    optimizer.step()
    wsn.end_task(probe=X)


def test_clipping_with_the_optimizer_refuses_it() -> None:
    wsn, optimizer = begun()
    backward(wsn, penalty(wsn))
    with pytest.raises(RuntimeError, match=REFUSED.format("weight")):
        optimizer.clip_grad_norm_(1.0)


# --- accepted --------------------------------------------------------------------------------------------------------
def scaled(wsn: WSN) -> None:
    backward(wsn)
    for p in wsn.parameters():
        if p.grad is not None:
            p.grad.mul_(0.5)


def replaced(wsn: WSN) -> None:
    backward(wsn)
    for p in wsn.parameters():
        p.grad = None if p.grad is None else p.grad * 0.5


def clipped_by_torch(wsn: WSN) -> None:
    backward(wsn)
    nn.utils.clip_grad_norm_(wsn.parameters(), 0.1)


def accumulated(wsn: WSN) -> None:
    for _ in range(3):
        backward(wsn)


def accumulated_and_scaled_between(wsn: WSN) -> None:
    for _ in range(3):
        scaled(wsn)


def accumulated_with_autocast_between(wsn: WSN) -> None:
    for autocast in (True, False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = loss_of(wsn).float()
        loss.backward()


def zeroed_in_place(wsn: WSN) -> None:
    backward(wsn)
    wsn.zero_grad(set_to_none=False)
    backward(wsn)


def after_a_gradient_that_was_dropped(wsn: WSN) -> None:
    penalty(wsn).backward()
    wsn.zero_grad()
    backward(wsn)


def after_a_gradient_that_was_zeroed(wsn: WSN) -> None:
    penalty(wsn).backward()
    wsn.zero_grad(set_to_none=False)
    backward(wsn)


def after_gradients_that_nobody_stored(wsn: WSN) -> None:
    torch.autograd.grad(loss_of(wsn) + penalty(wsn), [weight(wsn)])
    backward(wsn)


def with_a_retained_graph(wsn: WSN) -> None:
    loss = loss_of(wsn)
    loss.backward(retain_graph=True)
    loss.backward()


def with_a_graph_of_the_gradients(wsn: WSN) -> None:
    loss_of(wsn).backward(create_graph=True)
    for p in wsn.parameters():
        p.grad = None if p.grad is None else p.grad.detach()


def with_a_hook_that_returns_another_gradient(wsn: WSN) -> None:
    handle = weight(wsn).register_hook(lambda grad: grad * 0.5)
    for _ in range(2):
        backward(wsn)
    handle.remove()


def with_the_penalty_on_the_masked_weight(wsn: WSN) -> None:
    more = wsn.model.enc.masked("weight", torch.float32).square().sum()
    backward(wsn, more)


def read_without_gradients(wsn: WSN) -> None:
    backward(wsn, penalty(wsn).detach())


def with_a_layer_that_is_called_twice(wsn: WSN) -> None:
    backward(wsn, wsn.model.enc(X).square().mean())


def after_a_pass_that_failed(wsn: WSN) -> None:
    def fail(grad: Tensor) -> None:
        raise ValueError("on purpose")

    y = wsn.model.enc(X)
    y.register_hook(fail)
    with pytest.raises(ValueError, match="on purpose"):
        wsn.model.out(wsn.model.conv(y[:, None]).flatten(1)).sum().backward()
    wsn.zero_grad()
    backward(wsn)


def with_activation_checkpointing(wsn: WSN) -> None:
    for reentrant in (True, False):
        x = X.clone().requires_grad_()
        y = checkpoint(wsn.model.enc, x, use_reentrant=reentrant)
        wsn.model.out(wsn.model.conv(y[:, None]).flatten(1)).square().mean().backward()


def with_reentrant_checkpointing_of_some_layers(wsn: WSN) -> None:
    """The gate that was made ahead gets no gradient, but the layer in the checkpoint makes another one."""
    x = X.clone().requires_grad_()

    class Checkpointed(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return checkpoint(type(layer).forward, layer, x, use_reentrant=True)

    layer = wsn.model.enc
    wsn.model.enc = Checkpointed()
    try:
        wsn(x).square().mean().backward()
    finally:
        wsn.model.enc = layer


def with_a_loss_of_a_part(wsn: WSN) -> None:
    """The other layers get no gradient."""
    wsn.zero_grad()
    loss_of(wsn).backward()
    wsn.model.enc(X).square().mean().backward()


def with_inputs_without_a_batch(wsn: WSN) -> None:
    """The gradient of the output is that of both biases, one and the same tensor."""
    (wsn.model.enc(X[0]) + wsn.model.out(torch.cat([X[1], X[2]]))).sum().backward()


def with_a_gradient_that_changes_no_bit(wsn: WSN) -> None:
    backward(wsn, penalty(wsn) * 1e-30)


def scaled_by_a_scaler(wsn: WSN, optimizer: Any) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(loss_of(wsn)).backward()
    scaler.unscale_(optimizer)
    optimizer.clip_grad_norm_(0.1)


ACCEPTED = [
    scaled, replaced, clipped_by_torch, accumulated, accumulated_and_scaled_between, accumulated_with_autocast_between,
    zeroed_in_place, after_a_gradient_that_was_dropped, after_a_gradient_that_was_zeroed,
    after_gradients_that_nobody_stored, with_a_retained_graph, with_a_graph_of_the_gradients,
    with_a_hook_that_returns_another_gradient, with_the_penalty_on_the_masked_weight, read_without_gradients,
    with_a_layer_that_is_called_twice, after_a_pass_that_failed, with_activation_checkpointing,
    with_reentrant_checkpointing_of_some_layers, with_a_loss_of_a_part,
    with_inputs_without_a_batch, with_a_gradient_that_changes_no_bit,
]  # fmt: skip


@AHEAD
@pytest.mark.filterwarnings("ignore:Using backward\\(\\) with create_graph=True")
@pytest.mark.parametrize("use", ACCEPTED, ids=lambda f: f.__name__)
def test_what_training_loops_do_is_accepted(use: Callable[[WSN], None], steps: int) -> None:
    wsn, optimizer = begun(steps=steps)
    for _ in range(2):
        use(wsn)
        before = weight(wsn).detach().clone()
        optimizer.step()
        assert not torch.equal(weight(wsn), before)
        optimizer.zero_grad()


@AHEAD
def test_a_scaler_is_accepted(steps: int) -> None:
    wsn, optimizer = begun(steps=steps)
    for _ in range(2):
        scaled_by_a_scaler(wsn, optimizer)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("form", [
    lambda net: net.to(memory_format=torch.channels_last),
    lambda net: net.double(),
    lambda net: net.bfloat16(),
], ids=["channels last", "float64", "bfloat16"])  # fmt: skip
@pytest.mark.parametrize("bypass", [False, True])
def test_any_layout_and_dtype(form: Callable[[nn.Module], nn.Module], bypass: bool) -> None:
    net = form(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(4, 2, 2), nn.Flatten(), nn.Linear(50, 3)))
    wsn = WSN(convert(net, density=0.4))
    wsn.begin_task(1)
    optimizer = SubnetSGD(wsn, 0.01, momentum=0.9, one_pass=True)
    x = torch.randn(2, 3, 6, 6, dtype=net[0].weight.dtype)
    for _ in range(3):
        optimizer.zero_grad()
        wsn(x).square().mean().backward()
        optimizer.step()
    optimizer.zero_grad()
    if bypass:
        (wsn(x).square().mean() + net[0].weight.square().sum()).backward()
        with pytest.raises(RuntimeError, match=r"0\.weight has a gradient that did not come through its layer"):
            optimizer.step()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch.compile looks at it
@pytest.mark.parametrize("whole", [True, False], ids=["torch.compile(wsn)", "wsn.compile()"])
def test_compiled_models_train(whole: bool) -> None:
    torch.compiler.reset()
    wsn, optimizer = begun(steps=2)
    run = torch.compile(wsn, backend="aot_eager") if whole else wsn
    if not whole:
        wsn.compile(backend="aot_eager")
    for step in range(4):
        optimizer.zero_grad()
        for _ in range(1 + step % 2):
            run(X).square().mean().backward()
        optimizer.step()


def test_gradients_keep_their_memory() -> None:
    """Looking at them must not make autograd copy them."""
    wsn, _optimizer = begun(steps=2)
    handed = []
    for layer in wsn.subnet_layers().values():
        for gate in layer.gated():
            handed.append((gate.param, layer.gate_state.about_raw(gate.name)))
    backward(wsn)
    assert all(param.grad.data_ptr() == about.address for param, about in handed)
    assert all(about.storage is None and about.open == 0 for _, about in handed)


def test_without_an_optimizer_nothing_is_watched() -> None:
    wsn, optimizer = begun(steps=1)
    del optimizer
    gc.collect()
    backward(wsn)
    assert not any(param._post_accumulate_grad_hooks for param in wsn.parameters())


def test_copies_of_the_model_train_by_themselves() -> None:
    wsn, optimizer = begun(steps=2)
    twin = copy.deepcopy(wsn)
    other = SubnetAdamW(twin, 0.01, one_pass=True)
    backward(twin, penalty(twin))
    backward(wsn)
    optimizer.step()
    with pytest.raises(RuntimeError, match=REFUSED.format("weight")):
        other.step()
