"""Running means in fewer bytes, of shards: each process stores those of its rows as if the rows were a whole tensor."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from checkpoint_cases import wide
from ddp_training import across, all_equal
from fsdp_uses import check, pair, step
from sharded_training import whole, whole_masks
from torch import Tensor

from wsn_fast import WSN
from wsn_fast.backends import moments
from wsn_fast.nn.shards import local, shard_of
from wsn_fast.optim import SubnetAdamW, SubnetSGD
from wsn_fast.optim.stored_means import mean_in

Make = Callable[..., torch.optim.Optimizer]
MAKE: dict[str, Make] = {
    "AdamW, one pass": partial(SubnetAdamW, lr=1e-2, one_pass=True),
    "AdamW": partial(SubnetAdamW, lr=1e-2),
    "SGD, one pass": partial(SubnetSGD, lr=1e-1, momentum=0.9, one_pass=True),
}
STORAGES = ("bfloat16", "8bit")


def first_step(rank: int, make: Make, storage: str) -> None:
    """After one step the codes are those of the means of a single process, cut into rows, each part by itself."""
    wsn, single = pair(wide, torch.float32)
    for one in (wsn, single):
        torch.manual_seed(0)
        one.begin_task(0)
    optimizer, other = make(wsn, moments=storage), make(single)
    step(wsn, optimizer, 0)
    step(single, other, 0, of_all=True)
    theirs, compared = dict(single.named_parameters()), 0
    for name, param in wsn.named_parameters():
        gate = shard_of(param)
        for key, signed in optimizer.MEANS.items() if gate is not None else ():  # type: ignore[attr-defined]
            found = mean_in(optimizer.state[param], key)
            assert found is not None and gate is not None
            check(found.values.shape == param.shape and found.storage == storage, f"{name}: {key} has another form")
            rows = other.state[theirs[name]][key][gate.rows]
            expected = moments.zeros(rows, storage, signed)
            moments.encode(rows, expected, signed, torch.ones(()))
            mine, wanted = (
                moments.decode(one, rows, signed) for one in (found._replace(values=local(found.values)), expected)
            )
            # A mean in another order of sums may be on the other side of a step of the code.
            check(_share(mine, wanted) > 0.99, f"{name}: {key} has other codes, {_share(mine, wanted)}")
            check(torch.allclose(mine, wanted, rtol=0.15), f"{name}: {key} is far")
            compared += 1
    check(compared >= 8, f"only {compared} means")


def _share(one: Tensor, other: Tensor) -> float:
    return float((one == other).double().mean())


def tasks(rank: int, make: Make, storage: str) -> None:
    """Two tasks: finished ones stay the same to the bit, and all processes have the same masks."""
    wsn, _ = pair(wide, torch.float32)
    kept: dict[int, Tensor] = {}
    for task in (0, 1):
        wsn.begin_task(task)
        step(wsn, make(wsn, moments=storage), task, count=3)
        check(all_equal(across(whole_masks(wsn))) and all_equal(across(whole(wsn))), "the processes differ")
        wsn.end_task()
        wsn.verify()
        kept[task] = _logits(wsn, task)
    check(torch.equal(_logits(wsn, 0), kept[0]), "the logits of task 0 have changed")


@torch.no_grad()
def _logits(wsn: WSN, task: int) -> Tensor:
    wsn.eval()
    with wsn.use_task(task):
        return wsn(torch.randn(12, 1, 6, 6, generator=torch.Generator().manual_seed(3))).clone()


def resumed(rank: int, make: Make, storage: str) -> None:
    """The state of an optimizer is loaded by one in as many processes, to the bit, in any storage."""
    wsn, _ = pair(wide, torch.float32)
    wsn.begin_task(0)
    optimizer = make(wsn, moments=storage)
    step(wsn, optimizer, 0, count=2)
    state = optimizer.state_dict()
    plain, again = make(wsn), make(wsn, moments=storage)
    plain.load_state_dict(state)
    again.load_state_dict(plain.state_dict() if storage == "bfloat16" else state)
    for param, own in optimizer.state.items():
        for key, value in own.items():
            now = again.state[param][key]
            check(torch.equal(local(now), local(value)), f"{key} is another one")


CASES: dict[str, Callable[[int], Any]] = {
    f"{what.__name__} {name} {storage}": partial(what, make=make, storage=storage)
    for what in (first_step, tasks, resumed)
    for name, make in MAKE.items()
    for storage in STORAGES
}
