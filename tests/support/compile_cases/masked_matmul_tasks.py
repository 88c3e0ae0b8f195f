"""Compile cases of ``wsn_fast.kernels.masked_matmul_tasks``."""

from __future__ import annotations

from compiling import CompileCase

from wsn_fast.kernels._matmul_tile import MatmulConfig, fitted
from wsn_fast.kernels.masked_matmul_tasks import (
    TASKS_CONFIGS,
    TASKS_IEEE_CONFIGS,
    TASKS_TF32_CONFIGS,
    matmul_tasks_kernel,
)


def compile_cases() -> list[CompileCase]:
    """Every tile, with loads of 8, 4 and 1 elements; with 8, every row of a mask begins a byte."""
    cases = []
    for compute, precision, configs in (
        ("bf16", "tf32", TASKS_CONFIGS),
        ("fp32", "tf32", TASKS_TF32_CONFIGS),
        ("fp32", "ieee", TASKS_IEEE_CONFIGS),
    ):
        for config in configs:
            cases += [
                _case(config, compute, precision, "fp32", unit=8),
                _case(config, compute, precision, "fp32", unit=4),
                _case(config, compute, precision, compute, unit=1),
            ]
    return cases


def _case(config: MatmulConfig, compute: str, precision: str, w: str, unit: int) -> CompileCase:
    aligned, tile = unit == 8, fitted(config, unit)
    types = {"x_ptr": f"*{compute}", "w_ptr": f"*{w}", "masks_ptr": "*u8", "bias_ptr": f"*{compute}"}
    types |= {"bias_masks_ptr": "*u8", "tasks_ptr": "*i32", "order_ptr": "*i32", "y_ptr": f"*{compute}"}
    rows = ["N", "K", "stride_xm", "stride_ym", "stride_ys", "stride_mask", "stride_masks"]
    return CompileCase(
        name=f"{compute}/{w} {precision} unit={unit} {config}",
        fn=matmul_tasks_kernel,
        signature=types | dict.fromkeys([*rows, "M", "stride_bias_masks", "passes"], "i32"),
        constexprs={
            "ALIGNED": aligned,
            "UNIT": unit,
            "PRECISION": precision,
            "BLOCK_M": tile.block_m,
            "BLOCK_O": tile.block_o,
            "BLOCK_R": tile.block_r,
            "SLOTS": tile.slots,
        },
        attrs=dict.fromkeys([*types, *rows] if aligned else types, 16),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        needs_tensor_core=precision != "ieee" or compute != "fp32",
    )
