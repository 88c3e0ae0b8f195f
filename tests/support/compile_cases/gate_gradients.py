"""Compile cases of ``wsn_fast.kernels.gate_gradients``."""

from __future__ import annotations

from compiling import CompileCase

from wsn_fast.kernels._elementwise import ALIGNMENT, TRITON_DTYPES, Config
from wsn_fast.kernels.gate_gradients import CONFIGS, gate_backward_kernel, gate_backward_multi_kernel

DTYPES = [("bf16", "fp32"), ("fp32", "fp32"), ("bf16", "bf16"), ("fp64", "fp64")]
"""Of G and of weight and scores, in mixed, full and half precision."""

FLAGS = {"MAGNITUDE": True, "HAS_UNION": True, "NEED_WEIGHT": True, "NEED_SCORES": True}


def compile_cases() -> list[CompileCase]:
    """Every tile shape with all dtypes, for one tensor and for many; and what else a launch over many may be."""
    cases = [form(g, w, config) for config in CONFIGS for g, w in DTYPES for form in (_single, _multi)]
    others = {
        "unaligned": {"ALIGNED": False},
        "value, without union": {"MAGNITUDE": False, "HAS_UNION": False},
        "dW alone": {"NEED_SCORES": False},
        "dS alone": {"NEED_WEIGHT": False, "HAS_UNION": False},
    }
    for name, flags in others.items():
        case = _multi("bf16", "fp32", CONFIGS[0])
        cases.append(case._replace(name=f"{case.name}, {name}", constexprs={**case.constexprs, **flags}))
    return cases


def _single(g: str, w: str, config: Config) -> CompileCase:
    pointers = ("g_ptr", "w_ptr", "s_ptr", "tau_ptr", "union_ptr", "dw_ptr", "ds_ptr")
    types = (g, w, w, w, "u8", w, w)
    return CompileCase(
        name=f"gate_backward {g} {w} {config.block}x{config.num_warps}",
        fn=gate_backward_kernel,
        signature={p: f"*{t}" for p, t in zip(pointers, types, strict=True)} | {"n": "i64"},
        constexprs=FLAGS | {"BLOCK": config.block},
        attrs=dict.fromkeys(pointers, ALIGNMENT),
        num_warps=config.num_warps,
    )


def _multi(g: str, w: str, config: Config) -> CompileCase:
    named = {dtype.name: dtype for dtype in TRITON_DTYPES.values()}
    dtypes = {"G_DTYPE": named[g], "W_DTYPE": named[w], "S_DTYPE": named[w]}
    return CompileCase(
        name=f"gate_backward_multi {g} {w} {config.block}x{config.num_warps}",
        fn=gate_backward_multi_kernel,
        signature={"table_ptr": "*i64", "moving_ptr": "*i64", "block_ptr": "*i32", "tensors": "i32"},
        constexprs=FLAGS | dtypes | {"BLOCK": config.block, "ALIGNED": True},
        attrs=dict.fromkeys(("table_ptr", "moving_ptr", "block_ptr"), ALIGNMENT),
        num_warps=config.num_warps,
    )
