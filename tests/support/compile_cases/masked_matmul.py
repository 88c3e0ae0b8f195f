"""Compile cases of ``wsn_fast.kernels.masked_matmul``."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from compiling import CompileCase

from wsn_fast.kernels.masked_matmul import CONFIGS, IEEE_CONFIGS, TF32_CONFIGS, masked_matmul
from wsn_fast.kernels.split_sum import workspace_numel

from ._covering import covering
from ._launches import distinct, written_down
from ._products import COMPUTE, FLOATS, LAYOUTS, MASKS, ROWS, SCORES, STRIDES, WIDE, compute_of, tiles


def compile_cases() -> list[CompileCase]:
    """Every tile in the forms that take the most shared memory or registers; and any two of all the choices together
    that a launch can be of."""
    cases = [case for row in rows() for case in _launch(row)]
    return [case for case in distinct(cases) if case.fn.__name__ == "matmul_kernel"]


def rows() -> list[dict[str, Any]]:
    """The choices that make up the cases."""
    axes = {
        "tile": tiles(CONFIGS, TF32_CONFIGS, IEEE_CONFIGS), "compute": COMPUTE, "w": FLOATS, "mask": MASKS,
        "to": ("outputs", "inputs"), "layout": LAYOUTS, "end": ("without bias", "bias", "split"), "strides": STRIDES,
    }  # fmt: skip
    heavy = [
        {"tile": tile, "w": torch.float32, "mask": SCORES, "to": to, "layout": WIDE}
        for tile, to in itertools.product(axes["tile"], axes["to"])
    ]
    return covering(axes, heavy)


def _launch(row: dict[str, Any]) -> list[CompileCase]:
    layout, compute, backward = row["layout"], compute_of(row), row["to"] == "inputs"
    inputs, outputs = (layout.n, layout.k) if backward else (layout.k, layout.n)
    splits = 2 if row["end"] == "split" else 1
    with written_down() as cases:
        masked_matmul(
            layout.empty("x", ROWS, inputs, dtype=compute),
            torch.empty(layout.n, layout.k, dtype=row["w"]),
            torch.empty(ROWS, outputs, dtype=compute),
            **row["mask"].arguments(layout.n, layout.k),
            bias=torch.empty(outputs, dtype=compute) if row["end"] == "bias" else None,
            backward=backward,
            config=row["tile"].config,
            splits=splits,
            workspace=torch.empty(workspace_numel(ROWS, outputs, splits)),
            precision=row["tile"].precision,
        )
    return row["tile"].launched(cases, row, "masked_linear", backward)
