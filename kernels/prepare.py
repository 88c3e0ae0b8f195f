"""The coefficients of an optimizer step, from settings and step counts, on the device.

A captured graph follows a step count and a learning rate that are tensors. The same launch opens the windows of
:mod:`.warm`, where there is a ``next``.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ._compile import CompileCase
from ._elementwise import is_magnitude, table_pointer
from ._select_table import DIGITS, DTYPES, STATE
from ._update_tile import SCALES
from .update_table import FORMS, SETTINGS, UpdateTable, Workspace
from .warm import open_window


@triton.jit
def _power(base, exponent):
    """``base ** exponent`` in float64, for a whole number. tl.exp2 and tl.log2 of float64 have a stack."""
    result = tl.full((), 1, tl.float64)
    while exponent > 0:
        result *= tl.where((exponent & 1) != 0, base, 1.0)
        base *= base
        exponent >>= 1
    return result


@triton.jit
def _scalar(pointer, value):
    """What ``pointer`` holds, or ``value`` where it is None, as float64."""
    if pointer is not None:
        return tl.load(pointer).to(tl.float64)
    else:
        return tl.full((), value, tl.float64)


@triton.jit
def _store_adamw(settings_ptr, step_ptr, lr, beta1, beta2, eps, decay, decoupled):
    """The coefficients of one parameter's update, as :func:`._update_tile.adamw` takes them."""
    beta1, beta2 = tl.full((), beta1, tl.float64), tl.full((), beta2, tl.float64)
    step = tl.load(step_ptr).to(tl.int64)
    weight = 1 - beta1
    tl.store(settings_ptr, tl.where(weight < 0.5, weight, weight - 1).to(tl.float32))
    tl.store(settings_ptr + 1, beta2.to(tl.float32))
    tl.store(settings_ptr + 2, (1 - beta2).to(tl.float32))
    tl.store(settings_ptr + 3, tl.full((), eps, tl.float64).to(tl.float32))
    tl.store(settings_ptr + 4, tl.sqrt(1 - _power(beta2, step)).to(tl.float32))
    tl.store(settings_ptr + 5, (-lr / (1 - _power(beta1, step))).to(tl.float32))
    tl.store(settings_ptr + 6, (1 - lr * tl.full((), decoupled, tl.float64)).to(tl.float32))
    tl.store(settings_ptr + 7, tl.full((), decay, tl.float64).to(tl.float32))


@triton.jit(do_not_specialize=["first", "tensors"])
def adamw_prepare_kernel(
    fields_ptr,  # [FIELDS, tensors] int64, UpdateTable.fields
    settings_ptr,  # [tensors, SETTINGS] fp32, Workspace.settings
    state_ptr,  # [tensors, STATE + len(DIGITS) * 2**DIGITS[0]] int64
    weight_lr_ptr,  # [] float, or None for weight_lr
    score_lr_ptr,  # [] float, or None for score_lr
    first,  # the tensor of the first program
    tensors,
    weight_lr: tl.float64,
    weight_beta1: tl.float64,
    weight_beta2: tl.float64,
    weight_eps: tl.float64,
    weight_decay: tl.float64,  # coupled with the gradient
    weight_decoupled: tl.float64,  # weight decay that is not
    score_lr: tl.float64,
    score_beta1: tl.float64,
    score_beta2: tl.float64,
    score_eps: tl.float64,
    score_decay: tl.float64,
    score_decoupled: tl.float64,
    STEP: tl.constexpr,
    DTYPE: tl.constexpr,
    MAGNITUDE: tl.constexpr,
    DIGITS: tl.constexpr,
    STATE: tl.constexpr,
    SETTINGS: tl.constexpr,
    NEXT: tl.constexpr,
):
    """The coefficients of one tensor per program, and its state."""
    tensor = first + tl.program_id(0).to(tl.int64)
    settings_ptr += tensor * SETTINGS
    step_ptr = table_pointer(fields_ptr, 10, tensor, tensors, STEP, False)
    lr = _scalar(weight_lr_ptr, weight_lr)
    _store_adamw(
        settings_ptr, step_ptr, lr, weight_beta1, weight_beta2, weight_eps, weight_decay, weight_decoupled
    )  # fmt: skip
    step_ptr = table_pointer(fields_ptr, 11, tensor, tensors, STEP, False)
    lr = _scalar(score_lr_ptr, score_lr)
    _store_adamw(
        settings_ptr + 8, step_ptr, lr, score_beta1, score_beta2, score_eps, score_decay, score_decoupled
    )  # fmt: skip
    if NEXT:
        window_ptr = table_pointer(fields_ptr, 9, tensor, tensors, tl.int64, False)
        state_ptr += tensor * (STATE + (len(DIGITS) << DIGITS[0]))
        open_window(window_ptr, state_ptr, DTYPE, MAGNITUDE, DIGITS, STATE)


@triton.jit
def _store_sgd(settings_ptr, lr, momentum, rest, decay, nesterov, first):
    """The coefficients of one parameter's update, as :func:`._update_tile.sgd` takes them."""
    tl.store(settings_ptr, (-lr).to(tl.float32))
    tl.store(settings_ptr + 1, tl.full((), momentum, tl.float64).to(tl.float32))
    tl.store(settings_ptr + 2, tl.full((), rest, tl.float64).to(tl.float32))
    tl.store(settings_ptr + 3, tl.full((), decay, tl.float64).to(tl.float32))
    tl.store(settings_ptr + 4, tl.full((), nesterov, tl.float64).to(tl.float32))
    tl.store(settings_ptr + 5, tl.full((), first, tl.float64).to(tl.float32))


