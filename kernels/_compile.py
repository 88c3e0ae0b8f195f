"""How a kernel module tells a test which of its kernels to compile, and in which forms."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class CompileCase(NamedTuple):
    """One kernel with one choice of types, constants and options.

    Attributes:
        name: what reports and tests call it.
        fn: the ``@triton.jit`` function.
        signature: argument name to Triton type ("*bf16", "i64"), for every argument that is not a constexpr.
        constexprs: constexpr name to value.
        attrs: argument name to the power of two that divides it (a pointer: its address).
        num_warps: warps per program.
        num_stages: stages of the software pipeline.
        needs_tensor_core: whether the machine code must hold a tensor-core instruction.
    """

    name: str
    fn: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    attrs: Mapping[str, int] = {}
    num_warps: int = 4
    num_stages: int = 3
    needs_tensor_core: bool = False
