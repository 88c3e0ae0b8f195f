"""csrc/cuda as nvcc compiles it, wherever there is an nvcc; no GPU is needed."""

from __future__ import annotations

import itertools
import platform
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import nvcc
import pytest
import torch
from kernel_resources import faults

from wsn_fast.backends.native import cuda_select
from wsn_fast.backends.native.shared_library import open_file

from .conftest import CSRC

NVCC = nvcc.find_nvcc()
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="needs nvcc")


@pytest.mark.ci
@needs_nvcc
def test_no_kernel_breaks_a_rule() -> None:
    rows = nvcc.rows()
    assert rows
    broken = [f"{row.name} on sm_{row.arch} {fault}" for row in rows for fault in faults(row)]
    assert not broken, "\n".join(broken)


@pytest.mark.ci
@needs_nvcc
def test_every_form_has_a_row() -> None:
    assert NVCC is not None
    archs = nvcc.known_archs(NVCC) & set(nvcc.ARCHS)
    names = [f"select {dtype} {key}" for dtype in ("float32", "bfloat16", "float16") for key in ("|S|", "S")]
    assert sorted((row.arch, row.name) for row in nvcc.rows()) == sorted(itertools.product(archs, names))


@needs_nvcc
def test_equal_digits_of_a_warp_are_added_at_once() -> None:
    """Else many equal scores would queue for one counter."""
    if not nvcc.machine_code():
        pytest.skip("needs cuobjdump")
    for arch, code in nvcc.machine_code().items():
        atomics = Counter(re.findall(r"ATOMS\.[A-Z0-9.]+", code))
        kernels = code.count("Function :")
        counting = atomics.pop("ATOMS.POPC.INC.32")
        # The others: places in a list, and the keys below the window, once per warp.
        assert kernels == 6 and counting >= 30 * kernels and atomics.total() <= 6 * kernels, f"sm_{arch}: {atomics}"


@pytest.fixture(scope="module")
def library_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if NVCC is None or platform.system() != "Linux":
        pytest.skip("needs nvcc on Linux")
    out = tmp_path_factory.mktemp("nvcc") / "libwsn_cuda.so"
    host = ["-Xcompiler=-fPIC,-fvisibility=hidden", "-Xlinker=--exclude-libs=ALL", "-cudart=static", "-DWSN_BUILDING"]
    flags = ["-std=c++17", "-O1", "-arch=sm_80", "-shared", *host, f"-I{CSRC / 'include'}"]
    subprocess.run([NVCC, *flags, CSRC / "cuda" / "select.cu", "-o", out], check=True)
    return out


def test_library_loads_without_a_gpu(library_file: Path) -> None:
    library = open_file(library_file, cuda_select.INTERFACE)
    assert library.lib is not None, library.reason


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_call_without_a_gpu_is_an_error(library_file: Path) -> None:
    library = open_file(library_file, cuda_select.INTERFACE)
    assert library.lib is not None
    with pytest.raises(RuntimeError, match=r"wsn_cuda_select: .*(driver|device)"):
        cuda_select.launch(library.lib, [torch.zeros(4)], [0], "value", None, 1024, 0)


def test_only_the_abi_is_exported(library_file: Path) -> None:
    """The CUDA runtime inside must not be taken for PyTorch's, nor PyTorch's for it."""
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("needs nm")
    lines = subprocess.run([nm, "-D", library_file], capture_output=True, text=True, check=True).stdout.splitlines()
    ours = {line.split()[-1] for line in lines if line.split()[-2] == "T"}
    assert ours == {"wsn_cuda_abi_version", "wsn_cuda_error_message", *cuda_select.INTERFACE.signatures}
    assert not [line for line in lines if " U cu" in line]
