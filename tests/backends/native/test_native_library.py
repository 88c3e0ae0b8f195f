"""The native library itself: its C tests, how it is found, and every way in which it can be missing."""

from __future__ import annotations

import ctypes
import multiprocessing
import platform
import re
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
import torch

from wsn_fast.backends import native
from wsn_fast.backends import torch as portable
from wsn_fast.backends.native import binding, shared_library
from wsn_fast.backends.native.shared_library import ABI_VERSION, FILE, SIGNATURES, NativeLibrary, open_file


@pytest.mark.parametrize("program", ["abi_test", "sizes_test", "threads_test"])
def test_c_tests(build_folder: Path, program: str) -> None:
    result = subprocess.run([build_folder / "csrc" / "tests" / program], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_only_the_abi_is_exported(library_file: Path) -> None:
    if shutil.which("nm") is None:
        pytest.skip("needs nm")
    listed = subprocess.run(["nm", "-D", "--defined-only", library_file], capture_output=True, text=True, check=True)
    names = {line.split()[2] for line in listed.stdout.splitlines() if line.split()[1] == "T"}
    own = {"wsn_abi_version", "wsn_error_message", "wsn_limit_instructions"}
    assert names - {"_init", "_fini"} == SIGNATURES.keys() | own


def test_missing_library_is_named_at_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (native, binding):
        monkeypatch.setattr(module, "load", lambda: NativeLibrary(None, "it was not built"))
    with pytest.raises(RuntimeError, match="it was not built"):
        native.pack(torch.ones(3, dtype=torch.bool))


@pytest.mark.usefixtures("library")
def test_error_code_becomes_its_message() -> None:
    with pytest.raises(RuntimeError, match="wsn_pack_bits: a size is negative"):
        binding.call("wsn_pack_bits", None, -1, None)


def test_absent_library_is_a_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(shared_library, "package_roots", lambda: iter([tmp_path]))
    library = shared_library.load.__wrapped__()
    assert library.lib is None
    assert "not installed" in library.reason


def test_foreign_file_is_a_reason(tmp_path: Path) -> None:
    path = tmp_path / "libwsn_cpu.so"
    path.write_bytes(b"not a library of this platform")
    library = open_file(path)
    assert library.lib is None
    assert "cannot be loaded" in library.reason


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("int wsn_abi_version(void) { return 999; }", f"ABI version 999, this package needs {ABI_VERSION}"),
        (f"int wsn_abi_version(void) {{ return {ABI_VERSION}; }}", "lacks a function"),
        ("int something_else(void) { return 1; }", "lacks a function"),
    ],
    ids=["another version", "functions missing", "another library"],
)
def test_unfit_library_is_a_reason(tmp_path: Path, source: str, reason: str) -> None:
    if shutil.which("cc") is None:
        pytest.skip("needs the compiler cc")
    (tmp_path / "unfit.c").write_text(source)
    built = tmp_path / "unfit.so"
    subprocess.run(["cc", "-shared", "-fPIC", tmp_path / "unfit.c", "-o", built], check=True)
    library = open_file(built)
    assert library.lib is None
    assert reason in library.reason


def test_first_library_that_loads_is_taken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, library_file: Path) -> None:
    roots = [tmp_path / "broken", tmp_path / "good"]
    for root in roots:
        (root / FILE).parent.mkdir(parents=True)
    (roots[0] / FILE).write_bytes(b"broken")
    shutil.copy(library_file, roots[1] / FILE)
    monkeypatch.setattr(shared_library, "package_roots", lambda: iter(roots))
    assert str(roots[1]) in shared_library.load.__wrapped__().reason


def test_installed_library_is_found() -> None:
    try:
        root = distribution("wsn-fast").locate_file("wsn_fast")
    except PackageNotFoundError:
        pytest.skip("wsn-fast is not installed")
    if not Path(str(root), FILE).is_file():
        pytest.skip("wsn-fast is installed without its native library")
    assert shared_library.load().lib is not None, shared_library.load().reason


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize(
    ("operation", "dtype", "reason"),
    [
        ("threshold", torch.bfloat16, None),
        ("restore_frozen", torch.int64, None),
        ("pack", None, None),
        ("threshold", torch.int32, "no torch.int32"),
        ("restore_frozen", torch.complex128, "no torch.complex128"),
        ("adamw_step", torch.float64, None),
        ("sgd_step", torch.bfloat16, "no torch.bfloat16"),
        ("masked_linear", torch.float32, "no masked_linear"),
    ],
)
def test_supports(operation: str, dtype: torch.dtype | None, reason: str | None) -> None:
    answer = native.supports(operation, dtype)
    assert (answer is None) if reason is None else (reason in str(answer))


