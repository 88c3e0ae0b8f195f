"""begin_task and end_task notice that something finished tasks use has changed, before it is too late."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from small_models import batches, convnet, logits, mlp, run_tasks, train
from torch import nn

from wsn_fast import WSN, ForgottenError
from wsn_fast.nn.task_ids import decode_json, encode_json


def adamw(params: object) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, 0.01)  # type: ignore[arg-type]


def trained(wsn: WSN) -> list[torch.nn.Parameter]:
    return [p for p in wsn.parameters() if p.requires_grad]


def finished(tasks: tuple[int, ...] = (0,), model: Callable[[], nn.Module] = convnet) -> WSN:
    wsn = WSN(model())
    run_tasks(wsn, tasks, adamw)
    return wsn


@torch.no_grad()
def _first_frozen(wsn: WSN, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    gate = wsn.model[4]  # type: ignore[index]
    weight, mask = gate.weight, gate.mask("weight", 0)
    flat = weight.view(-1)
    where = mask.view(-1).nonzero()[0]
    flat[where] = change(flat[where])


CHANGES: dict[str, tuple[str, Callable[[WSN], object]]] = {
    "one weight by one ulp": ("4.weight", lambda w: _first_frozen(w, lambda x: x.nextafter(x + 1))),
    "a weight through .data": ("0.weight", lambda w: w.model[0].weight.data.mul_(0.5)),
    "a bias": ("4.bias", lambda w: torch.no_grad()(w.model[4].bias.mul_)(0.5)),
    "the head": ("7.weight", lambda w: w.model[7].head(0).weight.data.add_(1)),
    "the bias of the head": ("7.bias", lambda w: w.model[7].head(0).bias.data[0].add_(1)),
    "a kept norm": ("5.weight", lambda w: w.model[5].weight_tasks[0, 0].add_(1)),
    "kept statistics": ("1.running_mean", lambda w: w.model[1].running_mean_tasks[0].mul_(2)),
    "new data": ("0.weight", lambda w: setattr(w.model[0].weight, "data", torch.randn(4, 1, 3, 3))),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("guarded", [True, False])
def test_end_task_names_what_changed(change: str, guarded: bool) -> None:
    wsn, (name, do) = finished(), CHANGES[change]
    wsn.begin_task(1)
    optimizer = (wsn.guard if guarded else lambda o: o)(torch.optim.SGD(trained(wsn), 0.01))
    train(wsn, optimizer, batches(1, 1))
    do(wsn)
    said = "A guard ran in task 1, so something" if guarded else r"No guard ran in task 1\. Call wsn\.guard"
    with pytest.raises(ForgottenError, match=rf"task 0: {name}\n{said}") as caught:
        wsn.end_task()
    assert {(drift.task, drift.name) for drift in caught.value.drifts} == {(0, name)}


@pytest.mark.parametrize("change", CHANGES)
def test_begin_task_names_what_changed_and_changes_nothing(change: str) -> None:
    wsn, (name, do) = finished(), CHANGES[change]
    do(wsn)
    with pytest.raises(ForgottenError, match=f"task 0: {name}\nThey changed outside of any task"):
        wsn.begin_task(1, density=0.1)
    assert (wsn.current_task, wsn.model[7].tasks, wsn.model[4].gate_density) == (None, [0], 0.4)


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": adamw,
    "sgd with decay": lambda p: torch.optim.SGD(p, 0.1, weight_decay=0.1),
    "adam": lambda p: torch.optim.Adam(p, 0.01, weight_decay=0.1),
    "rprop": lambda p: torch.optim.RMSprop(p, 0.01, weight_decay=0.1),
}


@pytest.mark.parametrize("model", [mlp, convnet])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_no_guard_at_all(name: str, model: Callable[[], nn.Module]) -> None:
    wsn = finished((0, 1), model)
    wsn.begin_task(2)
    before = copy.deepcopy(wsn.state_dict())
    train(wsn, OPTIMIZERS[name](trained(wsn)), batches(2, 3))
    with pytest.raises(ForgottenError, match="No guard ran in task 2") as caught:
        wsn.end_task()
    assert {drift.task for drift in caught.value.drifts} == {0, 1}
    # The task is in progress as before, and nothing is lost: what was trained is there, and the way back works.
    assert (wsn.tasks, wsn.current_task) == ([0, 1], 2)
    assert all(layer.tasks == [0, 1] for layer in wsn.subnet_layers().values())
    wsn.load_state_dict(before)
    train(wsn, wsn.guard(OPTIMIZERS[name](trained(wsn))), batches(2, 3))
    wsn.end_task()
    wsn.verify()


@pytest.mark.parametrize("make_copy", [
    lambda wsn, o: copy.copy(o),
    lambda wsn, o: copy.deepcopy(o, {id(p): p for p in wsn.parameters()}),
    lambda wsn, o: type(o)(o.param_groups),
])  # fmt: skip
def test_a_copy_of_a_guarded_optimizer_is_not_guarded(make_copy: Callable[..., torch.optim.Optimizer]) -> None:
    wsn = finished()
    wsn.begin_task(1)
    optimizer = wsn.guard(adamw(trained(wsn)))
    train(wsn, optimizer, batches(1, 2))
    train(wsn, make_copy(wsn, optimizer), batches(1, 2))
    with pytest.raises(ForgottenError, match=r"an optimizer that is not guarded \(a copy of a guarded one is not\)"):
        wsn.end_task()


def test_a_copy_that_is_guarded_again_keeps() -> None:
    wsn = finished()
    wsn.begin_task(1)
    optimizer = copy.copy(wsn.guard(adamw(trained(wsn))))
    train(wsn, wsn.guard(optimizer), batches(1, 2))
    wsn.end_task()
    wsn.verify()


def test_a_model_and_its_optimizer_copied_together() -> None:
    wsn = finished()
    wsn.begin_task(1)
    other, optimizer = copy.deepcopy((wsn, wsn.guard(adamw(trained(wsn)))))
    train(other, optimizer, batches(1, 2))
    with pytest.raises(ForgottenError, match="No guard ran in task 1"):
        other.end_task()
    wsn.end_task()


def test_an_unguarded_wrapper_around_a_guarded_optimizer() -> None:
    wsn = finished()
    wsn.begin_task(1)
    optimizer = wsn.guard(adamw(trained(wsn)))
    train(wsn, optimizer, batches(1, 1))
    with torch.no_grad():
        for param in trained(wsn):
            param.lerp_(torch.zeros_like(param), 0.1)
    with pytest.raises(ForgottenError, match=r"a wrapper around a guarded optimizer \(guard the wrapper\)"):
        wsn.end_task()


def test_an_optimizer_that_moves_nothing_frozen_needs_no_guard() -> None:
    wsn = finished()
    wsn.begin_task(1)
    train(wsn, torch.optim.SGD(trained(wsn), 0.1), batches(1, 3))
    wsn.end_task()
    wsn.verify()


def test_a_wrong_call_is_reported_before_a_wrong_value() -> None:
    wsn = finished()
    wsn.model[0].weight.data.mul_(0.5)
    with pytest.raises(ValueError, match="has been trained already"):
        wsn.begin_task(0)
    with pytest.raises(RuntimeError, match="no task is in progress"):
        wsn.end_task()


def test_a_cast_model_is_told_how_to_go_on() -> None:
    wsn = finished().double()
    with pytest.raises(ForgottenError, match=r"0\.weight \(float32, now float64\)") as caught:
        wsn.begin_task(1)
    assert "WSN(model) makes a new WSN that takes the finished tasks as they are" in str(caught.value)
    again = WSN(wsn.model)
    again.begin_task(1)
    again.end_task()


# --- saved and loaded ------------------------------------------------------------------------------------------------
def test_a_value_that_changed_in_the_saved_state_is_found_when_the_next_task_begins() -> None:
    state = copy.deepcopy(finished().state_dict())
    state["model.0.weight"] *= 1.5
    wsn = WSN(convnet())
    wsn.load_state_dict(state)
    with pytest.raises(ForgottenError, match=r"0\.weight\nThey changed outside of any task"):
        wsn.begin_task(1)


def test_a_mask_with_other_bits_is_found() -> None:
    state = copy.deepcopy(finished().state_dict())
    state["model.4.weight_masks"] &= 0xFE
    wsn = WSN(convnet())
    wsn.load_state_dict(state)
    with pytest.raises(ForgottenError, match=r"4\.weight \(mask\)"):
        wsn.begin_task(1)


def of_an_earlier_version(wsn: WSN) -> dict[str, torch.Tensor]:
    state = copy.deepcopy(wsn.state_dict())
    register = decode_json(state["_extra_state"])
    assert register.pop("frozen")
    state["_extra_state"] = encode_json(register)
    return state


def test_a_state_of_an_earlier_version_is_trusted_and_stays_what_it_is() -> None:
    wsn = finished()
    state = of_an_earlier_version(wsn)
    fresh = WSN(convnet())
    fresh.load_state_dict(state)
    assert torch.equal(fresh.state_dict()["_extra_state"], state["_extra_state"])
    run_tasks(fresh, [1], adamw)
    assert "frozen" in decode_json(fresh.state_dict()["_extra_state"])
    assert torch.equal(logits(fresh, 0), logits(wsn, 0))


def test_in_a_state_of_an_earlier_version_later_changes_are_found() -> None:
    wsn = finished()
    wsn.begin_task(1)
    fresh = WSN(convnet())
    fresh.load_state_dict(of_an_earlier_version(wsn))
    train(fresh, adamw(trained(fresh)), batches(1, 2))
    with pytest.raises(ForgottenError, match="No guard ran in task 1"):
        fresh.end_task()


def test_after_one_of_an_earlier_version_a_state_with_checksums_is_saved_with_them() -> None:
    wsn, fresh = finished(), WSN(convnet())
    fresh.load_state_dict(of_an_earlier_version(wsn))
    fresh.load_state_dict(copy.deepcopy(wsn.state_dict()))
    assert torch.equal(fresh.state_dict()["_extra_state"], wsn.state_dict()["_extra_state"])


@pytest.mark.parametrize("end", [True, False])
def test_tasks_that_came_with_the_model_are_compared(end: bool) -> None:
    wsn = WSN(finished().model)
    if end:
        wsn.begin_task(1)
    wsn.model[4].weight.data.mul_(2)
    with pytest.raises(ForgottenError, match=r"task 0: 4\.weight"):
        wsn.end_task() if end else wsn.begin_task(1)


def test_the_checksums_are_saved_with_their_dtypes() -> None:
    register = decode_json(finished().state_dict()["_extra_state"])
    assert register["frozen"].keys() == {
        *(f"{n}.{what}" for n in (0, 4) for what in ("weight", "bias")),
        *(f"7.heads.i0.{what}" for what in ("weight", "bias")),
        *(f"{n}.{what}_tasks" for n in (1, 5) for what in ("weight", "bias")),
        *(f"1.{what}_tasks" for what in ("running_mean", "running_var", "num_batches_tracked")),
    }
    for value in register["frozen"].values():
        dtype, digits = value.split()
        assert hasattr(torch, dtype) and len(digits) == 16 and int(digits, 16) >= 0


def test_before_the_first_task_nothing_is_frozen() -> None:
    wsn = WSN(convnet())
    assert "frozen" not in decode_json(wsn.state_dict()["_extra_state"])
    wsn.begin_task(0)
    wsn.model[0].weight.data.mul_(3)
    wsn.end_task()
    with pytest.raises(ForgottenError):
        wsn.model[0].weight.data.mul_(3)
        wsn.begin_task(1)


@pytest.mark.parametrize("change", [lambda union: union.zero_(), lambda union: union.bitwise_not_()])
def test_a_union_that_is_not_that_of_the_masks_is_named(change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """It is derived from the masks. What it lacks is not protected."""
    wsn = finished()
    change(wsn.model[4].weight_union)
    with pytest.raises(ForgottenError, match=r"4\.weight"):
        wsn.begin_task(1)
    with pytest.raises(ForgottenError, match=r"4\.weight \(union of masks\)"):
        wsn.verify()
    wsn.model[4].rebuild_union()
    wsn.verify()
    wsn.begin_task(1)
    F.cross_entropy(wsn(batches(1, 1)[0][0]), batches(1, 1)[0][1]).backward()


def test_a_union_that_is_gone_is_named() -> None:
    wsn = finished()
    wsn.model[4].bias_union = None
    with pytest.raises(ForgottenError, match=r"4\.bias \(union of masks\)"):
        wsn.verify()


def test_a_new_wsn_makes_the_unions_of_the_masks() -> None:
    wsn = finished()
    before = logits(wsn, 0)
    wsn.model[4].weight_union.zero_()
    again = WSN(wsn.model)
    again.verify()
    run_tasks(again, [1], adamw)
    again.verify()
    assert torch.equal(logits(again, 0), before)


# --- what only some models have --------------------------------------------------------------------------------------
BUFFERS: dict[str, tuple[str, Callable[[nn.Module], object]]] = {
    "changed": ("scale", lambda head: head.scale.fill_(2)),
    "removed": ("scale", lambda head: delattr(head, "scale")),
    "added": ("shift", lambda head: head.register_buffer("shift", torch.ones(3))),
}


@pytest.mark.parametrize(
    "call", [lambda wsn: wsn.verify(), lambda wsn: wsn.begin_task(1)], ids=["verify", "begin_task"]
)
@pytest.mark.parametrize("change", BUFFERS)
def test_a_buffer_of_a_head_is_compared(change: str, call: Callable[[WSN], object]) -> None:
    wsn = WSN(convnet())
    wsn.begin_task(0)
    wsn.model[7].head(0).register_buffer("scale", torch.ones(3))
    wsn.end_task()
    name, do = BUFFERS[change]
    do(wsn.model[7].head(0))
    with pytest.raises(ForgottenError, match=rf"task 0: 7\.{name}"):
        call(wsn)


class Shift(nn.Module):
    """Has two parameters, and a buffer that is constant."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.ones(6)), nn.Parameter(torch.zeros(6))
        self.register_buffer("mean", torch.zeros(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x - self.mean) * self.scale + self.shift


@pytest.mark.parametrize("name", ["scale", "shift", "mean"])
def test_verify_names_a_tensor_that_is_declared_frozen(name: str) -> None:
    wsn = WSN(nn.Sequential(Shift(), *mlp()), frozen="0.*")
    run_tasks(wsn, [0], adamw)
    getattr(wsn.model[0], name).data.add_(1)
    with pytest.raises(ForgottenError, match=rf"task 0: 0\.{name}"):
        wsn.verify()


def test_a_constant_that_is_gone_at_the_end_of_the_task_is_an_error() -> None:
    wsn = WSN(nn.Sequential(Shift(), *mlp()), frozen="0.*")
    wsn.begin_task(0)
    wsn.model[0].mean = None
    with pytest.raises(RuntimeError, match=r"0\.mean was a buffer when the task began, and is gone"):
        wsn.end_task()
