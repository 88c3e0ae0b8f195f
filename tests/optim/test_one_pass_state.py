"""The one-pass mode trains as the standard mode does, whatever a training loop does with optimizers and parameters."""

from __future__ import annotations

import copy
import gc
import itertools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from one_pass_models import (
    CLIP,
    KINDS,
    MODES,
    assert_close,
    assert_ready,
    backward,
    begun,
    both,
    each_backend,
    frozen_of,
    layer_of,
    make_wsn,
    snapshot,
    union_of,
)
from torch import Tensor, nn

from wsn_fast import WSN
from wsn_fast.optim.optimizers import SubnetAdamW, SubnetSGD

backend = each_backend


# --- groups, learning rates
@MODES
def test_each_group_has_its_learning_rate(one_pass: bool) -> None:
    wsn, _ = begun(one_pass=one_pass)
    optimizer = SubnetSGD(wsn, 0.1, one_pass=one_pass, score_weight_decay=0.5)  # scores are a group of their own
    optimizer.param_groups[1]["lr"] = 0.0
    before = {n: p.detach().clone() for n, p in wsn.named_parameters()}
    backward(wsn)
    optimizer.step()
    moved = {n for n, p in wsn.named_parameters() if not torch.equal(p, before[n])}
    assert moved and not any(name.endswith("_score") for name in moved)


@pytest.mark.parametrize("kind", [SubnetAdamW, SubnetSGD])
@MODES
def test_a_learning_rate_may_be_a_tensor(kind: Any, one_pass: bool, backend: str) -> None:
    ends = []
    for lr in (torch.tensor(0.02, dtype=torch.float64), 0.02):
        wsn, _ = begun(backend=backend)
        optimizer = kind(wsn, lr, one_pass=one_pass)
        for step in range(3):
            optimizer.param_groups[0]["lr"] = optimizer.param_groups[0]["lr"] * 0.5
            backward(wsn, step=step)
            optimizer.step()
            optimizer.zero_grad()
        ends.append(wsn)
    assert_close(*ends)


