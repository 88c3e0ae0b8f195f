"""Every kernel is compiled for GPUs that need not be there, with every tile that the tuner can choose: none may spill
registers, use local memory or too much shared memory, or multiply without tensor cores."""

from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") == "1",
    reason="needs triton, and not its interpreter",
)


@pytest.fixture
def resources(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT)
    return importlib.import_module("benchmarks.resources")


@pytest.fixture
def compiling(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT)
    return importlib.import_module("wsn_fast.kernels._compile")


@needs_compiler
@pytest.mark.timeout(3600)  # minutes on two cores, less once Triton has the kernels in its cache
@pytest.mark.parametrize("options", [["--ptx"], pytest.param([], marks=pytest.mark.slow)], ids=["ptx", "machine code"])
def test_every_kernel_fits(options: list[str]) -> None:
    command = [sys.executable, "-m", "benchmarks.resources", "--arch", "80", "90", "100", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(f"| sm_{arch} |" in done.stdout for arch in (80, 90, 100))


@needs_compiler
def test_every_kernel_has_a_case(compiling: ModuleType) -> None:
    from triton.runtime.jit import JITFunction

    def kernels_of(module: ModuleType) -> set[str]:
        own = (value for value in vars(module).values() if isinstance(value, JITFunction))
        return {fn.__name__ for fn in own if fn.__name__.endswith("_kernel") and fn.__module__ == module.__name__}

    for path in (ROOT / "kernels").glob("[!_]*.py"):
        kernels = kernels_of(importlib.import_module(f"wsn_fast.kernels.{path.stem}"))
        compiled = {case.fn.__name__ for case in compiling.all_cases().get(path.stem, [])}
        assert kernels == compiled, path.name


@pytest.mark.parametrize(
    ("field", "value", "fault"),
    [
        ("spills", 8, "spills 8 bytes of registers"),
        ("local", 16, "uses 16 bytes of local memory"),
        ("shared", 227 * 1024 + 1, "uses 232449 bytes of shared memory, more than 232448"),
        ("tensor_core", 0, "has no tensor-core instruction"),
    ],
)
def test_a_broken_rule_is_named(resources: ModuleType, field: str, value: int, fault: str) -> None:
    fits = resources.Row("kernel", 90, 255, 0, 0, 227 * 1024, 1)
    assert resources.faults(fits) == []
    assert resources.faults(fits._replace(**{field: value})) == [fault]


def test_tensor_cores_that_are_not_wanted_are_not_missed(resources: ModuleType) -> None:
    assert resources.faults(resources.Row("kernel", 80, 32, 0, 0, 0, None)) == []


@needs_compiler
@pytest.mark.parametrize(
    ("change", "field", "low"),
    [
        ({"constexprs": {"BLOCK_M": 128, "BLOCK_O": 256}}, "stack", 1),
        ({"num_stages": 16}, "shared", 227 * 1024 + 1),
    ],
    ids=["spill", "shared memory"],
)
def test_a_tile_too_large_shows(compiling: ModuleType, change: dict[str, Any], field: str, low: int) -> None:
    case = next(case for case in compiling.all_cases()["matmul"] if case.needs_tensor_core)
    change = change | {"constexprs": {**case.constexprs, **change.get("constexprs", {})}}
    assert getattr(compiling.compile_case(case._replace(**change), 90), field) >= low


@needs_compiler
def test_full_precision_is_not_multiplied_as_tf32(compiling: ModuleType) -> None:
    """As Triton does on sm_100 with some tiles."""
    cases = [(kernel, case) for kernel, of_kernel in compiling.all_cases().items() for case in of_kernel]
    full = [(kernel, case) for kernel, case in cases if case.constexprs.get("PRECISION") == "ieee"]
    found = [
        f"{kernel}: {case.name}"
        for kernel, case in full
        if not case.needs_tensor_core
        and compiling.compile_case(case._replace(needs_tensor_core=True), 100, disassemble=False).tensor_core > 0
    ]
    assert full and not found, "\n".join(found)


@needs_compiler
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_ptx_and_machine_code_have_the_same_tensor_core_instructions(
    compiling: ModuleType, monkeypatch: pytest.MonkeyPatch, arch: int
) -> None:
    case = next(case for case in compiling.all_cases()["matmul"] if case.needs_tensor_core)
    in_machine_code = compiling.compile_case(case, arch)
    monkeypatch.setattr(compiling, "find_disassembler", lambda: None)
    in_ptx = compiling.compile_case(case, arch)
    assert in_machine_code.note == "" and in_ptx.note == "counted in the PTX"
    assert in_machine_code.tensor_core == in_ptx.tensor_core > 0
