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

from wsn_fast.backends import moments, native
from wsn_fast.backends import torch as portable
from wsn_fast.backends.mask import GateOrder, GradientOrder
from wsn_fast.backends.updates import WINDOW, AdamW, AdamWState, Batch, CodedAdamWState, Gradient, Next, Update

from .checks import check_same
from .provenance import provenance
from .tables import table, where
from .tables import three_digits as digits
from .timing import Call, time_calls

RULE = "magnitude"
SETTINGS = AdamW(1e-5, 0.9, 0.999, 1e-8, 0.0, True)


class Kernel(NamedTuple):
    """A call, and the bytes that it must move for each element."""

    name: str
    call: Call
    bytes: float


def kernels(n: int) -> list[Kernel]:
    """Everything that is measured, on ``n`` elements in float32; what can be compared with torch is compared first."""
    source, target = torch.randn(n), torch.empty(n)
    grad, weight, scores = (torch.randn(n) for _ in range(3))
    masked, dweight, dscores = (torch.empty(n) for _ in range(3))
    union, rank = portable.pack(torch.rand(n) < 0.3), n // 2
    tau = native.threshold(scores, rank, RULE)
    gate = [GateOrder(weight, scores, rank, RULE, masked)]
    gradients = [GradientOrder(grad, weight, scores, tau, union, RULE, dweight, dscores)]
    check(gate, gradients)
    state = AdamWState(*(torch.zeros(n) for _ in range(4)), torch.ones(()), torch.ones(()))
    means = [moments.zeros(weight, "8bit", signed) for signed in (True, False, True, False)]
    coded = CodedAdamWState(*means, torch.ones(()), torch.ones(()))
    following = Next(masked, tau.clone(), rank, torch.zeros(WINDOW, dtype=torch.int64))
    batch, coded_batch = (
        Batch([Update(weight, scores, union, RULE, one, following)], [Gradient(grad, None, following.tau)], None, {})
        for one in (state, coded)
    )
    settings = [(SETTINGS, SETTINGS)]
    dense = nn.Parameter(torch.randn(n))
    dense.grad = torch.randn(n)
    optimizer = torch.optim.AdamW([dense], 1e-5, fused=True)
    plan, gradient_plan = {}, {}  # type: dict[object, object], dict[object, object]
    return [
        Kernel("copy, torch", lambda: target.copy_(source), 8),
        Kernel("threshold", lambda: native.threshold(scores, rank, RULE), 4),
        Kernel("threshold and gate", lambda: native.gates(gate, plan), 16),
        Kernel("gradients of Eq. 4 and 5", lambda: native.gates_backward(gradients, gradient_plan), 20.125),
        Kernel("one-pass AdamW with the next gate", lambda: native.adamw_step(batch, settings), 56.125),
        Kernel("the same, means in 8 bits", lambda: native.adamw_coded_step(coded_batch, settings), 32.25),
        Kernel("dense AdamW, torch, fused", optimizer.step, 28),
    ]


def check(gate: list[GateOrder], gradients: list[GradientOrder]) -> None:
    """Raise ``WrongResultError`` where a result is not that of the torch backend, to the bit."""
    for run, orders, names in (
        (native.gates, gate, ("masked",)),
        (native.gates_backward, gradients, ("weight_grad", "score_grad")),
    ):
        run(orders)  # type: ignore[operator]
        found: list[Tensor] = [getattr(orders[0], name).clone() for name in names]  # type: ignore[index]
        (portable.gates if run is native.gates else portable.gates_backward)(orders)  # type: ignore[operator]
        for one, name in zip(found, names, strict=True):
            check_same(one, getattr(orders[0], name), name)  # type: ignore[index]


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
