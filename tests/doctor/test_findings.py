"""What ``python -m wsn_fast.doctor`` advises: each planted situation has its own advice and no other."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from wsn_fast.backends import availability, native, tables
from wsn_fast.backends.native import shared_library
from wsn_fast.backends.native.shared_library import ABI_VERSION, NativeLibrary, open_file
from wsn_fast.doctor import advice, findings

LOADED = NativeLibrary(SimpleNamespace(), "loaded", Path("libwsn_cpu.so"))  # type: ignore[arg-type]
EVERYTHING = {"c++", "cc", "apt-get"}


class Machine:
    """A machine where all is well, until a test plants something. It has a GPU if ``gpu`` has been called."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.patch = patch
        for name in ("WSN_FAST_NATIVE", "CUDA_VISIBLE_DEVICES", "CXX", "CC"):
            patch.delenv(name, raising=False)
        self.library(LOADED)
        self.programs(*EVERYTHING)
        self.origin("/src/wsn")
        patch.setattr(advice.sys, "executable", "/venv/bin/python")
        patch.setattr(advice.platform, "system", lambda: "Linux")
        patch.setattr(shared_library, "shares_team", lambda: True)
        patch.setattr(torch, "get_num_threads", lambda: 2)
        patch.setattr(torch.version, "hip", None)
        patch.setattr(torch.cuda, "is_available", lambda: False)
        patch.setattr(advice, "_has_nvidia_driver", lambda: False)

    def library(self, library: NativeLibrary) -> None:
        self.patch.setattr(native, "load", lambda: library)

    def programs(self, *names: str) -> None:
        self.patch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}" if name in names else None)

    def origin(self, folder: str, editable: bool = False) -> None:
        """Where pip has installed the package from."""
        told = json.dumps({"url": f"file://{folder}", "dir_info": {"editable": editable}})
        self.patch.setattr(advice, "distribution", lambda name: SimpleNamespace(read_text=lambda file: told))

    def torch_build(self, cuda: str | None, name: str = "2.13.0") -> None:
        self.patch.setattr(torch.version, "cuda", cuda)
        self.patch.setattr(torch, "__version__", name)

    def gpu(self, *names: str, capability: tuple[int, int] = (9, 0), triton: bool = True) -> None:
        """GPUs that PyTorch uses, with tuning tables, and a Triton whose kernels run."""
        self.torch_build("13.0")
        self.patch.setattr(torch.cuda, "is_available", lambda: True)
        self.patch.setattr(torch.cuda, "device_count", lambda: len(names))
        self.patch.setattr(torch.cuda, "get_device_name", lambda device: names[torch.device("cuda", device).index])
        self.patch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        self.patch.setattr(advice, "find_spec", lambda name: object() if triton else None)
        self.kernels(object(), "")
        self.tuned(*names)

    def kernels(self, module: Any, reason: str) -> None:
        """What is said of Triton's kernels on the GPU."""
        self.patch.setattr(availability, "triton", lambda *args, forced: (module, reason))

    def tuned(self, *names: str) -> None:
        self.patch.setattr(tables, "device_name", lambda device: torch.cuda.get_device_name(device.index))
        self.patch.setattr(tables, "of", lambda name: tables.Tables({}, (), "0123" if name in names else ""))


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    yield Machine(monkeypatch)


def the_only_advice() -> str:
    (line,) = advice.advice()
    return line


def test_a_machine_without_a_gpu_where_all_is_well(machine: Machine) -> None:
    assert list(advice.advice()) == []


def test_a_machine_with_a_gpu_where_all_is_well(machine: Machine) -> None:
    machine.gpu("NVIDIA H200")
    assert list(advice.advice()) == []


def test_the_report_ends_with_the_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(findings, "advice", lambda: iter(["buy a GPU", "install a compiler"]))
    assert findings.report().endswith("faster\n  buy a GPU\n  install a compiler\n")


def test_the_report_says_that_there_is_no_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(findings, "advice", lambda: iter(()))
    assert "faster\n  nothing that is known" in findings.report()


# --- the native library
REINSTALL = '`python -m pip install --force-reinstall --no-deps --no-cache-dir "/src/wsn"`'
MISSING = NativeLibrary(None, "no native library")
IS_MISSING = "the native library is not installed, so PyTorch and NumPy do its work on the CPU: "