SCHEDULES: dict[str, Callable[[Any], Any]] = {
    "step": lambda o: torch.optim.lr_scheduler.StepLR(o, 2, gamma=0.3),
    "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 5),
    "one cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.05, total_steps=10),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("kind", ["adamw", "momentum"])
def test_schedules(kind: str, schedule: str) -> None:
    """That of a cycle changes betas and momentum, too."""
    ends = []
    for wsn, optimizer in both(kind):
        scheduler = SCHEDULES[schedule](optimizer)
        for step in range(6):
            optimizer.zero_grad()
            backward(wsn, step=step)
            optimizer.step()
            scheduler.step()
        ends.append(wsn)
    assert_close(*ends, atol=1e-9)


@MODES
def test_a_schedule_that_looks_at_the_loss_halves_the_rate(one_pass: bool) -> None:
    _, optimizer = begun(one_pass=one_pass)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
    for _ in range(3):
        scheduler.step(1.0)
    assert optimizer.param_groups[0]["lr"] == 0.01 / 4


@MODES
def test_a_group_that_is_added_learns(one_pass: bool) -> None:
    wsn, optimizer = begun(one_pass=one_pass)
    extra = nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer.add_param_group({"params": [extra], "lr": 0.5, "weight_decay": 0.0})
    backward(wsn)
    extra.sum().backward()
    before = layer_of(wsn).weight.detach().clone()
    optimizer.clip_grad_norm_(1e6)
    optimizer.step()
    torch.testing.assert_close(extra.detach(), torch.full((3,), 0.5).double(), rtol=0, atol=1e-6)
    assert not torch.equal(layer_of(wsn).weight, before)


@pytest.mark.parametrize("guarded", [True, False])
def test_a_layer_that_is_added_later_learns_as_in_the_standard_mode(guarded: bool) -> None:
    ends = []
    for one_pass in (True, False):
        wsn = begun()[0]
        gc.collect()  # nobody owns raw gradients now
        layer = layer_of(wsn)
        for p in layer.parameters():
            p.requires_grad_(False)
        optimizer = KINDS["adamw"](wsn, one_pass=one_pass)
        backward(wsn)
        optimizer.step()
        optimizer.zero_grad()
        for p in layer.parameters():
            p.requires_grad_(True)
        optimizer.add_param_group({"params": list(layer.parameters()), "weight_decay": 0.0})
        if guarded:
            wsn.guard(optimizer)
            assert layer.one_pass == one_pass
        union = union_of(wsn)
        before = [x.clone() for x in frozen_of(wsn, union)]
        for step in (1, 2):
            backward(wsn, step=step)
            optimizer.step()
            optimizer.zero_grad()
        assert all(map(torch.equal, frozen_of(wsn, union), before))
        ends.append(wsn)
    assert_close(*ends)


# --- states
def torchs(kind: str, wsn: WSN) -> torch.optim.Optimizer:
    params = [p for p in wsn.parameters() if p.requires_grad]
    if kind == "adamw":
        return torch.optim.AdamW(params, 0.01, weight_decay=0.0)
    return torch.optim.SGD(params, 0.05, momentum=0.9, nesterov=True)


def ours(kind: str, wsn: WSN, one_pass: bool) -> Any:
    if kind == "adamw":
        return SubnetAdamW(wsn, 0.01, one_pass=one_pass)
    return SubnetSGD(wsn, 0.05, momentum=0.9, nesterov=True, one_pass=one_pass)


MAKERS: dict[str, Callable[[str, WSN], Any]] = {
    "one pass": lambda kind, wsn: ours(kind, wsn, True),
    "standard": lambda kind, wsn: ours(kind, wsn, False),
    "torch": lambda kind, wsn: wsn.guard(torchs(kind, wsn)),
}


@pytest.mark.parametrize("order", list(itertools.permutations(MAKERS)), ids=" to ".join)
@pytest.mark.parametrize("kind", ["adamw", "nesterov"])
def test_a_run_goes_on_with_the_state_of_another_optimizer(kind: str, order: tuple[str, ...], backend: str) -> None:
    """Each takes the state over from the one before; the end is that of one standard run."""
    ends = []
    for names in (order, ("standard",) * 3):
        wsn, _ = begun(backend=backend)
        state = None
        for name in names:
            optimizer = MAKERS[name](kind, wsn)
            if state is not None:
                optimizer.load_state_dict(state)
            for step in range(3):
                backward(wsn, step=step)
                optimizer.step()
                optimizer.zero_grad()
            state = optimizer.state_dict()
        ends.append(wsn)
    assert_close(*ends, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_an_optimizer_that_was_unpickled_takes_its_mode_again(kind: str) -> None:
    wsn, optimizer = begun(kind)
    backward(wsn)
    optimizer.step()
    optimizer.zero_grad()
    twin, copied = pickle.loads(pickle.dumps((wsn, optimizer)))
    assert (optimizer.knows_model, copied.knows_model, copied.one_pass) == (True, False, False)
    copied.attach(twin, True, "float32")
    for model, one in ((wsn, optimizer), (twin, copied)):
        for step in (1, 2):
            backward(model, step=step)
            assert layer_of(model).weight_score.grad is None
            one.step()
            one.zero_grad()
    assert all(map(torch.equal, snapshot(wsn), snapshot(twin)))


def test_attach_with_a_wrong_mode_changes_nothing() -> None:
    wsn, optimizer = begun(one_pass=True)
    with pytest.raises(ValueError, match="accumulate_in must be 'float32' without one_pass=True, got 'bfloat16'"):
        optimizer.attach(wsn, False, "bfloat16")
    assert (optimizer.one_pass, optimizer.accumulate_in) == (True, "float32")


def test_a_state_is_loaded_in_the_middle_of_accumulation() -> None:
    """The gradients at hand stay, as with torch's optimizers."""
    ends = []
    for wsn, optimizer in both():
        backward(wsn)
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        backward(wsn, step=1)
        optimizer.step()
        ends.append(wsn)
    assert_close(*ends)


@pytest.mark.parametrize("flag", ["amsgrad", "maximize"])
@MODES
def test_amsgrad_and_maximize_are_refused_when_built(flag: str, one_pass: bool) -> None:
    wsn = make_wsn()
    wsn.begin_task(0)
    with pytest.raises(ValueError, match=f"{flag} must be False, got True"):
        SubnetAdamW(wsn, one_pass=one_pass, **{flag: True})
    if flag == "maximize":
        with pytest.raises(ValueError, match="maximize must be False, got True"):
            SubnetSGD(wsn, one_pass=one_pass, maximize=True)


@pytest.mark.parametrize("flag", ["amsgrad", "maximize"])
@MODES
def test_amsgrad_and_maximize_are_refused_when_loaded(flag: str, one_pass: bool) -> None:
    wsn, optimizer = begun(one_pass=one_pass)
    theirs = torch.optim.AdamW([p for p in wsn.parameters() if p.requires_grad], 0.5, **{flag: True})
    with pytest.raises(ValueError, match=f"{flag} must be False, got True"):
        optimizer.load_state_dict(theirs.state_dict())
    assert optimizer.param_groups[0]["lr"] == 0.01


@MODES
def test_a_refused_step_changes_nothing(one_pass: bool) -> None:
    wsn, optimizer = begun(one_pass=one_pass)
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1).double())]})
    backward(wsn)
    optimizer.param_groups[0]["maximize"] = True
    before = snapshot(wsn)
    with pytest.raises(ValueError, match="maximize must be False"):
        optimizer.step()
    assert all(map(torch.equal, snapshot(wsn), before))


