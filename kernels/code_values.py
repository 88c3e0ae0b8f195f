"""The values of all 8-bit codes, in a table that the kernels of :mod:`.coded_step` decode by."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ._elementwise import FP_FUSION
from ._means import CODES, value_of


@triton.jit(do_not_specialize=["values_ptr"])
def code_values_kernel(
    values_ptr,  # [2, CODES] fp32
    CODES: tl.constexpr,
):
    """Write the value of every code for a scale of 1: those of first moments, then those of second moments."""
    code = tl.arange(0, CODES)
    tl.store(values_ptr + code, value_of(code, SIGNED=True))
    tl.store(values_ptr + CODES + code, value_of(code, SIGNED=False))


def write_values(values: Tensor) -> None:
    """Write the table to ``values``, float32 [2 * CODES] and contiguous."""
    assert values.numel() == 2 * CODES.value and values.is_contiguous()
    code_values_kernel[(1,)](values_ptr=values, CODES=CODES, num_warps=1, **FP_FUSION)
