"""Where the CUDA selection runs: built for the CPU wherever there is a C++ compiler, and on a GPU where there is one.

``target`` runs a test on both. The CPU build has 64 threads per block and not 512, which takes a fraction of the time.
"""

from __future__ import annotations

import ctypes
import platform
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from wsn_fast.backends.native import cuda_select
from wsn_fast.backends.native.cuda_select import WarmStart
from wsn_fast.backends.native.shared_library import NativeLibrary, open_file
from wsn_fast.reference import specification

CSRC = Path(__file__).parents[3] / "csrc"
CXX = next((path for path in map(shutil.which, ("c++", "g++", "clang++")) if path), None)


def emulation_flags(threads: int) -> list[str]:
    """Compiler flags for csrc/cuda on the CPU; skips the test where that cannot be built."""
    if CXX is None or platform.libc_ver()[0] != "glibc":
        pytest.skip("needs a C++ compiler and glibc, for its fibers")
    warnings = ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    include = [f"-I{CSRC / 'tests' / 'cuda_on_cpu'}", f"-I{CSRC / 'include'}"]
    defines = ["-DWSN_BUILDING", f"-DWSN_SELECT_THREADS={threads}"]
    return [CXX, "-std=c++17", "-g", *warnings, "-fno-strict-aliasing", "-pthread", *include, *defines]


def build_emulation(folder: Path, threads: int) -> NativeLibrary:
    """csrc/cuda as a library for the CPU."""
    out = folder / f"libwsn_cuda_on_cpu_{threads}.so"
    flags = ["-O2", "-shared", "-fPIC", "-fvisibility=hidden", "-x", "c++"]
    subprocess.run([*emulation_flags(threads), *flags, CSRC / "cuda" / "select.cu", "-o", out], check=True)
    library = open_file(out, cuda_select.INTERFACE)
    assert library.lib is not None, library.reason
    library.lib.cuda_on_cpu_launches.restype = ctypes.c_int64
    return library


@dataclass(frozen=True)
class Target:
    """A library and the device that it runs on."""

    library: NativeLibrary
    device: str

    def thresholds(
        self,
        scores: Sequence[Tensor],
        ranks: Sequence[int],
        rule: str,
        state: WarmStart | None = None,
        chunk: int = 1024,
    ) -> Tensor:
        """``native_cuda.thresholds``; on the CPU it is what that function calls after its checks."""
        if self.device == "cuda":
            return cuda_select.thresholds(scores, ranks, rule, state, chunk=chunk)
        cuda_select.check(scores, ranks, rule, state)
        assert self.library.lib is not None
        return cuda_select.launch(self.library.lib, scores, ranks, rule, state, chunk, 0)


@pytest.fixture(scope="session")
def emulation(tmp_path_factory: pytest.TempPathFactory) -> NativeLibrary:
    return build_emulation(tmp_path_factory.mktemp("cuda_on_cpu"), threads=64)


@pytest.fixture
def cpu(emulation: NativeLibrary, monkeypatch: pytest.MonkeyPatch) -> Target:
    """The CPU build alone, for what only it can tell."""
    monkeypatch.setattr(cuda_select, "load", lambda: emulation)
    return Target(emulation, "cpu")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def target(request: pytest.FixtureRequest) -> Iterator[Target]:
    if request.param == "cpu":
        yield request.getfixturevalue("cpu")
        return
    obstacle = cuda_select.obstacle(torch.device("cuda", torch.cuda.current_device()))
    if obstacle:
        pytest.skip(obstacle)
    yield Target(cuda_select.load(), "cuda")


def expected(scores: Tensor, rank: int, rule: str) -> Tensor:
    """The key of a rank, by sorting."""
    return specification.gate_key(scores.cpu(), rule).flatten().sort().values[rank]


def assert_thresholds(actual: Tensor, scores: Sequence[Tensor], ranks: Sequence[int], rule: str) -> None:
    """Equality of every threshold; any NaN is NaN, and zero is +0.0."""
    assert actual.dtype == scores[0].dtype and actual.shape == (len(scores),), f"{actual.dtype} {actual.shape}"
    for i, (tensor, rank, tau) in enumerate(zip(scores, ranks, actual.cpu(), strict=True)):
        wanted = expected(tensor, rank, rule)
        same = torch.equal(tau, wanted) or bool(tau.isnan() & wanted.isnan())
        assert same and not (tau == 0 and tau.signbit()), (
            f"tensor {i} of {tensor.numel()} elements, rank {rank}: got {tau.item()}, not {wanted.item()}"
        )
