"""Compile cases of ``wsn_fast.kernels.packed_masks``."""

from __future__ import annotations

from compiling import CompileCase

from wsn_fast.kernels.packed_masks import CONFIGS, pack_kernel, popcount_kernel, union_kernel, unpack_kernel

from ._elementwise import case


def compile_cases() -> list[CompileCase]:
    """Every kernel with every tile shape."""
    cases = []
    for config in CONFIGS:
        cases += [
            case(pack_kernel, config, {}, mask_ptr="u8", packed_ptr="u8"),
            case(unpack_kernel, config, {}, packed_ptr="u8", mask_ptr="u8"),
            case(union_kernel, config, {}, packed_ptr="u8", out_ptr="u8"),
            case(popcount_kernel, config, {}, packed_ptr="u8", count_ptr="i64"),
        ]
    return cases
