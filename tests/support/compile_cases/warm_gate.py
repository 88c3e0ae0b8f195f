"""Compile cases of ``wsn_fast.kernels.warm_gate``."""

from __future__ import annotations

import itertools

from compiling import CompileCase

from wsn_fast.kernels.threshold_table import DTYPES
from wsn_fast.kernels.warm_gate import CONFIG, gate_by_guess_kernel, open_windows_kernel

from ._forms import FORMS


def compile_cases() -> list[CompileCase]:
    """Both kernels in the forms that ``gate_by_guess`` can launch."""
    opened = {"tensors_ptr": "*i64", "state_ptr": "*i64"}
    signature = dict.fromkeys(("fields_ptr", "tensors_ptr", "programs_ptr", "state_ptr", "places_ptr"), "*i64")
    signature |= {"keys_ptr": "*u32"} | dict.fromkeys(("tensors", "items_each"), "i32")
    cases = []
    for (dtype, masked), rule in itertools.product(FORMS, (0, 1)):
        form = {"DTYPE": DTYPES[dtype], "MAGNITUDE": rule == 0}
        name = f"{DTYPES[dtype]} {('|S|', 'S')[rule]}"
        cases.append(CompileCase(f"open {name}", open_windows_kernel, opened, form, num_warps=1))
        form = form | {"MASKED": DTYPES[masked], "BLOCK": CONFIG.block, "LANES": 32 * CONFIG.num_warps, "ALIGNED": True}
        label = f"gate {name} {DTYPES[masked]}"
        cases.append(CompileCase(label, gate_by_guess_kernel, signature, form, num_warps=CONFIG.num_warps))
    return list({case.name: case for case in cases}.values())
