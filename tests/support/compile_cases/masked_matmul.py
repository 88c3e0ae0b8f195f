"""Compile cases of ``wsn_fast.kernels.masked_matmul``."""

from __future__ import annotations

from compiling import CompileCase

from wsn_fast.kernels._matmul_tile import MatmulConfig, fitted
from wsn_fast.kernels.masked_matmul import CONFIGS, IEEE_CONFIGS, TF32_CONFIGS, matmul_kernel


def compile_cases() -> list[CompileCase]:
    """Every tile with each source of the mask, forward and backward, and loads of 8, 4 and 1 elements: what takes the
    most shared memory, the most registers, and the ways between."""
    cases = []
    for compute, precision, configs in (
        ("bf16", "tf32", CONFIGS),
        ("fp32", "tf32", TF32_CONFIGS),
        ("fp32", "ieee", IEEE_CONFIGS),
    ):
        for config in configs:
            cases += [
                _case(config, compute, precision, w="fp32"),
                _case(config, compute, precision, w="fp32", unit=4),
                _case(config, compute, precision, w=compute, unit=1),
                _case(config, compute, precision, w="fp32", from_scores=True),
                _case(config, compute, precision, w=compute, backward=True),
            ]
    return cases


def _case(
    config: MatmulConfig,
    compute: str,
    precision: str,
    *,
    w: str,
    from_scores: bool = False,
    backward: bool = False,
    unit: int = 8,
) -> CompileCase:
    aligned, tile = unit == 8, fitted(config, unit)
    types = {"x_ptr": f"*{compute}", "w_ptr": f"*{w}", "bias_ptr": f"*{compute}", "y_ptr": f"*{compute}"}
    types |= {"s_ptr": f"*{w}", "tau_ptr": f"*{w}"} if from_scores else {"mask_ptr": "*u8"}
    sizes = ["N", "K", "stride_xm", "stride_ym", "stride_ys", "stride_mask"]
    constexprs = {
        **dict.fromkeys(["mask_ptr"] if from_scores else ["s_ptr", "tau_ptr"]),
        "BACKWARD": backward,
        "RULE": "magnitude",
        "ALIGNED": aligned,
        "UNIT": unit,
        "PRECISION": precision,
        "BLOCK_M": tile.block_m,
        "BLOCK_O": tile.block_o,
        "BLOCK_R": tile.block_r,
    }
    kind = ("scores" if from_scores else "packed") + ("-dx" if backward else "")
    return CompileCase(
        name=f"{kind} {compute}/{w} {precision} unit={unit} {config}",
        fn=matmul_kernel,
        signature=types | dict.fromkeys([*sizes, "M"], "i32"),
        constexprs=constexprs,
        attrs=dict.fromkeys([*types, *sizes] if aligned else types, 16),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        needs_tensor_core=precision != "ieee" or compute != "fp32",
    )
