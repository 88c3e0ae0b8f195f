"""Writes numbers of the host, mostly addresses, to the device by kernels that take them as arguments. Nothing is copied
from the host, so that a captured graph can do it too."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from ._elementwise import FP_FUSION

VALUES = 128
"""Numbers that one launch of ``write_kernel`` writes. A launch takes 9 us of the host, and another 8 us for so many
arguments. They take 1 KB of the 4 KB that the arguments of a kernel may take on every GPU."""

MARK = tl.constexpr(2**62 + 1)


def _marked(value: int) -> int:
    """The number that stands for ``value``, 0 <= value < 2^61, among the arguments of ``write_kernel``.

    Triton compiles a kernel anew for an integer argument that is 1, that is a multiple of 16, or that fits in 32 bits.
    Bit 62 of this number is always set, so that it does not fit in 32 bits and is not 1, and so is bit 0, so that it is
    no multiple of 16. Therefore all addresses use one compiled kernel.
    """
    assert 0 <= value < 2**61
    return (value << 1) ^ MARK.value


@triton.jit(do_not_specialize=["out_ptr", "count"])
def write_kernel(
    out_ptr,  # [count] int64
    count,  # how many of the values to write
    values,  # a tuple of VALUES integers, each as _marked returns it
):
    """Write the first ``count`` values side by side."""
    for i in tl.static_range(len(values)):
        tl.store(out_ptr + i, (values[i] ^ MARK) >> 1, mask=i < count)


def launches(values: Sequence[int], known: Sequence[int] | None = None) -> list[int]:
    """The places in ``values`` at which a launch of :func:`write` begins: one for every VALUES of them that do not
    agree with ``known``."""
    starts = range(0, len(values), VALUES)
    return [i for i in starts if known is None or values[i : i + VALUES] != known[i : i + VALUES]]


def write(out: Tensor, values: Sequence[int], known: Sequence[int] | None = None) -> None:
    """Write ``values`` to ``out`` with one launch for every VALUES of them.

    Args:
        out: int64 and contiguous, as many elements as there are values.
        values: what to write, each from 0 to 2^61 - 1.
        known: the values that ``out`` has already, a sequence of the same type, or None. It may be wrong about a 0 that
            no kernel reads. Nothing is launched for VALUES numbers that agree with ``known``.
    """
    assert out.numel() == len(values) and out.is_contiguous()
    for i in launches(values, known):
        part = values[i : i + VALUES]
        padded = [*part, *[0] * (VALUES - len(part))]
        write_kernel[(1,)](
            out_ptr=out.view(-1)[i:], count=len(part), values=tuple(map(_marked, padded)), num_warps=1, **FP_FUSION
        )


def address(tensor: Tensor | None) -> int:
    """The address of a tensor; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()
