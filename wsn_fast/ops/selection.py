"""The selection: the exact threshold of the top density of a tensor of scores, and the mask that it gives."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, overload

import torch
from torch import Tensor

from ..backends import collectives, run
from . import sharded_selection
from .arguments import (
    check_backend,
    check_density,
    check_dtype,
    check_rule,
    check_scores,
    check_sequence,
    constant_threshold,
    key_of,
)
from .operator import operator

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_LONGEST_SHARD = 1 << 31


@functools.lru_cache(maxsize=4096)
def threshold_rank(n: int, density: float, rule: str) -> int:
    """The index of the threshold among ``n`` ascending keys, on the host.

    For "magnitude" this repeats the float64 operations of the paper's code in their order, with c for ``density``:
    ``0.01 * q * (n - 1)`` with ``q = (1 - c) * 100``, rounded half to even. For "value" it is ``ceil((1 - c) *
    (n - 1))``, computed exactly from the decimal digits of c.
    """
    if rule == "magnitude":
        return round(0.01 * ((1 - density) * 100) * (n - 1))
    return math.ceil((1 - Fraction(repr(density))) * (n - 1))


@overload
def topc_threshold(
    scores: Tensor,
    density: float,
    *,
    rule: str = ...,
    backend: str | None = ...,
    group: ProcessGroup | None = ...,
) -> Tensor: ...


@overload
def topc_threshold(
    scores: Sequence[Tensor],
    density: float | Sequence[float],
    *,
    rule: str = ...,
    backend: str | None = ...,
    group: ProcessGroup | None = ...,
) -> list[Tensor]: ...


def topc_threshold(
    scores: Tensor | Sequence[Tensor],
    density: float | Sequence[float],
    *,
    rule: str = "magnitude",
    backend: str | None = None,
    group: ProcessGroup | None = None,
) -> Tensor | list[Tensor]:
    """The exact threshold that keeps the top ``density`` of ``scores``.

    With a ``group``, each of its processes passes its shard of the same tensor, and all of them get the threshold of
    the whole tensor: to the bit what this function gives for the shards joined. Each process sends and receives
    histograms only, for each tensor 20 KiB of counts for float32, 2 KiB for the dtypes of 16 bits and 40 KiB for
    float64, in 3, 2 and 6 sums over the group, however many tensors there are. What a sum costs on the wire is a matter
    of the group's backend: a ring of n processes sends 2 (n - 1) / n of it from each.

    Args:
        scores: floating tensor (float32, float64, bfloat16, float16) of any shape and strides, n >= 1 elements; or a
            sequence of such tensors. With a group of several processes, shards: of any shape, without elements too, and
            all of one dtype and on one device. A shard has less than 2^31 elements, and a whole tensor less than 2^32.
        density: the fraction to keep, in (0, 1]; for a sequence of tensors also one for each. It is a fraction of the
            whole tensor.
        rule: ``"magnitude"`` ranks ``|S|`` as the paper's code does, ``"value"`` ranks ``S`` as CLArena does.
            ``"value >= 0.005"`` ranks nothing: the threshold is this number, whatever the density, as in Piggyback
            (Mallya et al., ECCV 2018). It is not possible with a group of several processes.
        backend: ``"torch"``, ``"triton"`` or ``"native"``; None lets the library choose. With a group of several
            processes it has to be None or ``"torch"``.
        group: a process group of ``torch.distributed``. All of its processes make this call, with as many tensors, the
            same dtype, the same densities and the same rule.

    Returns:
        tau, 0-d, in the dtype and on the device of ``scores``; an element of the ranked keys, if the rule ranks. The
        host does not wait for it. For a sequence, a list with the tau of each. Where all shards are empty, tau is NaN.

    Raises:
        TypeError: ``scores`` is neither a floating tensor of a supported dtype nor a sequence of them; its tensors
            have several dtypes and there is a group; or ``group`` is no process group.
        ValueError: a tensor is empty and whole, or a shard is too long; the shards are on several devices; ``density``
            is outside (0, 1], or there are several and not one for each tensor; ``rule`` or ``backend`` is unknown or
            impossible; or this process is not in ``group``.
    """
    rule, backend = check_rule(rule), check_backend(backend)
    collectives.check_group(group)
    tensors = [scores] if isinstance(scores, Tensor) else check_sequence(scores)
    densities = _densities(density, None if isinstance(scores, Tensor) else len(tensors))
    if group is None or collectives.size(group) == 1:
        checked = [check_scores(one).detach() for one in tensors]
        taus = [threshold(one, c, rule, backend) for one, c in zip(checked, densities, strict=True)]
    else:
        _check_shards(tensors, rule, backend)
        taus = [*sharded_selection.thresholds(tensors, densities, rule, group).unbind()] if tensors else []
    return taus[0] if isinstance(scores, Tensor) else taus


def _densities(density: float | Sequence[float], tensors: int | None) -> list[float]:
    """The density of each of ``tensors``, or of the only one (None)."""
    if tensors is None or not isinstance(density, list | tuple):
        return [check_density(density)] * (1 if tensors is None else tensors)
    if len(density) != tensors:
        raise ValueError(f"density must be a number, or one for each of the {tensors} tensors, got {len(density)}")
    return [check_density(one, f"density[{i}]") for i, one in enumerate(density)]


def _check_shards(shards: Sequence[Tensor], rule: str, backend: str | None) -> None:
    if constant_threshold(rule) is not None:
        raise ValueError(f"rule must be 'magnitude' or 'value' with a group, got {rule!r}")
    for shard in shards:
        check_dtype(shard)
        if shard.numel() >= _LONGEST_SHARD:
            raise ValueError(f"a shard of scores must have less than 2^31 elements, got {shard.numel()}")
    for what, error, found in (
        ("dtype", TypeError, {shard.dtype for shard in shards}),
        ("device", ValueError, {shard.device for shard in shards}),
    ):
        if len(found) > 1:
            listed = ", ".join(sorted(map(str, found)))
            raise error(f"shards of scores must have one {what}, got {listed}: call the function for each")
    if backend not in (None, "torch"):
        raise ValueError(f"backend must be None or 'torch' with a group, whose shards PyTorch counts, got {backend!r}")


@torch.no_grad()
def keep_mask(scores: Tensor, tau: Tensor, rule: str, backend: str | None = None) -> Tensor:
    """The mask of ``scores`` for a threshold that is known: bool, in their shape. Arguments are not checked."""
    if scores.numel() == 0:
        return torch.ones_like(scores, dtype=torch.bool)
    mask: Tensor = run("keep_mask", scores.device, scores.dtype, backend).keep_mask(scores, tau, key_of(rule))
    return mask


def topc_mask(scores: Tensor, density: float, *, rule: str = "magnitude", backend: str | None = None) -> Tensor:
    """The mask of the top ``density`` of ``scores``.

    It is True where the key (``|S|`` or ``S``, by the rule) is not below the threshold. So ties with the threshold and
    NaN are kept. Arguments and errors are those of :func:`topc_threshold` for one tensor without a group.

    Returns:
        Boolean tensor of the shape of ``scores``, on its device.
    """
    scores, density, rule = check_scores(scores).detach(), check_density(density), check_rule(rule)
    return mask(scores, density, rule, check_backend(backend))


@operator(fake=lambda a: a.scores.new_empty(()))
def threshold(scores: Tensor, density: float, rule: str, backend: str | None = None) -> Tensor:
    """Do what :func:`topc_threshold` does, but do not check the arguments. ``scores`` need no gradient."""
    constant = constant_threshold(rule)
    if constant is not None:
        return torch.full((), constant, dtype=scores.dtype, device=scores.device)
    return key_at(scores, threshold_rank(scores.numel(), density, rule), rule, backend)


def key_at(scores: Tensor, rank: int, rule: str, backend: str | None = None) -> Tensor:
    """The key with the index ``rank`` among the ascending keys of ``scores``, 0-d. Arguments are not checked."""
    key: Tensor = run("threshold", scores.device, scores.dtype, backend).threshold(scores, rank, rule)
    return key


@operator(fake=lambda a: torch.empty_like(a.scores, dtype=torch.bool))
def mask(scores: Tensor, density: float, rule: str, backend: str | None = None) -> Tensor:
    """Do what :func:`topc_mask` does, but do not check the arguments. ``scores`` need no gradient."""
    tau = threshold(scores, density, rule, backend)
    return run("keep_mask", scores.device, scores.dtype, backend).keep_mask(scores, tau, key_of(rule))
