"""How long copies of frozen values are kept, and what does not disturb them."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import foreign_optimizers as foreign
import pytest
import torch
import torch.nn.functional as F
from small_models import batches, convnet, logits, mlp, run_tasks, train
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from wsn_fast import WSN, ForgottenError, UnmaskedReadError
from wsn_fast.optim import SubnetAdamW, SubnetSGD


def adamw(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, 0.01)


def in_second_task(model: Callable[[], nn.Module] = mlp) -> WSN:
    wsn = WSN(model())
    run_tasks(wsn, [0], adamw)
    wsn.begin_task(1)
    return wsn.train()


def loss_of(wsn: WSN, index: int = 0) -> torch.Tensor:
    x, y = batches(1, 2)[index]
    return F.cross_entropy(wsn(x), y)


def scheduled(wsn: WSN) -> torch.optim.Optimizer:
    optimizer = adamw(wsn.parameters())
    torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    return wsn.guard(optimizer)


def guarded_by_two(wsn: WSN) -> torch.optim.Optimizer:
    other = WSN(mlp())
    return wsn.guard(other.guard(adamw([*wsn.parameters(), *other.parameters()])))


ALONE: dict[str, Callable[[WSN], torch.optim.Optimizer]] = {
    "torch's": lambda wsn: wsn.guard(adamw(wsn.parameters())),
    "torch's with a schedule": scheduled,
    "guarded by two models": guarded_by_two,
    "subnet": lambda wsn: SubnetAdamW(wsn, 0.01),
    "subnet, one pass": lambda wsn: SubnetSGD(wsn, 0.01, one_pass=True),
}


@pytest.mark.parametrize("name", ALONE)
def test_nothing_is_kept_where_only_the_step_of_torch_writes(name: str) -> None:
    wsn = in_second_task()
    optimizer = ALONE[name](wsn)
    for _ in range(2):
        assert not wsn._guards.kept
        loss_of(wsn).backward()
        optimizer.step()
    assert not wsn._guards.kept


@pytest.mark.parametrize("make", [
    lambda wsn: wsn.guard(foreign.DecaysAfter(wsn.parameters())),
    lambda wsn: wsn.guard(foreign.Lookahead(adamw(wsn.parameters()))),
    lambda wsn: wsn.guard(foreign.LookaheadOptimizer(adamw(wsn.parameters()))),
])  # fmt: skip
def test_copies_are_kept_until_the_task_ends(make: Callable[[WSN], Any]) -> None:
    wsn = in_second_task()
    optimizer = make(wsn)
    assert wsn._guards.kept
    train(wsn, optimizer, batches(1, 2))
    del optimizer
    gc.collect()
    assert wsn._guards.kept
    wsn.end_task()
    assert not wsn._guards.kept


@pytest.mark.parametrize("make", [adamw, foreign.DecaysAfter, lambda p: foreign.LookaheadWithHooks(adamw(p))])
def test_a_guarded_optimizer_can_be_freed(make: Callable[..., Any]) -> None:
    wsn = in_second_task()
    optimizer = wsn.guard(make(wsn.parameters()))
    train(wsn, optimizer, batches(1, 1))
    alive = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert alive() is None


# --- autograd --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("between", [
    lambda wsn: None,
    lambda wsn: wsn.state_dict(),
    lambda wsn: wsn.trainable_state(),
    lambda wsn: copy.deepcopy(wsn),
])  # fmt: skip
@pytest.mark.parametrize("make", [adamw, foreign.DecaysAfter, foreign.DecaysAll])
def test_two_forward_passes_may_share_a_backward_pass(make: Callable[..., Any], between: Callable[[WSN], Any]) -> None:
    wsn = in_second_task()
    optimizer = wsn.guard(make(wsn.parameters()))
    for _ in range(3):
        optimizer.zero_grad()
        first = loss_of(wsn)
        between(wsn)
        (first + loss_of(wsn, 1)).backward()
        optimizer.step()
    wsn.end_task()
    wsn.verify()


def test_evaluation_makes_the_masked_weights_of_a_finished_task_once() -> None:
    wsn = in_second_task()
    train(wsn, wsn.guard(foreign.DecaysAfter(wsn.parameters())), batches(1, 2))
    x = batches(1, 1)[0][0]
    with torch.no_grad(), wsn.use_task(0):
        wsn(x)
        kept = {name: dict(layer.gate_state.kept) for name, layer in wsn.subnet_layers().items()}
        wsn(x)
        for name, layer in wsn.subnet_layers().items():
            assert kept[name] and all(layer.gate_state.kept[k] is v for k, v in kept[name].items())


# --- several optimizers ----------------------------------------------------------------------------------------------
def test_two_optimizers_of_one_model() -> None:
    """One of torch, one of another kind, which share nothing but the model."""
    wsn = in_second_task()
    layers = [list(layer.parameters()) for layer in wsn.subnet_layers().values()]
    known = {id(p) for layer in layers for p in layer}
    rest = [p for p in wsn.parameters() if id(p) not in known]
    optimizers = [wsn.guard(adamw([*layers[0], *rest])), wsn.guard(foreign.DecaysAll(layers[1]))]
    for _ in range(3):
        loss_of(wsn).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    wsn.end_task()
    wsn.verify()


def test_a_new_head_in_no_guarded_optimizer_is_found_with_wrappers_too() -> None:
    wsn = in_second_task()
    known = {id(p) for layer in wsn.subnet_layers().values() for p in layer.parameters()}
    optimizer = wsn.guard(foreign.LookaheadOptimizer(adamw([p for p in wsn.parameters() if id(p) in known])))
    loss_of(wsn).backward()
    with pytest.raises(RuntimeError, match="no guarded optimizer holds the head of task 1"):
        optimizer.step()


KEPT: dict[str, Callable[[WSN], Any]] = {
    "Muon-like": lambda wsn: wsn.guard(foreign.MuonLike(wsn.parameters())),
    "writes after the step": lambda wsn: wsn.guard(foreign.DecaysTwice(wsn.parameters(), 0.01)),
    "a wrapper": lambda wsn: wsn.guard(foreign.Lookahead(adamw(wsn.parameters()))),
    "a wrapper without hooks": lambda wsn: wsn.guard(foreign.LookaheadOptimizer(adamw(wsn.parameters()))),
}
each_kept = pytest.mark.parametrize("name", KEPT)


@each_kept
@pytest.mark.parametrize("model", [mlp, convnet])
def test_a_probe_at_the_end_undoes_no_training(name: str, model: Callable[[], nn.Module]) -> None:
    """The task that ends has frozen more, of which the copies have the values from before it."""
    wsn = in_second_task(model)
    train(wsn, KEPT[name](wsn), batches(1, 4))
    twin = copy.deepcopy(wsn)
    wsn.end_task(probe=batches(1, 1)[0][0])
    twin.end_task()
    assert torch.equal(logits(wsn, 1), logits(twin, 1))
    wsn.verify()


@each_kept
def test_a_probe_that_finds_something_undoes_no_training(name: str) -> None:
    wsn = in_second_task()
    optimizer = KEPT[name](wsn)
    train(wsn, optimizer, batches(1, 4))
    layer, trained = wsn.model[1], wsn.trainable_state()
    hook = layer.register_forward_hook(lambda module, args, output: output + layer.param("weight").sum())
    with pytest.raises(UnmaskedReadError, match=r"\b1\.weight"):
        wsn.end_task(probe=batches(1, 1)[0][0])
    hook.remove()
    assert all(torch.equal(tensor, trained[key]) for key, tensor in wsn.trainable_state().items())
    train(wsn, optimizer, batches(1, 2))  # the copies are still there
    wsn.end_task()
    wsn.verify()


@each_kept
def test_a_probe_that_changes_the_task_names_the_tensor_alone(name: str) -> None:
    """Frozen values are not put back in the place of NaN while a probe runs."""
    wsn = WSN(mlp(0.1))
    run_tasks(wsn, [0, 1], adamw)
    wsn.begin_task(2)
    optimizer = KEPT[name](wsn)
    train(wsn, optimizer, batches(2, 2))
    layer = wsn.model[1]
    of_another = layer.mask("weight", 1) & ~layer.mask("weight", 0)
    layer.register_forward_hook(lambda module, args, output: output + layer.param("weight")[of_another].sum())

    def probe(task: int | str) -> torch.Tensor:
        with wsn.use_task(task):
            return wsn(batches(2, 1)[0][0])

    with pytest.raises(UnmaskedReadError) as caught:
        wsn.verify(probe=probe)
    assert (caught.value.task, caught.value.names) == (0, ["1.weight"])


# --- copies are there before the first write -------------------------------------------------------------------------
class ShowsAPart(foreign.Several):
    """A wrapper that shows the param groups of its first part alone, and writes to everything."""

    def __init__(self, params: Any) -> None:
        params = list(params)
        self.parts = [adamw(params[:2]), adamw(params[2:])]  # type: ignore[list-item]

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.parts[0].param_groups

    def step(self, closure: Any = None) -> None:
        super().step(closure)
        for part in self.parts:
            foreign.decay(foreign.every(part))


def with_a_late_hook(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The guard saw the optimizer without the hook."""
    optimizer.register_step_post_hook(lambda one, *_: foreign.decay(foreign.every(one)))
    return optimizer


