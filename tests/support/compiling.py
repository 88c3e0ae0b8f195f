"""Compiles Triton kernels for GPUs that need not be there, and tells which resources the machine code uses.

Machine code tells what the source cannot: whether there were enough registers, and whether a product uses tensor cores.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import triton
from kernel_resources import KIB, SHARED_LIMITS, Row
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from wsn_fast.kernels._elementwise import FP_FUSION

# An instruction as nvdisasm prints it: its address in a comment, perhaps a predicate, its name up to the first dot.
INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][A-Z0-9]*)")
# By the first digits of the capability, as machine code spells them and as PTX does. On sm_100 Triton takes the
# instruction of sm_80 for tiles that do not suit the newer one.
TENSOR_CORE = {
    8: (("HMMA",), ("mma.sync",)),
    9: (("HGMMA",), ("wgmma.mma_async",)),
    10: (("UTCHMMA", "UTCQMMA", "HMMA"), ("tcgen05.mma", "mma.sync")),
    12: (("HMMA",), ("mma.sync",)),
}


class CompileCase(NamedTuple):
    """One kernel with one choice of types, constants and options.

    Attributes:
        name: what reports and tests call it.
        fn: the ``@triton.jit`` function.
        signature: argument name to Triton type ("*bf16", "i64"), for every argument that is not a constexpr.
        constexprs: constexpr name to value.
        attrs: argument name to the power of two that divides it (a pointer: its address).
        num_warps: warps per program.
        num_stages: stages of the software pipeline.
        needs_tensor_core: whether the machine code must hold a tensor-core instruction.
        most_shared: how many bytes of shared memory the library counts with when it chooses a tile, by how many there
            are; None where it has no choice.
        maxnreg: how many registers a thread may use, if the launch says it; None for as many as the compiler likes.
    """

    name: str
    fn: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    attrs: Mapping[str, int] = {}
    num_warps: int = 4
    num_stages: int = 3
    needs_tensor_core: bool = False
    most_shared: Callable[[int], int] | None = None
    maxnreg: int | None = None

    def can_be_chosen(self, capability: int) -> bool:
        """Whether the library can launch it on such a GPU: not where shared memory is too small for the tile."""
        counted = self.counted(capability)
        return counted is None or counted <= SHARED_LIMITS[capability] * KIB

    def counted(self, capability: int) -> int | None:
        """How many bytes of shared memory the library counts with on such a GPU."""
        return None if self.most_shared is None else self.most_shared(SHARED_LIMITS[capability] * KIB)


def compile_kernel(case: CompileCase, capability: int) -> Any:
    """Compile for a GPU of this capability, 90 for sm_90, that need not be there. Not in Triton's interpreter, where
    kernels are plain Python. Returns Triton's compiled kernel; ``asm`` has its forms."""
    names = case.fn.arg_names
    source = ASTSource(
        fn=case.fn,
        signature={name: "constexpr" if name in case.constexprs else case.signature[name] for name in names},
        constexprs={(names.index(name),): value for name, value in case.constexprs.items()},
        attrs={(names.index(name),): [["tt.divisibility", divisor]] for name, divisor in case.attrs.items()},
    )
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages, "maxnreg": case.maxnreg, **FP_FUSION}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def compile_case(case: CompileCase, capability: int, *, disassemble: bool = True) -> Row:
    """Compile, and find out what the kernel takes.

    Args:
        case: what to compile.
        capability: as for :func:`compile_kernel`.
        disassemble: whether to count tensor-core instructions in the machine code, where there is a disassembler, and
            not in the PTX. Each of the PTX becomes one of the machine code.

    Returns:
        What the kernel takes; ``note`` says how instructions were counted, if not in the machine code.
    """
    kernel = compile_kernel(case, capability)
    cubin = kernel.asm["cubin"]
    registers, spills, local = usage(cubin)
    tensor_core, note = None, ""
    if case.needs_tensor_core:  # else not worth the time
        in_machine_code, in_ptx = TENSOR_CORE[capability // 10]
        if disassemble and find_disassembler():
            instructions = INSTRUCTION.findall(disassembly(cubin))
            tensor_core = sum(map(instructions.count, in_machine_code))
        else:
            tensor_core, note = sum(map(kernel.asm["ptx"].count, in_ptx)), "counted in the PTX"
    found = (registers, spills, local, kernel.metadata.shared)
    return Row(case.name, capability, *found, tensor_core, case.counted(capability), note)


def usage(cubin: bytes) -> tuple[int, int, int]:
    """Of a compiled kernel, for a thread: its registers, the bytes that it spills, the bytes of local memory."""
    told = _run_on(cubin, knobs.nvidia.cuobjdump.path, "-res-usage")
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", told)
    assert found is not None, told
    registers, spills, local = map(int, found.groups())  # what is spilled lies in the stack frame
    return registers, spills, local


def disassembly(cubin: bytes) -> str:
    """The machine code of a compiled kernel, as nvdisasm prints it."""
    return _run_on(cubin, knobs.nvidia.nvdisasm.path, "-c", "-ndf")


def find_disassembler() -> str | None:
    """Where nvdisasm is. Triton comes with it, but need not."""
    try:
        return knobs.nvidia.nvdisasm.path
    except RuntimeError:
        return None


def _run_on(cubin: bytes, *command: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([*command, file.name], capture_output=True, text=True, check=True).stdout


class NoGpu:
    """As much of a driver as Triton needs to compile a kernel for a launch that does not follow."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0
