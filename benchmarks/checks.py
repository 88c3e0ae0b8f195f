"""The check of a threshold, by the reference."""

from __future__ import annotations

from torch import Tensor

from wsn_fast.doctor.measuring.checks import WrongResultError, check_same
from wsn_fast.reference import specification

_LARGEST_SORT = 1 << 26


def check_threshold(tau: Tensor, scores: Tensor, rank: int, rule: str) -> str:
    """``tau`` is the key of this rank: by the reference's sort, or by counting where a sort would not fit."""
    keys = specification.gate_key(scores.detach(), rule).reshape(-1)
    tau = tau.detach().reshape(()).to(keys.device)
    if keys.numel() <= _LARGEST_SORT:
        expected = keys.sort().values[rank]
        check_same(tau, expected, "threshold")
        check_same(~(keys < tau), ~(keys < expected), "mask")
        return "reference: threshold and mask bitwise"
    below, upto = int((keys < tau).sum()), int((keys <= tau).sum())
    if not below <= rank < upto:
        raise WrongResultError(f"threshold: {below} keys below it and {upto} not above, for rank {rank}")
    return "counted: exactly the rank'th key"
