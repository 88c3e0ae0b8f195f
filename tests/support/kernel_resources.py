"""Which resources of a GPU each kernel uses, and which of these break a rule. No GPU is needed: compilers tell it."""

from __future__ import annotations

import functools
import importlib
import itertools
import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from compiling import CompileCase

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


@functools.cache
def _cases() -> dict[str, list[CompileCase]]:
    return importlib.import_module("compile_cases").all_cases()


def _compiled(kernel: str, index: int, arch: int, disassemble: bool) -> Row:
    """The row of case ``index`` of a kernel module. Any process can compute it; a case itself cannot be sent to one."""
    row = importlib.import_module("compiling").compile_case(_cases()[kernel][index], arch, disassemble=disassemble)
    return row._replace(name=f"{kernel}: {row.name}")


def triton_rows(archs: Sequence[int], kernels: Sequence[str], jobs: int, disassemble: bool, third: bool) -> list[Row]:
    """Compile the cases of the Triton kernels.

    Args:
        archs: 90 for sm_90.
        kernels: names of modules of ``wsn_fast.kernels``; none for all.
        jobs: how many processes to use.
        disassemble: whether to count tensor-core instructions in the machine code, not in the PTX.
        third: whether to compile only a representative third of the cases.

    Raises:
        ValueError: there is no kernel module of this name.
    """
    if unknown := set(kernels) - _cases().keys():
        raise ValueError(f"kernels: expected some of {', '.join(_cases())}, got {', '.join(sorted(unknown))}")
    representative = importlib.import_module("compile_cases").representative
    work = []
    for kernel in kernels or _cases():
        cases = _cases()[kernel]
        chosen = representative(cases, archs) if third else itertools.product(range(len(cases)), archs)
        work += [(kernel, index, arch, disassemble) for index, arch in chosen]
    # Not forked: compilers have threads.
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(_compiled, *zip(*work, strict=True), chunksize=4))