def test_supports_nothing_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (native, binding):
        monkeypatch.setattr(module, "load", lambda: NativeLibrary(None, "it was not built"))
    assert native.supports("threshold", torch.float32) == "it was not built"


def test_operations_are_primitives_of_the_portable_backend() -> None:
    assert {name for name in native.OPERATIONS if callable(getattr(portable, name, None))} == native.OPERATIONS


def _threshold_in_child(scores: torch.Tensor, connection: object) -> None:
    torch.set_num_threads(4)
    connection.send(native.threshold(scores, 500_000, "value").item())  # type: ignore[attr-defined]


COUNTED = """
import os, pathlib, sys, torch
from wsn_fast.backends import native
from wsn_fast.backends.native import binding, shared_library
library = shared_library.open_file(pathlib.Path(sys.argv[1]))
for module in (native, binding):
    module.load = lambda: library
torch.set_num_threads(int(sys.argv[2]))
scores = torch.randn(int(sys.argv[3]))
(scores + scores).sum()  # PyTorch's team has its threads now
before = len(os.listdir("/proc/self/task"))
native.threshold(scores, 1_500_000, "value")
print(len(os.listdir("/proc/self/task")) - before)
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="counts the threads of Linux")
@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "GOMP_parallel"), reason="PyTorch brought no GNU OpenMP")
@pytest.mark.parametrize(
    ("threads", "size", "most"),
    [(3, 3_000_000, 0), (80, 30_000_000, 8)],  # a small part of a search is no work for 80 threads
)
def test_the_threads_are_those_of_pytorch(library_file: Path, threads: int, size: int, most: int) -> None:
    command = [sys.executable, "-c", COUNTED, str(library_file), str(threads), str(size)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert 0 <= int(done.stdout) <= most


@pytest.mark.usefixtures("library")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
@pytest.mark.parametrize("team", [False, True], ids=["pool", "PyTorch's team"])
def test_a_forked_child_has_threads_of_its_own(team: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if "fork" not in multiprocessing.get_all_start_methods():
        pytest.skip("needs fork")
    scores, before = torch.randn(1_000_001), torch.get_num_threads()
    torch.set_num_threads(4 if team else 1)  # four threads are no team of PyTorch's if it uses one
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    expected = native.threshold(scores, 500_000, "value").item()
    torch.set_num_threads(before)
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)
    child = context.Process(target=_threshold_in_child, args=(scores, send))
    child.start()
    child.join(60)
    child.kill()
    assert receive.poll() and receive.recv() == expected


DISASSEMBLED = [
    pytest.mark.skipif(shutil.which("objdump") is None, reason="objdump shows the instructions, and is not here"),
    pytest.mark.skipif(platform.machine().lower() not in ("x86_64", "amd64"), reason="these are those of x86-64"),
]


@pytest.fixture(scope="session")
def machine_code(library_file: Path) -> str:
    disassemble = ["objdump", "-d", "--no-show-raw-insn", str(library_file)]
    return subprocess.run(disassemble, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("register", [pytest.param(name, marks=DISASSEMBLED) for name in ("ymm", "zmm")])
def test_the_loops_of_adamw_are_vectorised(register: str, machine_code: str) -> None:
    """A compiler that gives up on one of them leaves results as they are, and makes steps five times slower. Each loop
    has one root of each mean; there are loops for two kinds of gradients, with a union and without, and more."""
    assert len(re.findall(rf"vsqrtps\s.*%{register}", machine_code)) >= 12


@pytest.mark.parametrize(
    ("instruction", "register"),
    [
        pytest.param(*names, marks=DISASSEMBLED, id=" ".join(names))
        for names in (("vpsrlvd", "ymm"), ("vpsllw", "ymm"), ("vpsrlvd", "zmm"), ("vptestmw", "zmm"))
    ],
)
def test_the_loops_of_the_8_bit_code_are_vectorised(instruction: str, register: str, machine_code: str) -> None:
    """To encode takes two shifts by as many bits as an element says (``vpsrlvd``). To decode, AVX-512 looks up words in
    pairs of registers, between which bits of the code choose (``vptestmw``), and AVX2 shifts words by 3 to 6 bits
    (``vpsllw``). Both for two kinds of means."""
    operands = r"\s+\$0x[3-6],.*" if instruction == "vpsllw" else r"\s.*"
    assert len(re.findall(rf"{instruction}{operands}%{register}", machine_code)) >= 4
