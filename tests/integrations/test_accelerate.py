"""accelerate saves with safetensors, and drops tensors that share memory; it takes empty ones for such."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from wsn_fast import WSN, convert

accelerate = pytest.importorskip("accelerate")


def plain() -> nn.Module:
    return convert(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4)), 0.5, heads="2")


def tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    return convert(model, 0.5)


@pytest.mark.parametrize("tasks", [0, 1, 9])
@pytest.mark.parametrize("make", [plain, tied])
def test_a_task_in_training_is_saved_and_loaded(make: Callable[[], nn.Module], tasks: int, tmp_path: Path) -> None:
    accelerator = accelerate.Accelerator(cpu=True)
    wsn = WSN(make())
    for task in range(tasks):
        wsn.begin_task(task)
        wsn.end_task()
    wsn.begin_task("a")
    wsn = accelerator.prepare(wsn)
    accelerator.save_state(tmp_path)
    before = {name: tensor.clone() for name, tensor in wsn.state_dict().items()}
    with torch.no_grad():
        for parameter in wsn.parameters():
            parameter.add_(1)
    accelerator.load_state(tmp_path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in wsn.state_dict().items())
    assert wsn.verify().tasks == list(range(tasks))


@pytest.mark.parametrize("prepared_first", [False, True])
def test_the_guard_takes_an_optimizer_before_and_after_it_is_prepared(prepared_first: bool) -> None:
    accelerator = accelerate.Accelerator(cpu=True)
    torch.manual_seed(0)
    wsn = accelerator.prepare(WSN(plain()))
    x, before = torch.ones(3, 4), []
    for task in range(2):
        wsn.begin_task(task)
        optimizer = torch.optim.AdamW(wsn.parameters(), 0.1, weight_decay=0.1)
        if prepared_first:
            optimizer = accelerator.prepare(optimizer)
            wsn.guard(optimizer)
        else:
            optimizer = accelerator.prepare(wsn.guard(optimizer))
        for _ in range(3):
            optimizer.zero_grad()
            accelerator.backward(wsn(x).square().sum())
            optimizer.step()
        wsn.end_task()
        with torch.no_grad(), wsn.use_task(0):
            before.append(wsn(x))
    assert torch.equal(*before)
    wsn.verify()
