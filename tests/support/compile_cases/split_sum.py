"""Compile cases of ``wsn_fast.kernels.split_sum``."""

from __future__ import annotations

import itertools

import torch
from compiling import CompileCase

from wsn_fast.kernels.split_sum import reduce_partials

from ._launches import TYPES, distinct, with_long_strides, written_down
from ._products import FLOATS

ROWS, TASKS, SPLITS = 4, 3, 2


def compile_cases() -> list[CompileCase]:
    """The one kernel with every dtype, width of load, and kind of bias, also with strides of 64 bits."""
    forms = list(itertools.product(FLOATS, (64, 65), ("none", "plain", "masked")))
    with written_down() as cases:
        for dtype, outputs, bias in forms:
            masked = bias == "masked"
            reduce_partials(
                torch.empty(SPLITS, ROWS, outputs),
                torch.empty(ROWS, outputs, dtype=dtype),
                None if bias == "none" else torch.empty(outputs, dtype=dtype),
                torch.empty(TASKS, (outputs + 7) // 8, dtype=torch.uint8) if masked else None,
                torch.empty(ROWS, dtype=torch.int32) if masked else None,
            )
    named = [
        case._replace(name=f"reduce {TYPES[dtype]}, {outputs} outputs, bias {bias}")
        for case, (dtype, outputs, bias) in zip(cases, forms, strict=True)
    ]
    return distinct([*named, with_long_strides(named[-1])._replace(name=f"{named[-1].name}, 64-bit strides")])
