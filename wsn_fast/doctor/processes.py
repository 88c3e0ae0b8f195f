"""``python -m wsn_fast.doctor --check`` under torchrun: the collectives that the library uses, on these devices.

Each process computes by itself what it is to get, from numbers that follow from the ranks. Sums are of small whole
numbers, so that they are exact in every dtype and in any order. A sum of others has to have the same bits in all
processes. What each process found travels through the store of torchrun, which no wrong collective can spoil.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .. import launch
from ..backends import collectives
from ..backends.meeting import Meeting, meet
from ..continual.wsn import WSN
from ..nn.linear import FastSubnetLinear
from ..ops import topc_threshold

SECONDS = 60
"""So long a process waits for the others in one collective, and the first one for their answers."""
_SIZE = 1003
_MOST = 100  # the sums of whole numbers are no larger, which bfloat16 holds exactly
_INTEGERS = (torch.int32, torch.int64)
_FLOATS = (torch.float32, torch.float64, torch.bfloat16)
_DTYPES = (*_INTEGERS, *_FLOATS)


class Check(NamedTuple):
    """A collective and how to check it.

    Attributes:
        name: what it is called in the output.
        dtypes: of the tensors.
        run: called with the meeting, a device and a dtype. It returns what has to have the same bits in all processes,
            and raises ``AssertionError`` if something is wrong in this one. It compares after its last collective:
            a process that stopped earlier would leave the others waiting.
    """

    name: str
    dtypes: Sequence[torch.dtype]
    run: Callable[[Meeting, torch.device, torch.dtype], Tensor]


class Verdict(NamedTuple):
    """What was found about a collective.

    Attributes:
        name: of the check.
        dtypes: those that were compared.
        problem: the dtype, the process and what is wrong there; or None.
    """

    name: str
    dtypes: str
    problem: str | None


# --- numbers ------------------------------------------------------------------------------------------------
def _whole(rank: int, size: int, device: torch.device, dtype: torch.dtype, count: int = _SIZE) -> Tensor:
    """Whole numbers of a process, whose sums over the processes are at most ``_MOST``."""
    most = max(1, _MOST // size)
    return ((torch.arange(count) * 7 + 13 * rank) % (2 * most + 1) - most).to(device, dtype)


def _of_all(met: Meeting, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The numbers of all processes, [processes, count]."""
    return torch.stack([_whole(rank, met.size, device, dtype) for rank in range(met.size)])


