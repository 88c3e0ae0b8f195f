"""Compile cases of ``wsn_fast.kernels.code_values``."""

from __future__ import annotations

from compiling import CompileCase

from wsn_fast.kernels._means import CODES
from wsn_fast.kernels.code_values import code_values_kernel


def compile_cases() -> list[CompileCase]:
    """The only form."""
    return [CompileCase("all codes", code_values_kernel, {"values_ptr": "*fp32"}, {"CODES": CODES.value}, num_warps=1)]
