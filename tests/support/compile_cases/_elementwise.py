"""The compile case of a kernel on flattened tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compiling import CompileCase

from wsn_fast.kernels._elementwise import ALIGNMENT, Config


def case(fn: Any, config: Config, constexprs: Mapping[str, Any], **pointers: str) -> CompileCase:
    """The kernel with one tile shape.

    Args:
        fn: the kernel.
        config: the tile shape.
        constexprs: its constants, but for BLOCK.
        pointers: the Triton type of what each pointer points to. All other arguments are int64.
    """
    constexprs = {**constexprs, "BLOCK": config.block}
    sizes = [name for name in fn.arg_names if name not in constexprs and name not in pointers]
    dtypes = " ".join(pointers.values())
    return CompileCase(
        name=f"{fn.__name__.removesuffix('_kernel')} {dtypes} {config.block}x{config.num_warps}",
        fn=fn,
        signature={name: f"*{dtype}" for name, dtype in pointers.items()} | dict.fromkeys(sizes, "i64"),
        constexprs=constexprs,
        attrs=dict.fromkeys(pointers, ALIGNMENT),
        num_warps=config.num_warps,
    )