def _random(rank: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.randn(_SIZE, generator=torch.Generator().manual_seed(rank)).to(device, dtype)


def _same(found: Tensor, expected: Tensor) -> Tensor:
    """Raise ``AssertionError`` unless two tensors are equal."""
    assert found.shape == expected.shape, f"the shape is {tuple(found.shape)}, not {tuple(expected.shape)}"
    wrong = (found != expected).reshape(-1).nonzero()
    if len(wrong):
        first = int(wrong[0])
        values = (found.reshape(-1)[first].item(), expected.reshape(-1)[first].item())
        raise AssertionError(f"element {first} of {found.numel()} is {values[0]}, not {values[1]}")
    return found


# --- the collectives ----------------------------------------------------------------------------------------
def _sum(met: Meeting, device: torch.device, dtype: torch.dtype) -> Tensor:
    whole = _whole(met.rank, met.size, device, dtype)
    if dtype.is_floating_point:
        other = _random(met.rank, device, dtype)
    else:
        other = torch.full_like(whole, torch.iinfo(dtype).max)  # counts of 2^31 and more wrap around
    around = other * met.size
    for tensor in (whole, other):
        collectives.sum_over(met.group, tensor)
    _same(whole, _of_all(met, device, dtype).sum(0).to(dtype))
    return other if dtype.is_floating_point else _same(other, around)


def _sum_in_background(met: Meeting, device: torch.device, dtype: torch.dtype) -> Tensor:
    total = _whole(met.rank, met.size, device, dtype)
    future = collectives.start_sum_over(met.group, total)
    future.wait()
    return _same(future.value()[0], _of_all(met, device, dtype).sum(0).to(dtype))


def _largest(met: Meeting, device: torch.device, dtype: torch.dtype) -> Tensor:
    found = _whole(met.rank, met.size, device, dtype)
    collectives.largest_over(met.group, found)
    return _same(found, _of_all(met, device, dtype).amax(0))


def _broadcast(met: Meeting, device: torch.device, dtype: torch.dtype) -> Tensor:
    found = torch.stack([_random(met.rank, device, torch.float32) * 99] * 2, 1).to(dtype)[:, 0]  # it has strides
    expected = (_random(0, device, torch.float32) * 99).to(dtype)
    collectives.send_from_first(met.group, found)
    return _same(found, expected)


def _gather(met: Meeting, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Parts of different lengths; that of the first process is empty."""
    parts = [_whole(rank, met.size, device, dtype, 37 * rank) for rank in range(met.size)]
    return _same(collectives.joined(met.group, parts[met.rank]), torch.cat(parts))


def _objects(met: Meeting, device: torch.device, dtype: torch.dtype) -> Tensor:
    texts = collectives.texts_of(met.group, f"process {met.rank}" * (met.rank + 1))
    said = [{"rank": met.rank}]
    torch.distributed.broadcast_object_list(said, 0, met.group)
    assert texts == [f"process {rank}" * (rank + 1) for rank in range(met.size)], f"the texts are {texts}"
    assert said == [{"rank": 0}], f"the first process has sent {said[0]}"
    return torch.zeros(1)


def _gather_shards(met: Meeting, device: torch.device, dtype: torch.dtype) -> Tensor:
    parts = _of_all(met, device, dtype)
    found = torch.empty_like(parts.reshape(-1))
    _newer("all_gather_single", "all_gather_into_tensor")(found, parts[met.rank], group=met.group)
    return _same(found, parts.reshape(-1))


def _scatter_sums(met: Meeting, device: torch.device, dtype: torch.dtype) -> Tensor:
    every = torch.stack([_whole(rank, met.size, device, dtype, met.size * _SIZE) for rank in range(met.size)])
    found = torch.empty(_SIZE, device=device, dtype=dtype)
    _newer("reduce_scatter_single", "reduce_scatter_tensor")(found, every[met.rank].clone(), group=met.group)
    _same(found, every.sum(0).to(dtype).chunk(met.size)[met.rank])
    return torch.zeros(1)  # each process has another part


def _newer(name: str, before: str) -> Callable[..., object]:
    """A collective of PyTorch by its newer name, or by the one that it had before."""
    found: Callable[..., object] = getattr(torch.distributed, name, None) or getattr(torch.distributed, before)
    return found


def _hook(met: Meeting, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A step's gradients with ``reduce_in_bfloat16``: those of a gated weight in bfloat16, those of a norm as they
    are."""
    from torch.nn.parallel import DistributedDataParallel

    from ..distributed import reduce_in_bfloat16

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer, norm = FastSubnetLinear(8, 4, density=1.0, bias=False), nn.LayerNorm(4)
    wsn = WSN(nn.Sequential(layer, norm)).to(device)
    wsn.begin_task(0)
    ddp = DistributedDataParallel(wsn)
    reduce_in_bfloat16(ddp)
    grads: list[list[Tensor]] = []
    for rank in (met.rank, *range(met.size)):  # that of all processes, and what each of them has alone
        wsn.zero_grad()
        with contextlib.nullcontext() if rank == met.rank and not grads else ddp.no_sync():
            ddp(_random(rank, device, torch.float32)[:16].view(2, 8)).square().sum().backward()
        grads.append([tensor.grad.clone() for tensor in (layer.weight, norm.weight) if tensor.grad is not None])
    for number, (sent_in, name) in enumerate(((torch.bfloat16, "a gated weight"), (torch.float32, "a norm"))):
        alone = torch.stack([of_rank[number] for of_rank in grads[1:]])
        allowed = 4 * torch.finfo(sent_in).eps * alone.abs().sum(0) + 1e-30
        worst = float(((grads[0][number] - alone.mean(0)).abs() / allowed).max())
        assert worst <= 1, f"the gradient of {name} is off by {worst:.3g} of what {_word(sent_in)} allows"
    return torch.cat([one.reshape(-1) for one in grads[0]])


def _threshold(met: Meeting, device: torch.device, dtype: torch.dtype) -> Tensor:
    scores = _random(99, device, dtype)
    scores[:100] = scores[100:200]  # ties
    ends = [len(scores) * (rank * rank) // (met.size * met.size) for rank in range(met.size + 1)]
    shard = scores[ends[met.rank] : ends[met.rank + 1]]
    ways = [(density, rule) for rule in ("magnitude", "value") for density in (0.05, 0.3, 1.0)]
    found = [topc_threshold(shard, density, rule=rule, group=met.group) for density, rule in ways]
    whole = [topc_threshold(scores, density, rule=rule) for density, rule in ways]
    return _same(torch.stack(found), torch.stack(whole))


CHECKS = (
    Check("all-reduce, sum", _DTYPES, _sum),
    Check("all-reduce, sum in the background", (torch.float32, torch.bfloat16), _sum_in_background),
    Check("all-reduce, max", _DTYPES, _largest),
    Check("broadcast", _DTYPES, _broadcast),
    Check("all-gather of parts", _DTYPES, _gather),
    Check("objects", (torch.uint8,), _objects),
    Check("all-gather of shards (FSDP2)", (torch.float32, torch.bfloat16), _gather_shards),
    Check("reduce-scatter (FSDP2)", (torch.float32, torch.bfloat16), _scatter_sums),
    Check("gradients with reduce_in_bfloat16", (torch.bfloat16,), _hook),
    Check("threshold of shards", _FLOATS, _threshold),
)


# --- verdicts -----------------------------------------------------------------------------------------------
def check(met: Meeting, device: torch.device) -> Iterator[Verdict]:
    """Check every collective on ``device``, one at a time. All processes get the same verdicts. If a process fails
    otherwise than by a wrong result, nothing more is checked, because the others may not be where it is."""
    for number, one in enumerate(CHECKS):
        problem: str | None = None
        lost = False
        for dtype in one.dtypes:
            key = f"{device.type} {number} {dtype}"
            found, failed = _agree(met, key, *_attempt(met, one, device, dtype))
            if found and problem is None:
                problem = f"{_word(dtype)}, {found}"
            lost = lost or failed
            if lost:
                break
        yield Verdict(one.name, " ".join(map(_word, one.dtypes)), problem)
        if lost:
            return


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _attempt(met: Meeting, one: Check, device: torch.device, dtype: torch.dtype) -> tuple[str, bool, str]:
    """What is wrong in this process, whether something else failed than a comparison, and a digest of the result."""
    try:
        result = one.run(met, device, dtype)
        raw = result.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return "", False, hashlib.blake2b(raw, digest_size=8).hexdigest()
    except AssertionError as error:
        return str(error), False, ""
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())}", True, ""


def _agree(met: Meeting, key: str, problem: str, failed: bool, digest: str) -> tuple[str, bool]:
    """The first problem of all processes, and whether any of them failed. Each tells the others through the store."""
    met.store.set(f"{key} {met.rank}", json.dumps([problem, failed, digest]))
    every: list[tuple[str, bool, str]] = []
    for rank in range(met.size):
        try:
            met.store.wait([f"{key} {rank}"], timedelta(seconds=2 * SECONDS))
            every.append(tuple(json.loads(met.store.get(f"{key} {rank}"))))
        except RuntimeError:
            every.append((f"it has not answered in {2 * SECONDS} s", True, ""))
    others = [f"rank {rank}: {text}" for rank, (text, _, _) in enumerate(every) if text]
    if not others:
        others = [f"rank {r}: its bits are not those of rank 0" for r, (_, _, own) in enumerate(every) if own != digest]
    return "; ".join(others), any(failed for _, failed, _ in every)


def main() -> int:
    """Check the collectives on the CPU, and on the GPU of each process if there is one. The first process prints a line
    for each. Return 1 in all of them if one is wrong, else 0."""
    met = meet(timedelta(seconds=SECONDS))
    wrong = 0
    for device, name in _devices(met):
        _say(met, f"{device.type}: {met.size} processes, {name}")
        verdicts = list[Verdict]()
        for verdict in check(met, device):
            verdicts.append(verdict)
            says = "right" if verdict.problem is None else f"WRONG: {verdict.problem}"
            _say(met, f"  {verdict.name:35}{verdict.dtypes:38}{says}")
        left = [one.name for one in CHECKS[len(verdicts) :]]
        if left:
            _say(met, f"  not checked after that: {', '.join(left)}")
        wrong += sum(verdict.problem is not None for verdict in verdicts)
        if left:
            break
    _say(
        met,
        f"{wrong} collectives are wrong; report them with this output"
        if wrong
        else "every collective is right. Without torchrun, --check compares the operations",
    )
    if met.rank == 0:
        met.store.set("said", "")
    met.store.wait(["said"], timedelta(seconds=SECONDS))  # torchrun ends all processes when one ends with status 1
    if not wrong:
        torch.distributed.destroy_process_group()
    return min(wrong, 1)


def _devices(met: Meeting) -> list[tuple[torch.device, str]]:
    found = [(torch.device("cpu"), "gloo")]
    if torch.cuda.is_available() and launch.local_rank() < torch.cuda.device_count():
        torch.cuda.set_device(launch.local_rank())
        found.append((torch.device("cuda", launch.local_rank()), "NCCL"))
    return found


def _say(met: Meeting, line: str) -> None:
    if met.rank == 0:
        print(line, flush=True)
