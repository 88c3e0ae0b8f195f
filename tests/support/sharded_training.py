"""Training of a WSN that is cut into shards beside the same training in one process with the whole batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from ddp_training import across, all_equal, one_pass, part
from small_models import batches
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from wsn_fast import WSN, FastSubnetLinear, TaskHeads, convert
from wsn_fast.distributed import full_state_dict, shard
from wsn_fast.nn.shards import shard_of
from wsn_fast.optim import SubnetAdamW, SubnetSGD

BATCH = 12  # of all processes together
Make = Callable[[], nn.Module]
Optimizer = Callable[[WSN], torch.optim.Optimizer]


def uneven(rule: str = "magnitude") -> nn.Module:
    """Rows that two or three processes cannot share evenly, of lengths that are no multiples of 8, and norms."""
    layers = [FastSubnetLinear(36, 7, density=0.4, rule=rule), FastSubnetLinear(7, 2, density=0.5, rule=rule)]
    return nn.Sequential(
        nn.Flatten(), layers[0], nn.LayerNorm(7), nn.ReLU(), layers[1], nn.GroupNorm(1, 2), TaskHeads(2, 3)
    )


class Block(nn.Module):
    """Attention and a product, with residuals."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(width), nn.MultiheadAttention(width, 2, batch_first=True)
        self.product = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.product(x).relu()


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(6, 10)
        self.blocks = nn.ModuleList([Block(10), Block(10)])
        self.head = nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x.flatten(1, 2))
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


def transformer() -> nn.Module:
    return convert(Transformer(), density=0.4, heads="head")


def subnet_adamw(wsn: WSN) -> SubnetAdamW:
    return SubnetAdamW(wsn, 1e-2, weight_decay=1e-2)


def sgd(wsn: WSN, one_pass: bool = True) -> SubnetSGD:
    return SubnetSGD(wsn, 1e-1, momentum=0.9, weight_decay=1e-2, one_pass=one_pass)


def mesh() -> DeviceMesh:
    return init_device_mesh("cpu", (dist.get_world_size(),))


def whole(wsn: WSN) -> dict[str, Tensor]:
    """All parameters, those that are cut into shards as a whole."""
    found = {}
    for name, param in wsn.named_parameters():
        one = shard_of(param)
        found[name] = param.detach().clone() if one is None else one.whole(param)
    return found


def whole_masks(wsn: WSN) -> dict[str, Tensor]:
    """The masks of the current scores."""
    sharding = wsn.gates.sharding
    assert sharding is not None
    sharding.find_thresholds()
    return {f"{name}.{k}": gate_mask for name, layer in wsn.subnet_layers().items() for k, gate_mask in _masks(layer)}


def _masks(layer: Any) -> list[tuple[str, Tensor]]:
    from wsn_fast.backends import collectives

    return [
        (name, collectives.joined(one.group, one.keep().reshape(-1)).view(one.shape))
        for name, one in layer.gate_state.shards.items()
    ]


def masks_of_one(wsn: WSN) -> dict[str, Tensor]:
    return {f"{n}.{k}": mask for n, layer in wsn.subnet_layers().items() for k, mask in layer.masks_of_scores().items()}


