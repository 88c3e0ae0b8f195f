"""Copies of the frozen values of many tensors, taken and put back in few launches."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from .. import ops
from ..backends.updates import Plan
from ..nn.shards import local

PART = 2**28
"""The most bytes that are saved in one piece of memory, unless a single tensor takes more. A piece as large as the
model may not be free, although as much memory is."""

Frozen = tuple[Tensor, Tensor | None]
"""A tensor of n elements, and where it must not change: ``uint8`` [ceil(n / 8)], a packed mask, or None for
everywhere."""


@dataclass
class _Part:
    """Tensors of one device and dtype, and the piece of memory that their copies share.

    Attributes:
        orders: the tensors, their copies and their masks.
        memory: the piece; it has no storage while nothing is saved.
        size: the bytes of its storage.
        plan: what a backend keeps from step to step.
    """

    orders: list[ops.RestoreOrder]
    memory: Tensor
    size: int
    plan: Plan

    def fill(self) -> None:
        """Copy the tensors."""
        storage = self.memory.untyped_storage()
        if storage.nbytes() != self.size:
            storage.resize_(self.size)
        torch._foreach_copy_([order.saved for order in self.orders], [order.param for order in self.orders])

    def empty(self) -> None:
        """Give the memory back, except on a CPU. The copies have their places in it again when it is filled."""
        if not self.memory.is_cpu:
            self.memory.untyped_storage().resize_(0)


class SavedValues:
    """Saves the frozen values of tensors, and puts them back.

    The copies exist from :meth:`save` to :meth:`forget`, and take as much memory as the tensors. What else is needed
    for them (places in the memory, tables of the backends) is kept for the next time, as long as the tensors are the
    same: it would take most of the time of a small model.

    Attributes:
        are_saved: whether there are copies.
    """

    def __init__(self) -> None:
        self._frozen: list[Frozen] = []
        self._facts: object = None
        self._parts: list[_Part] = []
        self._plans: dict[object, Plan] = {}
        self.are_saved = False

    @torch.no_grad()
    def save(self, frozen: Iterable[Frozen]) -> None:
        """Copy these tensors. What was saved before is dropped."""
        self._prepare(list(frozen))
        self.are_saved = False
        try:
            for part in self._parts:
                part.fill()
            self.are_saved = True
        finally:
            if not self.are_saved:
                self.forget()

    @torch.no_grad()
    def restore(self) -> None:
        """Put the saved values back where the tensors are frozen. They stay saved."""
        if not self.are_saved:
            return
        torch.clear_autocast_cache()  # it keeps casts of the values that were there
        increment_version([tensor for tensor, _ in self._frozen if local(tensor) is not tensor])
        moved = self._facts != _facts(self._frozen)
        for part in self._parts:
            if not moved:
                ops.restore_frozen_many(part.orders, plan=part.plan)
                continue
            for param, saved, union in part.orders:  # the model was cast, or moved to another device
                there = None if union is None else union.to(param.device)
                ops.restore_frozen_many([ops.RestoreOrder(param, saved.to(param.device, param.dtype), there)])

    def versions(self) -> list[int]:
        """The versions of the tensors, by which autograd counts what is written to them."""
        return [tensor._version for tensor, _ in self._frozen] if self.are_saved else []

    def forget(self) -> None:
        """Drop the saved values."""
        self.are_saved = False
        for part in self._parts:
            part.empty()

    def _prepare(self, frozen: list[Frozen]) -> None:
        """Have a place for the copy of each tensor."""
        facts = _facts(frozen)
        if facts == self._facts and all(
            one is other and mask is known for (one, mask), (other, known) in zip(frozen, self._frozen, strict=True)
        ):
            return
        self._parts = []  # before there is new memory
        kinds: dict[tuple[torch.device, torch.dtype], list[Frozen]] = {}
        for one in frozen:
            kinds.setdefault((one[0].device, one[0].dtype), []).append(one)
        for kind, members in kinds.items():
            for i, part in enumerate(_cut(members)):
                self._parts.append(_part(part, self._plans.setdefault((kind, i), {})))
        self._frozen, self._facts = frozen, facts


def _facts(frozen: Sequence[Frozen]) -> object:
    """What of the tensors has to be the same, so that a copy of one of them fits."""
    tensors = [local(tensor) for tensor, _ in frozen]
    return [t.shape for t in tensors], [t.dtype for t in tensors], [t.device for t in tensors]


def _cut(frozen: Sequence[Frozen]) -> list[list[Frozen]]:
    """The tensors in groups of :data:`PART` bytes."""
    parts: list[list[Frozen]] = []
    size = PART
    for one in frozen:
        nbytes = local(one[0]).nbytes
        size += nbytes
        if size > PART:
            parts.append([])
            size = nbytes
        parts[-1].append(one)
    return parts


def _part(frozen: Sequence[Frozen], plan: Plan) -> _Part:
    """A place for the copy of each tensor, in one piece of memory without a storage."""
    tensors = [local(tensor) for tensor, _ in frozen]
    sizes = [tensor.numel() for tensor in tensors]
    memory = torch.empty(sum(sizes), dtype=tensors[0].dtype, device=tensors[0].device)
    copies = [copy.view(tensor.shape) for copy, tensor in zip(memory.split(sizes), tensors, strict=True)]
    unions = [union for _, union in frozen]
    orders = [ops.RestoreOrder(*one) for one in zip(tensors, copies, unions, strict=True)]
    return _Part(orders, memory, memory.untyped_storage().nbytes(), plan)
