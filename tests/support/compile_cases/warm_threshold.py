"""Compile cases of ``wsn_fast.kernels.warm_threshold``."""

from __future__ import annotations

import itertools

from compiling import CompileCase

from wsn_fast.kernels.threshold_table import DTYPES, SEARCH_REGISTERS
from wsn_fast.kernels.update_table import CONFIGS
from wsn_fast.kernels.warm_threshold import WARPS, settle_kernel

from ._forms import FORMS


def compile_cases() -> list[CompileCase]:
    """The one kernel here in the forms that ``settle`` can launch."""
    signature = dict.fromkeys(("fields_ptr", "tensors_ptr", "programs_ptr", "state_ptr", "places_ptr"), "*i64")
    signature |= {"keys_ptr": "*u32"} | dict.fromkeys(("tensors", "items_each", "alone"), "i32")
    cases = []
    for (dtype, masked), rule, config in itertools.product(FORMS, (0, 1), CONFIGS):
        form = {"DTYPE": DTYPES[dtype], "MASKED": DTYPES[masked], "MAGNITUDE": rule == 0}
        form |= {"BLOCK": config.block, "DIGIT": config.digit_block, "FIX": config.fix_block, "ALIGNED": True}
        limits = {"num_warps": WARPS, "maxnreg": SEARCH_REGISTERS}
        label = f"settle {DTYPES[dtype]} {('|S|', 'S')[rule]} {DTYPES[masked]} {config.block}"
        cases.append(CompileCase(label, settle_kernel, signature, form, **limits))
    return list({case.name: case for case in cases}.values())
