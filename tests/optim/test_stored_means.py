"""Running means in fewer bytes: what the optimizers store, and that it goes with them wherever their state goes."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from elementwise import assert_same_bits
from one_pass_models import MODES, each_backend
from optimizer_pairs import by_kind
from torch import Tensor, nn

from wsn_fast import WSN, convert, explain
from wsn_fast.backends import moments
from wsn_fast.backends.moments import Stored
from wsn_fast.optim import SubnetAdamW, SubnetSGD

KINDS: dict[str, Callable[..., Any]] = {
    "adamw": lambda wsn, **how: SubnetAdamW(wsn, 0.01, weight_decay=0.1, **how),
    "momentum": lambda wsn, **how: SubnetSGD(wsn, 0.05, momentum=0.9, weight_decay=0.1, **how),
}
STORED: dict[str, dict[str, str]] = {
    "8bit": {"moments": "8bit"},
    "bfloat16": {"moments": "bfloat16"},
    "8bit and float32": {"moments": "8bit", "score_moments": "float32"},
}
DTYPES = {"8bit": torch.uint8, "bfloat16": torch.bfloat16, "float32": torch.float32}
KIND = pytest.mark.parametrize("kind", KINDS)
HOW = pytest.mark.parametrize("how", STORED.values(), ids=STORED)


def make_wsn(backend: str | None = "torch") -> WSN:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(9, 40), nn.LayerNorm(40), nn.ReLU(), nn.Linear(40, 11), nn.ReLU(), nn.Linear(11, 3))
    wsn = WSN(convert(net, density=0.4, heads="5"))
    for layer in wsn.subnet_layers().values():
        layer.backend = backend
    return wsn


def train(wsn: WSN, optimizer: Any, steps: int = 3, seed: int = 0) -> None:
    for step in range(steps):
        generator = torch.Generator().manual_seed(100 * seed + step)
        x = torch.randn(16, 9, generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(wsn(x), torch.randint(3, (16,), generator=generator)).backward()
        optimizer.step()


def loss_of(wsn: WSN) -> float:
    """On the batch of the first step."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(16, 9, generator=generator)
    return float(F.cross_entropy(wsn(x), torch.randint(3, (16,), generator=generator)).detach())


def trained(kind: str, backend: str | None = "torch", **how: Any) -> tuple[WSN, Any]:
    """In its second task, of which three steps are done."""
    wsn = make_wsn(backend)
    for task in range(2):
        torch.manual_seed(task)
        wsn.begin_task(task)
        optimizer = KINDS[kind](wsn, **how)
        train(wsn, optimizer, seed=task)
        if task == 0:
            wsn.end_task()
    return wsn, optimizer


def tensors_of(wsn: WSN, optimizer: Any) -> dict[str, Tensor]:
    found = {}
    for name, param in wsn.named_parameters():
        found[name] = param.detach()
        found |= {f"{key} of {name}": value for key, value in optimizer.state.get(param, {}).items()}
    return found


def assert_same(mine: tuple[WSN, Any], theirs: tuple[WSN, Any]) -> None:
    found, expected = tensors_of(*mine), tensors_of(*theirs)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype is tensor.dtype, name
        assert_same_bits(found[name], tensor, name)


