"""Compile cases of ``wsn_fast.kernels.coded_step``."""

from __future__ import annotations

import itertools

import torch
import triton.language as tl
from compiling import CompileCase

from wsn_fast.kernels._means import STORAGES
from wsn_fast.kernels.coded_step import coded_update_kernel, tile_of
from wsn_fast.kernels.threshold_table import DTYPES
from wsn_fast.kernels.update_table import configs

from ._forms import FORMS

PAIRS = ((2, 2), (1, 1), (2, 0), (0, 2), (1, 2))


def compile_cases() -> list[CompileCase]:
    """The dtypes of mixed, full and half precision, with and without a union and a ``next``, and every pair of storages
    of weights and scores."""
    pointers = ("fields_ptr", "gradients_ptr", "tensors_ptr", "programs_ptr", "state_ptr", "places_ptr")
    tables = dict.fromkeys(pointers, "*i64") | {"settings_ptr": "*fp32", "table_ptr": "*fp32", "keys_ptr": "*u32"}
    tables |= {"tensors": "i32", "items_each": "i32"}
    forms = [*itertools.product(FORMS, PAIRS[:2], (False, True), (False, True))]
    forms += [*itertools.product(FORMS[:1], PAIRS[2:], (True,), (False, True))]
    cases = []
    for (dtype, masked), (weight, score), union, ready in forms:
        storages = STORAGES[weight], STORAGES[score]
        config = configs(storages)[0]
        form = {"GRAD": DTYPES[masked], "DTYPE": DTYPES[dtype], "MASKED": DTYPES[masked], "SCALE": None}
        form |= {
            "BLOCK": tile_of(config, storages),
            "LANES": 32 * config.num_warps,
            "MAGNITUDE": True,
            "HAS_UNION": union,
        }
        form |= {"GIVEN": False, "NEXT": ready, "ALIGNED": True, "STEP": tl.float32}
        form |= {"WEIGHT_STORAGE": weight, "SCORE_STORAGE": score}
        name = f"{DTYPES[masked]} {DTYPES[dtype]} {' '.join(storages)}"
        name += " next" * ready + " union" * union
        for kind, states in (("adamw", 2), ("sgd", 1)):
            optimizer = {"ADAM": kind == "adamw", "WEIGHT_STATES": states, "SCORE_STATES": states}
            limits = {"num_warps": config.num_warps, "maxnreg": config.registers[dtype is not torch.float32]}
            cases.append(CompileCase(f"{kind} {name}", coded_update_kernel, tables, form | optimizer, **limits))
    return cases
