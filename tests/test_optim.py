"""The subnet optimizers: the same training as torch's optimizers under the guard, and nothing frozen moves."""

from __future__ import annotations

import contextlib
import copy
import gc
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wsn_fast import WSN, convert
from wsn_fast.backends import torch as portable
from wsn_fast.optim import SubnetAdamW, SubnetSGD

Make = Callable[[WSN], torch.optim.Optimizer]


def by_kind(wsn: WSN, decay: float) -> list[dict[str, object]]:
    """Weight decay for everything but scores, as the one-pass optimizers have it."""
    trained = [(name, p) for name, p in wsn.named_parameters() if p.requires_grad]
    scores = [p for name, p in trained if name.endswith("_score")]
    rest = [p for name, p in trained if not name.endswith("_score")]
    return [{"params": rest, "weight_decay": decay}, {"params": scores, "weight_decay": 0.0}]


def pairs_of(one_pass: bool) -> dict[str, tuple[Make, Make]]:
    """By kind: torch's optimizer under the guard, and ours."""
    return {
        "adamw": (
            lambda wsn: wsn.guard(torch.optim.AdamW(by_kind(wsn, 0.1), 0.01)),
            lambda wsn: SubnetAdamW(wsn, 0.01, weight_decay=0.1, one_pass=one_pass),
        ),
        "adam": (
            lambda wsn: wsn.guard(torch.optim.Adam(by_kind(wsn, 0.1), 0.01)),
            lambda wsn: SubnetAdamW(wsn, 0.01, weight_decay=0.1, decoupled=False, one_pass=one_pass),
        ),
        "sgd": (
            lambda wsn: wsn.guard(torch.optim.SGD(by_kind(wsn, 0.1), 0.05)),
            lambda wsn: SubnetSGD(wsn, 0.05, weight_decay=0.1, one_pass=one_pass),
        ),
        "nesterov": (
            lambda wsn: wsn.guard(torch.optim.SGD(by_kind(wsn, 0.0), 0.05, momentum=0.9, nesterov=True)),
            lambda wsn: SubnetSGD(wsn, 0.05, momentum=0.9, nesterov=True, one_pass=one_pass),
        ),
        "dampened": (
            lambda wsn: wsn.guard(torch.optim.SGD(by_kind(wsn, 0.1), 0.05, momentum=0.9, dampening=0.5)),
            lambda wsn: SubnetSGD(wsn, 0.05, momentum=0.9, dampening=0.5, weight_decay=0.1, one_pass=one_pass),
        ),
    }


PAIRS = pairs_of(True) | {f"{kind}, standard": pair for kind, pair in pairs_of(False).items()}


def make_wsn(rule: str = "magnitude", dtype: torch.dtype = torch.float64) -> WSN:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(9, 14), nn.ReLU(), nn.Linear(14, 7), nn.ReLU(), nn.Linear(7, 3)).to(dtype)
    return WSN(convert(net, density=0.4, heads="4", rule=rule))


def batch(task: int, step: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 * task + step)
    x = torch.randn(16, 9, generator=generator, dtype=torch.float64)
    return x.to(dtype), torch.randint(3, (16,), generator=generator)


