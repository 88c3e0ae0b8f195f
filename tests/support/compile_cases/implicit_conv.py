"""Compile cases of ``wsn_fast.kernels.implicit_conv``."""

from __future__ import annotations

from typing import Any

from compiling import CompileCase

from wsn_fast.kernels._matmul_tile import MatmulConfig
from wsn_fast.kernels.implicit_conv import CONFIGS, DX_CONFIGS, IEEE_CONFIGS, conv2d_dx_kernel, conv2d_kernel


def compile_cases() -> list[CompileCase]:
    """Every tile with each source of the mask, forward and backward, and with rows that begin inside a byte."""
    cases = []
    for compute, precision, configs in (
        ("bf16", "tf32", CONFIGS),
        ("fp32", "tf32", CONFIGS),
        ("fp32", "ieee", IEEE_CONFIGS),
    ):
        for config in configs:
            cases += [
                _case(conv2d_kernel, config, compute, precision, {"ALIGNED": True}, w="fp32"),
                _case(conv2d_kernel, config, compute, precision, {"ALIGNED": True}, w=compute, from_scores=True),
                _case(conv2d_kernel, config, compute, precision, {"ALIGNED": False}, w=compute),
            ]
            if config in (*DX_CONFIGS, *IEEE_CONFIGS):
                cases += [
                    _case(conv2d_dx_kernel, config, compute, precision, {}, w="fp32"),
                    _case(conv2d_dx_kernel, config, compute, precision, {}, w=compute, from_scores=True),
                ]
    return cases


def _case(
    fn: Any,
    config: MatmulConfig,
    compute: str,
    precision: str,
    aligned: dict[str, bool],
    *,
    w: str,
    from_scores: bool = False,
) -> CompileCase:
    types = {"w_ptr": f"*{w}"}
    types |= {"s_ptr": f"*{w}", "tau_ptr": f"*{w}"} if from_scores else {"mask_ptr": "*u8"}
    types |= {
        name: f"*{compute}" for name in ("x_ptr", "bias_ptr", "y_ptr", "dy_ptr", "dx_ptr") if name in fn.arg_names
    }
    constexprs = {
        **dict.fromkeys(["mask_ptr"] if from_scores else ["s_ptr", "tau_ptr"]),
        **aligned,
        "KH": 3,
        "KW": 3,
        "RULE": "magnitude",
        "PRECISION": precision,
        "BLOCK_M": config.block_m,
        "BLOCK_O": config.block_o,
        "BLOCK_R": config.block_r,
    }
    sizes = [name for name in fn.arg_names if name not in types and name not in constexprs]
    kind = ("scores" if from_scores else "packed") + ("-odd" if aligned.get("ALIGNED") is False else "")
    return CompileCase(
        name=f"{fn.__name__.removesuffix('_kernel')} {kind} {compute}/{w} {precision} {config}",
        fn=fn,
        signature=types | dict.fromkeys(sizes, "i32"),
        constexprs=constexprs,
        attrs=dict.fromkeys([*types, "stride_mask"] if aligned.get("ALIGNED") else types, 16),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        needs_tensor_core=precision != "ieee" or compute != "fp32",
    )
