"""Compiles every kernel with every tile that the tuner can choose, and tells which resources of a GPU each one uses. No
GPU is needed.

``python -m benchmarks.resources`` prints a Markdown table. It fails if a kernel spills registers, uses local memory or
more shared memory than there is, or should have tensor-core instructions and has none. ``--help`` names the options.
The tests compile the same cases: ``tests/support`` has them, in ``compile_cases``, and what compiles them.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import sys
from collections.abc import Sequence

from .provenance import ROOT
from .tables import table


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table, then on stderr what breaks a rule. Return 1 if any row does, else 0."""
    sys.path.append(str(ROOT / "tests" / "support"))
    measured = importlib.import_module("kernel_resources")
    parser = argparse.ArgumentParser(prog="python -m benchmarks.resources", description=__doc__)
    add = parser.add_argument
    generations = (80, 86, 89, 90, 100, 120)
    add("--arch", type=int, nargs="+", default=generations, choices=sorted(measured.SHARED_LIMITS), metavar="90")
    add("--kernel", nargs="+", default=(), help="modules of wsn_fast.kernels, such as masked_matmul")
    add("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: %(default)s)")
    add("--ptx", action="store_true", help="count tensor-core instructions in the PTX: faster")
    add("--every", type=int, default=1, metavar="N", help="compile every N-th case of a kernel (default: all)")
    add("--each", type=int, metavar="N", help="compile a case for N of the architectures, in turn (default: all)")
    options = parser.parse_args(arguments)
    if importlib.util.find_spec("triton") is None:
        parser.error("triton is not installed")
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET is set: the interpreter compiles nothing")
    part = measured.Part(options.every, options.each)
    rows = measured.triton_rows(options.arch, options.kernel, options.jobs, not options.ptx, part)
    cells = [["" if cell is None else str(cell) for cell in row._replace(arch=f"sm_{row.arch}")] for row in rows]
    columns = ("kernel", "arch", "registers", "spills", "local", "shared", "tensor core", "counted with", "note")
    print(*table(columns, cells, align=False), sep="\n")
    broken = [f"{row.name} on sm_{row.arch} {fault}" for row in rows for fault in measured.faults(row)]
    print(*broken, sep="\n", end="\n" if broken else "", file=sys.stderr)
    return min(len(broken), 1)


if __name__ == "__main__":
    sys.exit(main())
