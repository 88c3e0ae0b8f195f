"""Compile cases that the launchers write themselves: a launch is written down, and nothing runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from compiling import CompileCase
from torch import Tensor
from triton.runtime.jit import JITFunction

from wsn_fast.kernels._elementwise import ALIGNMENT

TYPES = {
    torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.uint8: "u8",
    torch.int32: "i32", torch.int64: "i64", torch.uint32: "u32",
}  # fmt: skip
"""Triton's name of each dtype that a kernel gets."""


@contextmanager
def written_down() -> Iterator[list[CompileCase]]:
    """The launches that are made inside, as cases in the form that Triton would compile for these arguments. Tensors
    may be on the CPU. A case is called like its kernel."""
    cases: list[CompileCase] = []

    def run(kernel: Any, *, grid: Any, warmup: bool, enable_fp_fusion: bool, **arguments: Any) -> None:
        cases.append(_case(kernel, arguments))

    with mock.patch.object(JITFunction, "run", run):
        yield cases


def _case(kernel: Any, arguments: dict[str, Any]) -> CompileCase:
    signature: dict[str, Any] = {}
    constexprs: dict[str, Any] = {}
    attrs: dict[str, int] = {}
    for parameter in kernel.params:
        name, value = parameter.name, arguments.pop(parameter.name)
        number = value.data_ptr() if isinstance(value, Tensor) else value
        special = not parameter.do_not_specialize and isinstance(number, int)
        if parameter.is_constexpr or value is None:
            constexprs[name] = value
        elif special and value is number and number == 1 and not parameter.annotation_type:
            constexprs[name] = 1
        else:
            signature[name] = parameter.annotation_type or _type_of(value)
            if special and number % ALIGNMENT == 0:
                attrs[name] = ALIGNMENT
    return CompileCase(kernel.fn.__name__.removesuffix("_kernel"), kernel, signature, constexprs, attrs, **arguments)


def _type_of(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_type_of, value))
    if isinstance(value, Tensor):
        return f"*{TYPES[value.dtype]}"
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def with_long_strides(case: CompileCase) -> CompileCase:
    """The case for tensors of which some stride, or number of elements, needs 64 bits."""
    wide = {
        name: "i64" for name in case.signature if name == "n" or (name.startswith("stride_") and name != "stride_mask")
    }
    return case._replace(signature={**case.signature, **wide})


def distinct(cases: list[CompileCase]) -> list[CompileCase]:
    """The first of the cases that are compiled to the same."""
    return list({_identity(case): case for case in reversed(cases)}.values())[::-1]


def _identity(case: CompileCase) -> tuple[Any, ...]:
    mappings = (case.signature, case.constexprs, case.attrs)
    return (
        case.fn,
        *(tuple(sorted((k, str(v)) for k, v in m.items())) for m in mappings),
        case.num_warps,
        case.num_stages,
        case.maxnreg,
    )
