"""What the Triton backend keeps in a plan from call to call, and the addresses that change between the calls."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from operator import or_
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from ...kernels import addresses as writer
from ...kernels._elementwise import ALIGNMENT
from ..updates import Plan

Table = TypeVar("Table")


class Kept(Protocol):
    """What a plan keeps for one set of tensors."""

    captured: bool
    """Whether a captured graph reads it, which then has to stay."""


def keep(plan: Plan, key: Any, entry: Kept, most: int) -> None:
    """Add an entry to the plan, and drop the oldest ones of more than ``most`` that no captured graph reads."""
    plan[key] = entry
    loose = [old for old, kept in plan.items() if not kept.captured]
    for old in loose[: max(0, len(loose) - most)]:
        del plan[old]


def is_capturing(device: torch.device) -> bool:
    """Whether the launches that are made now become those of a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def addresses_of(tensors: Iterable[Tensor | None]) -> list[int]:
    """The address of each tensor; 0 for None."""
    return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]


def are_aligned(addresses: Iterable[int]) -> bool:
    """Whether all addresses are multiples of 16 bytes."""
    return functools.reduce(or_, addresses, 0) % ALIGNMENT == 0


class Addresses:
    """Addresses on the device, which may be others at every call. An address of 0 is never read.

    Attributes:
        numbers: int64 [rows, T].
    """

    def __init__(self, rows: int, tensors: int, device: torch.device) -> None:
        self.numbers = torch.empty(rows, tensors, dtype=torch.int64, device=device)
        self._written: list[int] | None = None

    def write(self, values: list[int]) -> None:
        """Bring the addresses, row by row, to the device if they have changed. It takes a single launch or copy, but
        for the first time, when the addresses are arguments of kernels.

        A captured graph writes addresses of its own, for the first time therefore. It would repeat a copy, too, and so
        would need the memory that it copies from for as long as it lives. And the kernel is loaded when a capture
        begins, as the addresses outside the graph were written for the first time before.
        """
        known = self._written or [0] * len(values)
        launches = writer.launches(values, known)
        if self._written is None or len(launches) < 2:
            writer.write(self.numbers.view(-1), values, known)
        else:
            self._copy(values)
        self._written = values

    def _copy(self, values: list[int]) -> None:
        # The copy does not wait for the device, because it is from pinned memory. PyTorch gives this memory to nobody
        # else before the copy is over.
        pinned = torch.empty(len(values), dtype=torch.int64, pin_memory=self.numbers.is_cuda)
        pinned.numpy()[:] = values
        self.numbers.view(-1).copy_(pinned, non_blocking=True)


@dataclass
class Entry(Generic[Table]):
    """What a plan keeps for tensors that share launches.

    Attributes:
        table: where those tensors are that stay in place.
        addresses: where the others are.
        captured: whether a captured graph reads the table.
    """

    table: Table
    addresses: Addresses
    captured: bool = False

    def addresses_at(self, rows: Sequence[list[int]]) -> Tensor:
        """The addresses on the device, int64 [rows, T], for the launches that are made now.

        A captured graph repeats the launches that are made here, and nothing else. Therefore a graph gets a tensor of
        addresses of its own, and the graph itself writes the addresses into it. The table that the graph reads was
        written before the capture and is kept.
        """
        addresses = self.addresses
        if is_capturing(addresses.numbers.device):
            self.captured = True
            addresses = Addresses(len(rows), len(rows[0]), addresses.numbers.device)
        addresses.write([*chain.from_iterable(rows)])
        return addresses.numbers
