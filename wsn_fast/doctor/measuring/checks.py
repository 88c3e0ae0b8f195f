"""The checks of results: exact equality, and the 2x rule for floats."""

from __future__ import annotations

import torch
from torch import Tensor


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
