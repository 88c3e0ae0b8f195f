"""Training under DistributedDataParallel beside the same training in one process with the whole batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from small_models import batches, mlp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from wsn_fast import WSN
from wsn_fast.optim import SubnetAdamW

Make = Callable[[], nn.Module]
BATCH = 12  # of all processes together


def adamw(wsn: WSN) -> torch.optim.Optimizer:
    trained = [param for param in wsn.parameters() if param.requires_grad]
    return wsn.guard(torch.optim.AdamW(trained, 1e-2, weight_decay=1e-2))


def one_pass(wsn: WSN) -> torch.optim.Optimizer:
    return SubnetAdamW(wsn, 1e-2, weight_decay=1e-2, one_pass=True)


def part(tensor: Tensor) -> Tensor:
    """The part of a batch that is this process's."""
    return tensor.chunk(dist.get_world_size())[dist.get_rank()]


def across(value: object) -> list[Any]:
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def masks(wsn: WSN) -> dict[str, Tensor]:
    return {f"{n}.{k}": mask for n, layer in wsn.subnet_layers().items() for k, mask in layer.masks_of_scores().items()}


def all_equal(every: list[dict[str, Tensor]]) -> bool:
    return all(
        one.keys() == every[0].keys() and all(map(torch.equal, one.values(), every[0].values())) for one in every
    )


@dataclass
class Story:
    """Two tasks, or more, in all processes.

    Attributes:
        make: the model.
        optimizer, alone: the optimizer of the processes, and that of the single process; None for the same.
        wrapper: arguments of the wrapper.
        wrap: "once" before the first task, or "each task", after the optimizer was made.
        around: a module around the WSN, which is wrapped.
        accumulate: how many passes a step adds up; all but the last one run under no_sync.
        summed: whether the losses of these passes are summed, for one backward pass.
        draws: whether the processes draw other heads and scores at the start of each task.
        hook: what to do with a new wrapper.
        options: of the WSN.
        exact: whether the masks have to be those of the single process.
    """

    make: Make = mlp
    optimizer: Callable[[WSN], torch.optim.Optimizer] = adamw
    alone: Callable[[WSN], torch.optim.Optimizer] | None = None
    wrapper: dict[str, Any] = field(default_factory=dict)
    wrap: str = "once"
    around: Callable[[WSN], nn.Module] = lambda wsn: wsn
    accumulate: int = 1
    summed: bool = False
    draws: bool = True
    hook: Callable[[DistributedDataParallel], object] = lambda ddp: None
    options: dict[str, Any] = field(default_factory=dict)
    exact: bool = True
    tasks: int = 2
    steps: int = 4
    inputs: Callable[[Tensor], Tensor] = lambda x: x

    def run(self, rank: int) -> list[str]:
        """What was wrong; nothing if all was right."""
        self.problems: list[str] = []
        torch.manual_seed(1)
        self.wsn, self.single = (WSN(self.make().double(), **self.options) for _ in range(2))
        self.single.load_state_dict(self.wsn.state_dict())
        self.kept: dict[int, Tensor] = {}
        self.ddp: Any = None
        for task in range(self.tasks):
            self._train(task, rank)
            self._look_back(task)
        return self.problems

    def _wrapped(self) -> DistributedDataParallel:
        ddp = DistributedDataParallel(self.around(self.wsn), **self.wrapper)
        self.hook(ddp)
        return ddp

    def _train(self, task: int, rank: int) -> None:
        if self.wrap == "once" and self.ddp is None:
            self.ddp = self._wrapped()
        torch.manual_seed(100 * task + rank * self.draws)
        self.wsn.begin_task(task)
        self.single.begin_task(task)
        optimizer, other = self.optimizer(self.wsn), (self.alone or self.optimizer)(self.single)
        if self.wrap != "once" and (self.wrap == "each task" or self.ddp is None):
            self.ddp = self._wrapped()
        self.wsn.train()
        self.single.train()
        data = iter(batches(task, self.steps * self.accumulate, BATCH))
        for step in range(self.steps):
            optimizer.zero_grad()
            other.zero_grad()
            self._backward(data, first=step == 0, task=task)
            optimizer.step()
            other.step()
            self._compare(f"task {task}, step {step}")
        self.wsn.end_task()
        self.single.end_task()

    def _backward(self, data: Iterator[tuple[Tensor, Tensor]], first: bool, task: int) -> None:
        passes = [(x.double(), y) for x, y in islice(data, self.accumulate)]
        mine = [(self.inputs(part(x)), part(y)) for x, y in passes]
        if self.summed:
            sum(F.cross_entropy(self.ddp(x), y) for x, y in mine).backward()  # type: ignore[union-attr]
        for i, (x, y) in enumerate(() if self.summed else mine):
            with nullcontext() if i == self.accumulate - 1 else self.ddp.no_sync():
                F.cross_entropy(self.ddp(x), y).backward()
        if first:
            self._take_what_was_drawn(task)
        for x, y in passes:
            F.cross_entropy(self.single(self.inputs(x)), y).backward()

    def _take_what_was_drawn(self, task: int) -> None:
        """The single process goes on with the head and the scores of the others."""
        with torch.no_grad():
            mine, others = dict(self.wsn.named_parameters()), dict(self.single.named_parameters())
            for name, param in others.items():
                if f"heads.i{task}." in name or (self.options.get("reinit_scores") and name.endswith("_score")):
                    param.copy_(mine[name])

    def _compare(self, when: str) -> None:
        mine = masks(self.wsn)
        if not all_equal(across(mine)):
            self.problems.append(f"{when}: the masks of the processes differ")
        if not all_equal(across({name: param.detach() for name, param in self.wsn.named_parameters()})):
            self.problems.append(f"{when}: the parameters of the processes differ")
        if self.exact and not all_equal([mine, masks(self.single)]):
            self.problems.append(f"{when}: the masks are not those of a single process")
        pairs = zip(self.wsn.parameters(), self.single.parameters(), strict=True)
        if self.exact and not all(torch.allclose(p, q, rtol=1e-9, atol=1e-11) for p, q in pairs):
            self.problems.append(f"{when}: the parameters are not those of a single process")

    def _look_back(self, task: int) -> None:
        self.wsn.verify()
        for old in range(task + 1):
            now = self._logits(old)
            if old in self.kept and not torch.equal(now, self.kept[old]):
                self.problems.append(f"the logits of task {old} have changed after task {task}")
            self.kept.setdefault(old, now)
        stored = {n: b for n, b in self.wsn.named_buffers() if n.endswith(("_masks", "_tasks", "running_mean"))}
        if not all_equal(across({**stored, **{str(k): v for k, v in self.kept.items()}})):
            self.problems.append(f"after task {task} the processes keep different things")

    @torch.no_grad()
    def _logits(self, task: int) -> Tensor:
        self.wsn.eval()
        with self.wsn.use_task(task):
            return self.wsn(self.inputs(batches(99, 1, BATCH)[0][0].double())).clone()