@triton.jit(do_not_specialize=["first", "tensors"])
def sgd_prepare_kernel(
    fields_ptr,  # [FIELDS, tensors] int64, UpdateTable.fields
    settings_ptr,  # [tensors, SETTINGS] fp32, Workspace.settings
    state_ptr,  # [tensors, STATE + len(DIGITS) * 2**DIGITS[0]] int64
    weight_lr_ptr,  # [] float, or None for weight_lr
    score_lr_ptr,  # [] float, or None for score_lr
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
    DIGITS: tl.constexpr,
    STATE: tl.constexpr,
    SETTINGS: tl.constexpr,
    NEXT: tl.constexpr,
):
    """As :func:`adamw_prepare_kernel`."""
    tensor = first + tl.program_id(0).to(tl.int64)
    settings_ptr += tensor * SETTINGS
    lr = _scalar(weight_lr_ptr, weight_lr)
    _store_sgd(settings_ptr, lr, weight_momentum, weight_rest, weight_decay, weight_nesterov, weight_first)
    lr = _scalar(score_lr_ptr, score_lr)
    _store_sgd(settings_ptr + 8, lr, score_momentum, score_rest, score_decay, score_nesterov, score_first)
    if NEXT:
        window_ptr = table_pointer(fields_ptr, 9, tensor, tensors, tl.int64, False)
        state_ptr += tensor * (STATE + (len(DIGITS) << DIGITS[0]))
        open_window(window_ptr, state_ptr, DTYPE, MAGNITUDE, DIGITS, STATE)


def prepare(
    table: UpdateTable,
    workspace: Workspace,
    tensors: range,
    for_weights: Mapping[str, float | Tensor],
    for_scores: Mapping[str, float | Tensor],
    *,
    rule: str,
) -> None:
    """Coefficients for some of the tensors, which have the same settings. To be called for every tensor of the table
    before :func:`.optimizer.update`.

    Args:
        table: of :func:`.update_table.make_table`.
        workspace: of :func:`.update_table.workspace`.
        tensors: which of them.
        for_weights: for AdamW ``lr``, ``beta1``, ``beta2``, ``eps``, ``decay`` (coupled weight decay) and
            ``decoupled`` (decoupled weight decay); for SGD ``lr``, ``momentum``, ``rest`` (1 - dampening), ``decay``,
            ``nesterov`` and ``first`` (0 or 1). All float, but that ``lr`` may be a 0-d tensor on the device.
        for_scores: the same for the scores.
        rule: "magnitude" or "value".
    """
    arguments: dict[str, Any] = {}
    for name, settings in (("weight", for_weights), ("score", for_scores)):
        lr = settings["lr"]
        on_device = isinstance(lr, Tensor)
        arguments |= {f"{name}_{key}": value for key, value in settings.items()}
        arguments |= {f"{name}_lr_ptr": lr if on_device else None, f"{name}_lr": 0.0 if on_device else lr}
    kernel = sgd_prepare_kernel
    if table.steps is not None:
        kernel = adamw_prepare_kernel
        arguments["STEP"] = SCALES[table.steps]
    kernel[(len(tensors),)](
        **arguments,
        fields_ptr=table.fields,
        settings_ptr=workspace.settings,
        state_ptr=workspace.state,
        first=tensors.start,
        tensors=len(table.tensors),
        DTYPE=DTYPES[table.dtype],
        MAGNITUDE=is_magnitude(rule),
        DIGITS=DIGITS[table.dtype][rule == "value"],
        STATE=STATE,
        SETTINGS=SETTINGS,
        NEXT=table.masked is not None,
        num_warps=1,
    )


def compile_cases() -> list[CompileCase]:
    """Both kernels, with and without a ``next``."""
    cases = []
    for (dtype, _), rule, ready in itertools.product(FORMS, (0, 1), (False, True)):
        form = {"DTYPE": DTYPES[dtype], "MAGNITUDE": rule == 0, "DIGITS": DIGITS[dtype][rule], "STATE": STATE}
        form |= {"SETTINGS": SETTINGS, "NEXT": ready}
        name = f"{DTYPES[dtype]} {('|S|', 'S')[rule]}" + " next" * ready
        for kind, kernel in (("adamw", adamw_prepare_kernel), ("sgd", sgd_prepare_kernel)):
            signature = {"fields_ptr": "*i64", "settings_ptr": "*fp32", "state_ptr": "*i64"}
            signature |= dict.fromkeys(("weight_lr_ptr", "score_lr_ptr"), "*fp32") | {"first": "i32", "tensors": "i32"}
            constexprs = form | ({"STEP": tl.float32} if kind == "adamw" else {})
            numbers = [arg for arg in kernel.arg_names if arg not in signature and arg not in constexprs]
            signature |= dict.fromkeys(numbers, "fp64")
            cases.append(CompileCase(f"{kind} {name}", kernel, signature, constexprs, num_warps=1))
    return list({case.name: case for case in cases}.values())
