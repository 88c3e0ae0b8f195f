"""The native library built from this checkout, at every level of instructions that the machine has."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from wsn_fast.backends import native
from wsn_fast.backends.native import binding, shared_library
from wsn_fast.backends.native.shared_library import NativeLibrary, open_file

ROOT = Path(__file__).parents[3]
LEVELS = ("plain", "avx2", "avx512")


@pytest.fixture(scope="session")
def build_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library and its C tests, as CMakeLists.txt builds them; the processes of one run share the build."""
    if shutil.which("cmake") is None or shutil.which("c++") is None or shutil.which("cc") is None:
        pytest.skip("needs cmake and the compilers cc and c++")
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "native_build"
    with FileLock(f"{folder}.lock"):
        if not (folder / "built").exists():
            build(folder)
            (folder / "built").touch()
    return folder


def build(folder: Path) -> None:
    subprocess.run(["cmake", "-S", ROOT, "-B", folder, "-DWSN_TESTS=ON"], check=True, capture_output=True)
    targets = ["wsn_cpu", "abi_test", "sizes_test", "threads_test"]
    built = subprocess.run(["cmake", "--build", folder, "--target", *targets], capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    assert "warning" not in built.stderr, built.stderr


@pytest.fixture(scope="session")
def library_file(build_folder: Path) -> Path:
    return build_folder / shared_library.FILE.name


@pytest.fixture
def library(library_file: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[NativeLibrary]:
    """The bindings run on the library just built, whatever is installed."""
    opened = open_file(library_file)
    assert opened.lib is not None, opened.reason
    for module in (native, binding):
        monkeypatch.setattr(module, "load", lambda: opened)
    yield opened
    opened.lib.wsn_limit_instructions(len(LEVELS))


@pytest.fixture(params=range(len(LEVELS)), ids=LEVELS)
def level(request: pytest.FixtureRequest, library: NativeLibrary) -> int:
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
