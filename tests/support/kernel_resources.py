"""Which resources of a GPU each kernel uses, and which of these break a rule. No GPU is needed: compilers tell it."""

from __future__ import annotations

import functools
import importlib
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
        most_shared: the bytes of shared memory that the library counts with; None where it does not ask.
        note: what else the reader should know.
    """

    name: str
    arch: int
    registers: int
    spills: int
    local: int
    shared: int
    tensor_core: int | None = None
    most_shared: int | None = None
    note: str = ""


def faults(row: Row) -> list[str]:
    """The rules that a row breaks."""
    limit = SHARED_LIMITS[row.arch] * KIB
    return [
        *([f"spills {row.spills} bytes of registers"] if row.spills else []),
        *([f"uses {row.local} bytes of local memory"] if row.local else []),
        *([f"uses {row.shared} bytes of shared memory, more than {limit}"] if row.shared > limit else []),
        *(
            [f"uses {row.shared} bytes of shared memory, where the library counts with {row.most_shared}"]
            if row.most_shared is not None and row.shared > row.most_shared
            else []
        ),
        *(["has no tensor-core instruction"] if row.tensor_core == 0 else []),
    ]


@functools.cache
def _cases() -> dict[str, list[CompileCase]]:
    return importlib.import_module("compile_cases").all_cases()


def _compiled(kernel: str, index: int, arch: int, disassemble: bool) -> Row:
    """The row of case ``index`` of a kernel module. Any process can compute it; a case itself cannot be sent to one."""
    row = importlib.import_module("compiling").compile_case(_cases()[kernel][index], arch, disassemble=disassemble)
    return row._replace(name=f"{kernel}: {row.name}")


class Part(NamedTuple):
    """A part of what can be compiled: every n-th case of a kernel (``every``), for ``each`` architectures in turn."""

    every: int = 1
    each: int | None = None


EVERYTHING = Part()


def chosen(cases: Sequence[CompileCase], archs: Sequence[int], part: Part) -> list[tuple[int, int]]:
    """The cases of a module to compile: pairs of an index into ``cases`` and an architecture. Every kernel has one, and
    none has a tile that the library cannot choose on that architecture."""
    by_kernel: dict[str, list[int]] = {}
    for index, case in enumerate(cases):
        by_kernel.setdefault(case.fn.__name__, []).append(index)
    each = part.each or len(archs)
    pairs = []
    for indices in by_kernel.values():
        for place, index in enumerate(indices[:: part.every], start=len(pairs)):
            possible = [arch for arch in archs if cases[index].can_be_chosen(arch)]
            count = min(each, len(possible))
            pairs += [(index, possible[(place + i * len(possible) // count) % len(possible)]) for i in range(count)]
    return sorted(pairs)


def triton_rows(
    archs: Sequence[int], kernels: Sequence[str], jobs: int, disassemble: bool, part: Part = EVERYTHING
) -> list[Row]:
    """Compile the cases of the Triton kernels.

    Args:
        archs: 90 for sm_90.
        kernels: names of modules of ``wsn_fast.kernels``; none for all.
        jobs: how many processes to use.
        disassemble: whether to count tensor-core instructions in the machine code, not in the PTX.
        part: which of the cases.

    Raises:
        ValueError: there is no kernel module of this name.
    """
    if unknown := set(kernels) - _cases().keys():
        raise ValueError(f"kernels: expected some of {', '.join(_cases())}, got {', '.join(sorted(unknown))}")
    pairs = [(kernel, *pair) for kernel in kernels or _cases() for pair in chosen(_cases()[kernel], archs, part)]
    work = [(kernel, index, arch, disassemble) for kernel, index, arch in pairs]
    # Not forked: compilers have threads.
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(_compiled, *zip(*work, strict=True), chunksize=4))
