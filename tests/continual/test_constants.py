"""Buffers that nobody declared: they are taken as constant, and one that changes is found before a task is stored."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from small_models import batches, logits, train
from torch import Tensor, nn
from torch.nn.utils import parametrizations, spectral_norm

from wsn_fast import WSN, FastSubnetLinear, ForgottenError, OwnershipError, TaskHeads


class Constants(nn.Module):
    """Constants as transformers have them: of integers, of floats, a mask, some not saved, one complex."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("position_ids", torch.arange(36).flip(0))
        self.register_buffer("inv_freq", 1 / torch.arange(1.0, 37.0), persistent=False)
        self.register_buffer("mask", torch.arange(36) % 3 > 0, persistent=False)
        self.register_buffer("turn", torch.ones(36, dtype=torch.complex64))
        self.register_buffer("nothing", torch.empty(0))

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)[:, self.position_ids] * self.inv_freq
        return x.masked_fill(~self.mask, 0.0) * self.turn.real


class Average(nn.Module):
    """A running mean under another name (a codebook of VQ, for example)."""

    def __init__(self, name: str, only_in: str = "training", persistent: bool = True) -> None:
        super().__init__()
        self.name, self.only_in = name, only_in
        self.register_buffer(name, torch.zeros(36), persistent=persistent)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        if self.training == (self.only_in == "training"):
            getattr(self, self.name).mul_(0.9).add_(0.1 * x.mean(0).detach())
        return x - getattr(self, self.name)


