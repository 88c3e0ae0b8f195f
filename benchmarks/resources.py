"""What every kernel takes of a GPU, with every tile that the tuner can choose, found by compiling: no GPU is needed.

``python -m benchmarks.resources`` prints a Markdown table, and fails if a kernel spills registers, uses local memory or
more shared memory than there is, or should have tensor-core instructions and has none. ``--help`` names the options.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import itertools
import multiprocessing
import os
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from wsn_fast.kernels._compile import CompileCase

ARCHS = (80, 90, 100)
# Most bytes of shared memory that a block can have: CUDA C++ Programming Guide, compute capabilities.
SHARED_LIMITS = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99}
KIB = 1024


class Row(NamedTuple):
    """One kernel in one form on one architecture.

    Attributes:
        name: of the kernel and the form.
        arch: 90 for sm_90.
        registers: 32-bit registers per thread.
        spills: bytes per thread that registers are spilled to.
        local: bytes of local memory per thread.
        shared: bytes of shared memory per block.
        tensor_core: tensor-core instructions; None where none are wanted.
        note: what else the reader should know.
    """

    name: str
    arch: int
    registers: int
    spills: int
    local: int
    shared: int
    tensor_core: int | None = None
    note: str = ""


def faults(row: Row) -> list[str]:
    """The rules that a row breaks."""
    limit = SHARED_LIMITS[row.arch] * KIB
    return [
        *([f"spills {row.spills} bytes of registers"] if row.spills else []),
        *([f"uses {row.local} bytes of local memory"] if row.local else []),
        *([f"uses {row.shared} bytes of shared memory, more than {limit}"] if row.shared > limit else []),
        *(["has no tensor-core instruction"] if row.tensor_core == 0 else []),
    ]


def markdown(rows: Iterable[Row]) -> str:
    """The rows as a table."""
    lines = ["| kernel | arch | registers | spills | local | shared | tensor core | note |"]
    lines.append("|---|" + "---:|" * 6 + "---|")
    for row in rows:
        cells = {**row._asdict(), "arch": f"sm_{row.arch}"}
        texts = ["" if cell is None else str(cell).replace("|", "\\|") for cell in cells.values()]
        lines.append(f"| {' | '.join(texts)} |")
    return "\n".join(lines)


@functools.cache
def _cases() -> dict[str, list[CompileCase]]:
    from wsn_fast.kernels._compile import all_cases

    return all_cases()


def compiled(kernel: str, index: int, arch: int, disassemble: bool) -> Row:
    """The row of case ``index`` of a kernel module, for any process: a case itself cannot be sent to another."""
    from wsn_fast.kernels._compile import compile_case

    case = _cases()[kernel][index]
    found = compile_case(case, arch, disassemble=disassemble)
    tensor_core = found.tensor_core if case.needs_tensor_core else None
    name = f"{kernel}: {case.name}"
    return Row(name, arch, found.registers, found.stack, found.local, found.shared, tensor_core, found.note)


def triton_rows(archs: Sequence[int], kernels: Sequence[str], jobs: int, disassemble: bool) -> list[Row]:
    """Compile the cases of the Triton kernels.

    Args:
        archs: 90 for sm_90.
        kernels: names of modules of ``wsn_fast.kernels``; none for all.
        jobs: how many processes to use.
        disassemble: whether to count tensor-core instructions in the machine code, not in the PTX.

    Raises:
        ValueError: for a kernel module that there is not.
    """
    if unknown := set(kernels) - _cases().keys():
        raise ValueError(f"kernels: expected some of {', '.join(_cases())}, got {', '.join(sorted(unknown))}")
    work = [
        (kernel, index, arch, disassemble)
        for kernel in kernels or _cases()
        for index, arch in itertools.product(range(len(_cases()[kernel])), archs)
    ]
    # Not forked: compilers have threads.
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(compiled, *zip(*work, strict=True), chunksize=4))


def nvcc_rows(archs: Sequence[int]) -> tuple[list[Row], str]:
    """Rows of the CUDA C++ kernels, or none and the reason."""
    try:
        from . import _nvcc
    except ImportError:
        return [], "no CUDA C++ kernels here"
    try:
        rows = _nvcc.rows(archs)
    except (OSError, RuntimeError) as error:
        return [], f"CUDA C++ kernels not compiled: {error}"
    missing = sorted(set(archs) - {row.arch for row in rows})
    return rows, f"CUDA C++ kernels not compiled for {missing}: nvcc does not know these" if missing else ""


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table, then on stderr what breaks a rule; return how many rows do, at most 1."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.resources", description=__doc__)
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHS, choices=sorted(SHARED_LIMITS), metavar="90")
    parser.add_argument("--kernel", nargs="+", default=(), help="modules of wsn_fast.kernels, such as matmul")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: %(default)s)")
    parser.add_argument("--ptx", action="store_true", help="count tensor-core instructions in the PTX: faster")
    options = parser.parse_args(arguments)
    if importlib.util.find_spec("triton") is None:
        parser.error("triton is not installed")
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET is set: the interpreter compiles nothing")
    rows = triton_rows(options.arch, options.kernel, options.jobs, not options.ptx)
    if not options.kernel:
        more, reason = nvcc_rows(options.arch)
        rows += more
        if reason:
            print(reason, file=sys.stderr)
    print(markdown(rows))
    broken = [f"{row.name} on sm_{row.arch} {fault}" for row in rows for fault in faults(row)]
    print(*broken, sep="\n", end="\n" if broken else "", file=sys.stderr)
    return min(len(broken), 1)


if __name__ == "__main__":
    sys.exit(main())