@dataclass
class Story:
    """Some tasks, in all processes.

    Attributes:
        make: the model.
        optimizer: that of the processes and of the single process.
        after_begin: whether the model is cut after the first task has begun.
        options: of ``shard``.
        wsn_options: of the WSN.
        accumulate: how many passes a step adds up.
        sync: whether each of these passes averages its gradients.
        clip: the largest norm of the gradients.
        zero: whether gradients become 0 rather than None.
    """

    make: Make = uneven
    optimizer: Optimizer = one_pass
    after_begin: bool = False
    options: Callable[[], dict[str, Any]] = dict
    wsn_options: dict[str, Any] = field(default_factory=dict)
    accumulate: int = 1
    sync: bool = True
    clip: float | None = None
    zero: bool = False
    tasks: int = 2
    steps: int = 3

    def run(self, rank: int) -> list[str]:
        """What was wrong; nothing if all was right."""
        self.problems: list[str] = []
        torch.manual_seed(1)
        self.wsn, self.single = (WSN(self.make().double(), **self.wsn_options) for _ in range(2))
        self.single.load_state_dict(self.wsn.state_dict())
        self.kept: dict[int, Tensor] = {}
        if not self.after_begin:
            shard(self.wsn, mesh(), **self.options())
        for task in range(self.tasks):
            self._train(task, rank)
            self._look_back(task, rank)
        return self.problems

    def _train(self, task: int, rank: int) -> None:
        torch.manual_seed(100 * task + (0 if self.after_begin else rank))
        self.wsn.begin_task(task)
        torch.manual_seed(100 * task)
        self.single.begin_task(task)
        if self.after_begin and task == 0:
            shard(self.wsn, mesh(), **self.options())
        optimizer, other = self.optimizer(self.wsn), self.optimizer(self.single)
        self.wsn.train()
        self.single.train()
        data = iter(batches(task, self.steps * self.accumulate, BATCH))
        for step in range(self.steps):
            for one in (optimizer, other):
                one.zero_grad(set_to_none=not self.zero or step == 0)
            for i in range(self.accumulate):
                x, y = next(data)
                last = i == self.accumulate - 1
                self.wsn.set_requires_gradient_sync(last or self.sync)  # type: ignore[operator]
                F.cross_entropy(self.wsn(part(x.double())), part(y)).backward()
                F.cross_entropy(self.single(x.double()), y).backward()
            norms = [one.clip_grad_norm_(self.clip) for one in (optimizer, other) if self.clip]  # type: ignore[attr-defined]
            if norms and not torch.allclose(*norms, rtol=1e-9):
                self.problems.append(f"task {task}, step {step}: norms {norms}")
            optimizer.step()
            other.step()
            if step in (0, self.steps - 1):  # a comparison takes longer than a step
                self._compare(f"task {task}, step {step}")
        self.wsn.end_task()
        self.single.end_task()

    def _compare(self, when: str) -> None:
        mine, theirs = whole(self.wsn), dict(self.single.named_parameters())
        if not all_equal(across(mine)):
            self.problems.append(f"{when}: the parameters of the processes differ")
        far = [name for name in theirs if not torch.allclose(mine[name], theirs[name], rtol=1e-9, atol=1e-11)]
        if far or mine.keys() != theirs.keys():
            self.problems.append(f"{when}: {far} are not those of a single process")
        if not all_equal([whole_masks(self.wsn), masks_of_one(self.single)]):
            self.problems.append(f"{when}: the masks are not those of a single process")

    def _look_back(self, task: int, rank: int) -> None:
        self.wsn.verify()
        state, capacity = full_state_dict(self.wsn), self.wsn.capacity()
        fresh = self._check_state(task, state) if rank == 0 else None
        if fresh is not None and fresh.capacity() != capacity:
            self.problems.append(f"the capacity is {capacity}, and that of the saved state {fresh.capacity()}")
        for old in range(task + 1):
            now = logits(self.wsn, old)
            self.kept.setdefault(old, now)
            if not torch.equal(now, self.kept[old]):
                self.problems.append(f"the logits of task {old} have changed after task {task}")
            if fresh is not None and not torch.equal(now, logits(fresh, old)):
                self.problems.append(f"the logits of task {old} are not those of the saved state")
        if not all_equal(across({str(k): v for k, v in self.kept.items()})):
            self.problems.append("the processes compute different logits")

    def _check_state(self, task: int, state: dict[str, Any]) -> WSN:
        other = self.single.state_dict()
        if [*state] != [*other]:
            self.problems.append(f"a state has other names: {state.keys() ^ other.keys()}")
        masks = [name for name in other if name.endswith("_masks") and not torch.equal(state[name], other[name])]
        if masks:
            self.problems.append(f"after task {task}: the masks {masks} are not those of a single process")
        fresh = WSN(self.make().double(), **self.wsn_options)
        fresh.load_state_dict(state)
        fresh.verify()
        return fresh


@torch.no_grad()
def logits(wsn: WSN, task: int) -> Tensor:
    wsn.eval()
    with wsn.use_task(task):
        return wsn(batches(99, 1, BATCH)[0][0].double()).clone()
