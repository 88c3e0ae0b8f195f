"""Checkpoints of some processes that others load. All cases work in one folder, which they share."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from io import BytesIO
from pathlib import Path
from shutil import copytree
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.distributed as dist
from ddp_training import adamw, one_pass, part
from fsdp_uses import check
from sharded_training import BATCH, mesh, sgd, subnet_adamw, transformer, uneven
from small_models import batches, convnet
from torch import Tensor, nn
from torch.distributed.checkpoint import FileSystemReader
from torch.nn.functional import cross_entropy

from wsn_fast import WSN, FastSubnetLinear, TaskHeads
from wsn_fast.backends import collectives, moments
from wsn_fast.distributed import full_state_dict, load_checkpoint, load_optimizer, save_checkpoint, shard
from wsn_fast.nn.shards import local, shard_of
from wsn_fast.optim import SubnetAdamW
from wsn_fast.optim.stored_means import local_mean


def wide() -> nn.Module:
    """Rows that two or three processes cannot share evenly, of several blocks of running means each."""
    layers = [FastSubnetLinear(36, 29, density=0.4), FastSubnetLinear(29, 20, density=0.5)]
    return nn.Sequential(nn.Flatten(), layers[0], nn.LayerNorm(29), nn.ReLU(), layers[1], TaskHeads(20, 3))


def stored(wsn: WSN, storage: str) -> SubnetAdamW:
    return SubnetAdamW(wsn, 1e-2, one_pass=True, moments=storage)


class Kind(NamedTuple):
    """What is saved: a model with two finished tasks and one in progress."""

    make: Callable[[], nn.Module] = uneven
    optimizer: Callable[[WSN], torch.optim.Optimizer] = one_pass


KINDS = {
    "one pass": Kind(),
    "standard": Kind(optimizer=subnet_adamw),
    "guarded": Kind(optimizer=adamw),
    "momentum": Kind(optimizer=sgd),
    "attention": Kind(transformer),
    "convolution": Kind(convnet),
    "bfloat16": Kind(wide, partial(stored, storage="bfloat16")),
    "8 bits": Kind(wide, partial(stored, storage="8bit")),
    "8 bits of few rows": Kind(uneven, partial(stored, storage="8bit")),
}
CODED = ("bfloat16", "8 bits", "8 bits of few rows")
ACROSS = [kind for kind in KINDS if kind != "convolution"]  # the statistics of batch norm are those of a process's part


def fresh(kind: str, seed: int = 1) -> WSN:
    torch.manual_seed(seed)
    return WSN(KINDS[kind].make().double())


def step(wsn: WSN, optimizer: torch.optim.Optimizer, task: int, count: int) -> None:
    wsn.train()
    for x, y in batches(task, count, BATCH):
        optimizer.zero_grad()
        whole = wsn.gates.sharding is None
        cross_entropy(wsn(x.double() if whole else part(x.double())), y if whole else part(y)).backward()
        optimizer.step()


def trained(wsn: WSN, kind: str) -> torch.optim.Optimizer:
    """Two finished tasks, the second of which has a density of its own, and two steps of a third."""
    for task, density in ((0, None), ("two", 0.3)):
        wsn.begin_task(task, density=density)
        step(wsn, KINDS[kind].optimizer(wsn), len(wsn.tasks), 3)
        wsn.end_task()
    wsn.begin_task(2)
    optimizer = KINDS[kind].optimizer(wsn)
    step(wsn, optimizer, 2, 2)
    return optimizer


def go_on(wsn: WSN, optimizer: torch.optim.Optimizer) -> None:
    step(wsn, optimizer, 3, 2)
    wsn.end_task()


def state_of(wsn: WSN) -> dict[str, Tensor]:
    return wsn.state_dict() if wsn.gates.sharding is None else full_state_dict(wsn)


def save(rank: int, kind: str) -> None:
    saved(shard(fresh(kind), mesh()), kind, dist.get_world_size(), rank)


def saved(wsn: WSN, kind: str, world: int, rank: int = 0, folder: Path = Path()) -> None:
    optimizer = trained(wsn, kind)
    save_checkpoint(folder / f"{kind} by {world}", wsn, optimizer)
    keep(state_of(wsn), folder / f"{kind} at {world}.pt", rank)
    if kind in CODED:
        keep(means_of(wsn, optimizer), folder / f"{kind} means {world}.pt", rank)
    go_on(wsn, optimizer)
    keep(state_of(wsn), folder / f"{kind} after {world}.pt", rank)


def keep(state: dict[str, Tensor], path: Path, rank: int) -> None:
    if rank == 0:
        torch.save(state, path)


def means_of(wsn: WSN, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The running means of gated tensors and scores as float32, whole."""
    found = {}
    for name, param in wsn.named_parameters():
        gate, state = shard_of(param), optimizer.state[param]
        for key, signed in SubnetAdamW.MEANS.items() if gate is not None or "score" in name else ():
            mean = local_mean(state, key)
            own = local(param).detach()
            values = own if mean is None else moments.decode(mean, own, signed)  # None: this process has no rows
            values = values.float()
            whole = values if gate is None else collectives.joined(gate.group, values.reshape(-1)).view(param.shape)
            found[f"{name} {key}"] = whole
    return found


