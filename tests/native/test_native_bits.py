"""The native library: its C ABI from C, its bindings, and every way in which it can be missing."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
import torch

from wsn_fast.backends import native
from wsn_fast.backends import torch as portable

CSRC = Path(__file__).parents[2] / "csrc"
CXX, CC = shutil.which("c++"), shutil.which("cc")
SIZES = [0, 1, 7, 8, 9, 63, 64, 65, 1000, 2**20 + 5]  # the last one is large enough for threads

needs_compiler = pytest.mark.skipif(
    CXX is None or CC is None or sys.platform == "win32", reason="needs the compilers cc and c++"
)


def compile_library(source: Path, out: Path) -> Path:
    flags = [
        "-std=c++17",
        "-O2",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-shared",
        "-fPIC",
        "-pthread",
        "-DWSN_BUILDING",
    ]
    subprocess.run([CXX, *flags, f"-I{CSRC / 'include'}", source, "-o", out], check=True)
    return out


@pytest.fixture(scope="module")
def library_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_library(CSRC / "cpu" / "bits.cpp", tmp_path_factory.mktemp("native") / "libwsn_cpu.so")


@pytest.fixture
def library(library_file: Path, monkeypatch: pytest.MonkeyPatch) -> native.NativeLibrary:
    """The bindings run on the library just compiled, whatever is installed."""
    opened = native.open_library(library_file)
    monkeypatch.setattr(native, "load", lambda: opened)
    return opened


@pytest.fixture(params=[1, 4])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def random_mask(n: int) -> torch.Tensor:
    return torch.rand(n) < 0.3


@needs_compiler
def test_abi_from_c(library_file: Path, tmp_path: Path) -> None:
    program = tmp_path / "abi_test"
    flags = ["-std=c99", "-Wall", "-Wextra", "-Wpedantic", "-Werror", f"-I{CSRC / 'include'}"]
    link = [library_file, f"-Wl,-rpath,{library_file.parent}", "-o", program]
    subprocess.run([CC, *flags, CSRC / "tests" / "abi_test.c", *link], check=True)
    result = subprocess.run([program], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


@needs_compiler
@pytest.mark.usefixtures("library", "threads")
class TestAgainstTorch:
    """The portable backend is the oracle; equality is bitwise."""

    @pytest.mark.parametrize("n", SIZES)
    def test_pack(self, n: int) -> None:
        mask = random_mask(n)
        assert torch.equal(native.pack(mask), portable.pack(mask))

    @pytest.mark.parametrize("n", SIZES)
    def test_unpack(self, n: int) -> None:
        mask = random_mask(n)
        assert torch.equal(native.unpack(portable.pack(mask), n), mask)

    @pytest.mark.parametrize("n", SIZES)
    def test_popcount(self, n: int) -> None:
        mask = random_mask(n)
        count = native.popcount(portable.pack(mask))
        assert (count.dtype, count.shape, count.item()) == (torch.int64, (), mask.sum().item())

    @pytest.mark.parametrize("n", SIZES)
    def test_or(self, n: int) -> None:
        first, second = random_mask(n), random_mask(n)
        dst = portable.pack(first)
        native.or_(dst, portable.pack(second))
        assert torch.equal(dst, portable.pack(first | second))

    def test_every_byte(self) -> None:
        every = torch.arange(256, dtype=torch.uint8)
        mask = native.unpack(every, 2048)
        assert torch.equal(mask, portable.unpack(every, 2048))
        assert torch.equal(native.pack(mask), every)


@needs_compiler
@pytest.mark.usefixtures("library")
def test_strided_input_is_read_in_row_major_order() -> None:
    mask = random_mask(35).view(5, 7)
    assert torch.equal(native.pack(mask.t()), portable.pack(mask.t().contiguous()))


@needs_compiler
@pytest.mark.usefixtures("library")
def test_or_with_itself_changes_nothing() -> None:
    packed = portable.pack(random_mask(99))
    before = packed.clone()
    native.or_(packed, packed)
    assert torch.equal(packed, before)


BYTES = torch.zeros(4, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: native.pack(BYTES), TypeError, "mask must be a torch.bool tensor, got torch.uint8"),
        (lambda: native.pack([True]), TypeError, "mask must be a torch.bool tensor, got list"),
        (
            lambda: native.pack(torch.ones(3, dtype=torch.bool, device="meta")),
            ValueError,
            "mask .* CPU, got meta",
        ),
        (lambda: native.unpack(BYTES.int(), 32), TypeError, "packed must be a torch.uint8 tensor"),
        (lambda: native.unpack(BYTES, 33), ValueError, "packed must have 5 bytes for 33 elements, got 4"),
        (lambda: native.unpack(BYTES, -1), ValueError, "n must not be negative, got -1"),
        (lambda: native.popcount(BYTES.bool()), TypeError, "packed must be a torch.uint8 tensor"),
        (lambda: native.or_(BYTES[::2], BYTES[:2]), ValueError, "dst must be contiguous"),
        (
            lambda: native.or_(BYTES, BYTES[:2]),
            ValueError,
            r"src must have the shape \(4,\) of dst, got \(2,\)",
        ),
    ],
)
def test_bad_input_is_refused(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_missing_library_is_named_at_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "load", lambda: native.NativeLibrary(None, "it was not built"))
    with pytest.raises(RuntimeError, match="it was not built"):
        native.pack(torch.ones(3, dtype=torch.bool))


@needs_compiler
@pytest.mark.usefixtures("library")
def test_error_code_becomes_its_message() -> None:
    with pytest.raises(RuntimeError, match="wsn_pack_bits: a size is negative"):
        native._call("wsn_pack_bits", 0, -1, 0)


def test_absent_library_is_a_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(native, "_package_roots", lambda: iter([tmp_path]))
    library = native.load.__wrapped__()
    assert library.lib is None
    assert "not installed" in library.reason


def test_foreign_file_is_a_reason(tmp_path: Path) -> None:
    path = tmp_path / "libwsn_cpu.so"
    path.write_bytes(b"not a library of this platform")
    library = native.open_library(path)
    assert library.lib is None
    assert "cannot be loaded" in library.reason


@needs_compiler
@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ('extern "C" int wsn_abi_version() { return 999; }', "ABI version 999, this package needs 1"),
        ('extern "C" int wsn_abi_version() { return 1; }', "lacks a function"),
        ("int something_else() { return 1; }", "lacks a function"),
    ],
)
def test_unfit_library_is_a_reason(tmp_path: Path, source: str, reason: str) -> None:
    (tmp_path / "unfit.cpp").write_text(source)
    library = native.open_library(compile_library(tmp_path / "unfit.cpp", tmp_path / "unfit.so"))
    assert library.lib is None
    assert reason in library.reason


@needs_compiler
def test_first_library_that_loads_is_taken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, library_file: Path) -> None:
    roots = [tmp_path / "broken", tmp_path / "good"]
    for root in roots:
        (root / native._FILE).parent.mkdir(parents=True)
    (roots[0] / native._FILE).write_bytes(b"broken")
    shutil.copy(library_file, roots[1] / native._FILE)
    monkeypatch.setattr(native, "_package_roots", lambda: iter(roots))
    assert str(roots[1]) in native.load.__wrapped__().reason


def test_installed_library_is_found() -> None:
    try:
        root = distribution("wsn-fast").locate_file("wsn_fast")
    except PackageNotFoundError:
        pytest.skip("wsn-fast is not installed")
    if not Path(str(root), native._FILE).is_file():
        pytest.skip("wsn-fast is installed without its native library")
    assert native.load().lib is not None, native.load().reason
