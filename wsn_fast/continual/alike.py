"""Makes the processes of a group alike, or finds out that they are not."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from ..backends import collectives
from .frozen_values import checksums

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Named = tuple[str, Tensor]
_LISTED = 10


@torch.no_grad()
def send(group: ProcessGroup | None, tensors: Iterable[Tensor]) -> None:
    """Give these tensors the values that they have in the first process of ``group``."""
    if collectives.size(group) == 1:
        return
    for tensor in tensors:
        collectives.send_from_first(group, tensor.detach())
        increment_version(tensor)  # what was made from the values of before is out of date
    torch.clear_autocast_cache()


@torch.no_grad()
def different_tensors(group: ProcessGroup | None, tensors: Sequence[Named], device: torch.device) -> list[str]:
    """The names of those tensors that the processes of ``group`` have different values of. ``device`` is that of the
    collectives."""
    by_device: dict[torch.device, list[Named]] = {}
    for name, tensor in tensors:
        by_device.setdefault(tensor.device, []).append((name, tensor))
    names = [name for named in by_device.values() for name, _ in named]
    sums = [checksums([tensor for _, tensor in named]).to(device) for named in by_device.values()]
    return _different(group, names, torch.cat(sums) if sums else torch.empty(0, dtype=torch.int64, device=device))


def different_texts(group: ProcessGroup | None, texts: Mapping[str, str], device: torch.device) -> list[str]:
    """The names of those texts that differ in the processes of ``group``."""
    return _different(group, list(texts), torch.tensor([_hash(text) for text in texts.values()], device=device))


def _different(group: ProcessGroup | None, names: list[str], words: Tensor) -> list[str]:
    own = torch.tensor([_hash("\n".join(names))], device=words.device)
    if bool(_differ(group, own).any()):  # then the words cannot be compared
        every = [frozenset(text.split("\n")) for text in collectives.texts_of(group, "\n".join(names))]
        return sorted(every[0].union(*every) - every[0].intersection(*every)) or ["the order of the tensors"]
    return [name for name, one in zip(names, _differ(group, words).tolist(), strict=True) if one]


def _differ(group: ProcessGroup | None, words: Tensor) -> Tensor:
    """Which of these int64 differ."""
    both = torch.stack([words, ~words])  # the largest complement is that of the smallest word
    collectives.largest_over(group, both)
    return both[0] != ~both[1]


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


def listed(names: Sequence[str]) -> str:
    """These names, or the first of them."""
    rest = len(names) - _LISTED
    return ", ".join(names[:_LISTED]) + (f" and {rest} more" if rest > 0 else "")
