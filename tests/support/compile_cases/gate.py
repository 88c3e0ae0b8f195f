"""Compile cases of ``wsn_fast.kernels.gate``."""

from __future__ import annotations

import triton.language as tl
from compiling import CompileCase

from wsn_fast.kernels.gate import CONFIGS, gate_kernel, gate_multi_kernel, gate_packed_kernel

from ._elementwise import case


def compile_cases() -> list[CompileCase]:
    """Every kernel with every tile shape; the gate with the dtypes of mixed, full and half precision."""
    flags = {"MAGNITUDE": True, "PACK": True}
    dtypes = {"W_DTYPE": tl.float32, "S_DTYPE": tl.float32, "OUT_DTYPE": tl.bfloat16, "ALIGNED": True}
    cases = []
    for config in CONFIGS:
        for w, out in [("fp32", "bf16"), ("fp32", "fp32"), ("bf16", "bf16"), ("fp64", "fp64")]:
            cases += [
                case(gate_kernel, config, flags, w_ptr=w, s_ptr=w, tau_ptr=w, out_ptr=out, packed_ptr="u8"),
                case(gate_packed_kernel, config, {}, w_ptr=w, packed_ptr="u8", out_ptr=out),
            ]
        cases.append(case(gate_multi_kernel, config, flags | dtypes, table_ptr="i64", block_ptr="i32"))
    return cases
