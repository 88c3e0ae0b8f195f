"""Collectives that are wrong in one process, in one dtype each."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from wsn_fast.backends import digits
from wsn_fast.distributed import ddp
from wsn_fast.doctor import processes

WRONG = 1  # the process


class Arrived:
    """What a collective in the background returns, with a result of our own."""

    def __init__(self, result: Tensor) -> None:
        self._future: torch.futures.Future[list[Tensor]] = torch.futures.Future()
        self._future.set_result([result])

    def get_future(self) -> torch.futures.Future[list[Tensor]]:
        return self._future


def all_wrong(rank: int) -> None:
    """Every collective is wrong in one process."""
    if rank != WRONG:
        return
    before = {name: getattr(dist, name) for name in ("all_reduce", "broadcast", "all_gather", "all_gather_object")}

    def all_reduce(tensor: Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None, async_op: bool = False) -> Any:
        work = before["all_reduce"](tensor, op, group, async_op)
        if async_op and tensor.dtype == torch.float32 and len(tensor) > 1000:
            work.wait()
            return Arrived(tensor + 1)
        if not async_op and (op, tensor.dtype) == (dist.ReduceOp.SUM, torch.bfloat16):
            tensor[3] += 1
        if (op, tensor.dtype) == (dist.ReduceOp.MAX, torch.float32):
            tensor[5] -= 1
        return work

    def broadcast(tensor: Tensor, *args: Any, **kwargs: Any) -> None:
        before["broadcast"](tensor, *args, **kwargs)
        if tensor.dtype == torch.float64:
            tensor[7] += 1

    def all_gather(parts: list[Tensor], mine: Tensor, **kwargs: Any) -> None:
        before["all_gather"](parts, mine, **kwargs)
        if mine.dtype == torch.uint8:
            parts[1][0] ^= 1

    def all_gather_object(texts: list[str], text: str, **kwargs: Any) -> None:
        before["all_gather_object"](texts, text, **kwargs)
        texts[0] = "another"

    dist.all_reduce, dist.broadcast, dist.all_gather = all_reduce, broadcast, all_gather
    dist.all_gather_object = all_gather_object
    for name in ("all_gather_single", "all_gather_into_tensor", "reduce_scatter_single", "reduce_scatter_tensor"):
        if hasattr(dist, name):
            setattr(dist, name, with_one_more(getattr(dist, name)))
    ddp._Sum.take = lambda self: None  # type: ignore[method-assign]
    decode = digits.decode
    digits.decode = lambda codes, dtype, rule: decode(codes, dtype, rule) + 1


def with_one_more(call: Any) -> Any:
    def wrong(result: Tensor, given: Tensor, **kwargs: Any) -> None:
        call(result, given, **kwargs)
        if result.dtype == torch.bfloat16:
            result[9] += 1

    return wrong


def other_bits(rank: int) -> None:
    """One process rounds sums differently."""
    before = dist.all_reduce

    def all_reduce(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        work = before(tensor, *args, **kwargs)
        if tensor.dtype == torch.float64 and (tensor != tensor.round()).any():
            tensor[11] *= 1 + 2**-52
        return work

    if rank == WRONG:
        dist.all_reduce = all_reduce


def one_raises(rank: int) -> None:
    """One process raises in place of a sum, and the other one waits for it."""
    before = dist.all_reduce
    processes.SECONDS = 3

    def all_reduce(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        if rank == WRONG and tensor.dtype == torch.float64:
            raise RuntimeError("no such kernel")
        return before(tensor, *args, **kwargs)

    dist.all_reduce = all_reduce


def one_is_silent(rank: int) -> None:
    """One process does not come back from a sum in time."""
    one_raises(rank)
    if rank == WRONG:
        met = processes.meet

        def meet(timeout: timedelta) -> processes.Meeting:
            found = met(timeout)

            class Silent:
                def __getattr__(self, name: str) -> Any:
                    return getattr(found.store, name)

                def set(self, key: str, value: str) -> None:
                    if "float64" not in key:
                        found.store.set(key, value)

            return found._replace(store=Silent())

        processes.meet = meet
