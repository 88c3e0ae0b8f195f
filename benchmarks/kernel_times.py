"""Measures on a GPU what ``benchmarks.predict`` predicts: the time of every kernel of a training step.

``python -m benchmarks.kernel_times`` prints Markdown and writes JSON. The steps are those of ``real_steps.py``: one
linear layer without bias, float32 parameters, bf16 autocast, the second task with the union of the first. PyTorch's
profiler says when each kernel began and ended. Several nets take turns where one would stay in the L2 cache.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from wsn_fast.doctor.measuring.weights import input_sets

from .provenance import ROOT, provenance
from .tables import table
from .tables import three_digits as digits

sys.path.append(str(ROOT / "tests" / "support"))
steps = importlib.import_module("counted_steps")

SIDES = (1024, 4096, 8192)
MODES = ("dense", "one-pass", "standard", "guarded")
ROWS = 32  # of a batch
WARM, REPEATS = 20, 12  # steps of each net: until windows have settled, and those that are measured
_BYTES_PER_WEIGHT = 40  # of weights, scores and moments

Step = Callable[[], object]


class KernelTime(NamedTuple):
    """A kernel of a step: launches per step, and microseconds of a launch."""

    name: str
    launches: float
    median_us: float
    p20_us: float
    p80_us: float

    @property
    def us_per_step(self) -> float:
        """By medians."""
        return self.launches * self.median_us


def summarise(durations: Iterable[tuple[str, float]], count: int) -> list[KernelTime]:
    """The kernels of ``count`` steps from their names and microseconds, the one that takes most first."""
    found: dict[str, list[float]] = defaultdict(list)
    for name, us in durations:
        found[name].append(us)
    kernels = []
    for name, times in found.items():
        times.sort()
        low, high = (times[int(share * len(times))] for share in (0.2, 0.8))
        kernels.append(KernelTime(name, len(times) / count, statistics.median(times), low, high))
    return sorted(kernels, key=lambda kernel: -kernel.us_per_step)


def make_step(mode: str, side: int, lr: float, device: torch.device) -> Step:
    """A step of a new net."""
    net, x = nn.Sequential(nn.Linear(side, side, bias=False, device=device)), torch.randn(ROWS, side, device=device)
    step = steps.dense_step(mode, net, x) if mode == "dense" else steps.step_of(mode, steps.subnet(net), x)

    optimizer: torch.optim.Optimizer = step.args[1]
    for group in optimizer.param_groups:
        group["lr"] = lr

    def run() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            step()

    return run


def measure(mode: str, side: int, lr: float, device: torch.device) -> list[KernelTime]:
    """The kernels of a step."""
    nets = [make_step(mode, side, lr, device) for _ in range(input_sets(_BYTES_PER_WEIGHT * side * side, device))]
    for _ in range(WARM):
        for step in nets:
            step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(REPEATS):
            for step in nets:
                step()
        torch.cuda.synchronize()
    durations = [
        (event.name, event.time_range.elapsed_us())
        for event in profiler.events() or ()
        if event.device_type == torch.autograd.DeviceType.CUDA
    ]
    return summarise(durations, REPEATS * len(nets))


def markdown(found: Sequence[dict[str, Any]]) -> str:
    """A table for every step."""
    lines = ["# Kernels of a step, measured", ""]
    for one in found:
        lines += [f"## {one['mode']}, {one['side']}^2, batch {ROWS}", ""]
        if "error" in one:
            lines += [one["error"], ""]
            continue
        kernels = [KernelTime(*kernel) for kernel in one["kernels"]]
        cells = [
            (k.name[:60], f"{k.launches:g}", *(digits(us) for us in (k.median_us, k.p20_us, k.p80_us, k.us_per_step)))
            for k in kernels
        ]
        total = sum(kernel.us_per_step for kernel in kernels)
        cells.append(("all", f"{sum(k.launches for k in kernels):g}", "", "", "", digits(total)))
        lines += [*table(("kernel", "launches a step", "median us", "p20", "p80", "us a step"), cells), ""]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernel_times", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="the JSON file")
    parser.add_argument("--sides", type=int, nargs="+", default=SIDES, help="of the square weight")
    parser.add_argument("--modes", nargs="+", default=MODES, choices=MODES)
    parser.add_argument("--lr", type=float, default=1e-5, help="how fast scores move, and with them the threshold")
    parser.add_argument("--minutes", type=float, default=2.0, help="after which nothing new is begun")
    options = parser.parse_args(arguments)
    device, until = torch.device("cuda"), time.monotonic() + 60 * options.minutes
    facts, found = provenance(device), list[dict[str, Any]]()
    for side in options.sides:
        for mode in options.modes:
            one: dict[str, Any] = {"mode": mode, "side": side}
            try:
                if time.monotonic() > until:
                    raise TimeoutError("there was no time left")
                one["kernels"] = measure(mode, side, options.lr, device)
            except Exception as error:  # the other steps are measured all the same
                one["error"] = f"{type(error).__name__}: {error}"
            found.append(one)
            options.out.write_text(
                json.dumps({**facts, "rows": ROWS, "lr": options.lr, "steps": found}, indent=1) + "\n", "utf-8"
            )
    print(markdown(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
