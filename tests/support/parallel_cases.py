"""What several processes do to a WSN beside training. A case that must be refused raises; the others return what they
found, or raise if something is wrong."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from ddp_cases import Around, in_bfloat16
from ddp_training import across, adamw, all_equal, masks, one_pass
from processes import counting
from small_models import batches, convnet, logits, mlp
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DataParallel, DistributedDataParallel

from wsn_fast import WSN, FastSubnetLinear, ForgottenError, TaskHeads, distributed
from wsn_fast.backends import collectives
from wsn_fast.optim import SubnetAdamW

X = batches(0, 1, 4)[0][0]
Optimizer = Callable[[WSN], torch.optim.Optimizer]


def made(make: Callable[[], nn.Module] = mlp, **options: Any) -> WSN:
    torch.manual_seed(1)
    return WSN(make(), **options)


def begun(make: Callable[[], nn.Module] = mlp, **options: Any) -> WSN:
    wsn = made(make, **options)
    wsn.begin_task(0)
    return wsn


def step(wsn: WSN, ddp: nn.Module, rank: int, make: Optimizer = adamw) -> None:
    optimizer = make(wsn)
    ddp(X + rank).square().sum().backward()
    optimizer.step()


def finished(tasks: int, make: Callable[[], nn.Module] = mlp, **options: Any) -> WSN:
    """A WSN with finished tasks, the same in all processes."""
    wsn = made(make, reinit_scores=True, **options)
    for task in range(tasks):
        wsn.begin_task(task)
        step(wsn, wsn, 0)
        wsn.end_task()
    return wsn


# --- refused when a task begins
def wrapped_inside(rank: int, kind: type[nn.Module]) -> None:
    net = mlp()
    net[-1].add(9)
    WSN(kind(net)).begin_task(0)


def sharded(rank: int, when: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    wsn = WSN(mlp())
    if when == "before begin_task":
        fully_shard(wsn.model, mesh=mesh)
    wsn.begin_task(0)
    optimizer = adamw(wsn) if when == "after guard" else None
    fully_shard(wsn, mesh=mesh)
    if optimizer is None:
        adamw(wsn)
    assert optimizer is not None
    wsn(X).square().sum().backward()
    optimizer.step()  # of tensors that the model has no more


# --- refused in a forward pass
def different_weights(rank: int) -> None:
    wsn = begun()
    ddp = DistributedDataParallel(wsn)
    with torch.no_grad():
        wsn.model[1].weight[0, 0] += rank
    step(wsn, ddp, rank)


def different_densities(rank: int) -> None:
    wsn = made()
    wsn.begin_task(0, density={"1.*": 0.3 + 0.1 * rank})
    step(wsn, DistributedDataParallel(wsn), rank)


def different_masks(rank: int) -> None:
    wsn = finished(1)
    wsn.begin_task(1)
    wsn.model[1].weight_masks[0, 0] ^= rank
    step(wsn, DistributedDataParallel(wsn), rank)


def other_tensors(rank: int) -> None:
    """One process has a parameter more."""
    wsn = begun()
    ddp = DistributedDataParallel(wsn)
    if rank:
        wsn.model.register_parameter("more", nn.Parameter(torch.ones(2)))
    step(wsn, ddp, rank)


def one_pass_too_late(rank: int, **wrapper: Any) -> None:
    wsn = begun()
    step(wsn, DistributedDataParallel(wsn, **wrapper), rank, one_pass)


def old_wrapper_of_frozen_parameters(rank: int) -> None:
    wsn = made(lambda: nn.Sequential(nn.Flatten(), nn.Linear(36, 36), *mlp()[1:]), frozen=["1.*"])
    ddp = DistributedDataParallel(wsn)
    for task in (0, 1):
        wsn.begin_task(task)
        step(wsn, ddp, rank)
        wsn.end_task()


def mixed_precision(rank: int) -> None:
    from torch.nn.parallel.distributed import _MixedPrecision

    wsn = begun()
    ddp = DistributedDataParallel(wsn)
    ddp.mixed_precision = _MixedPrecision(param_dtype=torch.bfloat16)  # made with it, the wrapper wants a GPU
    with ddp._inside_ddp_forward():
        wsn(X)


def join(rank: int) -> None:
    wsn = begun()
    ddp = DistributedDataParallel(wsn)
    with ddp.join():
        step(wsn, ddp, rank)


def wrapped_in_use(rank: int) -> None:
    wsn = finished(2)
    with wsn.use_task(rank % 2):
        DistributedDataParallel(wsn)


def wrapped_by_another_reducer(rank: int) -> None:
    import torch._dynamo.config as config

    with config.patch(optimize_ddp="python_reducer"):
        DistributedDataParallel(begun())


def stepping_in_backward(rank: int) -> None:
    wsn = begun()
    wsn.guard(ZeroRedundancyOptimizer(wsn.parameters(), torch.optim.Adam, lr=1e-2, overlap_with_ddp=True))


# --- refused when a task ends
def changed_in_one(rank: int) -> list[str]:
    """A weight that one process has changed is found at the end of the task, and the task can end after it is put
    right."""
    wsn = begun()
    step(wsn, DistributedDataParallel(wsn), rank)
    with torch.no_grad():
        wsn.model[3].bias += float(rank)
    found = []
    for _ in range(2):
        try:
            wsn.end_task()
            found.append(f"ended: {wsn.tasks}")
        except RuntimeError as error:
            found.append(str(error))
            with torch.no_grad():
                wsn.model[3].bias -= float(rank)
                wsn.model[3].bias.copy_(torch.ones(12))
    return found


def forgotten_in_one(rank: int) -> str:
    wsn = finished(1)
    wsn.begin_task(1)
    step(wsn, DistributedDataParallel(wsn), rank)
    with torch.no_grad():
        for param in wsn.model[5].head(0).parameters():
            param += float(rank)
    try:
        wsn.end_task()
    except (RuntimeError, ForgottenError) as error:
        return f"{type(error).__name__}: {error}"
    return "ended"


def not_begun_in_one(rank: int) -> str:
    wsn = begun()
    ddp = DistributedDataParallel(wsn)
    step(wsn, ddp, rank)
    wsn.end_task()
    try:
        wsn.begin_task(1, density=0.5 if rank == 0 else 2)
    except (RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "begun"


# --- right
def different_tasks(rank: int, around: Callable[[WSN], nn.Module], make: Callable[[], nn.Module] = mlp) -> bool:
    """The processes evaluate different tasks through one wrapper."""
    wsn = finished(2, make)
    right = logits(wsn, rank % 2)
    ddp = DistributedDataParallel(around(wsn))
    wsn.eval()
    with torch.no_grad(), wsn.use_task(rank % 2):
        found = [ddp(batches(99, 1)[0][0]) for _ in range(2)]
    wsn.verify()
    return all(torch.equal(one, right) for one in found)


def telling(wsn: WSN) -> nn.Module:
    module = Around(wsn)
    distributed.leave_alone(module)
    return module


def removed(rank: int) -> bool:
    """Each process draws other values for what a removed task leaves."""
    wsn = finished(1)
    ddp = DistributedDataParallel(wsn)
    wsn.begin_task(1)
    step(wsn, ddp, rank)
    wsn.end_task()
    torch.manual_seed(rank)
    wsn.remove_task(0, redraw_free=True)
    return all_equal(across({name: gate.param.detach() for name, gate in wsn.gated()} | masks(wsn)))


def sent_when_begun(rank: int) -> bool:
    """With a wrapper that has run, heads and scores are the same before the first pass of the next task."""
    wsn = made(reinit_scores=True)
    ddp = DistributedDataParallel(wsn)
    for task in (0, 1):
        torch.manual_seed(rank)
        wsn.begin_task(task)
        if task == 0:
            step(wsn, ddp, rank)
            wsn.end_task()
    return all_equal(across({name: param.detach() for name, param in wsn.named_parameters()}))


def teacher(rank: int) -> None:
    """A WSN that another wrapped model calls is no part of the wrapper: the processes may have different ones."""
    wsn = begun()
    with torch.no_grad():
        wsn.model[1].weight += rank
    student = Around(wsn)
    student.inner = nn.Linear(36, 3)

    class Student(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.own = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.own(wsn(x))

    DistributedDataParallel(Student())(X).sum().backward()


def fresh_statistics(rank: int) -> list[Tensor]:
    """The running mean of this process before the task ends, and what is kept of it."""
    wsn = begun(convnet)
    wsn.train()
    step(wsn, DistributedDataParallel(wsn), rank)
    before = wsn.model[1].running_mean.clone()
    wsn.end_task()
    return [before, wsn.model[1].running_mean_tasks[0]]


def leveled_statistics(rank: int) -> list[Tensor]:
    """The running mean of this process while the task is in progress, before and after it is leveled."""
    wsn = begun(convnet)
    wsn.train()
    step(wsn, DistributedDataParallel(wsn), rank)
    before = wsn.model[1].running_mean.clone()
    distributed.level_buffers(wsn)
    return [before, wsn.model[1].running_mean]


def wide(density: float = 0.3) -> nn.Module:
    layers = [FastSubnetLinear(256, 256, bias=False, density=density) for _ in range(2)]
    return nn.Sequential(
        nn.Flatten(), FastSubnetLinear(36, 256, bias=False, density=density), *layers, TaskHeads(256, 4)
    )


def on_the_wire(rank: int, optimizer: Optimizer, hook: Callable[[DistributedDataParallel], object]) -> float:
    """Bytes that the processes send together for each gated weight in a step, if they add up in a ring."""
    wsn = begun(wide)
    stepping = optimizer(wsn)
    ddp = DistributedDataParallel(wsn)
    hook(ddp)
    for _ in range(2):
        with counting() as sent:
            ddp(X + rank).square().sum().backward()
            stepping.step()
            stepping.zero_grad()
    weights = sum(gate.param.numel() for _, gate in wsn.gated())
    return 2 * (dist.get_world_size() - 1) * sent.bytes / weights


def without_sync(rank: int) -> list[int]:
    """How often something is sent in backward passes under no_sync, and in the one after them."""
    wsn = begun()
    ddp = DistributedDataParallel(wsn)
    in_float32(ddp)
    step(wsn, ddp, rank)
    found = []
    for context in (ddp.no_sync(), nullcontext()):
        with context, counting() as sent:
            ddp(X + rank).square().sum().backward()
        found.append(len(sent.sizes))
    return found


def compiled_whole(rank: int) -> None:
    wsn = begun()
    ddp = DistributedDataParallel(torch.compile(wsn, backend="eager", fullgraph=True))
    step(wsn, ddp, rank)


def compiled_without_a_wrapper(rank: int) -> bool:
    wsn = begun()
    return torch.equal(torch.compile(wsn, backend="eager", fullgraph=True)(X), wsn(X))


def in_float32(ddp: DistributedDataParallel) -> None:
    ddp.register_comm_hook(None, allreduce_hook)


def standard(wsn: WSN) -> torch.optim.Optimizer:
    return SubnetAdamW(wsn, 1e-2)


def waits_when_it_ends(rank: int) -> int:
    collectives.end_calmly.cache_clear()
    wsn = begun()
    step(wsn, DistributedDataParallel(wsn), rank)
    return collectives.end_calmly.cache_info().currsize


def wrong_arguments(rank: int) -> list[str]:
    found = []
    for call, argument in (
        (distributed.leave_alone, 3),
        (distributed.leave_alone, nn.Linear(2, 2)),
        (partial(distributed.leave_alone, scores=True), begun()),
        (distributed.level_buffers, nn.Linear(2, 2)),
        (distributed.reduce_in_bfloat16, begun()),
        (distributed.reduce_in_bfloat16, DistributedDataParallel(nn.Linear(2, 2))),
    ):
        try:
            call(argument)
        except (TypeError, ValueError) as error:
            found.append(f"{type(error).__name__}: {error}")
    return found


def in_one_way_only(rank: int) -> list[bool]:
    """What the hook does to gradients: those of gated tensors are rounded, and no others."""
    grads = []
    for hook in (in_float32, in_bfloat16):
        wsn = begun(convnet)
        ddp = DistributedDataParallel(wsn)
        hook(ddp)
        ddp(X + rank).square().sum().backward()
        grads.append({name: param.grad for name, param in wsn.named_parameters()})
    gated = {f"model.{name}{end}" for name, _ in wsn.gated() for end in ("", "_score")}
    return [torch.equal(grads[0][name], grad) != (name in gated) for name, grad in grads[1].items()]


REFUSED_CASES: dict[str, Callable[[int], Any]] = {
    "DistributedDataParallel inside": lambda rank: wrapped_inside(rank, DistributedDataParallel),
    "DataParallel inside": lambda rank: wrapped_inside(rank, DataParallel),
    "sharded before begin_task": lambda rank: sharded(rank, "before begin_task"),
    "sharded after begin_task": lambda rank: sharded(rank, "after begin_task"),
    "sharded after guard": lambda rank: sharded(rank, "after guard"),
    "different weights": different_weights,
    "different densities": different_densities,
    "different masks": different_masks,
    "other tensors": other_tensors,
    "one pass after the wrapper": one_pass_too_late,
    "frozen since": old_wrapper_of_frozen_parameters,
    "mixed precision": mixed_precision,
    "join": join,
    "wrapped in use": wrapped_in_use,
    "another reducer": wrapped_by_another_reducer,
    "compiled whole": compiled_whole,
    "stepping in backward": stepping_in_backward,
    "different tasks in a module that says nothing": lambda rank: different_tasks(rank, Around),
}
RIGHT_CASES: dict[str, Callable[[int], Any]] = {
    "changed in one process": changed_in_one,
    "forgotten in one process": forgotten_in_one,
    "not begun in one process": not_begun_in_one,
    "different tasks": lambda rank: different_tasks(rank, lambda wsn: wsn),
    "different tasks of a convnet": lambda rank: different_tasks(rank, lambda wsn: wsn, convnet),
    "different tasks in a module around": lambda rank: different_tasks(rank, telling, convnet),
    "removed": removed,
    "sent when begun": sent_when_begun,
    "teacher": teacher,
    "statistics": fresh_statistics,
    "leveled statistics": leveled_statistics,
    "wire: standard": lambda rank: on_the_wire(rank, standard, in_float32),
    "wire: standard, bfloat16": lambda rank: on_the_wire(rank, standard, in_bfloat16),
    "wire: one pass": lambda rank: on_the_wire(rank, one_pass, in_float32),
    "wire: one pass, bfloat16": lambda rank: on_the_wire(rank, one_pass, in_bfloat16),
    "no sync": without_sync,
    "compiled without a wrapper": compiled_without_a_wrapper,
    "wrong arguments": wrong_arguments,
    "the end of the process": waits_when_it_ends,
    "rounded": in_one_way_only,
}
CASES = REFUSED_CASES | RIGHT_CASES
