"""Compile cases of ``wsn_fast.kernels.optimizer_step``."""

from __future__ import annotations

import itertools

import torch
from compiling import CompileCase

from wsn_fast.kernels.optimizer_step import update_kernel
from wsn_fast.kernels.threshold_table import DTYPES
from wsn_fast.kernels.update_table import CONFIGS

from ._forms import FORMS


def compile_cases() -> list[CompileCase]:
    """The dtypes of mixed, full and half precision, with and without a union and a ``next``."""
    pointers = ("fields_ptr", "gradients_ptr", "tensors_ptr", "programs_ptr", "state_ptr", "places_ptr")
    tables = dict.fromkeys(pointers, "*i64") | {"settings_ptr": "*fp32", "keys_ptr": "*u32"}
    tables |= {"tensors": "i32", "items_each": "i32"}
    forms = list(itertools.product(FORMS, (0, 1), (True,), (True,), CONFIGS))
    forms += list(itertools.product(FORMS, (0,), (False, True), (False, True), CONFIGS[:1]))
    cases = []
    for (dtype, masked), rule, union, ready, config in forms:
        form = {"GRAD": DTYPES[masked], "DTYPE": DTYPES[dtype], "MASKED": DTYPES[masked], "SCALE": None}
        form |= {"BLOCK": config.block, "LANES": 32 * config.num_warps, "MAGNITUDE": rule == 0, "HAS_UNION": union}
        form |= {"GIVEN": False, "NEXT": ready, "ALIGNED": True}
        name = f"{DTYPES[masked]} {DTYPES[dtype]} {('|S|', 'S')[rule]}" + " next" * ready + " union" * union
        name += f" {config.block}x{config.num_warps}"
        for kind, states in (("adamw", 2), ("sgd", 1)):
            optimizer = {"ADAM": kind == "adamw", "WEIGHT_STATES": states, "SCORE_STATES": states}
            limits = {"num_warps": config.num_warps, "maxnreg": config.registers[dtype is not torch.float32]}
            cases.append(CompileCase(f"{kind} {name}", update_kernel, tables, form | optimizer, **limits))
    return list({case.name: case for case in cases}.values())