def test_no_native_library(machine: Machine) -> None:
    machine.library(MISSING)
    assert the_only_advice() == f"{IS_MISSING}run {REINSTALL}"


@pytest.mark.parametrize(
    ("system", "tool", "how"),
    [
        ("Linux", "apt-get", "apt-get install g++"),
        ("Linux", "dnf", "dnf install gcc-c++"),
        ("Linux", "zypper", "GCC or Clang"),
        ("Darwin", "", "xcode-select --install"),
        ("Windows", "", "the Build Tools of Visual Studio"),
    ],
)
def test_no_native_library_and_no_compiler(machine: Machine, system: str, tool: str, how: str) -> None:
    machine.library(MISSING)
    machine.programs(tool)
    machine.patch.setattr(advice.platform, "system", lambda: system)
    assert the_only_advice() == f"{IS_MISSING}install a C++ compiler ({how}), then run {REINSTALL}"


@pytest.mark.parametrize("value", ["0", "OFF", "false"])
def test_no_native_library_since_a_variable_says_so(machine: Machine, value: str) -> None:
    machine.library(MISSING)
    machine.patch.setenv("WSN_FAST_NATIVE", value)
    told = "unset WSN_FAST_NATIVE, which leaves the library out, then run "
    assert the_only_advice() == f"{IS_MISSING}{told}{REINSTALL}"


def test_the_compiler_may_be_named_by_a_variable(machine: Machine) -> None:
    machine.library(MISSING)
    machine.programs("my-c++")
    machine.patch.setenv("CXX", "my-c++")
    assert the_only_advice() == f"{IS_MISSING}run {REINSTALL}"


def test_an_editable_installation_stays_one(machine: Machine) -> None:
    machine.library(MISSING)
    machine.origin("/src/my%20wsn", editable=True)
    assert the_only_advice().endswith('--no-cache-dir -e "/src/my wsn"`')


def test_what_came_from_an_index_comes_from_there_again(machine: Machine, tmp_path: Path) -> None:
    machine.library(MISSING)
    machine.patch.setattr(advice, "distribution", lambda name: SimpleNamespace(read_text=lambda file: None))
    machine.patch.setattr(advice, "__file__", str(tmp_path / "site-packages" / "wsn_fast" / "doctor" / "advice.py"))
    assert the_only_advice().endswith("--no-cache-dir wsn-fast`")


