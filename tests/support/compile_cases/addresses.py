"""Compile case of ``wsn_fast.kernels.addresses``."""

from __future__ import annotations

from compiling import CompileCase

from wsn_fast.kernels.addresses import VALUES, write_kernel


def compile_cases() -> list[CompileCase]:
    """The kernel that writes numbers of the host."""
    signature = {"out_ptr": "*i64", "count": "i32", "values": ("i64",) * VALUES}
    return [CompileCase("write", write_kernel, signature, {}, num_warps=1)]
