"""After a step that was skipped, failed or was interrupted, and after a change of weights in between, training goes on
as in the standard mode, where PyTorch does the counting."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import NoReturn

import pytest
import torch
import torch.nn.functional as F
from replayed import Replayed
from torch import Tensor, nn

import wsn_fast.optim.capture as capture
from wsn_fast import WSN, capture_step, convert
from wsn_fast.optim import SubnetSGD

Optimizer = torch.optim.Optimizer
Work = Callable[[WSN, Optimizer, Tensor], object]
MODES = pytest.mark.parametrize("mode", ["one pass", "guarded"])


def optimizer_of(wsn: WSN, mode: str) -> Optimizer:
    if mode == "guarded":
        params = [p for p in wsn.parameters() if p.requires_grad]
        return wsn.guard(torch.optim.SGD(params, 0.05, momentum=0.9, nesterov=True))
    return SubnetSGD(wsn, 0.05, momentum=0.9, nesterov=True, one_pass=mode == "one pass")


def begun(mode: str, gates_ahead: bool = False) -> tuple[WSN, Optimizer]:
    """In the second task."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(9, 14), nn.Tanh(), nn.Linear(14, 3)).double()
    wsn = WSN(convert(net, density=0.4, heads="2"), gates_ahead=gates_ahead)
    for task in range(2):
        torch.manual_seed(task)
        wsn.begin_task(task)
        optimizer = optimizer_of(wsn, mode)
        wsn.zero_grad()
        if task == 0:
            loss_of(wsn, 0).backward()
            optimizer.step()
            wsn.end_task()
    return wsn, optimizer


