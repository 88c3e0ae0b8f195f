"""Compile cases of ``wsn_fast.kernels.step_coefficients``."""

from __future__ import annotations

import itertools

import triton.language as tl
from compiling import CompileCase

from wsn_fast.kernels.step_coefficients import adamw_prepare_kernel, sgd_prepare_kernel
from wsn_fast.kernels.threshold_table import DTYPES

from ._forms import FORMS


def compile_cases() -> list[CompileCase]:
    """Both kernels."""
    cases = []
    for (dtype, _), rule in itertools.product(FORMS, (0, 1)):
        form = {"DTYPE": DTYPES[dtype], "MAGNITUDE": rule == 0}
        name = f"{DTYPES[dtype]} {('|S|', 'S')[rule]}"
        for kind, kernel in (("adamw", adamw_prepare_kernel), ("sgd", sgd_prepare_kernel)):
            signature = dict.fromkeys(("fields_ptr", "tensors_ptr", "state_ptr"), "*i64")
            signature |= dict.fromkeys(("settings_ptr", "weight_lr_ptr", "score_lr_ptr"), "*fp32")
            signature |= dict.fromkeys(("weight_lr_on_device", "score_lr_on_device", "first", "tensors"), "i32")
            constexprs = form | ({"STEP": tl.float32} if kind == "adamw" else {})
            numbers = [arg for arg in kernel.arg_names if arg not in signature and arg not in constexprs]
            signature |= dict.fromkeys(numbers, "fp64")
            cases.append(CompileCase(f"{kind} {name}", kernel, signature, constexprs, num_warps=1))
    return list({case.name: case for case in cases}.values())
