"""Compile cases of ``wsn_fast.kernels.grad_norm``."""

from __future__ import annotations

import itertools

from compiling import CompileCase

from wsn_fast.kernels.grad_norm import TOTAL_BLOCK, squares_kernel, total_kernel
from wsn_fast.kernels.threshold_table import DTYPES
from wsn_fast.kernels.update_table import CONFIGS

from ._forms import FORMS


def compile_cases() -> list[CompileCase]:
    """The dtypes of mixed, full and half precision."""
    tables = dict.fromkeys(("fields_ptr", "gradients_ptr", "tensors_ptr", "programs_ptr"), "*i64")
    tables |= {"parts_ptr": "*fp64", "tensors": "i32", "items_each": "i32"}
    total = {name: tables[name] for name in ("fields_ptr", "parts_ptr", "tensors", "items_each")}
    cases = [CompileCase("total", total_kernel, total | {"sums_ptr": "*fp32"}, {"BLOCK": TOTAL_BLOCK})]
    for (dtype, grad), rule in itertools.product(FORMS, (0, 1)):
        form = {"GRAD": DTYPES[grad], "DTYPE": DTYPES[dtype], "SCALE": None, "BLOCK": CONFIGS[0].block}
        form |= {"MAGNITUDE": rule == 0, "HAS_UNION": True, "GIVEN": False, "ALIGNED": True}
        name = f"squares {DTYPES[grad]} {DTYPES[dtype]} {('|S|', 'S')[rule]}"
        cases.append(CompileCase(name, squares_kernel, tables, form, num_warps=CONFIGS[0].num_warps))
    return cases
