"""The checks of results: exact equality, the 2x rule for floats, and the rank of a threshold."""

from __future__ import annotations

import torch
from torch import Tensor

from wsn_fast.reference import specification

_LARGEST_SORT = 1 << 26


class WrongResultError(Exception):
    """A call computed something else than it should; its time is worth nothing."""


class UnavailableError(Exception):
    """A contender does not exist on this machine; the message gives the reason."""


def check_same(actual: Tensor, expected: Tensor, what: str) -> None:
    """Every value equals the expected one, or ``WrongResultError`` is raised; NaN equals NaN and -0.0 equals +0.0."""
    if actual.shape != expected.shape or actual.dtype is not expected.dtype:
        raise WrongResultError(
            f"{what}: {actual.dtype} {list(actual.shape)}, expected {expected.dtype} {list(expected.shape)}"
        )
    if torch.equal(actual, expected):
        return
    wrong = actual != expected
    if actual.is_floating_point():
        wrong &= ~(actual.isnan() & expected.isnan())
    count = int(wrong.sum())
    if count:
        first = tuple(wrong.nonzero()[0].tolist())
        pair = f"{actual[first].item()!r} for {expected[first].item()!r}"
        raise WrongResultError(f"{what}: {count} of {wrong.numel()} differ, the first at {first}: {pair}")


def check_close(actual: Tensor, torchs: Tensor, exact: Tensor, what: str) -> None:
    """The 2x rule: the error against float64 is at most twice PyTorch's own at the same dtype.

    It is applied to the largest element and to the root of the mean square. Half a unit in the last place of the
    largest value is allowed beside it, since PyTorch is at times exact by luck.

    Raises:
        WrongResultError: the error is larger; the message gives both errors.
    """
    if actual.shape != exact.shape or not bool(actual.isfinite().all()):
        raise WrongResultError(f"{what}: shape {list(actual.shape)} for {list(exact.shape)}, or not all finite")
    ours, theirs = (t.double() - exact for t in (actual, torchs))
    unit = torch.finfo(torchs.dtype).eps / 2
    sizes = {"largest": lambda t: float(t.abs().max()), "mean square": lambda t: float(t.square().mean().sqrt())}
    for measure, size in sizes.items():
        error, allowed = size(ours), 2 * size(theirs) + unit * size(exact)
        if not error <= allowed:
            raise WrongResultError(f"{what}: {measure} error {error:.3g}, allowed {allowed:.3g} (twice torch's own)")


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