# --- closures
@pytest.mark.parametrize("kind", KINDS)
def test_closures(kind: str) -> None:
    ends = []
    for how in ("one pass, closure", "standard, closure", "one pass"):
        wsn, optimizer = begun(kind, how.startswith("one pass"))
        union = union_of(wsn)
        kept = [x.clone() for x in frozen_of(wsn, union)]
        for step in range(3):

            def closure(wsn: WSN = wsn, optimizer: Any = optimizer, step: int = step) -> Tensor:
                optimizer.zero_grad()
                loss = backward(wsn, step=step)
                optimizer.clip_grad_norm_(CLIP)
                return loss

            if "closure" in how:
                assert optimizer.step(closure) > 0
            else:
                closure()
                optimizer.step()
            if how.startswith("one pass"):
                assert_ready(wsn, stamped=False)  # the guard may have put back what frozen weights were
        assert all(map(torch.equal, frozen_of(wsn, union), kept))
        ends.append(wsn)
    assert_close(ends[0], ends[1])
    assert_close(ends[0], ends[2])


@MODES
def test_a_closure_that_fails_changes_nothing(one_pass: bool) -> None:
    wsn, optimizer = begun(one_pass=one_pass)
    before = snapshot(wsn)

    def closure() -> None:
        backward(wsn)
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        optimizer.step(closure)
    assert all(map(torch.equal, snapshot(wsn), before))
    optimizer.zero_grad()
    backward(wsn)
    optimizer.step()
    wsn.verify()


# --- parts that do not train
@pytest.mark.parametrize("names", [("weight", "bias"), ("weight_score", "bias_score"), ("bias",), ("weight_score",)])
@pytest.mark.parametrize("when", ["before", "after"])
def test_what_is_frozen_by_hand_stays_in_both_modes(names: tuple[str, ...], when: str) -> None:
    """Before the optimizer is built, or while it lives: only scores have gradients then, or only weights."""
    ends = []
    for wsn, optimizer in both("adam"):
        layer = layer_of(wsn)
        for name in names:
            getattr(layer, name).requires_grad_(False)
        if when == "before":
            optimizer = KINDS["adam"](wsn, one_pass=optimizer.one_pass)
        before = {n: p.detach().clone() for n, p in layer.named_parameters()}
        union = union_of(wsn)
        kept = [x.clone() for x in frozen_of(wsn, union)]
        for step in range(3):
            backward(wsn, step=step)
            optimizer.clip_grad_norm_(CLIP)
            optimizer.step()
            optimizer.zero_grad()
        for name, p in layer.named_parameters():
            assert torch.equal(p, before[name]) == (name in names), name
        assert all(map(torch.equal, frozen_of(wsn, union), kept))
        ends.append(wsn)
    assert_close(*ends)


@pytest.mark.parametrize("first_task", [True, False])
@pytest.mark.parametrize("kind", ["adam", "sgd"])
@pytest.mark.parametrize("name", ["weight", "bias_score"])
def test_what_is_thawed_again_learns_in_both_modes(name: str, kind: str, first_task: bool) -> None:
    """In the first task nothing is put back after a step, which would hide that the gate that is ready is an old
    one."""
    ends = []
    for one_pass in (True, False):
        if first_task:
            wsn = make_wsn()
            wsn.begin_task(0)
            optimizer = KINDS[kind](wsn, one_pass=one_pass)
        else:
            wsn, optimizer = begun(kind, one_pass)
        for frozen in (False, True, False, True, False):
            getattr(layer_of(wsn), name).requires_grad_(not frozen)
            backward(wsn, int(not first_task))
            optimizer.step()
            optimizer.zero_grad()
        ends.append(wsn)
    assert_close(*ends)


@pytest.mark.parametrize("lacking", ["weight", "weight_score"])
def test_gradients_of_one_kind_in_the_standard_mode(lacking: str) -> None:
    """Scores alone learn; weights alone are what a module does that reads them past their mask."""
    wsn, optimizer = begun("adam", one_pass=False)
    layer = layer_of(wsn)
    union = union_of(wsn)
    kept = [x.clone() for x in frozen_of(wsn, union)]
    backward(wsn)
    getattr(layer, lacking).grad = None
    before = {n: p.detach().clone() for n, p in layer.named_parameters()}
    if lacking == "weight_score":
        with pytest.raises(RuntimeError, match=r"0\.weight has a gradient and its scores have none"):
            optimizer.step()
    else:
        optimizer.step()
        assert not torch.equal(layer.weight_score, before["weight_score"])
        assert torch.equal(layer.weight, before["weight"])
    assert all(map(torch.equal, frozen_of(wsn, union), kept))