def read_by_torch(wsn: WSN, kind: str, of: int, folder: Path = Path()) -> list[str]:
    """The running means that an optimizer of torch, which knows no codes, has got otherwise than they were."""
    plain = torch.optim.Adam([p for p in wsn.parameters() if p.requires_grad], decoupled_weight_decay=True)
    load_optimizer(folder / f"{kind} by {of}", wsn, plain)
    now, then = means_of(wsn, plain), torch.load(folder / f"{kind} means {of}.pt")
    return [f"{name} was read otherwise" for name in now if not torch.equal(now[name], then[name])]


def load(rank: int, kind: str, of: int) -> list[str]:
    """What is wrong with a checkpoint of ``of`` processes."""
    wsn = shard(fresh(kind, seed=7 + rank), mesh())
    return differences(wsn, kind, of, exactly=of == dist.get_world_size(), rank=rank)


def differences(wsn: WSN, kind: str, of: int, exactly: bool, rank: int = 0, folder: Path = Path()) -> list[str]:
    load_checkpoint(folder / f"{kind} by {of}", wsn)
    optimizer = KINDS[kind].optimizer(wsn)
    load_optimizer(folder / f"{kind} by {of}", wsn, optimizer)
    check(wsn.verify().tasks == [0, "two"] and wsn.current_task == 2, "other tasks")
    problems = [f"{name} was loaded otherwise" for name in _different(wsn, folder / f"{kind} at {of}.pt", rank, True)]
    problems += read_by_torch(wsn, kind, of, folder) if kind in CODED else []
    go_on(wsn, optimizer)
    if kind in CODED and not exactly:  # blocks begin elsewhere, and the dither too
        return problems
    return problems + [
        f"{name} is otherwise after" for name in _different(wsn, folder / f"{kind} after {of}.pt", rank, exactly)
    ]


def _different(wsn: WSN, then: Path, rank: int, exactly: bool) -> list[str]:
    now = state_of(wsn)
    if rank:
        return []
    saved = torch.load(then)
    exact = {name for name in saved if exactly or name.endswith("_masks")}
    checksums = {name for name in saved if name == "_extra_state" and not exactly}
    return [
        name
        for name in (now.keys() | saved.keys()) - checksums
        if not (torch.equal if name in exact else close)(now[name], saved[name])
    ]


def close(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=1e-9, atol=1e-11)


def whole_in_each(rank: int) -> list[str]:
    """A WSN that each of two processes has whole, as DistributedDataParallel wants it, is saved and loaded too."""
    wsn = fresh("one pass")
    save_checkpoint("whole in each", wsn, trained(wsn, "one pass"))
    other = fresh("one pass", seed=3 + rank)
    load_checkpoint("whole in each", other)
    one, two = wsn.state_dict(), other.state_dict()
    return [name for name in one if not torch.equal(one[name], two[name])]


# --- what is written
def nothing_is_gathered(rank: int) -> None:
    wsn = shard(fresh("one pass"), mesh())
    optimizer = trained(wsn, "one pass")
    calls = ("joined", "send_from_first")
    with patch.multiple(collectives, **{name: partial(_refused, name) for name in calls}):
        save_checkpoint("not gathered", wsn, optimizer)


def _refused(name: str, *args: object) -> None:
    raise AssertionError(f"a checkpoint calls {name}")


def sizes_of_files(rank: int) -> list[int]:
    """The bytes that each process has written of a model of 8 MiB."""
    wsn = shard(WSN(nn.Sequential(FastSubnetLinear(1024, 1024, density=0.5), TaskHeads(1024, 3))), mesh())
    save_checkpoint("sizes", wsn)
    return sorted(path.stat().st_size for path in Path("sizes").glob("*.distcp"))


