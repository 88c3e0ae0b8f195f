"""The native library built from this checkout, at every level of instructions that the machine has."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from wsn_fast.backends import native, native_library

ROOT = Path(__file__).parents[2]
LEVELS = ("plain", "avx2", "avx512")


@pytest.fixture(scope="session")
def build_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library and its C tests, as CMakeLists.txt builds them."""
    if shutil.which("cmake") is None or shutil.which("c++") is None or shutil.which("cc") is None:
        pytest.skip("needs cmake and the compilers cc and c++")
    folder = tmp_path_factory.mktemp("native")
    subprocess.run(["cmake", "-S", ROOT, "-B", folder, "-DWSN_TESTS=ON"], check=True, capture_output=True)
    targets = ["wsn_cpu", "abi_test", "sizes_test", "threads_test"]
    built = subprocess.run(["cmake", "--build", folder, "--target", *targets], capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    assert "warning" not in built.stderr, built.stderr
    return folder


@pytest.fixture(scope="session")
def library_file(build_folder: Path) -> Path:
    return build_folder / native_library._FILE.name


@pytest.fixture
def library(library_file: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[native_library.NativeLibrary]:
    """The bindings run on the library just built, whatever is installed."""
    opened = native_library.open_library(library_file)
    assert opened.lib is not None, opened.reason
    for module in (native, native_library):
        monkeypatch.setattr(module, "load", lambda: opened)
    yield opened
    opened.lib.wsn_limit_instructions(len(LEVELS))


@pytest.fixture(params=range(len(LEVELS)), ids=LEVELS)
def level(request: pytest.FixtureRequest, library: native_library.NativeLibrary) -> int:
    assert library.lib is not None
    if library.lib.wsn_limit_instructions(request.param) != request.param:
        pytest.skip(f"this machine or build has no {LEVELS[request.param]}")
    return request.param


@pytest.fixture(params=[1, 2, 3, 4])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)
