"""Compile cases of ``wsn_fast.kernels.masked_matmul_grad``."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from compiling import CompileCase

from wsn_fast.kernels.masked_matmul_grad import CONFIGS, IEEE_CONFIGS, TF32_CONFIGS, masked_matmul_grad
from wsn_fast.kernels.split_sum import workspace_numel

from ._covering import covering
from ._launches import distinct, written_down
from ._products import COMPUTE, FLOATS, LAYOUTS, MASKS, ODD, ROWS, SCORES, STRIDES, WIDE, Layout, compute_of, tiles

BOTH_LAYOUTS = (*LAYOUTS, Layout(64, 64, "dy"), Layout(68, 65), Layout(66, 64))
"""Those in which dy and x take loads of different widths, too."""
RESULTS = ("dW and dS", "dW", "dS")


def compile_cases() -> list[CompileCase]:
    """Every tile in the forms that take the most shared memory or registers; and any two of all the choices together
    that a launch can be of. The kernel that adds the parts of a split sum comes with them."""
    return distinct([case for row in rows() for case in _launch(row)])


def rows() -> list[dict[str, Any]]:
    """The choices that make up the cases."""
    axes = {
        "tile": tiles(CONFIGS, TF32_CONFIGS, IEEE_CONFIGS), "compute": COMPUTE, "w": FLOATS, "mask": MASKS[1:],
        "results": RESULTS, "union": (True, False), "layout": BOTH_LAYOUTS, "split": (False, True), "strides": STRIDES,
    }  # fmt: skip
    heavy = [
        {"tile": tile, "w": torch.float32, "mask": SCORES, "results": RESULTS[0], "union": True, "layout": layout,
         "split": False}
        for tile, layout in itertools.product(axes["tile"], (WIDE, ODD))
    ]  # fmt: skip
    return covering(axes, heavy)


def _launch(row: dict[str, Any]) -> list[CompileCase]:
    layout, mask = row["layout"], row["mask"]
    shape = (layout.n, layout.k)
    splits = 2 if row["split"] else 1
    with written_down() as cases:
        masked_matmul_grad(
            layout.empty("dy", ROWS, layout.n, dtype=compute_of(row)),
            layout.empty("x", ROWS, layout.k, dtype=compute_of(row)),
            torch.empty(shape, dtype=row["w"]),
            torch.empty(shape, dtype=row["w"]) if "dW" in row["results"] else None,
            torch.empty(shape, dtype=mask.dtype) if "dS" in row["results"] else None,
            **mask.arguments(*shape),
            union=torch.empty((layout.n * layout.k + 7) // 8, dtype=torch.uint8) if row["union"] else None,
            config=row["tile"].config,
            splits=splits,
            workspace=torch.empty(workspace_numel(*shape, splits)),
            precision=row["tile"].precision,
        )
    return row["tile"].launched(cases, row, "masked_linear_grad")