class Lazy(nn.Module):
    """Makes its buffer in the first forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("cache", None)

    def forward(self, x: Tensor) -> Tensor:
        if self.cache is None:
            self.cache = torch.ones(36)
        return x.flatten(1) * self.cache


def wsn_of(*first: nn.Module, **owners: object) -> WSN:
    torch.manual_seed(0)
    body = nn.Sequential(*first, nn.Flatten(), FastSubnetLinear(36, 12, density=0.4), nn.ReLU(), TaskHeads(12, 3))
    return WSN(body, **owners)  # type: ignore[arg-type]


def run(wsn: WSN, *tasks: int) -> None:
    for task in tasks:
        wsn.begin_task(task)
        train(wsn, wsn.guard(torch.optim.AdamW(wsn.parameters(), 0.01)), batches(task, 3))
        wsn.end_task()


def test_constants_need_no_declaration() -> None:
    wsn = wsn_of(Constants())
    run(wsn, 0)
    first = logits(wsn, 0)
    run(wsn, 1)
    assert torch.equal(logits(wsn, 0), first)
    assert wsn.verify().shared == []
    other = wsn_of(Constants())
    other.load_state_dict(wsn.state_dict(), strict=True)
    assert torch.equal(logits(other, 0), first)
    other.verify()


@pytest.mark.parametrize("name", ["position_ids", "inv_freq", "mask", "turn"])
def test_a_constant_that_changes_between_tasks_is_found(name: str) -> None:
    wsn = wsn_of(Constants())
    run(wsn, 0)
    buffer = getattr(wsn.model[0], name)
    buffer.copy_(~buffer if buffer.dtype is torch.bool else buffer + 1)
    with pytest.raises(ForgottenError, match=rf"task 0: 0\.{name}"):
        wsn.verify()
    with pytest.raises(ForgottenError, match=rf"task 0: 0\.{name}"):
        wsn.begin_task(1)


CHANGING: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "an average": (lambda: Average("codes"), r"0\.codes"),
    "an average that is not saved": (lambda: Average("codes", persistent=False), r"0\.codes"),
}


@pytest.mark.parametrize("kind", CHANGING)
@pytest.mark.parametrize("earlier", [0, 1])
def test_a_buffer_that_changes_is_found_before_the_task_is_stored(kind: str, earlier: int) -> None:
    make, name = CHANGING[kind]
    wsn = wsn_of(make(), rest="frozen")
    for task in range(earlier):
        wsn.begin_task(task)  # without training nothing changes
        wsn.end_task()
    with pytest.raises(RuntimeError, match=f"{name} is a buffer that changes in training: declare it per_task"):
        run(wsn, 7)
    assert wsn.tasks == [*range(earlier)] and wsn.current_task == 7
    assert all(len(gate.masks) == earlier for _, gate in wsn.gated())


@pytest.mark.filterwarnings("ignore:.*spectral_norm.*is deprecated:FutureWarning")
def test_the_older_spectral_norm() -> None:
    wsn = wsn_of(nn.Flatten(), spectral_norm(nn.Linear(36, 36)), rest="frozen")
    with pytest.raises(RuntimeError, match=r"1\.weight_u is a buffer that changes in training"):
        run(wsn, 0)


def test_the_vectors_of_a_spectral_norm_are_per_task_as_those_of_a_norm() -> None:
    wsn = wsn_of(nn.Flatten(), parametrizations.spectral_norm(nn.Linear(36, 36)), rest="frozen")
    run(wsn, 0)
    first = logits(wsn, 0)
    run(wsn, 1)
    assert torch.equal(logits(wsn, 0), first)
    rows = wsn.model[1].parametrizations.weight[0]._u_tasks
    assert not torch.equal(rows[0], rows[1])
    wsn.verify()


def test_a_buffer_that_changes_in_evaluation_only() -> None:
    wsn = wsn_of(Average("codes", only_in="evaluation"))
    wsn.begin_task(0)
    train(wsn, wsn.guard(torch.optim.SGD(wsn.parameters(), 0.01)), batches(0, 2))
    wsn.eval()
    wsn(batches(0, 1)[0][0])
    with pytest.raises(RuntimeError, match=r"0\.codes is a buffer that changes"):
        wsn.end_task()
    assert wsn.current_task == 0


def test_all_that_change_are_listed() -> None:
    wsn = wsn_of(Average("codes"), Average("other"))
    with pytest.raises(RuntimeError) as error:
        run(wsn, 0)
    assert str(error.value).splitlines() == [
        "0.codes is a buffer that changes in training: declare it per_task (or shared)",
        "1.other is a buffer that changes in training: declare it per_task (or shared)",
    ]


def test_the_declaration_that_the_message_asks_for() -> None:
    wsn = wsn_of(Average("codes"), per_task="codes")
    run(wsn, 0)
    first = logits(wsn, 0)
    run(wsn, 1)
    assert torch.equal(logits(wsn, 0), first)
    assert not torch.equal(wsn.model[0].codes_tasks[0], wsn.model[0].codes_tasks[1])


def test_a_running_statistic_is_no_constant() -> None:
    wsn = wsn_of(Average("running_mean"))
    with pytest.raises(OwnershipError, match=r"0\.running_mean \[36\] \(36 elements\)") as error:
        wsn.begin_task(0)
    assert "running statistics change in training: per_task or shared" in str(error.value)
    with pytest.raises(OwnershipError, match="running_mean"):
        wsn_of(Average("running_mean"), rest="frozen").begin_task(0)
    run(wsn_of(Average("running_mean"), rest="per_task"), 0, 1)


def test_a_buffer_that_comes_or_goes() -> None:
    wsn = wsn_of(Lazy())
    with pytest.raises(RuntimeError, match=r"0\.cache is a buffer that did not exist when the task began: run a batch"):
        run(wsn, 0)
    wsn = wsn_of(Lazy())
    wsn.model[0](batches(0, 1)[0][0])
    run(wsn, 0, 1)
    wsn.begin_task(2)
    wsn.model[0].cache = None
    with pytest.raises(RuntimeError, match=r"0\.cache was a buffer when the task began, and is gone"):
        wsn.end_task()


def test_a_task_that_goes_on_after_a_load() -> None:
    wsn = wsn_of(Average("codes"))
    wsn.begin_task(0)
    train(wsn, wsn.guard(torch.optim.SGD(wsn.parameters(), 0.01)), batches(0, 2))
    other = wsn_of(Average("codes"))
    other.load_state_dict(copy.deepcopy(wsn.state_dict()), strict=True)
    with pytest.raises(RuntimeError, match=r"0\.codes is a buffer that changes"):
        other.end_task()


class Wraps(nn.Module):
    """Has another model inside it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x)
        return out


def test_a_rename_is_no_change() -> None:
    wsn = wsn_of(Constants())
    run(wsn, 0)
    wsn.begin_task(1)
    wsn.model = Wraps(wsn.model)
    wsn.rename({"": "inner"})
    wsn.end_task()
    wsn.verify()
