"""The peak memory of a training step, in bytes per gated weight: by the allocator on a GPU, by the kernel on Linux.

On a GPU it is ``torch.cuda.max_memory_allocated``. On a CPU a process of its own makes the competitor, trains a few
steps and drops it, so that all code and all threads are there; then it does the same again, and the peak of its
resident memory is read from the kernel (``VmHWM``, reset before): whoever allocates is seen, native libraries too.
glibc is told to take every block above 64 KiB from the kernel and to give it back at once, so that pages are counted
while they are in use and not longer; what is left is exact to about a MiB, hence the least size.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from wsn_fast.doctor.measuring.competitors import Competitor
from wsn_fast.doctor.measuring.peak_memory import train
from wsn_fast.doctor.measuring.shapes import LinearShape

from .ours import COMPETITORS
from .problem import Problem
from .provenance import ROOT

NOTE = "peak bytes per weight"
LEAST_WEIGHTS = 1 << 22
"""Below this a layer is not measured on a CPU: pages and small blocks would be seen beside it."""
_ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(64 << 10), "MALLOC_TRIM_THRESHOLD_": "0"}
_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def on_cpu(kind: type[Competitor], shape: object) -> dict[str, float]:
    """The same on a CPU; none for small layers and nets, where the kernel cannot reset a peak, or under
    ``torch.compile``, whose compiler allocates in the same process."""
    large = isinstance(shape, LinearShape) and shape.outputs * shape.inputs >= LEAST_WEIGHTS
    if not large or kind.compiled or not os.access(_RESET, os.W_OK):
        return {}
    sizes = [str(size) for size in (shape.outputs, shape.inputs, shape.rows)]
    command = [sys.executable, "-m", "benchmarks.memory", kind.name, *sizes, str(torch.get_num_threads())]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **_ALLOCATOR}, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the process that measures memory: {done.stderr.strip()[-400:]}")
    return {NOTE: json.loads(done.stdout)}


def _resident(what: str) -> int:
    """Bytes by the kernel: ``VmRSS`` now, ``VmHWM`` at most."""
    lines = _STATUS.read_text("utf-8").splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{what}:"))


def main(arguments: Sequence[str] | None = None) -> int:
    """Competitor, outputs, inputs, rows, threads; prints bytes per weight, or null for small layers."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__)
    parser.add_argument("competitor", choices=[kind.name for kind in COMPETITORS])
    for name in ("outputs", "inputs", "rows", "threads"):
        parser.add_argument(name, type=int)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    kind = next(kind for kind in COMPETITORS if kind.name == options.competitor)
    shape = LinearShape(options.outputs, options.inputs, options.rows)
    if not os.environ.keys() >= _ALLOCATOR.keys():  # glibc reads them when a process starts
        print(json.dumps(on_cpu(kind, shape).get(NOTE)))
        return 0
    problem = Problem(shape, torch.device("cpu"))
    train(kind, problem)
    gc.collect()
    before = _resident("VmRSS")
    _RESET.write_text("5", "ascii")
    train(kind, problem)
    print(json.dumps((_resident("VmHWM") - before) / problem.numel))
    return 0


if __name__ == "__main__":
    sys.exit(main())
