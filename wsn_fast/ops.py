"""Argument checks, allocation and ``torch.library`` registrations over the backends.

Two doors lead to each operation. The public functions check their arguments. The ones that layers call on every step
(:func:`gate`, :func:`gate_backward`) do not: they run the backend directly in eager mode and the registered operator
while ``torch.compile`` traces, because a registered operator costs tens of microseconds a call.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from fractions import Fraction
from numbers import Real
from types import ModuleType

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from .backends import parse_override, run
from .backends.updates import SGD, AdamW, AdamWState, Plan, SGDState, Update

RULES = ("magnitude", "value")
SCORE_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
FUSED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Of weights and scores that the fused products read."""


# --- arguments
# ----------------------------------------------------------------------------------------------------------
def check_density(density: object, name: str = "density") -> float:
    """``density`` as a float in (0, 1]; anything else is a ``ValueError`` with the argument's name and value."""
    number = isinstance(density, Real) and not isinstance(density, bool)
    if not number or not 0 < float(density) <= 1:  # type: ignore[arg-type]
        raise ValueError(f"{name} must be a number in (0, 1], got {density!r}")
    return float(density)  # type: ignore[arg-type]


def check_rule(rule: object) -> str:
    """``rule`` if it is one of ``RULES``, else ``ValueError``."""
    if rule not in RULES:
        raise ValueError(f"rule must be one of {RULES}, got {rule!r}")
    return str(rule)


def check_backend(backend: object) -> str | None:
    """``backend`` if it is None or an override (:func:`wsn_fast.backends.parse_override`), else ``TypeError`` or
    ``ValueError``."""
    if backend is None:
        return None
    if not isinstance(backend, str):
        raise TypeError(f"backend must be a string or None, got {type(backend).__name__}")
    parse_override(backend)
    return backend


def check_scores(scores: object) -> Tensor:
    """``scores`` if it is a non-empty floating tensor of a supported dtype."""
    if not isinstance(scores, Tensor):
        raise TypeError(f"scores must be a torch.Tensor, got {type(scores).__name__}")
    if scores.dtype not in SCORE_DTYPES:
        raise TypeError(f"scores must be float32, float64, bfloat16 or float16, got {scores.dtype}")
    if scores.numel() == 0:
        raise ValueError(f"scores must have at least one element, got shape {tuple(scores.shape)}")
    return scores


@functools.lru_cache(maxsize=4096)
def threshold_rank(n: int, density: float, rule: str) -> int:
    """The index of the threshold among ``n`` ascending keys, on the host.

    "magnitude": the paper's code, in its order of float64 operations. "value": the element that bounds the interpolated
    quantile from above, in exact arithmetic on the decimal digits of ``density``.
    """
    if rule == "magnitude":
        return round(0.01 * ((1 - density) * 100) * (n - 1))
    return math.ceil((1 - Fraction(repr(density))) * (n - 1))


# --- selection
# ----------------------------------------------------------------------------------------------------------
def topc_threshold(scores: Tensor, density: float, *, rule: str = "magnitude", backend: str | None = None) -> Tensor:
    """The exact threshold that keeps the top ``density`` of ``scores``.

    Args:
        scores: floating tensor (float32, float64, bfloat16, float16) of any shape and strides, n >= 1 elements.
        density: the fraction to keep, in (0, 1].
        rule: ``"magnitude"`` ranks ``|S|`` as the paper's code does, ``"value"`` ranks ``S`` as CLArena does.
        backend: ``"torch"``, ``"triton"`` or ``"native"`` instead of the one that would be chosen.

    Returns:
        tau, 0-d, in the dtype and on the device of ``scores``; an element of the ranked keys. The host does not wait
        for it.

    Raises:
        TypeError: ``scores`` is not a floating tensor of a supported dtype.
        ValueError: ``scores`` is empty, ``density`` is outside (0, 1], or ``rule`` or ``backend`` is unknown.
    """
    scores, density, rule = check_scores(scores).detach(), check_density(density), check_rule(rule)
    return threshold(scores, density, rule, check_backend(backend))


def topc_mask(scores: Tensor, density: float, *, rule: str = "magnitude", backend: str | None = None) -> Tensor:
    """The mask of the top ``density`` of ``scores``: ``not (key < tau)``, so that ties with the threshold and NaN are
    kept.

    Arguments and errors as for :func:`topc_threshold`.

    Returns:
        Boolean tensor of the shape of ``scores``, on its device.
    """
    scores, density, rule = check_scores(scores).detach(), check_density(density), check_rule(rule)
    backend = check_backend(backend)
    if torch.compiler.is_compiling():
        return _mask_op(scores, density, rule, backend)
    return _mask(scores, density, rule, backend)


def threshold(scores: Tensor, density: float, rule: str, backend: str | None) -> Tensor:
    """:func:`topc_threshold`, unchecked, for scores that need no gradient."""
    if torch.compiler.is_compiling():
        return _threshold_op(scores, density, rule, backend)
    return _threshold(scores, density, rule, backend)


