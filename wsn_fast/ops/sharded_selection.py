"""The exact threshold of a tensor that is cut into shards, one in each process of a group.

No score leaves its process. A radix search finds the threshold from its highest digit to its lowest: each round counts
one digit of the codes (:mod:`wsn_fast.backends.digits`) that begin with the digits found so far, and the counts of all
processes are added up. The counts of many tensors travel together. All processes compute the same digits from the same
counts, and no host waits for a device.
"""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..backends import collectives, digits

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_DECIMALS = 3
_BASE = 10**_DECIMALS
_LONGEST = 60
"""So many decimals of a density are read. They hold all digits of a float that is not far below 1 / 2^53."""


@torch.no_grad()
def thresholds(shards: Sequence[Tensor], densities: Sequence[float], rule: str, group: ProcessGroup) -> Tensor:
    """The thresholds of several tensors, [len(shards)], in the dtype and on the device of the shards. That of a tensor
    without elements is NaN.

    Args:
        shards: this process's part of each tensor, of any shape and also without elements; all of one dtype and on one
            device. The other processes have as many.
        densities: of each tensor.
        rule: "magnitude" or "value".
        group: the processes that have the other parts.
    """
    first = shards[0]
    prefix = torch.zeros(len(shards), dtype=torch.int64, device=first.device)
    rank: Tensor | None = None  # of the threshold among the codes that begin with the prefix
    known = 0
    for width in digits.WIDTHS[first.element_size()]:
        counts = torch.zeros(len(shards), 1 << width, dtype=torch.int32, device=first.device)
        for shard, begin, own in zip(shards, prefix.unbind(), counts.unbind(), strict=True):
            digits.count(shard, rule, begin, known, width, own)
        collectives.sum_over(group, counts)
        upto = (counts.to(torch.int64) & 0xFFFFFFFF).cumsum(1)  # a sum of 2^31 and more has wrapped around
        if rank is None:
            rank = _ranks(upto[:, -1], densities, rule)
        # Without elements no digit is found. The last one of each round gives the code of NaN.
        digit = torch.searchsorted(upto, rank[:, None], right=True).clamp_(max=(1 << width) - 1)
        below = upto.gather(1, (digit - 1).clamp_(min=0)).masked_fill_(digit == 0, 0)
        rank = rank - below[:, 0]
        prefix = prefix << width | digit[:, 0]
        known += width
    return digits.decode(prefix, first.dtype, rule)


def _ranks(counts: Tensor, densities: Sequence[float], rule: str) -> Tensor:
    """The ranks of the thresholds of tensors with these ``counts`` of elements, int64."""
    if len(set(densities)) == 1:
        return ranks(counts, densities[0], rule)
    return torch.stack([ranks(n, c, rule) for n, c in zip(counts.unbind(), densities, strict=True)])


def ranks(counts: Tensor, density: float, rule: str) -> Tensor:
    """What :func:`wsn_fast.ops.threshold_rank` returns for each of these ``counts``, on their device. 0 for 0.

    Args:
        counts: int64, any shape, each below 2^53.
        density: in (0, 1].
        rule: "magnitude" or "value".

    Returns:
        int64, in the shape of ``counts``.
    """
    last = (counts - 1).clamp(min=0)
    if rule == "magnitude":
        return (last.to(torch.float64) * (0.01 * ((1 - density) * 100))).round().to(torch.int64)
    # ceil((1 - c) * last) is last - floor(c * last). The floor is exact: the decimals of c, from the last on, as one
    # does it by hand.
    whole, _, decimals = f"{Decimal(repr(density)):f}".partition(".")
    decimals = decimals[:_LONGEST].ljust(-(-len(decimals[:_LONGEST]) // _DECIMALS) * _DECIMALS, "0")
    kept = torch.zeros_like(last)
    for end in range(len(decimals), 0, -_DECIMALS):
        kept = (kept + last * int(decimals[end - _DECIMALS : end])) // _BASE
    return last - kept - last * int(whole)