def saved(optimizer: Any) -> dict[str, Any]:
    """Its state after a way through a file."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    state: dict[str, Any] = torch.load(file)
    return state


def first_gate(wsn: WSN) -> tuple[Tensor, Tensor]:
    layer = wsn.subnet_layers()["0"]
    return layer.weight, layer.weight_score


backend = each_backend


# --- what is stored
@HOW
@KIND
def test_only_gated_tensors_and_scores_are_stored_in_fewer_bytes(kind: str, how: dict[str, str]) -> None:
    wsn, optimizer = trained(kind, **how)
    gated = {id(gate.param): how["moments"] for _, gate in wsn.gated()}
    gated |= {id(gate.score): how.get("score_moments", how["moments"]) for _, gate in wsn.gated()}
    assert len(gated) == 8
    for name, param in wsn.named_parameters():
        storage = gated.get(id(param), "float32")
        for key in optimizer.MEANS if param in optimizer.state else ():
            assert optimizer.state[param][key].dtype is DTYPES[storage], name
            assert (f"{key}_scales" in optimizer.state[param]) == (storage == "8bit"), name


@KIND
def test_the_default_stores_what_torch_stores(kind: str) -> None:
    wsn, optimizer = trained(kind)
    torchs: Any = torch.optim.Adam if kind == "adamw" else torch.optim.SGD
    theirs = torchs([torch.ones(1, requires_grad=True)])
    assert optimizer.state_dict()["param_groups"][0].keys() == theirs.state_dict()["param_groups"][0].keys()
    expected = {"step", "exp_avg", "exp_avg_sq"} if kind == "adamw" else {"momentum_buffer"}
    assert all(optimizer.state[param].keys() == expected for param in first_gate(wsn))


@HOW
@KIND
def test_both_modes_make_the_same_update(kind: str, how: dict[str, str]) -> None:
    assert_same(trained(kind, one_pass=True, **how), trained(kind, **how))


@HOW
@KIND
def test_the_loss_falls(kind: str, how: dict[str, str]) -> None:
    wsn, optimizer = trained(kind, one_pass=True, **how)
    before = loss_of(wsn)
    for _ in range(30):
        train(wsn, optimizer, steps=1)
    assert loss_of(wsn) < before - 0.01


@MODES
@pytest.mark.parametrize("how", [{}, *STORED.values()], ids=["float32", *STORED])
@KIND
def test_finished_tasks_stay_the_same_to_the_bit(kind: str, how: dict[str, str], one_pass: bool, backend: str) -> None:
    wsn, optimizer = trained(kind, backend, one_pass=one_pass, **how)
    x = torch.randn(8, 9)
    with wsn.use_task(0), torch.no_grad():
        before = wsn(x)
    train(wsn, optimizer, steps=10, seed=1)
    wsn.end_task()
    with wsn.use_task(0), torch.no_grad():
        assert_same_bits(wsn(x), before, "logits")
    wsn.verify()


def test_explain_names_the_storage() -> None:
    wsn, _optimizer = trained("adamw", one_pass=True, moments="8bit", score_moments="float32")
    step = next(route for route in explain(wsn.model) if "one-pass step" in route.operation)
    assert step.operation == "one-pass step, moments 8bit, float32 for scores"


@pytest.mark.parametrize("kind", [SubnetAdamW, SubnetSGD])
@pytest.mark.parametrize(
    ("name", "value"), [("moments", "fp8"), ("moments", None), ("moments", 8), ("score_moments", "int4")]
)
def test_an_unknown_storage_is_named(kind: Any, name: str, value: object) -> None:
    wsn = make_wsn()
    wsn.begin_task(0)
    with pytest.raises(ValueError, match=f"^{name} must be one of .*'8bit'.*, got {value!r}$"):
        kind(wsn, **{name: value})


# --- where the state goes
@MODES
@HOW
@KIND
def test_training_goes_on_after_a_load_as_if_it_had_never_stopped(
    kind: str, how: dict[str, str], one_pass: bool, backend: str
) -> None:
    wsn, optimizer = trained(kind, backend, one_pass=one_pass, **how)
    twin = copy.deepcopy(wsn)
    for mine, theirs in zip(twin.subnet_layers().values(), wsn.subnet_layers().values(), strict=True):
        mine.backend = theirs.backend
    again = KINDS[kind](twin, one_pass=one_pass, **how)
    again.load_state_dict(saved(optimizer))
    assert_same((twin, again), (wsn, optimizer))
    for model, one in ((wsn, optimizer), (twin, again)):
        train(model, one, seed=5)
    assert_same((twin, again), (wsn, optimizer))


@pytest.mark.parametrize("how", [{"moments": "8bit"}, {"moments": "bfloat16"}], ids=["8bit", "bfloat16"])
def test_the_state_of_torchs_adam_is_converted_and_goes_back(how: dict[str, str]) -> None:
    wsn, _ = trained("adamw")
    torchs = wsn.guard(torch.optim.AdamW(by_kind(wsn, 0.1), 0.01))
    train(wsn, torchs, steps=5)
    ours = KINDS["adamw"](wsn, **how)
    ours.load_state_dict(saved(torchs))
    plain = KINDS["adamw"](wsn)
    plain.load_state_dict(saved(ours))
    back = torch.optim.AdamW(by_kind(wsn, 0.1), 0.01)
    back.load_state_dict(saved(plain))
    for param in first_gate(wsn):
        start, middle, end = (one.state[param] for one in (torchs, ours, back))
        assert int(middle["step"]) == int(end["step"]) == 5
        for key, signed in ours.MEANS.items():
            stored = Stored(middle[key], middle.get(f"{key}_scales"))
            assert stored.storage == how["moments"]
            assert_same_bits(end[key], moments.decode(stored, param, signed), key)
            top = float(start[key].abs().max())
            torch.testing.assert_close(end[key], start[key], rtol=1 / 16, atol=top * 2.0**-8)


def test_a_loaded_float32_state_keeps_its_bits_in_float32() -> None:
    wsn, optimizer = trained("adamw")
    again = KINDS["adamw"](wsn)
    again.load_state_dict(saved(optimizer))
    assert_same((wsn, again), (wsn, optimizer))


@pytest.mark.parametrize("way", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))], ids=["copy", "pickle"])
@HOW
@KIND
def test_a_copy_trains_on_with_the_same_means(kind: str, how: dict[str, str], way: Callable[[Any], Any]) -> None:
    wsn, optimizer = trained(kind, **how)
    twin, again = way((wsn, optimizer))
    twin.guard(again)
    for model, one in ((wsn, optimizer), (twin, again)):
        for layer in model.subnet_layers().values():
            layer.backend = "torch"
        train(model, one, seed=5)
    assert_same((twin, again), (wsn, optimizer))


@KIND
def test_what_torchs_step_updates_once_comes_back_afterwards(kind: str) -> None:
    """In the standard mode, torch's step updates scores whose weight has no gradient."""
    wsn, optimizer = trained(kind, moments="8bit")
    weight, score = first_gate(wsn)
    key = next(iter(optimizer.MEANS))
    mean = Stored(optimizer.state[score][key], optimizer.state[score][f"{key}_scales"])
    before = moments.decode(mean, score, True)
    optimizer.zero_grad()
    F.cross_entropy(wsn(torch.randn(16, 9)), torch.randint(3, (16,))).backward()
    weight.grad = None
    optimizer.step()
    assert score.grad is not None
    expected = before * 0.9 + score.grad * (0.1 if kind == "adamw" else 1.0)
    torch.testing.assert_close(optimizer.state[score][key], expected)
    train(wsn, optimizer, steps=1)
    assert optimizer.state[score][key].dtype is torch.uint8


