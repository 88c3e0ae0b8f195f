"""Compiles the kernels for GPUs that need not be there, with every tile that the tuner can choose. None may spill
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
import torch
from kernel_resources import Part, Row, chosen, faults
from triton_versions import spills_when_old

ROOT = Path(__file__).parents[2]
ARCHS = (80, 86, 89, 90, 100, 120)
needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") == "1",
    reason="needs triton, and not its interpreter",
)


@pytest.fixture
def compiling() -> ModuleType:
    return importlib.import_module("compiling")


@pytest.fixture
def all_cases() -> dict[str, list[Any]]:
    return importlib.import_module("compile_cases").all_cases()


@needs_compiler
@spills_when_old
@pytest.mark.timeout(7200)  # minutes on two cores, less once Triton has the kernels in its cache
@pytest.mark.parametrize(
    "options",
    [
        pytest.param(["--ptx", "--every", "6", "--each", "1"], id="a sample, ptx"),
        pytest.param(["--ptx", "--every", "2", "--each", "2"], id="a sixth, ptx", marks=pytest.mark.ci),
        pytest.param([], id="machine code", marks=pytest.mark.slow),
    ],
)
def test_every_kernel_fits(options: list[str]) -> None:
    command = [sys.executable, "-m", "benchmarks.resources", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(f"| sm_{arch} |" in done.stdout for arch in ARCHS)


@needs_compiler
@pytest.mark.parametrize(("every", "each"), [(6, 1), (2, 2), (1, None)])
def test_a_part_has_every_kernel_and_every_architecture(
    all_cases: dict[str, list[Any]], every: int, each: int | None
) -> None:
    for name, cases in all_cases.items():
        pairs = chosen(cases, ARCHS, Part(every, each))
        assert len(set(pairs)) == len(pairs)
        assert {cases[index].fn for index, _ in pairs} == {case.fn for case in cases}, name
        assert all(cases[index].can_be_chosen(arch) for index, arch in pairs)
        assert len({index for index, _ in pairs}) >= len(cases) / every
        possible = {arch for case in cases for arch in ARCHS if case.can_be_chosen(arch)}
        assert len({arch for _, arch in pairs}) == min(len(possible), len(pairs)), name


@needs_compiler
def test_a_tile_is_compiled_where_it_can_be_chosen(all_cases: dict[str, list[Any]]) -> None:
    large = next(case for case in all_cases["masked_matmul_grad"] if "128x256x64" in case.name)
    assert [arch for arch in ARCHS if large.can_be_chosen(arch)] == [90, 100]
    assert {arch for _, arch in chosen([large], ARCHS, Part())} == {90, 100}


@needs_compiler
def test_every_kernel_has_a_case(all_cases: dict[str, list[Any]]) -> None:
    from triton.runtime.jit import JITFunction

    def kernels_of(module: ModuleType) -> set[str]:
        own = (value for value in vars(module).values() if isinstance(value, JITFunction))
        return {fn.__name__ for fn in own if fn.__name__.endswith("_kernel") and fn.__module__ == module.__name__}

    for path in (ROOT / "kernels").glob("[!_]*.py"):
        kernels = kernels_of(importlib.import_module(f"wsn_fast.kernels.{path.stem}"))
        compiled = {case.fn.__name__ for case in all_cases.get(path.stem, [])}
        assert kernels == compiled, path.name


@pytest.mark.parametrize(
    ("field", "value", "fault"),
    [
        ("spills", 8, "spills 8 bytes of registers"),
        ("local", 16, "uses 16 bytes of local memory"),
        ("shared", 227 * 1024 + 1, "uses 232449 bytes of shared memory, more than 232448"),
        ("most_shared", 1000, "uses 232448 bytes of shared memory, where the library counts with 1000"),
        ("tensor_core", 0, "has no tensor-core instruction"),
    ],
)
def test_a_broken_rule_is_named(field: str, value: int, fault: str) -> None:
    fits = Row("kernel", 90, 255, 0, 0, 227 * 1024, 1)
    assert faults(fits) == []
    assert faults(fits._replace(**{field: value})) == [fault]


def test_tensor_cores_that_are_not_wanted_are_not_missed() -> None:
    assert faults(Row("kernel", 80, 32, 0, 0, 0, None)) == []


@needs_compiler
@pytest.mark.parametrize(
    ("change", "field", "low"),
    [
        ({"constexprs": {"BLOCK_M": 128, "BLOCK_O": 256}}, "spills", 1),
        ({"num_stages": 16}, "shared", 227 * 1024 + 1),
    ],
    ids=["spill", "shared memory"],
)
def test_a_tile_too_large_shows(
    compiling: ModuleType, all_cases: dict[str, list[Any]], change: dict[str, Any], field: str, low: int
) -> None:
    case = next(case for case in all_cases["masked_matmul"] if case.needs_tensor_core)
    change = change | {"constexprs": {**case.constexprs, **change.get("constexprs", {})}}
    assert getattr(compiling.compile_case(case._replace(**change), 90), field) >= low


@needs_compiler
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("every", [12, pytest.param(3, marks=pytest.mark.ci), pytest.param(1, marks=pytest.mark.slow)])
def test_full_precision_is_not_multiplied_as_tf32(
    compiling: ModuleType, all_cases: dict[str, list[Any]], every: int
) -> None:
    """As Triton does on sm_100 with some tiles."""
    cases = [(kernel, case) for kernel, of_kernel in all_cases.items() for case in of_kernel]
    full = [(kernel, case) for kernel, case in cases if case.constexprs.get("PRECISION") == "ieee"][::every]
    found = [
        f"{kernel}: {case.name}"
        for kernel, case in full
        if not case.needs_tensor_core
        and compiling.compile_case(case._replace(needs_tensor_core=True), 100, disassemble=False).tensor_core > 0
    ]
    assert full and not found, "\n".join(found)


@needs_compiler
@pytest.mark.parametrize("arch", [80, 90, 100, 120])
def test_ptx_and_machine_code_have_the_same_tensor_core_instructions(
    compiling: ModuleType, all_cases: dict[str, list[Any]], monkeypatch: pytest.MonkeyPatch, arch: int
) -> None:
    case = next(case for case in all_cases["masked_matmul"] if case.needs_tensor_core)
    in_machine_code = compiling.compile_case(case, arch)
    monkeypatch.setattr(compiling, "find_disassembler", lambda: None)
    in_ptx = compiling.compile_case(case, arch)
    assert in_machine_code.note == "" and in_ptx.note == "counted in the PTX"
    assert in_machine_code.tensor_core == in_ptx.tensor_core > 0


@needs_compiler
def test_one_compiled_kernel_writes_every_number(compiling: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """An address must not cost a compilation. Triton compiles anew for 1, multiples of 16, and what fits in 32 bits."""
    from triton.runtime import driver

    from wsn_fast.kernels import addresses

    compiled = []
    kernel = addresses.write_kernel

    class Compiled:
        def __getitem__(self, grid: Any) -> Any:
            return lambda **arguments: compiled.append(kernel.warmup(**arguments, grid=grid).hash)

    monkeypatch.setattr(addresses, "write_kernel", Compiled())
    monkeypatch.setattr(driver, "_active", compiling.NoGpu())
    numbers = [0, 1, 2, 16, 17, 2**31 - 1, 2**31, 2**32, 2**47 + 1, 2**57, 2**61 - 1]
    for i, number in enumerate(numbers):
        values = [*numbers, *[number] * (addresses.VALUES * i)]
        addresses.write(torch.empty(len(values), dtype=torch.int64), values)
    assert len(compiled) > 50 and len(set(compiled)) == 1
