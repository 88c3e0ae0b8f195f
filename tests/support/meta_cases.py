"""A WSN that is built on the meta device, and gets its memory while it is cut into shards."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from ddp_training import across, all_equal, one_pass, part
from fsdp_uses import check, step, train
from sharded_training import mesh, uneven
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.profiler import ProfilerActivity, profile

from wsn_fast import WSN, convert, materialize
from wsn_fast.backends import collectives
from wsn_fast.distributed import full_state_dict, load_checkpoint, save_checkpoint, shard

WIDTH, DEPTH = 256, 12


class Net(nn.Module):
    """Blocks of layers with norms, a parameter and a buffer of its own, and a classifier."""

    def __init__(self, width: int = 10) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Block(width) for _ in range(3)))
        self.shift = nn.Parameter(torch.empty(width))
        self.head = nn.Linear(width, 3)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.shift)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(x) + self.shift)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.first, self.second = nn.LayerNorm(width), nn.Linear(width, 7), nn.Linear(7, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(self.first(self.norm(x)).relu())


class Restless(Block):
    """Its ``reset_parameters`` sets what an inner module has drawn."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.scale = nn.Parameter(torch.empty(width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.scale)
        nn.init.normal_(self.first.bias)


def restless_net() -> nn.Module:
    net = Net()
    net.blocks[1] = Restless(10)
    return net


def on_meta(make: Callable[[], nn.Module] = Net, **options: Any) -> WSN:
    with torch.device("meta"):
        return WSN(convert(make(), 0.4, heads="head", **options), rest="per_task")


def as_one(
    rank: int, groups: tuple[str, ...] = (), make: Callable[[], nn.Module] = Net, score_init: str = "default"
) -> None:
    """The values are those that a single process draws with the seed of the first one."""
    torch.manual_seed(5)
    single = materialize(on_meta(make, score_init=score_init), "cpu")
    torch.manual_seed(5 + rank)
    wsn = shard(on_meta(make, score_init=score_init), mesh(), groups=groups)
    state = full_state_dict(wsn)
    if rank == 0:
        different = [name for name, one in single.state_dict().items() if not torch.equal(one, state[name])]
        check(not different, f"other values: {different}")
    kept = {name: one for name, one in wsn.named_parameters() if "norm" in name or "shift" in name}
    check(all_equal(across({name: one.detach() for name, one in kept.items()})), "the processes differ")


def training(rank: int) -> None:
    wsn = shard(on_meta(), mesh())
    for task in (0, 1):
        wsn.begin_task(task)
        optimizer, x = one_pass(wsn), torch.randn(8, 10, generator=torch.Generator().manual_seed(task))
        for _ in range(3):
            optimizer.zero_grad()
            cross_entropy(wsn(part(x)), part(torch.arange(8) % 3)).backward()
            optimizer.step()
        wsn.end_task()
    check(wsn.verify().tasks == [0, 1], "other tasks")


def from_checkpoint(rank: int) -> None:
    torch.manual_seed(rank)
    wsn = shard(WSN(uneven()), mesh())
    train(wsn, 2)
    save_checkpoint("of a real model", wsn)
    with torch.device("meta"):
        other = WSN(uneven())
    load_checkpoint("of a real model", shard(other, mesh()))
    one, two = full_state_dict(wsn), full_state_dict(other)
    check(all_equal([one, two]), "other values")
    other.begin_task(2)
    step(other, one_pass(other), 2)
    other.end_task()
    other.verify()


def seeds_go_on(rank: int) -> Tensor:
    """What is drawn after a model has been cut: the numbers of a process do not depend on its shards."""
    torch.manual_seed(3)
    shard(on_meta(), mesh())
    return torch.rand(3)


# --- memory
def most_bytes(work: Callable[[], object]) -> int:
    """The most bytes of tensors that there were at once while ``work`` ran, beyond those of before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = [one for one in profiler.profiler.kineto_results.events() if one.name() == "[memory]"]
    events.sort(key=lambda one: one.start_ns())
    return max(accumulate(one.nbytes() for one in events))


def tower(width: int, depth: int) -> nn.Module:
    layers = [layer for _ in range(depth) for layer in (nn.Linear(width, width, bias=False), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(width, 3))


def deep(width: int, depth: int) -> WSN:
    with torch.device("meta"):
        return WSN(convert(tower(width, depth), 0.5, heads=str(2 * depth)))


def live_bytes(rank: int) -> tuple[int, int, int]:
    """The most bytes that a process had at once while it cut a model, what its shards take, and what a layer takes with
    its scores."""
    wsn, layer = deep(WIDTH, DEPTH), 2 * WIDTH**2 * 4
    shard(deep(8, 1), mesh())  # what is imported at the first call
    with patch.object(
        collectives, "send_from_first", lambda *_: None
    ):  # threads of gloo free what they sent, which is not counted
        most = most_bytes(lambda: shard(wsn, mesh()))
    return most, DEPTH * layer // dist.get_world_size(), layer


def resident_bytes(rank: int) -> tuple[int, int, int]:
    """The same of the resident memory of a process, and a model of 768 MiB."""
    width, depth = 4096, 6
    wsn = deep(width, depth)
    shard(deep(64, 1), mesh())  # what is loaded at the first call
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    shard(wsn, mesh())
    layer = 2 * width**2 * 4
    return _resident("VmHWM") - before, depth * layer // dist.get_world_size(), layer


def _resident(what: str) -> int:
    found = re.search(rf"{what}:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


# --- refused
def restless(rank: int) -> None:
    shard(on_meta(restless_net), mesh())


class Lost(Net):
    reset_parameters = None  # type: ignore[assignment]

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.blocks, self.head = nn.Sequential(Block(10)), nn.Linear(10, 3)
        self.shift = nn.Parameter(torch.empty(10))


def lost(rank: int) -> None:
    shard(on_meta(Lost), mesh())


CASES: dict[str, Callable[[int], Any]] = {
    "values": as_one,
    "values, U01": partial(as_one, score_init="U01"),
    "values, blocks": partial(as_one, groups=("blocks.2", "blocks.0")),
    "values, restless in a group": partial(as_one, groups=("blocks.1",), make=restless_net),
    "training": training,
    "a checkpoint": from_checkpoint,
    "seeds": seeds_go_on,
    "live bytes": live_bytes,
    "resident bytes": resident_bytes,
    "restless": restless,
    "lost": lost,
}