def test_the_numbers_of_updates_survive_a_step_that_fails() -> None:
    wsn, optimizer = trained("momentum", moments="8bit")
    counts = [int(optimizer.state[param]["step"]) for param in first_gate(wsn)]
    F.cross_entropy(wsn(torch.randn(16, 9)), torch.randint(3, (16,))).backward()
    optimizer.param_groups[0]["lr"] = "fast"
    with pytest.raises((TypeError, ValueError)):
        optimizer.step()
    assert [int(optimizer.state[param]["step"]) for param in first_gate(wsn)] == counts


def test_a_group_that_is_added_has_float32_means() -> None:
    wsn, optimizer = trained("adamw", moments="8bit")
    extra = nn.Parameter(torch.ones(3))
    optimizer.add_param_group({"params": [extra]})
    (F.cross_entropy(wsn(torch.randn(16, 9)), torch.randint(3, (16,))) + extra.sum()).backward()
    optimizer.step()
    assert optimizer.state[extra]["exp_avg"].dtype is torch.float32


def test_a_state_that_was_moved_key_by_key_trains_on() -> None:
    """As programs do that move the state of an optimizer to another device."""
    wsn, optimizer = trained("adamw", moments="8bit")
    twin, again = copy.deepcopy((wsn, optimizer))
    twin.guard(again)
    for state in again.state.values():
        state.update((key, value.to("cpu", copy=True)) for key, value in state.items())
    for model, one in ((wsn, optimizer), (twin, again)):
        for layer in model.subnet_layers().values():
            layer.backend = "torch"
        train(model, one, seed=5)
    assert_same((twin, again), (wsn, optimizer))


# --- states that do not fit
def broken(change: Callable[[dict[str, Tensor]], object]) -> tuple[WSN, Any, dict[str, Any]]:
    wsn, optimizer = trained("adamw", moments="8bit")
    state = copy.deepcopy(optimizer.state_dict())
    change(next(one for one in state["state"].values() if "exp_avg_scales" in one))
    return wsn, optimizer, state


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda one: one.pop("exp_avg_scales"), "exp_avg must be uint8 with float32 exp_avg_scales, got torch.uint8"),
        (lambda one: one.update(exp_avg=one["exp_avg"][:1]), "exp_avg must have the shape"),
        (lambda one: one.update(exp_avg_sq_scales=torch.ones(7)), "exp_avg_sq_scales must have the shape"),
        (lambda one: one.update(exp_avg=one["exp_avg"].float()), "exp_avg must be uint8 with .*, got torch.float32"),
    ],
    ids=["no scales", "codes", "scales", "dtype"],
)
def test_codes_that_do_not_fit_are_refused(change: Callable[[dict[str, Tensor]], object], message: str) -> None:
    wsn, optimizer, state = broken(change)
    before = {name: tensor.clone() for name, tensor in tensors_of(wsn, optimizer).items()}
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state)
    assert {name: tensor.tolist() for name, tensor in tensors_of(wsn, optimizer).items()} == {
        name: tensor.tolist() for name, tensor in before.items()
    }
