"""Compile cases of ``wsn_fast.kernels.split_sum``."""

from __future__ import annotations

from compiling import CompileCase

from wsn_fast.kernels.split_sum import REDUCE_BLOCK, reduce_kernel


def compile_cases() -> list[CompileCase]:
    """The one kernel, with masks of several tasks for the bias."""
    types = {"partial_ptr": "*fp32", "bias_ptr": "*bf16", "bias_masks_ptr": "*u8", "tasks_ptr": "*i32"}
    sizes = ("O", "splits", "stride_pm", "stride_ps", "stride_ym", "stride_bias_masks")
    signature = types | {"y_ptr": "*bf16"} | dict.fromkeys(sizes, "i32")
    return [CompileCase("reduce", reduce_kernel, signature, {"BLOCK": REDUCE_BLOCK})]
