"""Stories of training under DistributedDataParallel. Each tells what was wrong with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from ddp_training import Story, adamw, one_pass
from small_models import CLASSES, convnet, mlp
from torch import Tensor, nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from wsn_fast import WSN, FastSubnetLinear, TaskHeads, convert, distributed
from wsn_fast.optim import SubnetAdamW


class Recurrent(nn.Module):
    """A GRU with gated matrices, and attention, over six steps."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(6, 8, batch_first=True)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x, _ = self.gru(x.flatten(1, 2))
        x, _ = self.attention(x, x, x)
        return self.head(x.mean(1))


def recurrent() -> nn.Module:
    return convert(Recurrent(), 0.4, heads="head")


def with_heads_of_batch_norm() -> nn.Module:
    head = nn.Sequential(nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Linear(8, CLASSES))
    return nn.Sequential(nn.Flatten(), FastSubnetLinear(36, 16, density=0.4), nn.ReLU(), TaskHeads.of(head))


def with_known_heads() -> nn.Module:
    net = mlp()
    net[-1] = TaskHeads(12, CLASSES, tasks=range(3))
    return net


class Around(nn.Module):
    """A module around a WSN, as a trainer makes one."""

    def __init__(self, wsn: WSN) -> None:
        super().__init__()
        self.inner = wsn

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def around(wsn: WSN) -> nn.Module:
    module = Around(wsn)
    distributed.leave_alone(module)
    return module


def around_before_the_optimizer(wsn: WSN) -> nn.Module:
    """As Lightning does: it wraps the module, and makes the optimizer afterwards."""
    module = Around(wsn)
    distributed.leave_alone(module, scores=True)
    return module


def moments_in_8_bits(wsn: WSN) -> torch.optim.Optimizer:
    return SubnetAdamW(wsn, 1e-2, one_pass=True, moments="8bit")


def zero_redundancy(wsn: WSN) -> torch.optim.Optimizer:
    trained = [param for param in wsn.parameters() if param.requires_grad]
    return wsn.guard(ZeroRedundancyOptimizer(trained, torch.optim.AdamW, lr=1e-2, weight_decay=1e-2))


def first_one_pass(wsn: WSN) -> torch.optim.Optimizer:
    """The first task in one pass, later ones not: the wrapper of the first one leaves the scores alone."""
    return adamw(wsn) if wsn.tasks else one_pass(wsn)


def in_bfloat16(ddp: DistributedDataParallel) -> None:
    distributed.reduce_in_bfloat16(ddp)


def compiled(wsn: WSN) -> nn.Module:
    torch.compiler.reset()
    wsn.compile(backend="eager")
    return wsn


def compiled_whole(wsn: WSN) -> nn.Module:
    """Compiled with breaks of the graph: the forward pass of the WSN itself stays eager."""
    torch.compiler.reset()
    return torch.compile(wsn, backend="eager")


STATIC, VIEWS = {"static_graph": True}, {"gradient_as_bucket_view": True}
IN_TURN: dict[str, Any] = {"optimizer": one_pass, "wrap": "first task"}

STORIES: dict[str, Story] = {
    "once": Story(),
    "each task": Story(wrap="each task"),
    "scores drawn anew": Story(options={"reinit_scores": True}),
    "scores drawn anew, each task": Story(options={"reinit_scores": True}, wrap="each task"),
    "accumulated": Story(accumulate=3),
    "static graph": Story(wrapper=STATIC),
    "bucket views": Story(wrapper=VIEWS),
    "gates ahead": Story(options={"gates_ahead": True}),
    "any module": Story(make=recurrent),
    "known heads": Story(make=with_known_heads),
    "a module around": Story(around=around),
    "a module around that says nothing": Story(around=Around),
    "a module around that says nothing, each task": Story(around=Around, wrap="each task"),
    "a module around, its scores left alone": Story(around=around_before_the_optimizer),
    "zero redundancy": Story(optimizer=zero_redundancy, alone=adamw, wrap="each task"),
    "batch norm": Story(make=convnet, exact=False),
    "batch norm, no buffers sent": Story(make=convnet, exact=False, wrapper={"broadcast_buffers": False}),
    "batch norm in heads": Story(make=with_heads_of_batch_norm, exact=False),
    "bfloat16": Story(hook=in_bfloat16, exact=False),
    "one pass": Story(**IN_TURN),
    "one pass, each task": Story(optimizer=one_pass, wrap="each task"),
    "one pass, scores drawn anew": Story(**IN_TURN, options={"reinit_scores": True}),
    "one pass, accumulated": Story(**IN_TURN, accumulate=3),
    "one pass, static graph": Story(**IN_TURN, wrapper=STATIC),
    "one pass, bucket views": Story(**IN_TURN, wrapper=VIEWS),
    "one pass, any module": Story(**IN_TURN, make=recurrent),
    "one pass, a module around": Story(**IN_TURN, around=around),
    "one pass, made after a module around": Story(optimizer=one_pass, around=around_before_the_optimizer),
    "one pass, unused parameters": Story(optimizer=one_pass, wrapper={"find_unused_parameters": True}),
    "one pass, bfloat16": Story(**IN_TURN, hook=in_bfloat16, exact=False),
    "one pass, bfloat16, accumulated": Story(**IN_TURN, hook=in_bfloat16, exact=False, accumulate=2),
    "one pass, two passes in one": Story(**IN_TURN, accumulate=2, summed=True),
    "two passes in one": Story(accumulate=2, summed=True),
    "compiled": Story(around=compiled),
    "compiled with the WSN": Story(around=compiled_whole),
    "one pass, compiled": Story(**IN_TURN, around=compiled),
    "one pass, 8 bits": Story(optimizer=moments_in_8_bits, wrap="first task"),
    "one pass at first": Story(optimizer=first_one_pass, wrap="first task"),
}

CASES: dict[str, Callable[[int], Any]] = {name: story.run for name, story in STORIES.items()}
