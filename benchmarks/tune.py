"""``python -m benchmarks.tune`` measures tile sizes and crossovers of one GPU model: a file of ``kernels/tuning``.

Every candidate is checked before it is timed. What there was no time for is listed under
``not_measured``; :mod:`wsn_fast.backends.triton.tuning` reads the file and has a default for everything
that is not in it.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from .provenance import ROOT, provenance
from .shapes import LAYER, TINY, ConvShape
from .timing import Call, time_calls
from .tuner import BF16, FP16, IEEE, TF32, Sweep, Trials, tables

FACTS = ("device", "capability", "driver", "cuda", "torch", "triton", "commit", "dirty", "date")
FULL = Sweep(
    elementwise=LAYER,
    precisions=(BF16, TF32, FP16, IEEE),
    sizes=((4096, 4096), (1024, 1024), (4096, 16384), (16384, 4096), (512, 512)),
    rows=(1, 8, 16, 32, 64, 128, 256),
    grad_sizes=((4096, 4096), (1024, 1024)),
    grad_rows=(32, 64, 128, 256, 1024, 4096, 16384),
    tasks=8,
    task_sizes=((4096, 4096), (1024, 1024)),
    task_rows=(8, 16, 32, 64, 128, 256),
    convs=tuple(
        ConvShape(64, channels, size, outputs, 3, padding=1)
        for channels, size, outputs in ((64, 32, 128), (256, 16, 256), (64, 56, 64), (512, 7, 512))
    ),
)
DRY = Sweep(1000, (IEEE,), ((24, 40),), (5,), ((24, 40),), (70,), 2, ((24, 40),), (5,), TINY.conv_steps)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune", description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "kernels" / "tuning", help="folder of the file")
    parser.add_argument("--minutes", type=float, default=4.5, help="after which nothing new is begun")
    parser.add_argument("--dry", action="store_true", help="tiny shapes in Triton's interpreter: no measurement")
    options = parser.parse_args(arguments)
    if options.dry and options.out == ROOT / "kernels" / "tuning":
        parser.error("--dry measures nothing: give it another folder with --out")
    device = torch.device("cpu" if options.dry else "cuda")

    def clock(calls: Sequence[Call]) -> float:
        return time_calls(calls, device, seconds=0.0 if options.dry else 0.02).median_us

    trials = Trials(device, clock, time.monotonic() + 60 * options.minutes)
    facts, measured = provenance(device), tables(trials, DRY if options.dry else FULL)
    data = {name: facts.get(name) for name in FACTS} | measured | {"not_measured": trials.not_measured}
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"{'-'.join(str(data['device']).lower().split())}.json"
    path.write_text(json.dumps(data, indent=1) + "\n", "utf-8")
    names = ("linear", "linear_grad", "linear_tasks", "conv")
    print(f"{path.name}: {', '.join(f'{len(data[name])} {name}' for name in names)}")
    for line in trials.not_measured:
        print(f"not measured: {line}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
