"""Compile cases of ``wsn_fast.kernels.threshold``."""

from __future__ import annotations

import itertools

from compiling import CompileCase

from wsn_fast.kernels.threshold import sample_kernel, search_kernel, window_kernel
from wsn_fast.kernels.threshold_table import CONFIGS, DTYPES, SEARCH_REGISTERS


def compile_cases() -> list[CompileCase]:
    """Every kernel in every form that :func:`select` can launch with ``CONFIGS``."""
    tables = {"tensors_ptr": "*i64", "programs_ptr": "*i64", "state_ptr": "*i64", "items_each": "i32"}
    tiles = {**tables, "lists_ptr": "*u32", "alone": "i32"}
    one = dict.fromkeys(("tau", "scores", "n", "rank", "low_rank", "high_rank", "room", "programs"), "i64")
    one |= dict.fromkeys(("magnitude", "writes_programs", "samples"), "i32")
    cases = []
    for dtype, rule, config in itertools.product(DTYPES, (0, 1), CONFIGS):
        warps, name = config.num_warps, f"{DTYPES[dtype]} {('|S|', 'S')[rule]}"
        sample = {"DTYPE": DTYPES[dtype], "SAMPLE": config.sample}
        cases.append(CompileCase(f"sample {DTYPES[dtype]}", sample_kernel, tables | one, sample, num_warps=4))
        form = {"DTYPE": DTYPES[dtype], "MAGNITUDE": rule == 0}
        window = {**form, "BLOCK": config.window_block, "LANES": 32 * warps}
        label = f"window {name} {config.window_block}"
        cases.append(CompileCase(label, window_kernel, tiles, window, num_warps=warps))
        search = {**form, "BLOCK": config.digit_block}
        label = f"search {name} {config.digit_block}"
        cases.append(CompileCase(label, search_kernel, tiles, search, num_warps=warps, maxnreg=SEARCH_REGISTERS))
    return list({case.name: case for case in cases}.values())
