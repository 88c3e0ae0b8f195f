"""The coefficients of an optimizer step, computed on the device from settings and step counts.

Step counts are tensors, and learning rates may be tensors. A captured graph then reads their current values. For
tensors with a ``next`` the same launch prepares the search of :mod:`.warm_threshold`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from . import _layout as layout
from ._elementwise import FP_FUSION, is_magnitude, table_pointer
from ._update_rules import SCALES
from ._window import open_window
from .threshold_table import DTYPES
from .update_table import UpdateTable, Workspace

NOT_SPECIALIZED = (
    "fields_ptr", "tensors_ptr", "settings_ptr", "state_ptr", "weight_lr_ptr", "score_lr_ptr", "weight_lr_on_device",
    "score_lr_on_device", "first", "tensors",
)  # fmt: skip
"""Arguments whose values and alignment make no difference to the machine code that is worth a kernel of its own."""


@triton.jit
def _power(base, exponent):
    """``base ** exponent`` in float64, for a whole number, without the stack that tl.exp2 and tl.log2 would use."""
    result = tl.full((), 1, tl.float64)
    while exponent > 0:
        result *= tl.where((exponent & 1) != 0, base, 1.0)
        base *= base
        exponent >>= 1
    return result


@triton.jit
def _rate(pointer, on_device, value):
    """The learning rate as float64: the number at ``pointer`` if ``on_device`` is 1, else ``value``."""
    loaded = tl.load(pointer, mask=on_device > 0, other=0.0).to(tl.float64)
    return tl.where(on_device > 0, loaded, tl.full((), value, tl.float64))


@triton.jit
def _store_adamw(settings_ptr, step_ptr, lr, beta1, beta2, eps, decay, decoupled):
    """The coefficients of one parameter's update, as :func:`._update_rules.adamw` takes them."""
    beta1, beta2 = tl.full((), beta1, tl.float64), tl.full((), beta2, tl.float64)
    step = tl.load(step_ptr).to(tl.int64)
    lerp = 1 - beta1
    lerp = tl.where(lerp < 0.5, lerp, lerp - 1)
    correction = tl.sqrt(1 - _power(beta2, step))
    size = -lr / (1 - _power(beta1, step))
    shrink = 1 - lr * tl.full((), decoupled, tl.float64)
    tl.store(settings_ptr + layout.ADAMW_LERP, lerp.to(tl.float32))
    tl.store(settings_ptr + layout.ADAMW_BETA2, beta2.to(tl.float32))
    tl.store(settings_ptr + layout.ADAMW_REST2, (1 - beta2).to(tl.float32))
    tl.store(settings_ptr + layout.ADAMW_EPS, tl.full((), eps, tl.float64).to(tl.float32))
    tl.store(settings_ptr + layout.ADAMW_CORRECTION, correction.to(tl.float32))
    tl.store(settings_ptr + layout.ADAMW_SIZE, size.to(tl.float32))
    tl.store(settings_ptr + layout.ADAMW_SHRINK, shrink.to(tl.float32))
    tl.store(settings_ptr + layout.ADAMW_DECAY, tl.full((), decay, tl.float64).to(tl.float32))


@triton.jit
def _store_sgd(settings_ptr, lr, momentum, rest, decay, nesterov, first):
    """The coefficients of one parameter's update, as :func:`._update_rules.sgd` takes them."""
    tl.store(settings_ptr + layout.SGD_SIZE, (-lr).to(tl.float32))
    tl.store(settings_ptr + layout.SGD_MOMENTUM, tl.full((), momentum, tl.float64).to(tl.float32))
    tl.store(settings_ptr + layout.SGD_REST, tl.full((), rest, tl.float64).to(tl.float32))
    tl.store(settings_ptr + layout.SGD_DECAY, tl.full((), decay, tl.float64).to(tl.float32))
    tl.store(settings_ptr + layout.SGD_NESTEROV, tl.full((), nesterov, tl.float64).to(tl.float32))
    tl.store(settings_ptr + layout.SGD_FIRST, tl.full((), first, tl.float64).to(tl.float32))