def train(wsn: WSN, make: Make, tasks: int = 2, steps: int = 100, accumulate: int = 1) -> list[Tensor]:
    """The masks after every step."""
    masks = []
    for task in range(tasks):
        torch.manual_seed(task)  # for the new head
        wsn.begin_task(task)
        optimizer = make(wsn)
        for step in range(steps):
            for part in range(accumulate):
                x, y = batch(task, step * accumulate + part, next(wsn.parameters()).dtype)
                F.cross_entropy(wsn(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
            masks += [m for layer in wsn.subnet_layers().values() for m in layer.masks_of_scores().values()]
        wsn.end_task()
    return masks


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("rule", ["magnitude", "value"])
@pytest.mark.parametrize("kind", PAIRS)
def test_two_hundred_steps_are_those_of_torch_under_the_guard(kind: str, rule: str, accumulate: int) -> None:
    found, expected = make_wsn(rule), make_wsn(rule)
    for mine, theirs in zip(
        train(found, PAIRS[kind][1], accumulate=accumulate),
        train(expected, PAIRS[kind][0], accumulate=accumulate),
        strict=True,
    ):
        assert torch.equal(mine, theirs)
    for mine, theirs in zip(found.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-9)
    found.verify()


@pytest.mark.parametrize("kind", PAIRS)
def test_finished_tasks_stay_the_same_to_the_bit_in_float32(kind: str) -> None:
    wsn = make_wsn(dtype=torch.float32)
    x, _ = batch(9, 9, torch.float32)
    train(wsn, PAIRS[kind][1], tasks=1, steps=10)
    with wsn.use_task(0), torch.no_grad():
        before = wsn(x)
    for task in (1, 2):
        wsn.begin_task(task)
        optimizer = PAIRS[kind][1](wsn)
        for step in range(10):
            inputs, labels = batch(task, step, torch.float32)
            with torch.autocast("cpu", torch.bfloat16, enabled=task == 2):
                loss = F.cross_entropy(wsn(inputs), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        wsn.end_task()
    with wsn.use_task(0), torch.no_grad():
        assert torch.equal(wsn(x), before)
    wsn.verify()


def begun(kind: str) -> tuple[WSN, torch.optim.Optimizer]:
    wsn = make_wsn()
    train(wsn, PAIRS[kind][1], tasks=1, steps=3)
    wsn.begin_task(1)
    return wsn, PAIRS[kind][1](wsn)


def backward(wsn: WSN, scale: float = 1.0) -> None:
    x, y = batch(1, 0)
    (F.cross_entropy(wsn(x), y) * scale).backward()


def test_the_weight_gets_the_gradient_of_the_masked_weight_and_the_scores_none() -> None:
    wsn, _ = begun("adamw")
    backward(wsn)
    layer = wsn.subnet_layers()["0"]
    assert layer.weight_score.grad is None
    assert layer.weight.grad[~layer.masks_of_scores()["weight"]].count_nonzero() > 0


def test_the_state_goes_to_torch_and_back() -> None:
    wsn, optimizer = begun("adam")
    backward(wsn)
    optimizer.step()
    state = optimizer.state_dict()
    torchs = torch.optim.Adam(by_kind(wsn, 0.1), 0.5)
    torchs.load_state_dict(state)
    assert torchs.param_groups[0]["lr"] == 0.01
    again = SubnetAdamW(wsn, 0.3, weight_decay=0.1, decoupled=False, one_pass=True)
    again.load_state_dict(torchs.state_dict())
    backward(wsn)
    again.step()
    assert {int(s["step"]) for s in again.state.values()} == {2}


def test_a_schedule_and_a_closure_work() -> None:
    wsn, optimizer = begun("nesterov")
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.0)
    x, y = batch(1, 0)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(wsn(x), y)
        loss.backward()
        return loss

    before = [p.clone() for p in wsn.parameters()]
    assert optimizer.step(closure) > 0
    assert any(not torch.equal(p, b) for p, b in zip(wsn.parameters(), before, strict=True))
    schedule.step()  # to a learning rate of zero
    before = [p.clone() for p in wsn.parameters()]
    optimizer.step(closure)
    assert all(torch.equal(p, b) for p, b in zip(wsn.parameters(), before, strict=True))


def test_grad_scaler_unscales_and_skips() -> None:
    results = []
    for scaled in (False, True):
        wsn, optimizer = begun("adamw")
        if scaled:
            scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
            backward(wsn, scaler.get_scale())
            scaler.scale(torch.zeros(()))  # which makes its tensors
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            kept = [p.clone() for p in wsn.parameters()]
            scaler.scale(torch.zeros(()))
            backward(wsn, float("inf"))
            scaler.step(optimizer)
            assert all(torch.equal(p, k) for p, k in zip(wsn.parameters(), kept, strict=True))
        else:
            backward(wsn)
            optimizer.step()
        results.append([p.detach().clone() for p in wsn.parameters()])
    torch.testing.assert_close(*results, rtol=0, atol=1e-12)


def test_hooks_run_once_a_step() -> None:
    wsn, optimizer = begun("adamw")
    torch.optim.Adam([torch.zeros(1, requires_grad=True)]).step()  # torch wraps the step of its class now
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    backward(wsn)
    optimizer.step()
    assert calls == ["before", "after"]


def test_another_optimizer_does_not_take_a_gradient_that_is_not_its() -> None:
    wsn, _ = begun("adamw")
    backward(wsn)
    standard = torch.optim.AdamW([p for p in wsn.parameters() if p.requires_grad])
    wsn.guard(standard)
    assert wsn.subnet_layers()["0"].weight.grad is None, "a raw gradient is nothing for another optimizer"
    backward(wsn)
    assert wsn.subnet_layers()["0"].weight_score.grad is not None
    standard.step()


@pytest.mark.parametrize("kind", [SubnetAdamW, SubnetSGD])
def test_wrong_settings_are_refused(kind: type[torch.optim.Optimizer]) -> None:
    wsn = make_wsn()
    wsn.begin_task(0)
    with pytest.raises(ValueError, match="score_weight_decay must be a number of at least 0, got -1"):
        kind(wsn, score_weight_decay=-1)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=r"wsn must be a wsn_fast\.WSN, got Linear"):
        kind(nn.Linear(2, 2))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="learning rate"):
        kind(wsn, -1.0)


