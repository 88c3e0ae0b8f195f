"""What several processes do to a WSN. Each case runs in all of them; the parent gets what each process saw."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from small_models import batches, convnet, mlp
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from wsn_fast import WSN

X = batches(0, 1, 4)[0][0]


def sgd(wsn: WSN) -> torch.optim.Optimizer:
    return wsn.guard(torch.optim.SGD(wsn.parameters(), 0.1))


def begun(rank: int, make: Callable[[], nn.Module] = mlp, **options: Any) -> WSN:
    torch.manual_seed(1)
    wsn = WSN(make(), **options)
    wsn.begin_task(0)
    return wsn


def step(wsn: WSN, ddp: nn.Module, rank: int) -> None:
    optimizer = sgd(wsn)
    ddp(X + rank).square().sum().backward()
    optimizer.step()


def wrapped_inside(rank: int, kind: type[nn.Module]) -> None:
    net = mlp()
    net[-1].add(9)
    WSN(kind(net)).begin_task(0)


def head_made_later(rank: int) -> None:
    wsn = begun(rank)
    ddp = DistributedDataParallel(wsn)
    step(wsn, ddp, rank)
    wsn.end_task()
    wsn.begin_task(1)
    step(wsn, ddp, rank)


def different_tasks(rank: int) -> None:
    wsn = begun(rank, reinit_scores=True)
    wsn.end_task()
    wsn.begin_task(1)
    wsn.end_task()
    wsn.begin_task(2)
    ddp = DistributedDataParallel(wsn)
    try:
        with wsn.use_task(rank):
            ddp(X)
    finally:
        wsn.verify()


def batch_norm(rank: int) -> None:
    wsn = begun(rank, convnet)
    step(wsn, DistributedDataParallel(wsn), rank)


def different_scores(rank: int) -> None:
    wsn = WSN(mlp(), reinit_scores=True)
    ddp = None
    for task in (0, 1):
        torch.manual_seed(5 * task * rank)
        wsn.begin_task(task)
        ddp = DistributedDataParallel(wsn) if ddp is None or task == 0 else ddp
        if task == 1:
            wsn.model[-1].active = 0  # the first head is reduced
        step(wsn, ddp, rank)
        wsn.end_task()


def sharded(rank: int, when: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    wsn = WSN(mlp())
    if when == "before begin_task":
        fully_shard(wsn.model, mesh=mesh)
    wsn.begin_task(0)
    optimizer = sgd(wsn) if when == "after guard" else None
    fully_shard(wsn, mesh=mesh)
    if optimizer is None:
        sgd(wsn)
    assert optimizer is not None
    wsn(X).square().sum().backward()
    optimizer.step()  # of tensors that the model has no more


def works(rank: int) -> None:
    wsn = begun(rank)
    step(wsn, DistributedDataParallel(wsn), rank)
    wsn.end_task()
    wsn.begin_task(1)
    step(wsn, DistributedDataParallel(wsn), rank)
    wsn.end_task()
    wsn.verify()
    with wsn.use_task(rank):
        wsn(X)
    sums = [sum(float(p.detach().double().sum()) for p in wsn.parameters()), float(wsn.model[1].weight_masks.sum())]
    found: list[Any] = [None, None]
    dist.all_gather_object(found, sums)
    assert found[0] == found[1], found


CASES: dict[str, Callable[[int], None]] = {
    "DistributedDataParallel inside": lambda rank: wrapped_inside(rank, DistributedDataParallel),
    "DataParallel inside": lambda rank: wrapped_inside(rank, DataParallel),
    "a head made later": head_made_later,
    "different tasks": different_tasks,
    "batch norm": batch_norm,
    "different scores": different_scores,
    "sharded before begin_task": lambda rank: sharded(rank, "before begin_task"),
    "sharded after begin_task": lambda rank: sharded(rank, "after begin_task"),
    "sharded after guard": lambda rank: sharded(rank, "after guard"),
    "works": works,
}


def work(rank: int, path: str) -> None:
    """Run all cases as process ``rank`` of two, and save the message of each error, or None."""
    dist.init_process_group("gloo", init_method=f"file://{path}/rendezvous", rank=rank, world_size=2)
    seen: dict[str, str | None] = {}
    for name, case in CASES.items():
        try:
            case(rank)
            seen[name] = None
        except Exception as error:
            seen[name] = f"{type(error).__name__}: {error}"
        dist.barrier()
    torch.save(seen, f"{path}/{rank}.pt")
    dist.destroy_process_group()
