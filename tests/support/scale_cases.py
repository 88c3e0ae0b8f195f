"""What a process holds and sends in a step of a sharded WSN, beside what ``benchmarks.scale`` says of it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from fsdp_uses import wired
from sharded_training import mesh
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy

from benchmarks.scale import Matrices, Model
from wsn_fast import WSN, convert
from wsn_fast.distributed import shard
from wsn_fast.nn.shards import local, shard_of
from wsn_fast.optim import SubnetAdamW

TASKS = 2
CLASSES = 4
MODEL = Model(gated=(Matrices(131, 64, 1), Matrices(96, 131, 1)), blocks=1, per_task=2 * 131 + 97 * CLASSES)
"""The model of the cases: two uneven matrices, a norm for each task, and a head for each task."""
POLICIES: dict[tuple[int, int], MixedPrecisionPolicy] = {
    (4, 4): MixedPrecisionPolicy(),
    (2, 4): MixedPrecisionPolicy(torch.bfloat16, torch.float32),
    (2, 2): MixedPrecisionPolicy(torch.bfloat16, torch.bfloat16),
}
"""By the bytes of the dtypes of what is gathered and of what is summed."""


def measured(rank: int, policy: MixedPrecisionPolicy, one_pass: bool) -> tuple[dict[str, int], int]:
    """The bytes that this process holds at the end of a backward pass, by kind, and those that a step sends."""
    layers = (nn.Linear(64, 131, bias=False), nn.LayerNorm(131), nn.ReLU(), nn.Linear(131, 96, bias=False))
    wsn = WSN(convert(nn.Sequential(*layers, nn.Linear(96, CLASSES)), density=0.3, heads="4"))
    shard(wsn, mesh(), mp_policy=policy)
    for task in range(TASKS + 1):
        wsn.begin_task(task)
        optimizer = SubnetAdamW(wsn, one_pass=one_pass)
        for _ in range(2):
            with wired() as sent:
                optimizer.zero_grad()
                F.cross_entropy(wsn(torch.randn(4, 64)).float(), torch.randint(CLASSES, (4,))).backward()
                held = _held(wsn, optimizer)
                optimizer.step()
        if task < TASKS:
            wsn.end_task()
    return held, sum(sent)


def _held(wsn: WSN, optimizer: SubnetAdamW) -> dict[str, int]:
    kinds = ("weights", "scores", "running means of AdamW", "gradients", "masks and their union", "not gated")
    held = dict.fromkeys(kinds, 0)
    for name, tensor in wsn.named_parameters():
        is_gated, is_score = shard_of(tensor) is not None, name.endswith("_score")
        held["scores" if is_score else "weights" if is_gated else "not gated"] += local(tensor).nbytes
        means = [v for key, v in optimizer.state.get(tensor, {}).items() if key.startswith("exp")]
        held["running means of AdamW" if is_gated else "not gated"] += sum(local(one).nbytes for one in means)
        if tensor.grad is not None:
            held["gradients" if is_gated else "not gated"] += local(tensor.grad).nbytes
    for name, buffer in wsn.named_buffers():
        held["masks and their union" if _is_packed(buffer) else "not gated"] += 0 if "_view" in name else buffer.nbytes
    return held


def _is_packed(buffer: Tensor) -> bool:
    return buffer.dtype == torch.uint8


CASES: dict[str, Callable[[int], Any]] = {
    f"{compute} {reduce} {'one pass' if one_pass else 'standard'}": partial(measured, policy=policy, one_pass=one_pass)
    for (compute, reduce), policy in POLICIES.items()
    for one_pass in (True, False)
}