def with_a_wrapped_hook(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    def hook(one: Any, *_: object) -> None:
        for param in foreign.every(one):
            param.mul_(0.99)

    optimizer.register_step_post_hook(torch.no_grad()(hook))
    return optimizer


WRITERS: dict[str, Callable[[WSN], Any]] = {
    "without hooks": lambda wsn: wsn.guard(foreign.WithoutHooks(wsn.parameters())),
    "a wrapper that shows a part": lambda wsn: wsn.guard(ShowsAPart(wsn.parameters())),
    "a subclass": lambda wsn: wsn.guard(foreign.DecaysAfter(wsn.parameters())),
    "a late hook that torch has wrapped": lambda wsn: with_a_wrapped_hook(wsn.guard(adamw(wsn.parameters()))),
    "a late hook, torch's": lambda wsn: with_a_late_hook(wsn.guard(adamw(wsn.parameters()))),
    "a late hook, subnet": lambda wsn: with_a_late_hook(SubnetAdamW(wsn, 0.01)),
    "a late hook, subnet, one pass": lambda wsn: with_a_late_hook(SubnetSGD(wsn, 0.01, one_pass=True)),
}


def untrained(tasks: int) -> WSN:
    """A WSN in the task after ``tasks``, in which no optimizer was: guards of then would keep copies for theirs."""
    wsn = WSN(mlp())
    for task in range(tasks):
        wsn.begin_task(task)
        wsn.end_task()
    wsn.begin_task(tasks)
    return wsn.train()


def take_steps(wsn: WSN, optimizer: Any, count: int = 2) -> None:
    for index in range(count):
        optimizer.zero_grad()
        loss_of(wsn, index).backward()
        optimizer.step()


@pytest.mark.parametrize("name", WRITERS)
def test_the_first_optimizer_of_all_is_one_that_writes(name: str) -> None:
    wsn = untrained(1)
    before = logits(wsn, 0)
    take_steps(wsn.train(), WRITERS[name](wsn))
    wsn.end_task()
    assert torch.equal(logits(wsn, 0), before)


def test_a_hook_of_all_optimizers_that_comes_after_the_guard() -> None:
    wsn = untrained(1)
    before = logits(wsn, 0)
    optimizer = wsn.guard(adamw(wsn.parameters()))
    handle = register_optimizer_step_pre_hook(lambda one, *_: foreign.decay(foreign.every(one)))
    try:
        take_steps(wsn.train(), optimizer)
    finally:
        handle.remove()
    wsn.end_task()
    assert torch.equal(logits(wsn, 0), before)


@pytest.mark.parametrize("name", WRITERS)
def test_one_that_was_guarded_before_a_task_ended_keeps_that_task_too(name: str) -> None:
    wsn = untrained(0)
    optimizer = WRITERS[name](wsn)
    wsn.end_task()
    before = logits(wsn, 0)
    wsn.begin_task(1)
    optimizer.param_groups[0]["params"] += list(wsn.model[5].head(1).parameters())
    if isinstance(optimizer, SubnetAdamW | SubnetSGD):
        wsn.guard(optimizer)
    take_steps(wsn.train(), optimizer)
    wsn.end_task()
    assert torch.equal(logits(wsn, 0), before)


@pytest.mark.parametrize("name", WRITERS)
def test_one_that_was_guarded_before_a_task_was_removed_keeps_the_others(name: str) -> None:
    wsn = untrained(2)
    optimizer = WRITERS[name](wsn)
    wsn.end_task()
    before = logits(wsn, 1)
    wsn.remove_task(0)
    wsn.begin_task(3)
    optimizer.param_groups[0]["params"] += list(wsn.model[5].head(3).parameters())
    if isinstance(optimizer, SubnetAdamW | SubnetSGD):
        wsn.guard(optimizer)
    take_steps(wsn.train(), optimizer)
    wsn.end_task()
    assert torch.equal(logits(wsn, 1), before)


@pytest.mark.parametrize(
    "kind", [foreign.WithoutHooks, foreign.DecaysAfter, lambda p: foreign.LookaheadOptimizer(adamw(p))]
)
def test_a_head_may_be_in_an_optimizer_of_any_kind(kind: Callable[..., Any]) -> None:
    wsn = in_second_task()
    heads = wsn.guard(kind(wsn.model[5].head(1).parameters()))
    known = {id(p) for p in wsn.model[5].parameters()}
    layers = wsn.guard(adamw([p for p in wsn.parameters() if id(p) not in known]))
    before = wsn.model[1].weight.detach().clone()
    loss_of(wsn).backward()
    layers.step()
    heads.step()
    assert not torch.equal(wsn.model[1].weight, before)


# --- writes while a finished task is in use --------------------------------------------------------------------------
def schedule_free(wsn: WSN) -> Callable[[], object]:
    optimizer = wsn.guard(foreign.ScheduleFree(wsn.parameters()))
    take_steps(wsn, optimizer)
    return optimizer.eval


def without_hooks(wsn: WSN) -> Callable[[], object]:
    optimizer = wsn.guard(foreign.WithoutHooks(wsn.parameters()))
    return lambda: foreign.decay(foreign.every(optimizer))


def wrapper(wsn: WSN) -> Callable[[], object]:
    optimizer = wsn.guard(foreign.LookaheadOptimizer(adamw(wsn.parameters())))
    return lambda: foreign.decay(foreign.every(optimizer))


@pytest.mark.parametrize("past", [False, True])
@pytest.mark.parametrize("make", [schedule_free, without_hooks, wrapper])
def test_a_write_while_a_finished_task_is_in_use(make: Callable[[WSN], Callable[[], object]], past: bool) -> None:
    """``past``: the layers have kept masked weights of what was written, because the model was called by itself."""
    wsn = in_second_task()
    before, write = logits(wsn, 0), make(wsn.train())
    x = batches(99, 1)[0][0]
    with torch.no_grad(), wsn.eval().use_task(0):
        write()
        if past:
            assert not torch.equal(wsn.model(x), before)
        assert torch.equal(wsn(x), before)


# --- what cannot be put back -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("call", [lambda wsn: wsn(batches(1, 1)[0][0]), lambda wsn: wsn.state_dict(), lambda wsn: None])
def test_a_parameter_of_another_shape_is_named_at_the_end_of_the_task(call: Callable[[WSN], object]) -> None:
    wsn = in_second_task()
    wsn.guard(foreign.DecaysAfter(wsn.parameters()))
    wsn.model[5].head(0).weight.data = torch.zeros(1)
    call(wsn)
    with pytest.raises(ForgottenError, match=r"5\.weight"):
        wsn.end_task()


# --- closures --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("by", ["position", "keyword"])
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_a_closure_may_give_a_fixed_parameter_its_first_gradient(kind: Any, by: str) -> None:
    wsn = WSN(convnet(), frozen="5.*")
    run_tasks(wsn, [0], adamw)
    before = logits(wsn, 0)
    wsn.begin_task(1)
    wsn.train().requires_grad_(True)
    optimizer = wsn.guard(kind(wsn.parameters(), 0.1))

    def closure() -> torch.Tensor:
        loss = loss_of(wsn)
        loss.backward()
        return loss

    optimizer.step(closure) if by == "position" else optimizer.step(closure=closure)
    assert torch.equal(logits(wsn, 0), before)
