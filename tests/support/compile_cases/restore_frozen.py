"""Compile cases of ``wsn_fast.kernels.restore_frozen``."""

from __future__ import annotations

from compiling import CompileCase

from wsn_fast.kernels.restore_frozen import CONFIGS, restore_frozen_kernel, restore_frozen_multi_kernel

from ._elementwise import case


def compile_cases() -> list[CompileCase]:
    """Both kernels with every tile shape."""
    pointers = {"param_ptr": "fp32", "saved_ptr": "fp32", "union_ptr": "u8"}
    tables = {"table_ptr": "i64", "block_ptr": "i32", "saved_ptr": "fp32"}
    return [
        one
        for config in CONFIGS
        for one in (
            case(restore_frozen_kernel, config, {}, **pointers),
            case(restore_frozen_multi_kernel, config, {}, **tables),
        )
    ]
