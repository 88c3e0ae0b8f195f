"""The CUDA library's C ABI from C, its bindings, and every way in which it can be missing."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from wsn_fast.backends.native import cuda_select, shared_library
from wsn_fast.backends.native.cuda_select import WarmStart
from wsn_fast.backends.native.shared_library import NativeLibrary, open_file

from .conftest import CSRC, CXX, Target

CC = shutil.which("cc")
FILE = cuda_select.INTERFACE.file.name


def test_abi_from_c(cpu: Target, tmp_path: Path) -> None:
    if CC is None:
        pytest.skip("needs a C compiler")
    assert cpu.library.lib is not None
    library, program = Path(cpu.library.lib._name), tmp_path / "abi_test"
    flags = ["-std=c99", "-Wall", "-Wextra", "-Wpedantic", "-Werror", f"-I{CSRC / 'include'}"]
    link = [library, f"-Wl,-rpath,{library.parent}", "-o", program]
    subprocess.run([CC, *flags, CSRC / "tests" / "cuda_on_cpu" / "abi_test.c", *link], check=True)
    result = subprocess.run([program], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


SCORES = torch.zeros(4)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: cuda_select.thresholds([], [], "value"), ValueError, "at least 1, got 0 and 0"),
        (lambda: cuda_select.thresholds([SCORES], [0, 1], "value"), ValueError, "same length, at least 1, got 1 and 2"),
        (lambda: cuda_select.thresholds([SCORES], [0], "size"), ValueError, "rule must be one of .* got 'size'"),
        (lambda: cuda_select.thresholds([[1.0]], [0], "value"), TypeError, r"scores\[0\] must be a tensor, got list"),
        (lambda: cuda_select.thresholds([SCORES.double()], [0], "value"), TypeError, "got torch.float64"),
        (
            lambda: cuda_select.thresholds([SCORES, SCORES.half()], [0, 0], "value"),
            TypeError,
            r"scores\[1\]: expected torch.float32, got torch.float16",
        ),
        (lambda: cuda_select.thresholds([SCORES[::2]], [0], "value"), ValueError, r"contiguous .* strides \(2,\)"),
        (lambda: cuda_select.thresholds([SCORES], [4], "value"), ValueError, r"ranks\[0\]: .* got 4 for 4"),
        (lambda: cuda_select.thresholds([SCORES], [-1], "value"), ValueError, r"ranks\[0\]: .* got -1 for 4"),
        (lambda: cuda_select.thresholds([SCORES[:0]], [0], "value"), ValueError, r"ranks\[0\]: .* got 0 for 0"),
        (lambda: cuda_select.thresholds([SCORES], [0], "value"), ValueError, "must be on a CUDA device, got cpu"),
        (
            lambda: cuda_select.thresholds([SCORES, SCORES.to("meta")], [0, 0], "value"),
            ValueError,
            r"scores\[1\]: expected a contiguous tensor on cpu, got .* on meta",
        ),
        (lambda: WarmStart(0, "cpu"), ValueError, "count must be at least 1, got 0"),
    ],
)
def test_bad_input_is_refused(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_state_of_other_tensors_is_refused(cpu: Target) -> None:
    with pytest.raises(ValueError, match="expected one of 1 tensors on cpu, got 2 on cpu"):
        cpu.thresholds([SCORES], [0], "value", WarmStart(2, "cpu"))


def test_bad_chunk_is_refused(cpu: Target) -> None:
    with pytest.raises(RuntimeError, match="chunk is not a multiple of 1024"):
        cpu.thresholds([SCORES], [0], "value", chunk=1000)


def test_missing_library_is_named_at_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_select, "load", lambda: NativeLibrary(None, "it was not built"))
    with pytest.raises(RuntimeError, match="it was not built"):
        WarmStart(1, "cpu")


def test_absent_library_is_a_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(shared_library, "package_roots", lambda: iter([tmp_path]))
    library = cuda_select.load.__wrapped__()
    assert library.lib is None
    assert "not installed" in library.reason


def test_first_library_that_loads_is_taken(
    cpu: Target, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, emulation: NativeLibrary
) -> None:
    monkeypatch.undo()
    assert emulation.lib is not None
    roots = [tmp_path / "broken", tmp_path / "good"]
    for root in roots:
        (root / cuda_select.INTERFACE.file).parent.mkdir(parents=True)
    (roots[0] / cuda_select.INTERFACE.file).write_bytes(b"broken")
    shutil.copy(emulation.lib._name, roots[1] / cuda_select.INTERFACE.file)
    monkeypatch.setattr(shared_library, "package_roots", lambda: iter(roots))
    assert str(roots[1]) in cuda_select.load.__wrapped__().reason


def test_foreign_file_is_a_reason(tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(b"not a library of this platform")
    library = open_file(tmp_path / FILE, cuda_select.INTERFACE)
    assert library.lib is None
    assert "cannot be loaded" in library.reason


@pytest.mark.skipif(CXX is None or sys.platform == "win32", reason="needs a C++ compiler")
@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ('extern "C" int wsn_cuda_abi_version() { return 999; }', "ABI version 999, this package needs"),
        (
            f'extern "C" int wsn_cuda_abi_version() {{ return {cuda_select.INTERFACE.abi_version}; }}',
            "lacks a function",
        ),
        ("int something_else() { return 1; }", "lacks a function"),
    ],
)
def test_unfit_library_is_a_reason(tmp_path: Path, source: str, reason: str) -> None:
    (tmp_path / "unfit.cpp").write_text(source)
    subprocess.run([CXX, "-shared", "-fPIC", tmp_path / "unfit.cpp", "-o", tmp_path / FILE], check=True)
    library = open_file(tmp_path / FILE, cuda_select.INTERFACE)
    assert library.lib is None
    assert reason in library.reason


def test_no_gpu_is_an_obstacle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cuda_select.obstacle.__wrapped__(torch.device("cuda", 0)) == "torch finds no NVIDIA GPU"


def test_another_device_is_an_obstacle() -> None:
    assert "not on cpu" in cuda_select.obstacle(torch.device("cpu"))


@pytest.mark.parametrize(
    ("sizes", "chunk"),
    [([1], 65536), ([65536, 10], 65536), ([65537], 4096), ([2**24], 32768), ([2**22, 100], 8192), ([2**40], 32768)],
)
def test_default_chunk(sizes: list[int], chunk: int) -> None:
    """On a GPU of 132 multiprocessors."""
    assert cuda_select.default_chunk(sizes, 132) == chunk
