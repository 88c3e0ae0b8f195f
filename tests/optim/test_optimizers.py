"""The subnet optimizers: the same training as torch's optimizers under the guard, and nothing frozen moves."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from optimizer_pairs import PAIRS, backward, batch, begun, by_kind, make_wsn, train
from torch import Tensor, nn

from wsn_fast.optim.optimizers import SubnetAdamW, SubnetSGD


# Every kind, rule and number of accumulated gradients in the ordinary run; every combination in the run of .ci/run.
@pytest.mark.parametrize(
    ("kind", "rule", "accumulate"),
    [
        pytest.param(
            kind, rule, accumulate, marks=[] if number % 2 == (rule == "value") == accumulate - 1 else pytest.mark.ci
        )
        for number, kind in enumerate(PAIRS)
        for rule in ("magnitude", "value")
        for accumulate in (1, 2)
    ],
)
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
