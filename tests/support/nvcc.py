"""What nvcc says of csrc/cuda: registers, spills and shared memory of every kernel, for GPUs that need not be there."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from kernel_resources import Row

CSRC = Path(__file__).parents[2] / "csrc"
ARCHS = (80, 86, 89, 90, 100, 120)
"""The architectures that the library is built for."""

_DTYPES = {"2139095040": "float32", "32640": "bfloat16", "31744": "float16"}  # by the bits of infinity
_FORM = re.compile(r"(\w+?)_kernelI6FormatI[jt]Lj(\d+)EELb([01])E")
_REPORT = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for 'sm_(?P<arch>\d+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)


def find_nvcc() -> str | None:
    """The path of nvcc: on PATH, or under CUDA_HOME or CUDA_PATH; None without one."""
    return _tool("nvcc")


def known_archs(nvcc: str) -> set[int]:
    """The architectures that this nvcc can compile for."""
    return {int(arch) for arch in re.findall(r"sm_(\d+)\b", _run(nvcc, "--list-gpu-code"))}


def rows(archs: Sequence[int] = ARCHS) -> list[Row]:
    """Compile every kernel of csrc/cuda for each of ``archs`` that nvcc knows.

    Args:
        archs: capabilities, 90 for sm_90.

    Returns:
        A row per kernel, form and architecture.

    Raises:
        RuntimeError: there is no nvcc, or it fails; the message is its own.
    """
    return parse(_compile(tuple(archs)).report)


def machine_code(archs: Sequence[int] = ARCHS) -> dict[int, str]:
    """The disassembly of csrc/cuda for each of ``archs`` that nvcc knows; empty without a cuobjdump.

    Raises:
        RuntimeError: there is no nvcc, or it or cuobjdump fails; the message is its own.
    """
    parts = re.split(r"^arch = sm_(\d+)$", _compile(tuple(archs)).code, flags=re.MULTILINE)
    return {int(arch): code for arch, code in zip(parts[1::2], parts[2::2], strict=True)}


def parse(report: str) -> list[Row]:
    """The rows of what ``ptxas -v`` printed."""
    return [
        Row(
            name=_readable(match["name"]),
            arch=int(match["arch"]),
            registers=int(match["registers"]),
            spills=int(match["stores"]) + int(match["loads"]),
            local=int(match["stack"]),
            shared=sum(map(int, re.findall(r"(\d+) bytes smem", match["rest"]))),
        )
        for match in _REPORT.finditer(report)
    ]


class _Compiled(NamedTuple):
    report: str
    code: str


@functools.cache  # it takes seconds for each architecture
def _compile(archs: tuple[int, ...]) -> _Compiled:
    nvcc, disassembler = find_nvcc(), _tool("cuobjdump")
    if nvcc is None:
        raise RuntimeError("no nvcc on PATH or under CUDA_HOME or CUDA_PATH")
    wanted = sorted(set(archs) & known_archs(nvcc))
    flags = ["-std=c++17", "-O3", "-Xptxas=-v", f"-I{CSRC / 'include'}"]
    flags += [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in wanted]
    report = code = ""
    with tempfile.TemporaryDirectory() as folder:
        for source in sorted((CSRC / "cuda").glob("*.cu")) if wanted else ():
            fatbin = f"{folder}/{source.stem}.fatbin"
            report += _run(nvcc, *flags, "-fatbin", str(source), "-o", fatbin)
            code += _run(disassembler, "-sass", fatbin) if disassembler else ""
    return _Compiled(report, code)


def _tool(name: str) -> str | None:
    """One of CUDA's programs: on PATH, where a variable says that CUDA is, or among those in Triton's wheel."""
    folders = [Path(os.environ[home], "bin") for home in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(home)]
    triton = importlib.util.find_spec("triton")
    for root in (triton.submodule_search_locations if triton else None) or []:
        folders.append(Path(root, "backends", "nvidia", "bin"))
    found = (shutil.which(name, path=str(folder)) for folder in folders)
    return shutil.which(name) or next(filter(None, found), None)


def _readable(mangled: str) -> str:
    """``select float32 |S|`` for an instance of the selection, else the mangled name."""
    form = _FORM.search(mangled)
    if form is None:
        return mangled
    kernel, infinity, magnitude = form.groups()
    name = re.sub(r".*\d", "", kernel)
    return f"{name} {_DTYPES.get(infinity, infinity)} {'|S|' if magnitude == '1' else 'S'}"


def _run(*command: str) -> str:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{command[0]}: {result.stderr.strip()}")
    return result.stdout + result.stderr
