"""What a WSN that is cut into shards refuses, in all processes and before a step. Each case has to raise."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from ddp_training import adamw, one_pass, part
from fsdp_uses import pair, step, train
from sharded_training import BATCH, mesh, transformer, uneven
from small_models import batches
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from wsn_fast import WSN, FastSubnetLinear, TaskHeads, capture_step, convert, to_dense
from wsn_fast.distributed import full_state_dict, load_full_state_dict, shard
from wsn_fast.optim import SubnetAdamW

Case = Callable[[int], Any]


def of(wsn: WSN | None = None, **options: Any) -> WSN:
    wsn = WSN(uneven().double()) if wsn is None else wsn
    return shard(wsn, options.pop("mesh", None) or mesh(), **options)


def in_training(make: Any = uneven) -> tuple[WSN, SubnetAdamW, Tensor, Tensor]:
    wsn, _ = pair(make)
    wsn.begin_task(0)
    x, y = batches(0, 1, BATCH)[0]
    return wsn, SubnetAdamW(wsn, one_pass=True), part(x.double()), part(y)


# --- what cannot be cut
def recurrent(rank: int) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.head = nn.GRU(3, 4), nn.Linear(4, 2)

    of(WSN(convert(Net(), heads="head")))


def tied(rank: int) -> None:
    one, other = (FastSubnetLinear(6, 6, bias=False) for _ in range(2))
    other.weight = one.weight
    of(WSN(nn.Sequential(one, other, TaskHeads(6, 2))))


def twice(rank: int) -> None:
    of(of())


def after_fully_shard(rank: int) -> None:
    wsn = WSN(uneven())
    fully_shard(wsn.model[1], mesh=mesh())
    of(wsn)


def of_tensor_parallelism(rank: int) -> None:
    wsn = WSN(uneven())
    layer = wsn.model[1]
    layer._parameters["weight"] = nn.Parameter(distribute_tensor(layer.weight.detach(), mesh()))
    of(wsn)


def after_ddp(rank: int) -> None:
    wsn = WSN(uneven().double())
    ddp = DistributedDataParallel(wsn)
    wsn.begin_task(0)
    ddp(part(batches(0, 1, BATCH)[0][0].double()))
    of(wsn)


def of_a_guarded_optimizer(rank: int) -> Any:
    wsn = WSN(uneven())
    wsn.begin_task(0)
    optimizer = one_pass(wsn)
    return of(wsn), optimizer


def of_a_task_in_use(rank: int) -> None:
    wsn = WSN(uneven())
    wsn.begin_task(0)
    wsn.end_task()
    wsn.use_task(0)
    of(wsn)


def of_other_tasks(rank: int) -> None:
    wsn = WSN(uneven())
    wsn.begin_task(rank)
    of(wsn)


# --- what is not done with shards
def with_sharded(act: Callable[[WSN], Any]) -> Case:
    def case(rank: int) -> Any:
        wsn, _ = pair()
        train(wsn, 1)
        return act(wsn)

    return case


def x_of(wsn: WSN) -> Tensor:
    return batches(0, 1, BATCH)[0][0].double()


def of_the_head_alone(rank: int) -> None:
    """An optimizer that holds what FSDP2 has gathered."""
    wsn, _, x, _ = in_training()
    gathered: list[Tensor] = []
    wsn.model[1].register_forward_pre_hook(lambda m, a: gathered.append(m._parameters["weight"]))
    wsn(x)
    wsn.guard(torch.optim.SGD([*gathered, *wsn.parameters()], 0.1))


def a_penalty(rank: int) -> None:
    wsn, _, x, y = in_training()
    (F.cross_entropy(wsn(x), y) + wsn.model[1].weight.square().sum().full_tensor()).backward()


def a_reader_outside_of_the_group(rank: int) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.mix, self.head = nn.Embedding(8, 4), nn.Linear(4, 4), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(F.linear(self.mix(self.words(x)), self.words.weight).mean(1))

    wsn = of(WSN(convert(Tied(), density=0.5, heads="head")))
    wsn.begin_task(0)
    wsn(torch.zeros(2, 3, dtype=torch.int64))


def a_layer_by_itself(rank: int) -> None:
    wsn, optimizer, x, y = in_training()
    F.cross_entropy(wsn(x), y).backward()
    optimizer.step()
    wsn.model[1](x.flatten(1))


def unsharded_by_hand(rank: int) -> None:
    wsn, *_ = in_training()
    wsn.model[1].unshard()


def scores_that_change_before_backward(rank: int) -> None:
    wsn, _, x, y = in_training()
    loss = F.cross_entropy(wsn(x), y)
    with torch.no_grad():
        next(gate for _, gate in wsn.gated()).score.mul_(2)
    loss.backward()


def other_tasks_in_use(rank: int) -> None:
    wsn, _ = pair()
    train(wsn, 2)
    wsn.eval()
    with wsn.use_task(rank), torch.no_grad():
        wsn(x_of(wsn))


def a_task_in_one_process(rank: int) -> None:
    wsn, _ = pair()
    train(wsn, 2)
    wsn.begin_task(2 + rank)
    wsn(x_of(wsn))


def other_densities(rank: int) -> None:
    wsn, *_ = in_training()
    wsn(x_of(wsn))
    wsn.model[1].task_density = 0.2 + 0.1 * rank
    wsn(x_of(wsn))


def weights_that_are_not_trained(rank: int) -> None:
    wsn, *_ = in_training()
    for _, gate in wsn.gated():
        gate.param.requires_grad_(False)
    wsn(x_of(wsn))


def gradients_that_do_not_go_together(rank: int) -> None:
    wsn, _ = pair()
    wsn.begin_task(0)
    optimizer = adamw(wsn)
    x, y = batches(0, 1, BATCH)[0]
    for _ in range(2):
        F.cross_entropy(wsn(part(x.double())), part(y)).backward()
        for _, gate in wsn.gated():
            gate.score.grad = None
    optimizer.step()


def a_wrong_batch(rank: int) -> None:
    """What fails in one process only has to fail in all: a NaN in one shard."""
    wsn, _ = pair()
    wsn.begin_task(0)
    step(wsn, one_pass(wsn), 0)
    if rank == 1:
        from wsn_fast.nn.shards import local

        local(next(g for n, g in wsn.gated() if n == "1.weight").score).detach()[0] = torch.nan
    wsn.end_task()


CASES: dict[str, Case] = {
    "no wsn": lambda rank: of(uneven()),  # type: ignore[arg-type]
    "no mesh": lambda rank: of(mesh="cpu"),
    "a part of a mesh": lambda rank: of(mesh=init_device_mesh("cpu", (1, 2), mesh_dim_names=("a", "b"))["a"]),
    "two dimensions": lambda rank: of(mesh=init_device_mesh("cpu", (1, 2), mesh_dim_names=("a", "b"))),
    "reshard to 2": lambda rank: of(reshard_after_forward=2),
    "offload": lambda rank: of(offload_policy=CPUOffloadPolicy()),
    "no policy": lambda rank: of(mp_policy=torch.bfloat16),
    "float16": lambda rank: of(mp_policy=MixedPrecisionPolicy(param_dtype=torch.float16)),
    "sums in float16": lambda rank: of(mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float16)),
    "the whole model": lambda rank: of(WSN(wsn := transformer()), groups=[wsn]),
    "a list": lambda rank: of(WSN(transformer()), groups=["blocks"]),
    "no module": lambda rank: of(WSN(transformer()), groups=["block"]),
    "no layer": lambda rank: of(WSN(transformer()), groups=["blocks.0.norm"]),
    "a layer twice": lambda rank: of(WSN(transformer()), groups=["blocks.0", "blocks.0.product"]),
    "a name": lambda rank: of(WSN(transformer()), groups="blocks.0"),
    "recurrent": recurrent,
    "tied": tied,
    "constant threshold": lambda rank: of(
        WSN(nn.Sequential(FastSubnetLinear(6, 6, rule="value >= 0.5"), TaskHeads(6, 2)))
    ),
    "gates ahead": lambda rank: of(WSN(uneven(), gates_ahead=True)),
    "twice": twice,
    "fully_shard": after_fully_shard,
    "tensor parallelism": of_tensor_parallelism,
    "DDP before": after_ddp,
    "guarded": of_a_guarded_optimizer,
    "in use": of_a_task_in_use,
    "other tasks": of_other_tasks,
    "DDP": with_sharded(DistributedDataParallel),
    "state_dict": with_sharded(lambda wsn: wsn.state_dict()),
    "state_dict of the model": with_sharded(lambda wsn: wsn.model.state_dict()),
    "load_state_dict": with_sharded(lambda wsn: wsn.load_state_dict({})),
    "deepcopy": with_sharded(copy.deepcopy),
    "pickle": with_sharded(lambda wsn: torch.save(wsn, io.BytesIO())),
    "compile": with_sharded(lambda wsn: wsn.compile()),
    "rows in one pass": with_sharded(lambda wsn: wsn.forward_tasks(x_of(wsn), [0] * BATCH, one_pass=True)),
    "rows of an unknown task": with_sharded(lambda wsn: wsn.forward_tasks(x_of(wsn), [7 * dist.get_rank()] * BATCH)),
    "too few tasks": with_sharded(lambda wsn: wsn.forward_tasks(x_of(wsn), [0] * (BATCH - dist.get_rank()))),
    "masked_reads": with_sharded(lambda wsn: wsn.masked_reads()),
    "to_dense": with_sharded(lambda wsn: to_dense(wsn, 0)),
    "moved": with_sharded(lambda wsn: wsn.float()),
    "an averaged model": with_sharded(lambda wsn: (wsn.begin_task(1), AveragedModel(wsn))),
    "capture": with_sharded(lambda wsn: capture_step(wsn, one_pass(wsn), F.cross_entropy)),
    "divide factor": with_sharded(lambda wsn: wsn.set_gradient_divide_factor(3.0)),  # type: ignore[operator]
    "full state of a whole one": lambda rank: full_state_dict(WSN(uneven())),
    "loading into a whole one": lambda rank: load_full_state_dict(WSN(uneven()), {}),
    "gathered": of_the_head_alone,
    "penalty": a_penalty,
    "reader": a_reader_outside_of_the_group,
    "a layer by itself": a_layer_by_itself,
    "unshard": unsharded_by_hand,
    "scores changed": scores_that_change_before_backward,
    "other tasks in use": other_tasks_in_use,
    "another task": a_task_in_one_process,
    "other densities": other_densities,
    "untrained weights": weights_that_are_not_trained,
    "half of the gradients": gradients_that_do_not_go_together,
    "NaN": a_wrong_batch,
}
