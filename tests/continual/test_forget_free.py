"""The promise: after a task has ended its logits stay the same to the bit, whatever is trained afterwards and
however."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest
import torch
import torch.nn.functional as F
from small_models import CLASSES, batches, convnet, logits, mlp, run_tasks, train
from torch import Tensor, nn

from wsn_fast import WSN, FastSubnetLinear, ForgottenError, TaskHeads

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, weight_decay=0.01),
    "sgd_nesterov": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adam": lambda p: torch.optim.Adam(p, 0.01, weight_decay=1e-2),
    "adam_amsgrad_foreach": lambda p: torch.optim.Adam(p, 0.01, amsgrad=True, foreach=True, weight_decay=1e-2),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01),
    "adamw_fused": lambda p: torch.optim.AdamW(p, 0.01, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.9, weight_decay=1e-2),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.01, weight_decay=1e-2),
    "adadelta": lambda p: torch.optim.Adadelta(p, 1.0, weight_decay=1e-2),
    "adamax": lambda p: torch.optim.Adamax(p, 0.01, weight_decay=1e-2),
    "nadam": lambda p: torch.optim.NAdam(p, 0.01, weight_decay=1e-2, decoupled_weight_decay=True),
    "radam": lambda p: torch.optim.RAdam(p, 0.01, weight_decay=1e-2),
    "asgd": lambda p: torch.optim.ASGD(p, 0.05, weight_decay=1e-2),
    "rprop": lambda p: torch.optim.Rprop(p, 0.01),
}


def with_heads(make: Callable[[], nn.Sequential]) -> WSN:
    """All heads from the start, so that one optimizer can hold all parameters over all tasks."""
    wsn = WSN(make())
    heads = wsn.model[-1]
    assert isinstance(heads, TaskHeads)
    for task in range(3):
        heads.add(task)
    return wsn


def unchanged_after_two_more_tasks(wsn: WSN, optimizer: torch.optim.Optimizer, step: Callable[..., None]) -> bool:
    """Train tasks 0, 1, 2 with one optimizer (so that momentum is kept) and compare task 0 and 1 along the way."""
    known: dict[int, Tensor] = {}
    same = True
    for task in range(3):
        wsn.begin_task(task)
        step(wsn, optimizer, batches(task, 5))
        wsn.end_task()
        known[task] = logits(wsn, task)
        same &= all(torch.equal(logits(wsn, t), before) for t, before in known.items())
    return same


@pytest.mark.parametrize("model", [mlp, convnet])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_with_any_optimizer_kept_over_all_tasks(name: str, model: Callable[[], nn.Sequential]) -> None:
    wsn = with_heads(model)
    optimizer = wsn.guard(OPTIMIZERS[name](wsn.parameters()))
    before = wsn.model[-3 if model is mlp else 4].weight.clone()
    assert unchanged_after_two_more_tasks(wsn, optimizer, train)
    assert not torch.equal(before, wsn.model[-3 if model is mlp else 4].weight), "the optimizer did train"
    assert wsn.verify().tasks == [0, 1, 2]


@pytest.mark.parametrize("name", ["sgd", "sgd_nesterov", "adam", "adamw", "adamw_fused", "rmsprop"])
def test_without_the_guard_the_same_run_forgets(name: str) -> None:
    wsn = with_heads(mlp)
    with pytest.raises(ForgottenError) as caught:
        unchanged_after_two_more_tasks(wsn, OPTIMIZERS[name](wsn.parameters()), train)
    assert (wsn.tasks, wsn.current_task) == ([0], 1)
    drifted = {drift.name for drift in caught.value.drifts}
    assert "1.weight" in drifted
    assert any(name.startswith("1.weight") for name in str(caught.value).split())


def test_even_plain_sgd_without_decay_needs_the_guard_for_momentum_only() -> None:
    """The masked gradient alone is enough for plain SGD: what the guard adds is protection from the rest."""
    wsn = with_heads(mlp)
    assert unchanged_after_two_more_tasks(wsn, torch.optim.SGD(wsn.parameters(), 0.1), train)


def _clipped(wsn: WSN, optimizer: torch.optim.Optimizer, data: Iterable[tuple[Tensor, Tensor]]) -> None:
    for x, y in data:
        optimizer.zero_grad(set_to_none=False)
        F.cross_entropy(wsn(x), y).backward()
        torch.nn.utils.clip_grad_norm_(wsn.parameters(), 0.1)
        optimizer.step()


def _accumulated(wsn: WSN, optimizer: torch.optim.Optimizer, data: Iterable[tuple[Tensor, Tensor]]) -> None:
    optimizer.zero_grad(set_to_none=False)
    for x, y in data:
        for part in (slice(0, 8), slice(8, 16)):
            F.cross_entropy(wsn(x[part]), y[part]).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)


def _autocast(wsn: WSN, optimizer: torch.optim.Optimizer, data: Iterable[tuple[Tensor, Tensor]]) -> None:
    for x, y in data:
        optimizer.zero_grad(set_to_none=False)
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(wsn(x), y)
        loss.backward()
        optimizer.step()


def _scaled(wsn: WSN, optimizer: torch.optim.Optimizer, data: Iterable[tuple[Tensor, Tensor]]) -> None:
    scaler = torch.amp.GradScaler("cpu")
    for x, y in data:
        optimizer.zero_grad(set_to_none=False)
        with torch.autocast("cpu", torch.float16):
            loss = F.cross_entropy(wsn(x), y)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()


def _scheduled(wsn: WSN, optimizer: torch.optim.Optimizer, data: Iterable[tuple[Tensor, Tensor]]) -> None:
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    for batch in data:
        train(wsn, optimizer, [batch])
        scheduler.step()


def _closure(wsn: WSN, optimizer: torch.optim.Optimizer, data: Iterable[tuple[Tensor, Tensor]]) -> None:
    for x, y in data:

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            optimizer.zero_grad(set_to_none=False)
            loss = F.cross_entropy(wsn(x), y)
            loss.backward()
            return loss

        optimizer.step(closure)  # type: ignore[arg-type]


@pytest.mark.parametrize("step", [_clipped, _accumulated, _autocast, _scaled, _scheduled, _closure])
@pytest.mark.parametrize("model", [mlp, convnet])
def test_with_every_way_to_step(model: Callable[[], nn.Sequential], step: Callable[..., None]) -> None:
    wsn = with_heads(model)
    assert unchanged_after_two_more_tasks(wsn, wsn.guard(OPTIMIZERS["adamw"](wsn.parameters())), step)
    wsn.verify()


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.compiler)])
def test_with_torch_compile(backend: str) -> None:
    wsn = with_heads(mlp)
    compiled = torch.compile(wsn.model, fullgraph=True, dynamic=False, backend=backend)

    def step(wsn: WSN, optimizer: torch.optim.Optimizer, data: Iterable[tuple[Tensor, Tensor]]) -> None:
        for x, y in data:
            optimizer.zero_grad(set_to_none=False)
            F.cross_entropy(compiled(x), y).backward()
            optimizer.step()

    assert unchanged_after_two_more_tasks(wsn, wsn.guard(OPTIMIZERS["adamw"](wsn.parameters())), step)
    with torch.no_grad(), wsn.use_task(1):
        torch.testing.assert_close(compiled(batches(5, 1)[0][0]), wsn(batches(5, 1)[0][0]))


@pytest.mark.parametrize("model", [mlp, convnet])
@pytest.mark.parametrize("rule", ["magnitude", "value"])
@pytest.mark.parametrize("density", [0.03, 0.5, 1.0])
def test_with_rules_densities_and_fresh_optimizers(
    model: Callable[..., nn.Sequential], rule: str, density: float
) -> None:
    wsn = WSN(model(density, rule), reinit_scores=rule == "value")
    run_tasks(wsn, [0], OPTIMIZERS["adamw"])
    first = logits(wsn, 0)
    run_tasks(wsn, [1, 2], OPTIMIZERS["adamw"])
    assert torch.equal(logits(wsn, 0), first)
    wsn.verify()


def test_across_a_checkpoint_inside_a_task() -> None:
    wsn = with_heads(convnet)
    run_tasks(wsn, [0], OPTIMIZERS["adamw"])
    first = logits(wsn, 0)
    wsn.begin_task(1)
    optimizer = wsn.guard(OPTIMIZERS["adamw"](wsn.parameters()))
    train(wsn, optimizer, batches(1, 3))
    saved, saved_optimizer = wsn.state_dict(), optimizer.state_dict()

    resumed = with_heads(convnet)
    resumed.load_state_dict(saved, strict=True)
    optimizer = resumed.guard(OPTIMIZERS["adamw"](resumed.parameters()))
    optimizer.load_state_dict(saved_optimizer)
    assert resumed.current_task == 1
    train(resumed, optimizer, batches(1, 3))
    resumed.end_task()
    assert torch.equal(logits(resumed, 0), first)
    resumed.verify()


def test_using_an_old_task_in_training_mode_leaves_its_statistics_alone() -> None:
    wsn = with_heads(convnet)
    run_tasks(wsn, [0, 1], OPTIMIZERS["sgd"])
    first = logits(wsn, 0)
    wsn.train()
    with wsn.use_task(0):
        wsn(torch.randn(16, 1, 6, 6))
    assert torch.equal(logits(wsn, 0), first)
    wsn.verify()


def test_the_logits_of_a_task_do_not_depend_on_the_batch() -> None:
    wsn = with_heads(convnet)
    run_tasks(wsn, [0], OPTIMIZERS["sgd"])
    x = batches(99, 1)[0][0].double()
    wsn.double().eval()
    with torch.no_grad(), wsn.use_task(0):
        torch.testing.assert_close(wsn(x[:3]), wsn(x)[:3], rtol=1e-12, atol=1e-12)


class ReadsPastTheMask(nn.Module):
    """Uses a gated weight without calling its layer, and does not read the attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.gated = FastSubnetLinear(36, 12)
        self.heads = TaskHeads(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.heads(F.linear(x.flatten(1), self.gated._parameters["weight"]))
        return out


def test_a_module_that_reads_past_the_mask_is_found_at_the_first_step() -> None:
    wsn = WSN(ReadsPastTheMask())
    wsn.begin_task(0)
    with pytest.raises(RuntimeError, match=r"gated\.weight has a gradient and its scores have none"):
        train(wsn, wsn.guard(torch.optim.SGD(wsn.parameters(), 0.1)), batches(0, 1))


def test_lbfgs_is_refused_with_the_reason() -> None:
    wsn = with_heads(mlp)
    with pytest.raises(TypeError, match="must not be LBFGS: it moves the weights and evaluates"):
        wsn.guard(torch.optim.LBFGS(wsn.parameters()))


def test_an_optimizer_of_another_model_is_refused() -> None:
    with pytest.raises(ValueError, match="holds no parameter of this model"):
        with_heads(mlp).guard(torch.optim.SGD(nn.Linear(2, 2).parameters(), 0.1))


def test_something_that_is_no_optimizer_is_refused() -> None:
    with pytest.raises(TypeError, match=r"must be a torch\.optim\.Optimizer, .* got dict"):
        with_heads(mlp).guard({})  # type: ignore[arg-type]