# --- what is refused: nothing may have changed
Change = Callable[[Path], object]


def flip(path: Path, tensor: str, in_values: bool = True) -> None:
    """Change a bit of the last piece of a tensor: in its values, or in what says what they are."""
    pieces = FileSystemReader(path).read_metadata().storage_data.items()
    piece = max((p for p in pieces if p[0].fqn == tensor), key=lambda p: tuple(p[0].offset))[1]
    file = path / piece.relative_path
    data = bytearray(file.read_bytes())
    one = data[piece.offset : piece.offset + piece.length]
    values = torch.load(BytesIO(one)).numpy().tobytes()
    at = one.index(values) + len(values) // 2 if in_values else one.index(b"_rebuild_tensor")
    data[piece.offset + at] ^= 64
    file.write_bytes(data)


def cut(path: Path, name: str) -> None:
    file = path / name
    file.write_bytes(file.read_bytes()[:-100])


DAMAGE: dict[str, Change] = {
    "a file is missing": lambda path: (path / "__1_0.distcp").unlink(),
    "a file is cut": lambda path: cut(path, "__1_0.distcp"),
    "a weight": lambda path: flip(path, "wsn.model.1.weight"),
    "a mask": lambda path: flip(path, "wsn.model.1.weight_masks"),
    "a head": lambda path: flip(path, "wsn.model.6.heads.i0.weight"),
    "the kind of a weight": lambda path: flip(path, "wsn.model.1.weight", in_values=False),
    "the tasks": lambda path: flip(path, "wsn._extra_state"),
    "no metadata": lambda path: (path / ".metadata").unlink(),
    "cut metadata": lambda path: cut(path, ".metadata"),
}


def damaged(path: Path, name: str) -> Path:
    """A copy of a checkpoint, with a damage."""
    copy = path.with_name(name)
    copytree(path, copy)
    DAMAGE[name](copy)
    return copy


def wider() -> nn.Module:
    layers = [FastSubnetLinear(36, 8, density=0.4), FastSubnetLinear(8, 2, density=0.5)]
    return nn.Sequential(
        nn.Flatten(), layers[0], nn.LayerNorm(8), nn.ReLU(), layers[1], nn.GroupNorm(1, 2), TaskHeads(2, 3)
    )


def longer() -> nn.Module:
    return nn.Sequential(*uneven(), FastSubnetLinear(3, 3, density=0.5))


def dense() -> nn.Module:
    layers = [FastSubnetLinear(36, 7, density=0.4), FastSubnetLinear(7, 2, density=0.5)]
    return nn.Sequential(nn.Flatten(), layers[0], nn.ReLU(), nn.ReLU(), layers[1], nn.GroupNorm(1, 2), TaskHeads(2, 3))


OTHERS: dict[str, Callable[[], nn.Module]] = {"wider": wider, "longer": longer, "without a norm": dense}


def message_of(path: Path, wsn: WSN) -> str:
    """Why a checkpoint is not loaded, if nothing has changed."""
    before = state_of(wsn)
    try:
        load_checkpoint(path, wsn)
    except RuntimeError as error:
        after = state_of(wsn)
        same = before.keys() == after.keys() and all(map(torch.equal, before.values(), after.values()))
        return str(error) if same else "something has changed"
    return "it was loaded"


def refused(rank: int, name: str) -> str:
    wsn = shard(fresh("one pass", seed=9), mesh())
    if rank == 0 and name in DAMAGE:
        damaged(Path("one pass by 2"), name)
    if name in OTHERS:
        wsn, name = shard(WSN(OTHERS[name]().double()), mesh()), "one pass by 2"
    dist.barrier()
    return message_of(Path(name), wsn)


def worlds(names: list[str], world: int) -> dict[str, Callable[[int], Any]]:
    return {f"{kind} of {world}": partial(load, kind=kind, of=world) for kind in names}


CASES: dict[str, Callable[[int], Any]] = {
    **{f"save {kind}": partial(save, kind=kind) for kind in KINDS},
    **{name: case for world in (1, 2, 3) for name, case in worlds([*KINDS], world).items()},
    "whole in each": whole_in_each,
    "nothing is gathered": nothing_is_gathered,
    "sizes of files": sizes_of_files,
    **{f"refuse {name}": partial(refused, name=name) for name in (*DAMAGE, *OTHERS)},
}