def loss_of(wsn: WSN, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(8, 9, generator=generator, dtype=torch.float64)
    return F.cross_entropy(wsn(x), torch.randint(3, (8,), generator=generator))


# --- when a loop drops its gradients, and how
def by_hand(wsn: WSN, optimizer: Optimizer) -> None:
    for p in wsn.parameters():
        p.grad = None


HOW: dict[str, Callable[[WSN, Optimizer], object]] = {
    "optimizer": lambda wsn, optimizer: optimizer.zero_grad(),
    "optimizer, in place": lambda wsn, optimizer: optimizer.zero_grad(set_to_none=False),
    "module": lambda wsn, optimizer: wsn.zero_grad(),
    "by hand": by_hand,
}
IN_PLACE = "module, in place"
HOW_ELSE = {**HOW, IN_PLACE: lambda wsn, optimizer: wsn.zero_grad(set_to_none=False)}
WHEN = ["before the forward pass", "before the backward pass", "after the step"]


def step_of(wsn: WSN, optimizer: Optimizer, seed: int, when: str, how: str, work: Work | None = None) -> None:
    """One round of a loop; ``work`` takes the place of backward pass and step."""
    drop = HOW_ELSE[how]
    if when == WHEN[0]:
        drop(wsn, optimizer)
    loss = loss_of(wsn, seed)
    if when == WHEN[1]:
        drop(wsn, optimizer)
    if work is None:
        loss.backward()
        optimizer.step()
    else:
        work(wsn, optimizer, loss)
    if when == WHEN[2]:
        drop(wsn, optimizer)


# --- accidents
class Stop(Exception):
    """What ends a step."""


def stop(*_: object) -> NoReturn:
    raise Stop


def clamp(wsn: WSN) -> None:
    """Change what a user may change at any time."""
    with torch.no_grad():
        for layer in wsn.subnet_layers().values():
            layer.weight_score.clamp_(-0.3, 0.3)


def skipped_with_a_clamp(wsn: WSN, optimizer: Optimizer, loss: Tensor) -> None:
    loss.backward()
    clamp(wsn)


def not_finite(wsn: WSN, optimizer: Optimizer, loss: Tensor) -> None:
    best = wsn.trainable_state()
    (loss * torch.nan).backward()
    wsn.load_trainable_state(best)


def loaded(wsn: WSN, optimizer: Optimizer, loss: Tensor) -> None:
    loss.backward()
    wsn.load_state_dict(copy.deepcopy(wsn.state_dict()))


def skipped_by_a_scaler(wsn: WSN, optimizer: Optimizer, loss: Tensor) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    (scaler.scale(loss) * torch.inf).backward()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    clamp(wsn)


def clipped_and_skipped(wsn: WSN, optimizer: Optimizer, loss: Tensor) -> None:
    loss.backward()
    capture.clip_gradients(optimizer, 0.1)
    clamp(wsn)


def stopped_in_backward(wsn: WSN, optimizer: Optimizer, loss: Tensor) -> None:
    hook = wsn.model[0].weight.register_hook(stop)
    with pytest.raises(Stop):
        loss.backward()
    hook.remove()
    clamp(wsn)


def stopped_before_the_step(wsn: WSN, optimizer: Optimizer, loss: Tensor) -> None:
    loss.backward()
    hook = optimizer.register_step_pre_hook(stop)
    with pytest.raises(Stop):
        optimizer.step()
    hook.remove()
    clamp(wsn)


def stopped_after_the_step(wsn: WSN, optimizer: Optimizer, loss: Tensor) -> None:
    loss.backward()
    hook = optimizer.register_step_post_hook(stop)
    with pytest.raises(Stop):
        optimizer.step()
    hook.remove()


def stopped_in_a_closure(wsn: WSN, optimizer: Optimizer, loss: Tensor) -> None:
    def closure() -> float:
        loss.backward()
        clamp(wsn)
        raise Stop

    with pytest.raises(Stop):
        optimizer.step(closure)


def refused(wsn: WSN, optimizer: Optimizer, loss: Tensor) -> None:
    loss.backward()
    with wsn.use_task(0), pytest.raises(RuntimeError, match="leave use_task before a training step"):
        optimizer.step()
    clamp(wsn)


def stopped_in_forward(wsn: WSN, optimizer: Optimizer, loss: Tensor) -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        wsn(torch.ones(2, 5).double())
    clamp(wsn)


def another_forward(wsn: WSN, optimizer: Optimizer, loss: Tensor) -> None:
    loss.backward()
    clamp(wsn)
    loss_of(wsn, 99)  # in training mode and without a backward pass


def another_density(wsn: WSN, optimizer: Optimizer, loss: Tensor) -> None:
    loss.backward()
    wsn.model[0].density = 0.6


ACCIDENTS: list[Work] = [
    skipped_with_a_clamp, not_finite, loaded, skipped_by_a_scaler, clipped_and_skipped, stopped_in_backward,
    stopped_before_the_step, stopped_after_the_step, stopped_in_a_closure, refused, stopped_in_forward, another_forward,
    another_density,
]  # fmt: skip
each_accident = pytest.mark.parametrize("accident", ACCIDENTS, ids=lambda work: work.__name__)


def assert_close(mine: WSN, theirs: WSN) -> None:
    for (name, a), b in zip(mine.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")


@each_accident
@pytest.mark.parametrize("when", WHEN)
@pytest.mark.parametrize("mode", ["one pass", "guarded", "one pass, gates ahead", "guarded, gates ahead"])
def test_training_goes_on_as_in_the_standard_mode(mode: str, when: str, accident: Work) -> None:
    for how in HOW:
        ends = []
        for one in (mode, "standard"):
            wsn, optimizer = begun(one.partition(",")[0], gates_ahead="ahead" in one)
            for seed in range(6):
                step_of(wsn, optimizer, seed, when, how, accident if seed == 2 else None)
            wsn.verify()
            ends.append(wsn)
        assert_close(*ends)


@each_accident
@pytest.mark.parametrize("when", WHEN)
def test_gradients_that_a_module_sets_to_zero_stop_a_run_at_most_once(when: str, accident: Work) -> None:
    """They cannot be told from those of an earlier pass."""
    wsn, optimizer = begun("one pass")
    errors = 0
    for seed in range(6):
        before = wsn.model[0].weight_score.detach().clone()
        try:
            step_of(wsn, optimizer, seed, when, IN_PLACE, accident if seed == 2 else None)
        except RuntimeError as error:
            assert "changed between the forward pass and the step" in str(error)
            errors += 1
        else:
            assert seed == 2 or not torch.equal(wsn.model[0].weight_score, before)
    assert errors <= 1
    wsn.verify()


# --- what has to be refused still is, and once
def test_gradients_of_different_weights_are_not_added_up() -> None:
    wsn, optimizer = begun("one pass")
    loss_of(wsn, 0).backward()
    clamp(wsn)
    loss_of(wsn, 1).backward()
    before = [p.detach().clone() for p in wsn.parameters()]
    with pytest.raises(RuntimeError, match=r"0\.weight, its scores or its rule changed.*were dropped"):
        optimizer.step()
    assert all(map(torch.equal, wsn.parameters(), before))
    assert all(gate.param.grad is None for _, gate in wsn.gated())
    loss_of(wsn, 2).backward()
    optimizer.step()


def test_gradients_of_different_densities_are_not_added_up() -> None:
    """The step would use the mask of the last one for all of them."""
    wsn, optimizer = begun("one pass")
    loss_of(wsn, 0).backward()
    wsn.model[0].density = 0.7
    loss_of(wsn, 1).backward()
    with pytest.raises(RuntimeError, match=r"0\.weight, its scores or its rule changed"):
        optimizer.step()


def test_a_gradient_that_is_dropped_late_frees_all_passes_before_it() -> None:
    """Two passes wait with a gradient of other scores; it goes before the first of the two backward passes."""
    ends = []
    for mode in ("one pass", "standard"):
        wsn, optimizer = begun(mode)
        loss_of(wsn, 0).backward()
        clamp(wsn)
        first, second = loss_of(wsn, 1), loss_of(wsn, 2)
        by_hand(wsn, optimizer)
        second.backward()
        first.backward()
        optimizer.step()
        ends.append(wsn)
    assert_close(*ends)


def test_clipping_that_is_out_of_date_is_refused_once() -> None:
    """A module that sets gradients to zero in place leaves them where they were clipped."""
    wsn, optimizer = begun("one pass")
    assert isinstance(optimizer, SubnetSGD)
    errors = []
    for seed in range(4):
        loss = loss_of(wsn, seed)
        wsn.zero_grad(set_to_none=False)
        loss.backward()
        try:
            optimizer.clip_grad_norm_(0.1)
            if seed != 1:
                optimizer.step()
        except RuntimeError as error:
            errors.append(str(error))
    assert len(errors) == 1 and "gradients changed after clip_grad_norm_" in errors[0]


class Switching(nn.Module):
    """A layer that may be left out."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.seldom, self.last = nn.Linear(9, 9), nn.Linear(9, 9), nn.Linear(9, 3)
        self.use_seldom = True

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        return self.last(self.seldom(x) if self.use_seldom else x)


def test_a_layer_may_be_left_out_after_a_module_has_set_gradients_to_zero() -> None:
    torch.manual_seed(0)
    net = Switching().double()
    wsn = WSN(convert(net, density=0.4, heads="last"))
    wsn.begin_task(0)
    optimizer = SubnetSGD(wsn, 0.05, one_pass=True)
    for seed in range(4):
        net.use_seldom = seed % 2 == 0
        wsn.zero_grad(set_to_none=False)
        before = net.seldom.weight.detach().clone()
        loss_of(wsn, seed).backward()
        optimizer.step()
        assert torch.equal(net.seldom.weight, before) != net.use_seldom


def test_a_loss_may_leave_out_the_scores_after_a_module_has_set_gradients_to_zero() -> None:
    wsn, optimizer = begun("one pass")
    (loss_of(wsn, 0) + wsn.model[0].weight_score.sum()).backward()
    with pytest.raises(RuntimeError, match=r"the scores of 0\.weight have a gradient of their own"):
        optimizer.step()
    wsn.zero_grad(set_to_none=False)
    loss_of(wsn, 1).backward()
    optimizer.step()


# --- captured
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("at", range(6))
@pytest.mark.parametrize("mode", ["one pass", "standard"])
def test_a_captured_step_goes_on_as_the_loop(
    mode: str, at: int, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error in the warm-up, in the capture or in a replay, and a change of weights: the step is repeated."""
    monkeypatch.setattr(capture, "obstacle_of", lambda device: "")
    (wsn, optimizer), (plain, other) = begun(mode), begun("standard")
    for group in (*optimizer.param_groups, *other.param_groups):
        group["lr"] = 0.0625  # a float32, as a captured step has it
    calls = 0

    def loss_fn(seed: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == at + 1:
            raise error("injected")
        return loss_of(wsn, int(seed))

    monkeypatch.setattr(capture, "new_graph", lambda: Replayed(wsn, optimizer))
    step, errors = capture_step(wsn, optimizer, loss_fn), 0
    for seed in range(8):
        try:
            step(torch.tensor(seed))
        except error:
            errors += 1
            clamp(wsn), clamp(plain)
            step(torch.tensor(seed))
        step_of(plain, other, seed, WHEN[0], "optimizer")
    assert errors == 1 and step.captured
    wsn.verify()
    assert_close(wsn, plain)