# --- what the optimizers cannot take in one pass, they treat as torch's would
def same_as_torch(prepare: Callable[[WSN], None], make: Callable[[], WSN] = make_wsn) -> WSN:
    """Two steps of the second task, one-pass and by torch under the guard, end alike."""
    ends = []
    for build in reversed(PAIRS["adam"]):
        wsn = make()
        train(wsn, PAIRS["adam"][1], tasks=1, steps=3)
        torch.manual_seed(1)
        wsn.begin_task(1)
        prepare(wsn)
        optimizer = build(wsn)
        for _ in range(2):
            optimizer.zero_grad()
            backward(wsn)
            optimizer.step()
        ends.append(wsn)
    for mine, theirs in zip(ends[0].parameters(), ends[1].parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-9)
    ends[0].end_task()
    ends[0].verify()
    return ends[0]


@pytest.mark.parametrize("name", ["weight", "bias", "weight_score", "bias_score"])
def test_what_is_frozen_by_hand_stays_and_the_rest_learns(name: str) -> None:
    same_as_torch(lambda wsn: getattr(wsn.subnet_layers()["0"], name).requires_grad_(False))


def tied() -> WSN:
    torch.manual_seed(0)
    shared = nn.Linear(9, 9)
    net = nn.Sequential(shared, nn.ReLU(), nn.Linear(9, 9), nn.ReLU(), nn.Linear(9, 3)).double()
    net[2].weight = shared.weight
    return WSN(convert(net, density=0.4, heads="4"))


def test_tied_layers_learn_as_with_torch() -> None:
    same_as_torch(lambda wsn: None, tied)


def test_tied_layers_have_one_density() -> None:
    wsn = tied()
    with pytest.raises(ValueError, match=r"density of 2 is 0\.8, and that of 0, tied to it, 0\.2"):
        wsn.begin_task(0, density={"0": 0.2, "2": 0.8})
    assert wsn.current_task is None


def test_weight_and_scores_of_different_dtypes() -> None:
    wsn = make_wsn(dtype=torch.float32)
    layer = wsn.subnet_layers()["0"]
    layer.weight_score = nn.Parameter(layer.weight_score.double())
    wsn.begin_task(0)
    optimizer = SubnetAdamW(wsn, one_pass=True)
    x, y = batch(0, 0, torch.float32)
    F.cross_entropy(wsn(x), y).backward()
    before = layer.weight_score.clone()
    optimizer.step()
    assert not torch.equal(before, layer.weight_score)


def test_the_mode_ends_with_the_optimizer_and_is_not_copied() -> None:
    wsn, optimizer = begun("adamw")
    layer = wsn.subnet_layers()["0"]
    assert layer.one_pass and not copy.deepcopy(wsn).subnet_layers()["0"].one_pass
    pickle.loads(pickle.dumps(wsn))
    del optimizer
    gc.collect()
    assert not layer.one_pass


def test_a_gradient_past_the_mask_is_refused() -> None:
    wsn, optimizer = begun("sgd")
    layer = wsn.subnet_layers()["0"]
    with torch.no_grad():
        wsn(batch(1, 0)[0])
    layer.weight.square().sum().backward()
    before = layer.weight.clone()
    with pytest.raises(RuntimeError, match="reads it past its mask"):
        optimizer.step()
    assert torch.equal(layer.weight, before)


def test_scores_follow_their_own_group() -> None:
    wsn, optimizer = begun("adamw")
    layer = wsn.subnet_layers()["0"]
    group = optimizer.param_groups[1]
    group["params"] = [p for p in group["params"] if p is not layer.weight_score]
    optimizer.add_param_group({"params": [layer.weight_score], "lr": 0.0})
    backward(wsn)
    before = layer.weight_score.clone()
    optimizer.step()
    assert torch.equal(layer.weight_score, before)


def test_guarding_again_adds_no_guard() -> None:
    wsn, optimizer = begun("adam")
    hooks = len(optimizer._optimizer_step_pre_hooks)
    wsn.guard(optimizer)
    assert len(optimizer._optimizer_step_pre_hooks) == hooks
    assert wsn.subnet_layers()["0"].one_pass


def test_unknown_flags_of_a_loaded_state_are_refused() -> None:
    wsn, optimizer = begun("adam")
    optimizer.param_groups[0]["amsgrad"] = True
    backward(wsn)
    with pytest.raises(ValueError, match="amsgrad must be False"):
        optimizer.step()


def test_what_a_step_writes_is_noticed_by_autograd() -> None:
    wsn, optimizer = begun("sgd")
    weight = wsn.subnet_layers()["0"].weight
    backward(wsn)
    kept = weight.square().sum()
    version = weight._version
    optimizer.step()
    assert weight._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kept.backward()