def test_a_checkout_that_was_never_installed(machine: Machine) -> None:
    def absent(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    machine.library(MISSING)
    machine.patch.setattr(advice, "distribution", absent)
    root = Path(__file__).parents[2]
    assert the_only_advice().endswith(f'--no-cache-dir "{root}"`')


def test_a_broken_native_library(machine: Machine, tmp_path: Path) -> None:
    (tmp_path / "libwsn_cpu.so").write_bytes(b"broken")
    machine.library(open_file(tmp_path / "libwsn_cpu.so"))
    told = the_only_advice()
    assert told.startswith(f"the native library cannot be used ({tmp_path / 'libwsn_cpu.so'} cannot be loaded: ")
    assert told.endswith(f"on the CPU: run {REINSTALL}")


def test_a_native_library_with_another_abi(machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_library.ctypes, "CDLL", lambda path: SimpleNamespace(wsn_abi_version=lambda: 999))
    machine.library(open_file(tmp_path / "libwsn_cpu.so"))
    versions = f"has ABI version 999, this package needs {ABI_VERSION}"
    assert the_only_advice() == (
        f"the native library cannot be used ({tmp_path / 'libwsn_cpu.so'} {versions}), so PyTorch and NumPy do its "
        f"work on the CPU: run {REINSTALL}"
    )


def test_threads_that_cannot_be_shared(machine: Machine) -> None:
    machine.patch.setattr(shared_library, "shares_team", lambda: False)
    assert "set OMP_WAIT_POLICY=PASSIVE before Python starts" in the_only_advice()


def test_one_thread_shares_nothing(machine: Machine) -> None:
    machine.patch.setattr(shared_library, "shares_team", lambda: False)
    machine.patch.setattr(torch, "get_num_threads", lambda: 1)
    assert list(advice.advice()) == []


# --- GPUs
def test_a_gpu_and_a_torch_for_the_cpu(machine: Machine) -> None:
    machine.patch.setattr(advice, "_has_nvidia_driver", lambda: True)
    machine.torch_build(None, "2.13.0+cpu")
    told = the_only_advice()
    assert told.startswith("this machine has an NVIDIA GPU that PyTorch does not use: torch 2.13.0+cpu is a build for")
    assert told.endswith("https://pytorch.org/get-started/locally has the command for your system")


@pytest.mark.parametrize("value", ["", "-1", "none"])
def test_a_gpu_that_a_variable_hides(machine: Machine, value: str) -> None:
    machine.patch.setattr(advice, "_has_nvidia_driver", lambda: True)
    machine.torch_build("13.0")
    machine.patch.setenv("CUDA_VISIBLE_DEVICES", value)
    assert the_only_advice().endswith(f"CUDA_VISIBLE_DEVICES={value!r} hides it. Unset this variable")


@pytest.mark.parametrize("value", [None, "0,1", "GPU-8932f937"])
def test_a_driver_that_is_too_old(machine: Machine, value: str | None) -> None:
    machine.patch.setattr(advice, "_has_nvidia_driver", lambda: True)
    machine.torch_build("13.0")
    if value is not None:
        machine.patch.setenv("CUDA_VISIBLE_DEVICES", value)
    assert "torch 2.13.0 is built for CUDA 13.0, for which the driver may be too old" in the_only_advice()


@pytest.mark.parametrize(
    ("required", "wanted"),
    [
        (['triton==3.7.0; platform_system == "Linux"', "numpy"], '"triton==3.7.0"'),
        (["triton>=3.6,<4"], '"triton>=3.6,<4"'),
        (["numpy"], '"triton"'),
        (None, '"triton"'),
    ],
)
def test_a_gpu_and_no_triton(machine: Machine, required: list[str] | None, wanted: str) -> None:
    machine.gpu("NVIDIA H200", triton=False)
    machine.patch.setattr(advice, "requires", lambda name: required)
    told = f"Triton is not installed, so PyTorch does the work on the GPU: run `python -m pip install {wanted}`"
    assert the_only_advice() == told


def test_a_gpu_that_is_too_old(machine: Machine) -> None:
    machine.gpu("Tesla T4", capability=(7, 5))
    machine.kernels(None, "too old")
    assert the_only_advice() == (
        "Tesla T4 is too old for the Triton kernels, so PyTorch does the work there: use a GPU of compute capability "
        "8.0 (Ampere) or later; this one has 7.5"
    )


def test_kernels_that_do_not_run(machine: Machine) -> None:
    machine.gpu("NVIDIA H200")
    machine.kernels(None, "Triton cannot run a kernel here: OSError: no space left")
    machine.patch.setattr(advice, "requires", lambda name: ["triton==3.7.0"])
    assert the_only_advice() == (
        "the Triton kernels do not run on NVIDIA H200: Triton cannot run a kernel here: OSError: no space left. Mend "
        'this, or run `python -m pip install --force-reinstall "triton==3.7.0"`'
    )


def test_kernels_that_no_compiler_can_launch(machine: Machine) -> None:
    machine.gpu("NVIDIA H200")
    machine.kernels(None, "Triton cannot run a kernel here: RuntimeError: Failed to find C compiler")
    machine.programs("apt-get")
    told = "the Triton kernels do not run on NVIDIA H200: install a C compiler, such as gcc, which Triton needs"
    assert the_only_advice().startswith(told)


def test_a_gpu_without_a_tuning_table(machine: Machine) -> None:
    machine.gpu("NVIDIA H200", "NVIDIA L4", "NVIDIA L4")
    machine.tuned("NVIDIA H200")
    assert the_only_advice() == (
        "nobody has measured which products are fastest on NVIDIA L4: run `python -m wsn_fast.doctor --tune`, which "
        "takes some minutes"
    )


def test_a_torch_for_amd_gets_no_advice_that_it_cannot_follow(machine: Machine) -> None:
    machine.gpu("AMD Instinct MI300X", triton=False)
    machine.patch.setattr(torch.version, "hip", "7.0")
    assert list(advice.advice()) == []


def test_a_gpu_and_no_native_library(machine: Machine) -> None:
    machine.gpu("NVIDIA H200", triton=False)
    machine.library(MISSING)
    assert [line.split(",")[0] for line in advice.advice()] == [
        "Triton is not installed",
        "the native library is not installed",
    ]
