"""Compile cases of ``wsn_fast.kernels.masked_matmul_grad``."""

from __future__ import annotations

from compiling import CompileCase

from wsn_fast.kernels._elementwise import ALIGNMENT
from wsn_fast.kernels.masked_matmul_grad import (
    CONFIGS,
    GROUP,
    IEEE_CONFIGS,
    REDUCE_CONFIG,
    TF32_CONFIGS,
    GradMatmulConfig,
    fitted,
    matmul_grad_kernel,
    reduce_grad_kernel,
)


def compile_cases() -> list[CompileCase]:
    """Every tile with its gradients, for an fp32 weight and on odd rows, and as a part of a split sum."""
    cases = []
    for compute, precision, configs in (
        ("bf16", "tf32", CONFIGS),
        ("fp32", "tf32", TF32_CONFIGS),
        ("fp32", "ieee", IEEE_CONFIGS),
    ):
        for config in configs:
            cases += [
                _case(config, compute, precision, w="fp32"),
                _case(config, compute, precision, w=compute, aligned=False),
                _case(config, compute, precision, w="fp32", partial=True),
            ]
    for dtype in ("fp32", "bf16"):
        operands = _operands(dtype) | {"partial_ptr": "*fp32"}
        cases.append(
            CompileCase(
                name=f"reduce {dtype}",
                fn=reduce_grad_kernel,
                signature=operands | {"n": "i64", "splits": "i32"},
                constexprs={"MAGNITUDE": True, "BLOCK": REDUCE_CONFIG.block},
                attrs=dict.fromkeys([*operands, "n"], ALIGNMENT),
                num_warps=REDUCE_CONFIG.num_warps,
            )
        )
    return cases


def _operands(w: str) -> dict[str, str]:
    types = dict.fromkeys(("w_ptr", "s_ptr", "tau_ptr", "dw_ptr", "ds_ptr"), f"*{w}")
    return types | {"union_ptr": "*u8"}


def _case(
    config: GradMatmulConfig, compute: str, precision: str, *, w: str, aligned: bool = True, partial: bool = False
) -> CompileCase:
    outputs = {"partial_ptr": "*fp32"} if partial else _operands(w)
    absent = _operands(w) if partial else ["partial_ptr"]
    pointers = {"dy_ptr": f"*{compute}", "x_ptr": f"*{compute}"} | outputs
    unit = 8 if aligned else 1
    config = fitted(config, unit)
    constexprs = {
        **dict.fromkeys(absent),
        "MAGNITUDE": True,
        "ALIGNED": aligned,
        "UNIT_DY": unit,
        "UNIT_X": unit,
        "PRECISION": precision,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "BLOCK_M": config.block_m,
        "COLUMNS": config.columns,
        "GROUP": GROUP,
    }
    kind = "partial" if partial else "whole" if aligned else "odd"
    return CompileCase(
        name=f"{kind} {compute}/{w} {precision} {config}",
        fn=matmul_grad_kernel,
        signature=pointers | dict.fromkeys(["M", "N", "K", "stride_dm", "stride_xm", "stride_mask"], "i32"),
        constexprs=constexprs,
        attrs=dict.fromkeys(pointers, ALIGNMENT),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        needs_tensor_core=precision != "ieee" or compute != "fp32",
    )
