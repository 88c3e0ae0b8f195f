"""Compile cases of ``wsn_fast.kernels.masked_matmul_tasks``."""

from __future__ import annotations

from typing import Any

import torch
from compiling import CompileCase

from wsn_fast.kernels.masked_matmul_tasks import (
    TASKS_CONFIGS,
    TASKS_IEEE_CONFIGS,
    TASKS_TF32_CONFIGS,
    masked_matmul_tasks,
)
from wsn_fast.kernels.split_sum import workspace_numel

from ._covering import covering
from ._launches import distinct, written_down
from ._products import COMPUTE, FLOATS, LAYOUTS, ROWS, STRIDES, WIDE, compute_of, tiles

TASKS = 3


def compile_cases() -> list[CompileCase]:
    """Every tile in the forms that take the most shared memory or registers; and any two of all the choices together
    that a launch can be of."""
    cases = [case for row in rows() for case in _launch(row)]
    return [case for case in distinct(cases) if case.fn.__name__ == "matmul_tasks_kernel"]


def rows() -> list[dict[str, Any]]:
    """The choices that make up the cases."""
    axes = {
        "tile": tiles(TASKS_CONFIGS, TASKS_TF32_CONFIGS, TASKS_IEEE_CONFIGS), "compute": COMPUTE, "w": FLOATS,
        "layout": LAYOUTS, "end": ("without bias", "bias", "masked bias", "split"), "strides": STRIDES,
    }  # fmt: skip
    return covering(axes, [{"tile": tile, "w": torch.float32, "layout": WIDE} for tile in axes["tile"]])


def _launch(row: dict[str, Any]) -> list[CompileCase]:
    layout, compute, end = row["layout"], compute_of(row), row["end"]
    splits = 2 if end == "split" else 1
    with written_down() as cases:
        masked_matmul_tasks(
            layout.empty("x", ROWS, layout.k, dtype=compute),
            torch.empty(layout.n, layout.k, dtype=row["w"]),
            torch.empty(ROWS, layout.n, dtype=compute),
            packed=torch.empty(TASKS, (layout.n * layout.k + 7) // 8, dtype=torch.uint8),
            tasks=torch.empty(ROWS, dtype=torch.int32),
            order=torch.empty(ROWS, dtype=torch.int32),
            bias=None if end == "without bias" else torch.empty(layout.n, dtype=row["w"]),
            packed_bias=torch.empty(TASKS, (layout.n + 7) // 8, dtype=torch.uint8) if end == "masked bias" else None,
            config=row["tile"].config,
            splits=splits,
            workspace=torch.empty(workspace_numel(ROWS, layout.n, splits)),
            precision=row["tile"].precision,
        )
    return row["tile"].launched(cases, row, "masked_linear_tasks")