def _threshold(scores: Tensor, density: float, rule: str, backend: str | None) -> Tensor:
    rank = threshold_rank(scores.numel(), density, rule)
    return run("threshold", scores.device, scores.dtype, backend).threshold(scores, rank, rule)


@torch.library.custom_op("wsn_fast::threshold", mutates_args=())
def _threshold_op(scores: Tensor, density: float, rule: str, backend: str | None = None) -> Tensor:
    return _threshold(scores, density, rule, backend)


@_threshold_op.register_fake
def _(scores: Tensor, density: float, rule: str, backend: str | None = None) -> Tensor:
    return scores.new_empty(())


def _mask(scores: Tensor, density: float, rule: str, backend: str | None) -> Tensor:
    tau = _threshold(scores, density, rule, backend)
    return run("keep_mask", scores.device, scores.dtype, backend).keep_mask(scores, tau, rule)


@torch.library.custom_op("wsn_fast::mask", mutates_args=())
def _mask_op(scores: Tensor, density: float, rule: str, backend: str | None = None) -> Tensor:
    return _mask(scores, density, rule, backend)


@_mask_op.register_fake
def _(scores: Tensor, density: float, rule: str, backend: str | None = None) -> Tensor:
    return torch.empty_like(scores, dtype=torch.bool)