@triton.jit
def _open_window(tensors_ptr, state_ptr, tensor, DTYPE: tl.constexpr, MAGNITUDE: tl.constexpr):
    """Prepare the search for the next threshold of a tensor, if there is to be one."""
    window = tl.load(tensors_ptr + layout.TENSOR_COLUMNS * tensor + layout.TENSOR_WINDOW)
    if window != 0:
        window_ptr = window.to(tl.pointer_type(tl.int64))
        open_window(window_ptr, layout.state_of(state_ptr, tensor), DTYPE, MAGNITUDE)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def adamw_prepare_kernel(
    fields_ptr,  # [FIELDS, tensors] int64, UpdateTable.fields
    tensors_ptr,  # [tensors, TENSOR_COLUMNS] int64, UpdateTable.tensors
    settings_ptr,  # [tensors, SETTINGS] fp32, Workspace.settings
    state_ptr,  # [tensors, STATE_SIZE] int64
    weight_lr_ptr,  # [] float
    score_lr_ptr,  # [] float
    weight_lr_on_device,  # 1 if weight_lr_ptr has the learning rate, 0 if weight_lr is it
    score_lr_on_device,
    first,  # the tensor of the first program
    tensors,
    weight_lr: tl.float64,
    weight_beta1: tl.float64,
    weight_beta2: tl.float64,
    weight_eps: tl.float64,
    weight_decay: tl.float64,  # coupled weight decay
    weight_decoupled: tl.float64,  # decoupled weight decay
    score_lr: tl.float64,
    score_beta1: tl.float64,
    score_beta2: tl.float64,
    score_eps: tl.float64,
    score_decay: tl.float64,
    score_decoupled: tl.float64,
    STEP: tl.constexpr,
    DTYPE: tl.constexpr,
    MAGNITUDE: tl.constexpr,
):
    """Write the coefficients of AdamW for one tensor per program, and clear the state of its search."""
    tensor = first + tl.program_id(0).to(tl.int64)
    settings_ptr += tensor * layout.SETTINGS
    _store_adamw(
        settings_ptr + layout.SETTINGS_WEIGHT,
        table_pointer(fields_ptr, layout.FIELD_WEIGHT_STEP, tensor, tensors, STEP, ALIGNED=False),
        lr=_rate(weight_lr_ptr, weight_lr_on_device, weight_lr),
        beta1=weight_beta1,
        beta2=weight_beta2,
        eps=weight_eps,
        decay=weight_decay,
        decoupled=weight_decoupled,
    )
    _store_adamw(
        settings_ptr + layout.SETTINGS_SCORES,
        table_pointer(fields_ptr, layout.FIELD_SCORES_STEP, tensor, tensors, STEP, ALIGNED=False),
        lr=_rate(score_lr_ptr, score_lr_on_device, score_lr),
        beta1=score_beta1,
        beta2=score_beta2,
        eps=score_eps,
        decay=score_decay,
        decoupled=score_decoupled,
    )
    _open_window(tensors_ptr, state_ptr, tensor, DTYPE, MAGNITUDE)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def sgd_prepare_kernel(
    fields_ptr,  # [FIELDS, tensors] int64, UpdateTable.fields
    tensors_ptr,  # [tensors, TENSOR_COLUMNS] int64, UpdateTable.tensors
    settings_ptr,  # [tensors, SETTINGS] fp32, Workspace.settings
    state_ptr,  # [tensors, STATE_SIZE] int64
    weight_lr_ptr,  # [] float
    score_lr_ptr,  # [] float
    weight_lr_on_device,  # 1 if weight_lr_ptr has the learning rate, 0 if weight_lr is it
    score_lr_on_device,
    first,  # the tensor of the first program
    tensors,
    weight_lr: tl.float64,
    weight_momentum: tl.float64,
    weight_rest: tl.float64,  # 1 - dampening
    weight_decay: tl.float64,
    weight_nesterov: tl.float64,  # 0 or 1, like weight_first
    weight_first: tl.float64,
    score_lr: tl.float64,
    score_momentum: tl.float64,
    score_rest: tl.float64,
    score_decay: tl.float64,
    score_nesterov: tl.float64,
    score_first: tl.float64,
    DTYPE: tl.constexpr,
    MAGNITUDE: tl.constexpr,
):
    """Write the coefficients of SGD for one tensor per program, and clear the state of its search."""
    tensor = first + tl.program_id(0).to(tl.int64)
    settings_ptr += tensor * layout.SETTINGS
    _store_sgd(
        settings_ptr + layout.SETTINGS_WEIGHT,
        lr=_rate(weight_lr_ptr, weight_lr_on_device, weight_lr),
        momentum=weight_momentum,
        rest=weight_rest,
        decay=weight_decay,
        nesterov=weight_nesterov,
        first=weight_first,
    )
    _store_sgd(
        settings_ptr + layout.SETTINGS_SCORES,
        lr=_rate(score_lr_ptr, score_lr_on_device, score_lr),
        momentum=score_momentum,
        rest=score_rest,
        decay=score_decay,
        nesterov=score_nesterov,
        first=score_first,
    )
    _open_window(tensors_ptr, state_ptr, tensor, DTYPE, MAGNITUDE)


def prepare(
    table: UpdateTable,
    workspace: Workspace,
    tensors: range,
    for_weights: Mapping[str, float | Tensor],
    for_scores: Mapping[str, float | Tensor],
    *,
    rule: str,
) -> None:
    """Write the coefficients for some of the tensors, which have the same settings. Before
    :func:`.optimizer_step.update` this has to be called for every tensor of the table.

    Args:
        table: of :func:`.update_table.make_table`.
        workspace: of :func:`.update_table.workspace`.
        tensors: which of them.
        for_weights: for AdamW ``lr``, ``beta1``, ``beta2``, ``eps``, ``decay`` (coupled weight decay) and
            ``decoupled`` (decoupled weight decay); for SGD ``lr``, ``momentum``, ``rest`` (1 - dampening), ``decay``,
            ``nesterov`` and ``first`` (0 or 1). All are floats; ``lr`` may also be a 0-d tensor on the
            device.
        for_scores: the same for the scores.
        rule: "magnitude" or "value".
    """
    arguments: dict[str, Any] = {}
    for name, settings in (("weight", for_weights), ("score", for_scores)):
        lr = settings["lr"]
        on_device = isinstance(lr, Tensor)
        arguments |= {f"{name}_{key}": value for key, value in settings.items()}
        arguments[f"{name}_lr_on_device"] = int(on_device)
        arguments[f"{name}_lr"] = 0.0 if on_device else lr
        # A pointer that nothing is read from is better than None, for which the kernel would be compiled anew.
        arguments[f"{name}_lr_ptr"] = lr if on_device else workspace.settings
    kernel = sgd_prepare_kernel
    if table.is_adam:
        kernel = adamw_prepare_kernel
        arguments["STEP"] = SCALES[table.steps]
    kernel[(len(tensors),)](
        **arguments,
        fields_ptr=table.fields,
        tensors_ptr=table.tensors,
        settings_ptr=workspace.settings,
        state_ptr=workspace.state,
        first=tensors.start,
        tensors=len(table.tensors),
        DTYPE=DTYPES[table.dtype],
        MAGNITUDE=is_magnitude(rule),
        num_warps=1,
        **FP_FUSION,
    )