def test_compiled_layers_hand_over_raw_gradients_too() -> None:
    wsn, optimizer = begun("adamw")
    twin, other = begun("adamw")
    compiled = torch.compile(wsn, fullgraph=True, backend="aot_eager")
    x, y = batch(1, 0)
    F.cross_entropy(compiled(x), y).backward()
    backward(twin)
    optimizer.step()
    other.step()
    for mine, theirs in zip(wsn.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)


# --- what reviews found
@pytest.mark.parametrize("kind", ["adamw", "adamw, standard"])
@pytest.mark.parametrize("where", ["closure", "hook"])
def test_a_change_of_hands_within_a_step_is_refused_and_moves_nothing_frozen(kind: str, where: str) -> None:
    wsn, optimizer = begun(kind)

    def disturb(*_: object) -> None:
        for _, gate in wsn.gated():
            gate.score.requires_grad_(False)
            gate.score.grad = None

    def closure() -> Tensor:
        if where == "closure":
            disturb()
        optimizer.zero_grad()
        x, y = batch(1, 0)
        loss = F.cross_entropy(wsn(x), y)
        loss.backward()
        return loss

    if where == "hook":
        backward(wsn)
        optimizer.register_step_pre_hook(disturb)
    with contextlib.suppress(RuntimeError):
        optimizer.step(closure if where == "closure" else None)
    wsn.verify()


@pytest.mark.parametrize("one_pass", [False, True])
def test_a_first_gradient_may_come_late(one_pass: bool) -> None:
    wsn = make_wsn()
    wsn.begin_task(0)
    optimizer = SubnetSGD(wsn, 0.1, momentum=0.9, one_pass=one_pass)
    extra = nn.Parameter(torch.ones(2, dtype=torch.float64))
    optimizer.add_param_group({"params": [extra]})
    for step in range(3):
        optimizer.zero_grad()
        backward(wsn)
        if step:
            extra.sum().backward()
        optimizer.step()
    assert (extra < 1).all()


def test_a_gradient_replaced_after_clipping_is_refused() -> None:
    wsn, optimizer = begun("sgd")
    backward(wsn, 1e4)
    assert isinstance(optimizer, SubnetSGD)
    optimizer.clip_grad_norm_(1.0)
    weight = wsn.subnet_layers()["0"].weight
    assert weight.grad is not None
    weight.grad = weight.grad.clone()
    before = weight.clone()
    with pytest.raises(RuntimeError, match="gradients changed after clip_grad_norm_"):
        optimizer.step()
    assert torch.equal(weight, before)


def test_a_step_that_failed_is_still_clipped_when_repeated() -> None:
    wsn, optimizer = begun("sgd")
    assert isinstance(optimizer, SubnetSGD)
    backward(wsn, 1e4)
    optimizer.clip_grad_norm_(1.0)
    before = [p.detach().clone() for p in wsn.parameters()]
    optimizer.param_groups[0]["maximize"] = True
    with pytest.raises(ValueError, match="maximize"):
        optimizer.step()
    optimizer.param_groups[0]["maximize"] = False
    optimizer.step()
    for param, kept in zip(wsn.parameters(), before, strict=True):
        assert (param - kept).norm() <= 1


def test_a_layer_may_be_skipped_after_gradients_were_set_to_zero() -> None:
    wsn, optimizer = begun("sgd")
    backward(wsn)
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    wsn.model[4].head(1)(torch.ones(2, 7, dtype=torch.float64)).sum().backward()
    optimizer.step()


def test_gradients_of_an_optimizer_that_died_go_with_it() -> None:
    wsn, optimizer = begun("sgd")
    backward(wsn)
    del optimizer
    gc.collect()
    wsn.guard(torch.optim.SGD(wsn.parameters(), 1.0))
    weight = wsn.subnet_layers()["0"].weight
    assert weight.grad is None and weight.grad_dtype is weight.dtype


def test_a_hook_on_the_weight_sees_its_dtype() -> None:
    wsn = make_wsn(dtype=torch.float32)
    wsn.begin_task(0)
    optimizer = SubnetAdamW(wsn, one_pass=True)
    weight = wsn.subnet_layers()["0"].weight
    weight.register_hook(lambda grad: grad.float() * 2)
    x, y = batch(0, 0, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = F.cross_entropy(wsn(x), y)
    loss.backward()
    assert weight.grad is not None and weight.grad.dtype is torch.float32
    optimizer.step()


def test_the_portable_step_that_runs_out_of_memory_leaves_frozen_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    wsn, optimizer = begun("adamw")
    for layer in wsn.subnet_layers().values():
        layer.backend = "torch"
    backward(wsn)

    def fail(*_: object) -> Tensor:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(portable, "threshold", fail)  # after the update, for the next gate
    with pytest.raises(torch.OutOfMemoryError):
        optimizer.step()
    wsn.verify()