# --- the gate of a layer: unchecked
# ------------------------------------------------------------------------------------
def gate(
    weight: Tensor, scores: Tensor, density: float, rule: str, dtype: torch.dtype, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """``(m ? W : +0.0 in dtype, tau)`` with the mask of the current scores."""
    if torch.compiler.is_compiling():
        return _gate_op(weight, scores, density, rule, dtype, backend)
    tau = _threshold(scores, density, rule, backend)
    return run("gate", weight.device, weight.dtype, backend).gate(weight, scores, tau, rule, dtype), tau


@torch.library.custom_op("wsn_fast::gate", mutates_args=())
def _gate_op(
    weight: Tensor, scores: Tensor, density: float, rule: str, dtype: torch.dtype, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    return gate(weight, scores, density, rule, dtype, backend)


@_gate_op.register_fake
def _(
    weight: Tensor, scores: Tensor, density: float, rule: str, dtype: torch.dtype, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(weight, dtype=dtype), scores.new_empty(())


def gate_backward(
    grad: Tensor,
    weight: Tensor,
    scores: Tensor,
    tau: Tensor,
    union: Tensor | None,
    rule: str,
    need_weight: bool,
    need_scores: bool,
    backend: str | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """``(dW, dS)`` from the gradient of the masked weight; None for one that is not needed. ``union`` is packed or
    None."""
    if torch.compiler.is_compiling():
        dw, ds = _gate_backward_op(grad, weight, scores, tau, union, rule, need_weight, need_scores, backend)
        return (dw if need_weight else None), (ds if need_scores else None)
    chosen = run("gate_backward", grad.device, weight.dtype, backend)
    return chosen.gate_backward(grad, weight, scores, tau, union, rule, need_weight, need_scores)


@torch.library.custom_op("wsn_fast::gate_backward", mutates_args=())
def _gate_backward_op(
    grad: Tensor,
    weight: Tensor,
    scores: Tensor,
    tau: Tensor,
    union: Tensor | None,
    rule: str,
    need_weight: bool,
    need_scores: bool,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    dw, ds = gate_backward(grad, weight, scores, tau, union, rule, need_weight, need_scores, backend)
    # A schema has no optional results: an empty tensor stands for a gradient that nobody asked for.
    return weight.new_empty(0) if dw is None else dw, scores.new_empty(0) if ds is None else ds


@_gate_backward_op.register_fake
def _(
    grad: Tensor,
    weight: Tensor,
    scores: Tensor,
    tau: Tensor,
    union: Tensor | None,
    rule: str,
    need_weight: bool,
    need_scores: bool,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    dw = torch.empty_like(grad, dtype=weight.dtype) if need_weight else weight.new_empty(0)
    ds = torch.empty_like(grad, dtype=scores.dtype) if need_scores else scores.new_empty(0)
    return dw, ds


def gate_packed(weight: Tensor, packed: Tensor, dtype: torch.dtype, backend: str | None = None) -> Tensor:
    """``m ? W : +0.0 in dtype`` with a packed mask."""
    if torch.compiler.is_compiling():
        return _gate_packed_op(weight, packed, dtype, backend)
    return run("gate_packed", weight.device, weight.dtype, backend).gate_packed(weight, packed, dtype)


@torch.library.custom_op("wsn_fast::gate_packed", mutates_args=())
def _gate_packed_op(weight: Tensor, packed: Tensor, dtype: torch.dtype, backend: str | None = None) -> Tensor:
    return gate_packed(weight, packed, dtype, backend)


@_gate_packed_op.register_fake
def _(weight: Tensor, packed: Tensor, dtype: torch.dtype, backend: str | None = None) -> Tensor:
    return torch.empty_like(weight, dtype=dtype)


# --- packed masks: outside the step, so never traced
# --------------------------------------------------------------------
def packed_size(n: int) -> int:
    """Bytes of a packed mask of ``n`` elements."""
    return (n + 7) // 8


def pack_mask(mask: Tensor) -> Tensor:
    """A boolean mask at 1 bit per element.

    Args:
        mask: ``torch.bool``, any shape, n elements.

    Returns:
        ``uint8`` [ceil(n / 8)]: element i of the row-major flattened mask is bit i % 8, least significant first, of
        byte i // 8. Padding bits are zero.

    Raises:
        TypeError: ``mask`` is not a boolean tensor.
    """
    if not isinstance(mask, Tensor) or mask.dtype is not torch.bool:
        raise TypeError(f"mask must be a torch.bool tensor, got {getattr(mask, 'dtype', type(mask).__name__)}")
    return run("pack", mask.device).pack(mask.reshape(-1))


def unpack_mask(packed: Tensor, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """The boolean mask of ``shape`` that :func:`pack_mask` packed.

    Raises:
        TypeError: ``packed`` is not ``uint8``.
        ValueError: ``packed`` does not have the bytes that ``shape`` needs.
    """
    n = math.prod(shape)
    _check_packed(packed)
    if packed.shape != (packed_size(n),):
        raise ValueError(
            f"packed must have shape ({packed_size(n)},) for a mask of shape {tuple(shape)}, got {tuple(packed.shape)}"
        )
    return run("unpack", packed.device).unpack(packed.contiguous(), n).view(shape)


def union_packed(packed: Tensor) -> Tensor:
    """The OR of the rows of ``packed`` [T, bytes], T >= 1: [bytes].

    Raises:
        TypeError: ``packed`` is not ``uint8``.
        ValueError: ``packed`` is not two-dimensional or has no rows.
    """
    _check_packed(packed)
    if packed.ndim != 2 or packed.shape[0] == 0:
        raise ValueError(f"packed must have shape [T, bytes] with T >= 1, got {tuple(packed.shape)}")
    return run("union", packed.device).union(packed)


def count_packed(packed: Tensor) -> Tensor:
    """The number of set bits of a packed mask: 0-d int64 on its device. Raises ``TypeError`` if it is not ``uint8``."""
    _check_packed(packed)
    return run("popcount", packed.device).popcount(packed.contiguous())


def _check_packed(packed: object) -> None:
    if not isinstance(packed, Tensor) or packed.dtype is not torch.uint8:
        raise TypeError(f"packed must be a torch.uint8 tensor, got {getattr(packed, 'dtype', type(packed).__name__)}")


@torch.no_grad()
def restore_frozen_(param: Tensor, saved: Tensor, union: Tensor) -> None:
    """In place: ``param = union ? saved : param``, bit for bit; ``union`` is packed. Unchecked."""
    run("restore_frozen", param.device, param.dtype).restore_frozen(param, saved, union)
    increment_version(param)


# --- the one-pass optimizers: unchecked
# --------------------------------------------------------------------------------
def adamw_step(
    updates: Sequence[Update],
    states: Sequence[AdamWState],
    for_weights: Sequence[AdamW],
    for_scores: Sequence[AdamW],
    backend: str | None = None,
    plan: Plan | None = None,
) -> None:
    """One AdamW update of gated tensors and their scores, of one device and one dtype, in place; see
    :func:`wsn_fast.backends.torch.adamw_step`."""
    _of(updates, "adamw_step", backend).adamw_step(updates, states, for_weights, for_scores, plan)
    _changed(updates, states)


def sgd_step(
    updates: Sequence[Update],
    states: Sequence[SGDState],
    for_weights: Sequence[SGD],
    for_scores: Sequence[SGD],
    backend: str | None = None,
    plan: Plan | None = None,
) -> None:
    """As :func:`adamw_step`, for SGD; see :func:`wsn_fast.backends.torch.sgd_step`."""
    _of(updates, "sgd_step", backend).sgd_step(updates, states, for_weights, for_scores, plan)
    _changed(updates, states)


def gradient_squares(updates: Sequence[Update], backend: str | None = None, plan: Plan | None = None) -> Tensor:
    """The sums of the squares of the gradients that an update would form: of dW and dS of each tensor in turn."""
    result: Tensor = _of(updates, "gradient_squares", backend).gradient_squares(updates, plan)
    return result


def _of(updates: Sequence[Update], operation: str, backend: str | None) -> ModuleType:
    weight = updates[0].weight
    return run(operation, weight.device, weight.dtype, backend)


def _changed(updates: Sequence[Update], states: Sequence[AdamWState] | Sequence[SGDState]) -> None:
    """Tell autograd, which would not know."""
    changed = [t for update in updates for t in (update.weight, update.scores)]
    changed += [t for state in states for t in state if t is not None]
    changed += [update.next.masked for update in updates if update.next is not None]
    increment_version(changed)
