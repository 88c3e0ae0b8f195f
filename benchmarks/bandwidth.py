"""The native CPU kernels beside the bandwidth of a copy, in one run: ``python -m benchmarks.bandwidth``.

Outputs are made before the clock starts, so that no kernel pays for new pages. Bytes are those that a kernel must read
and write; a store to memory that is not in a cache costs a read too, which is not counted, for the copy neither.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from wsn_fast.backends import native
from wsn_fast.backends import torch as portable
from wsn_fast.doctor.measuring.checks import check_same
from wsn_fast.doctor.measuring.operations import OPERATIONS, Operands
from wsn_fast.doctor.measuring.timing import Call, time_calls
from wsn_fast.doctor.measuring.weights import Weight

from .provenance import provenance
from .tables import table, where
from .tables import three_digits as digits


class Kernel(NamedTuple):
    """A call, and the bytes that it must move for each element."""

    name: str
    call: Call
    bytes: float


NAMES = {
    "threshold": "threshold",
    "gates": "threshold and gate",
    "gates_backward": "gradients of Eq. 4 and 5",
    "adamw_step": "one-pass AdamW with the next gate",
    "adamw_coded_step": "the same, means in 8 bits",
}
"""The primitives that are measured, and what they are called in the table."""
READ_AGAIN = {"gates": 4}
"""Bytes for each element that are read again: the threshold of scores that nothing is known of takes a pass."""


def kernels(n: int) -> list[Kernel]:
    """Everything that is measured, on ``n`` elements in float32; what can be compared with torch is compared first."""
    source, target = torch.randn(n), torch.empty(n)
    o = Operands(native, Weight.random((n,), torch.device("cpu")), torch.float32, 1)
    check(o)
    dense = nn.Parameter(torch.randn(n))
    dense.grad = torch.randn(n)
    optimizer = torch.optim.AdamW([dense], 1e-5, fused=True)
    ours = [
        Kernel(label, OPERATIONS[name].prepare(o), OPERATIONS[name].bytes_each(4, 4, 1) + READ_AGAIN.get(name, 0))
        for name, label in NAMES.items()
    ]
    return [
        Kernel("copy, torch", lambda: target.copy_(source), 8),
        *ours,
        Kernel("dense AdamW, torch, fused", optimizer.step, 28),
    ]


def check(o: Operands) -> None:
    """Raise ``WrongResultError`` where a result is not that of the torch backend, to the bit."""
    for name in ("threshold", "gates", "gates_backward"):
        found, expected = (OPERATIONS[name].prepare(o._replace(module=m))() for m in (native, portable))
        pairs = zip(*((r,) if isinstance(r, Tensor) else r for r in (found, expected)), strict=True)
        for one, right in pairs:
            check_same(one, right, name)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bandwidth", description=__doc__)
    parser.add_argument("--elements", type=int, nargs="+", default=(1 << 20, 1 << 22, 1 << 24))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=0.5, help="to measure a kernel")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    device = torch.device("cpu")
    lines = ["# The native kernels and the bandwidth of a copy", "", where(provenance(device)), ""]
    for n in options.elements:
        cells, copied = [], 0.0
        for kernel in kernels(n):
            us = time_calls([kernel.call], device, seconds=options.seconds).median_us
            rate = kernel.bytes * n / us / 1e3
            copied = copied or rate
            cells.append((kernel.name, digits(us / 1e3), f"{kernel.bytes:g}", digits(rate), f"{rate / copied:.2f}"))
        lines += [*table((f"{n} elements", "ms", "bytes", "GB/s", "x copy"), cells), ""]
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
