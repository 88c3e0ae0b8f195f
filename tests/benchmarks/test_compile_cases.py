"""What is compiled without a GPU is what the library can launch on one."""

from __future__ import annotations

import importlib
import importlib.util
import os
from itertools import chain, combinations, product
from types import ModuleType
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") == "1",
    reason="needs triton, and not its interpreter",
)


@pytest.fixture(scope="module")
def cases() -> dict[str, list[Any]]:
    return importlib.import_module("compile_cases").all_cases()


@pytest.fixture(scope="module")
def launched() -> dict[str, list[Any]]:
    return importlib.import_module("backend_launches").launches()


def test_every_form_that_the_backend_launches_is_compiled(
    launched: dict[str, list[Any]], cases: dict[str, list[Any]]
) -> None:
    left_out = importlib.import_module("compile_cases._traits").left_out
    missing = left_out(chain.from_iterable(launched.values()), chain.from_iterable(cases.values()))
    assert not missing, "\n".join(case.name for case in missing)


def test_the_backend_is_asked_for_all_that_it_can_do(
    launched: dict[str, list[Any]], cases: dict[str, list[Any]]
) -> None:
    from wsn_fast.backends import PRIMITIVES
    from wsn_fast.backends import triton as backend

    kernels = {case.fn.__name__ for of_primitive in launched.values() for case in of_primitive}
    assert kernels == {case.fn.__name__ for of_module in cases.values() for case in of_module}
    named = {"pack", "unpack", "union", "popcount", "restore_frozen_many"}  # those of masks and restore_frozen
    assert {one for one in PRIMITIVES if hasattr(backend, one)} == launched.keys() - {"masks"} | named


@pytest.mark.parametrize(
    ("primitive", "kernel", "wanted"),
    [
        ("adamw_step", "update_kernel", {"GIVEN": "True", "HAS_UNION": "True", "NEXT": "True", "SCALE": "fp64"}),
        ("sgd_step", "update_kernel", {"DTYPE": "fp16", "ALIGNED": "False"}),
        ("gates_backward", "gate_backward_multi_kernel", {"W_DTYPE": "fp16", "S_DTYPE": "fp64"}),
        ("masked_conv", "conv2d_dx_kernel", {"s_ptr": "*fp16", "PRECISION": "tf32"}),
    ],
)
def test_forms_that_were_left_out_before(
    launched: dict[str, list[Any]], primitive: str, kernel: str, wanted: dict[str, str]
) -> None:
    traits = importlib.import_module("compile_cases._traits").traits
    found = [traits(case) for case in launched[primitive] if case.fn.__name__ == kernel]
    assert any(wanted.items() <= one.items() for one in found)


def test_a_form_without_a_case_is_found(cases: dict[str, list[Any]]) -> None:
    left_out = importlib.import_module("compile_cases._traits").left_out
    of_module = cases["masked_matmul"]
    assert left_out(of_module, of_module) == []
    wider = of_module[0]._replace(signature={**of_module[0].signature, "w_ptr": "*fp64"})
    assert [case.signature for case in left_out([wider], of_module)] == [wider.signature]


def test_any_two_values_meet() -> None:
    covering = importlib.import_module("compile_cases._covering").covering
    axes = {"a": (0, 1, 2), "b": "xyz", "c": (False, True), "d": (None, 1)}
    first = [{"a": 2, "c": True}, {"a": 2, "b": "y", "c": True, "d": None}]
    rows = covering(axes, first)
    for one, other in combinations(axes, 2):
        assert {(row[one], row[other]) for row in rows} == {*product(axes[one], axes[other])}
    assert all(row.items() >= begun.items() for row, begun in zip(rows, first, strict=False))
    assert len(rows) < 36 / 2


@pytest.mark.parametrize(
    ("length", "begin", "splits"), [(64, 0, 1), (65, 0, 1), (64, 1, 1), (64, 0, 2)], ids=["wide", "odd", "off", "split"]
)
def test_a_launch_is_written_down_as_triton_compiles_it(
    monkeypatch: pytest.MonkeyPatch, length: int, begin: int, splits: int
) -> None:
    from triton import knobs
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from wsn_fast.kernels.masked_matmul import CONFIGS, masked_matmul

    written_down = importlib.import_module("compile_cases._launches").written_down
    sources: list[Any] = []

    def launch() -> None:
        masked_matmul(
            torch.empty(5 * length + 1, dtype=torch.bfloat16)[begin:][: 5 * length].view(5, length),
            torch.empty(1, length),
            torch.empty(5, 1, dtype=torch.bfloat16),
            packed=torch.empty((length + 7) // 8, dtype=torch.uint8),
            config=CONFIGS[0],
            splits=splits,
            workspace=torch.empty(10),
        )

    with written_down() as cases:
        launch()
    monkeypatch.setattr(driver, "_active", importlib.import_module("compiling").NoGpu())
    monkeypatch.setattr(knobs.compilation, "listener", lambda src, **_: sources.append(src))
    run = JITFunction.run
    monkeypatch.setattr(JITFunction, "run", lambda self, **given: run(self, **{**given, "warmup": True}))
    kernels: list[ModuleType] = [case.fn for case in cases]
    for kernel in kernels:
        kernel.device_caches.clear()  # what was compiled before is not compiled again
    launch()
    for case, source in zip(cases, sources, strict=True):
        names = case.fn.arg_names
        assert source.signature == {n: "constexpr" if n in case.constexprs else case.signature[n] for n in names}
        assert source.constants == {(names.index(name),): value for name, value in case.constexprs.items()}
        assert {k: v for k, v in source.attrs.items() if v} == {
            (names.index(name),): [["tt.divisibility", divisor]] for name, divisor in case.attrs.items()
        }
