"""The choice between backends, its overrides, and the tables that it reads."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from wsn_fast import FastSubnetConv2d, FastSubnetLinear, backends, convert, explain, ops, topc_mask, topc_threshold
from wsn_fast.backends import availability, choice, choose, forget, native, parse_override
from wsn_fast.backends import torch as portable

ROOT = Path(__file__).parents[2]
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@pytest.fixture(autouse=True)
def _no_memory(monkeypatch: pytest.MonkeyPatch) -> object:
    """Choices are remembered for the life of a process: forget them around each test."""
    caches = (availability._module, availability._obstacle)
    monkeypatch.delenv(backends.ENVIRONMENT_VARIABLE, raising=False)
    forget()
    for cache in caches:
        cache.cache_clear()
    yield
    forget()
    for cache in caches:
        cache.cache_clear()


def test_an_override_names_a_backend_for_all_or_for_some_operations() -> None:
    assert parse_override("torch") == {"": "torch"}
    assert parse_override("triton, threshold=torch") == {"": "triton", "threshold": "torch"}


@pytest.mark.parametrize(
    "text",
    ["cuda", "threshold=", "sort=torch", "=torch", "torch,,native", "threshold torch", "np=torch", "torch,triton"],
)
def test_a_wrong_override_is_refused_by_its_value(text: str) -> None:
    with pytest.raises(ValueError, match="must be"):
        parse_override(text)
    with pytest.raises(ValueError, match="must be"):
        topc_threshold(torch.randn(3), 0.5, backend=text)
    with pytest.raises(ValueError, match="must be"):
        FastSubnetLinear(2, 2).backend = text


def test_an_override_is_a_string() -> None:
    with pytest.raises(TypeError, match="backend must be a string or None, got module"):
        topc_mask(torch.randn(3), 0.5, backend=portable)  # type: ignore[arg-type]


def test_the_call_goes_before_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(backends.ENVIRONMENT_VARIABLE, "torch")
    assert choose("pack", "cpu")[1:] == ("torch", "WSN_FAST_BACKEND=torch")
    asked = choose("pack", "cpu", None, "native")
    assert asked.name == ("torch" if native.load().lib is None else "native")
    assert asked.reason.startswith("backend='native'")


def test_a_wrong_environment_is_refused_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(backends.ENVIRONMENT_VARIABLE, "tritn")
    with pytest.raises(ValueError, match="WSN_FAST_BACKEND: backend must be one of"):
        choose("pack", "cpu")


def test_what_the_environment_leaves_open_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(backends.ENVIRONMENT_VARIABLE, "threshold=torch")
    assert choose("threshold", "cpu")[1:] == ("torch", "WSN_FAST_BACKEND=threshold=torch")
    assert choose("pack", "cpu").name == ("torch" if native.load().lib is None else "native")


def test_missing_triton_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wsn_fast.backends.triton", None)  # the import fails
    monkeypatch.delattr(backends, "triton", raising=False)
    choice = choose("gate", "cuda", torch.float32)
    assert choice.name == "torch" and choice.reason.startswith("triton cannot be imported")


def test_an_operation_without_a_kernel_is_a_reason() -> None:
    reason = "there is no Triton kernel for keep_mask, because PyTorch needs only few launches for it"
    assert choose("keep_mask", "cuda", torch.float32)[1:] == ("torch", reason)
    assert choose("keep_mask", "cuda", None, "triton")[1:] == ("torch", f"backend='triton', but {reason}")


def test_an_unsupported_dtype_is_a_reason() -> None:
    assert choose("threshold", "cuda", torch.float64)[1:] == (
        "torch", "the Triton backend has no threshold for torch.float64",
    )  # fmt: skip


@needs_triton
@pytest.mark.parametrize(
    ("patch", "reason"),
    [
        ({"get_device_capability": lambda _: (7, 5)}, "need compute capability 8.0, this GPU has 7.5"),
        ({"get_device_capability": lambda _: (9, 0)}, "Triton cannot run a kernel here"),  # there is no such device
    ],
)
def test_a_gpu_that_cannot_run_them_is_a_reason(
    monkeypatch: pytest.MonkeyPatch, patch: dict[str, Callable[..., object]], reason: str
) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    for name, value in {"is_available": lambda: True, "current_device": lambda: 0, **patch}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    choice = choose("gate", "cuda", torch.float32)
    assert choice.name == "torch" and reason in choice.reason


@needs_triton
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter is on")
def test_triton_on_the_cpu_needs_its_interpreter() -> None:
    assert choose("gate", "cpu", torch.float32, "triton").name == "torch"


def test_importing_the_package_does_not_import_the_kernels() -> None:
    code = "import sys, wsn_fast; assert 'wsn_fast.backends.triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})


# --- what a layer makes of it
def test_a_layer_shows_its_override_and_keeps_it_out_of_checkpoints() -> None:
    layer = FastSubnetLinear(4, 4)
    plain = repr(layer)
    layer.backend = "torch"
    assert repr(layer) == plain.replace(")", ", backend='torch')", 1)
    fresh = FastSubnetLinear(4, 4)
    fresh.load_state_dict(layer.state_dict())
    assert fresh.backend is None


def test_explain_gives_a_reason_for_every_operation_of_every_layer() -> None:
    model = convert(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 3)))
    model[0].backend = "torch"
    routes = explain(model)
    assert {route.layer for route in routes} == {"0", "2"}
    assert all(route.reason and route.backend in backends.NAMES for route in routes)
    assert {route.reason for route in routes if route.layer == "0" and route.operation == "gate"} == {"backend='torch'"}
    assert str(routes).count("\n") == len(routes)
    assert isinstance(model[0], FastSubnetConv2d)


def test_explain_refuses_a_model_without_subnet_layers() -> None:
    with pytest.raises(ValueError, match="model has no subnet layer: Linear"):
        explain(nn.Linear(2, 2))


# --- tables
def table(**entries: object) -> object:
    from wsn_fast.backends import tables
    from wsn_fast.backends.triton import tuning

    return tuning.Table("NVIDIA Test 1", tables.Tables(entries, (), "digest"))


def linear() -> dict[str, object]:
    """An entry of a table, made up."""
    from wsn_fast.kernels.masked_matmul import CONFIGS

    tiles = [
        {"rows": rows, "config": [*vars(config).values()], "splits": splits, "us": 1.0, "us_dense": 2.0}
        for rows, config, splits in ((8, CONFIGS[-1], 3), (16, CONFIGS[0], 2))
    ]
    return {
        "dtype": "bfloat16", "precision": "tf32", "n": 1024, "k": 2048, "source": "packed", "backward": False,
        "max_rows": 16, "tiles": tiles,
    }  # fmt: skip


@needs_triton
def test_a_measured_shape_answers_for_its_neighbours_only() -> None:
    from wsn_fast.backends.triton.tuning import Product

    measured = table(linear=[linear()])
    product = Product("masked_linear", torch.bfloat16, "tf32", "packed")
    assert measured.fused_rows(product, 1024, 2048)[0] == 16
    assert measured.fused_rows(product, 2048, 1024)[0] == 16
    rows, reason = measured.fused_rows(product, 4096, 4096)
    assert rows == 0 and "no crossover of masked_linear has been measured near 4096 x 4096 on NVIDIA Test 1" in reason
    assert measured.fused_rows(product._replace(backward=True), 1024, 2048)[0] == 0
    assert measured.fused_rows(product._replace(dtype=torch.float16), 1024, 2048)[0] == 0


@needs_triton
def test_a_tile_is_that_of_the_next_measured_number_of_rows() -> None:
    from wsn_fast.backends.triton.tuning import Gpu, Product, default_tile

    measured = table(linear=[linear()])
    product = Product("masked_linear", torch.bfloat16, "tf32", "packed")
    assert measured.tile(product, 3, 1024, 2048, Gpu(100, 232448)) == (product.configs[-1], 3)
    assert measured.tile(product, 9, 1024, 2048, Gpu(100, 232448)) == (product.configs[0], 2)
    assert measured.tile(product, 17, 1024, 2048, Gpu(100, 232448)) == default_tile(
        product, 17, 1024, 2048, Gpu(100, 232448)
    )


@needs_triton
def test_an_elementwise_tile_that_no_longer_exists_gives_way_to_the_default() -> None:
    from wsn_fast.backends.triton.tuning import Gpu
    from wsn_fast.kernels import gate, threshold

    gpu = Gpu(processors=132, shared=1)
    measured = table(elementwise={"gate": [512, 4], "gate_backward": [3, 3], "threshold": {"items": 1}})
    assert measured.gate == gate.Config(512, 4)
    assert measured.gate_backward in gate.CONFIGS
    assert measured.search(1 << 24, gpu) == threshold.spread(threshold.CONFIGS[0], 1 << 24, 132)
    for config in threshold.CONFIGS:
        assert table(elementwise={"threshold": vars(config)}).search(1 << 24, gpu) == config


def test_the_committed_tables_can_be_read() -> None:
    from wsn_fast.backends import tables

    for path in tables.PACKAGED.glob("*.json"):
        data = json.loads(path.read_text())
        assert path.name == tables.file_name(data["device"])
        assert tables.read(data["device"]).data, "the table is ignored"
        assert {"capability", "torch", "triton", "commit", "date"} <= data["facts"].keys(), (
            "a measurement names its circumstances"
        )


@needs_triton
def test_every_choice_has_the_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "a GPU")
    monkeypatch.setattr(availability, "_obstacle", functools.cache(lambda index: ""))
    for operation in backends.PRIMITIVES:
        assert hasattr(portable, operation)
        for device in ("cpu", "cuda"):
            for backend in (None, *backends.NAMES):
                for dtype in (torch.float32, torch.float64):
                    assert hasattr(choose(operation, device, dtype, backend).backend, operation), operation


@needs_triton
@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_steps_over_stored_means_take_triton_on_a_gpu(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "a GPU")
    monkeypatch.setattr(availability, "_obstacle", functools.cache(lambda index: ""))
    forget()
    try:
        assert choose(f"{kind}_coded_step", "cuda", torch.float32).name == "triton"
        assert choose(f"{kind}_coded_step", "cuda", torch.float64).name == "torch"
    finally:
        forget()


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_an_override_of_a_step_is_one_over_stored_means_too(kind: str) -> None:
    def named(backend: str) -> str:
        return choose(f"{kind}_coded_step", "cpu", torch.float32, backend).reason

    assert named(f"{kind}_step=torch") == f"backend='{kind}_step=torch'"
    assert named(f"native,{kind}_step=torch") == f"backend='native,{kind}_step=torch'"
    both = f"{kind}_step=torch,{kind}_coded_step=native"
    assert choose(f"{kind}_coded_step", "cpu", torch.float32, both).reason.startswith(f"backend={both!r}; ")
    assert choose(f"{kind}_step", "cpu", torch.float32, f"{kind}_coded_step=torch").reason != "backend"


def test_what_records_pytorchs_operations_sees_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "choose", lambda *_: pytest.fail("another backend would not be seen"))
    weight, packed = torch.randn(4, 6), torch.randint(0, 256, (3,), dtype=torch.uint8)
    traced = make_fx(lambda w: ops.gate_packed(w, packed, torch.float32))(weight)
    monkeypatch.undo()
    other = torch.randn(4, 6)
    torch.testing.assert_close(traced(other), ops.gate_packed(other, packed, torch.float32))


def test_doctor_reports_a_wrong_override() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "wsn_fast.doctor"],
        env={**os.environ, "WSN_FAST_BACKEND": "foo", "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "backend must be one of" in done.stdout and "torch" in done.stdout
    assert done.stderr == ""


def test_doctor_names_every_operation_and_says_why() -> None:
    from wsn_fast.doctor import findings

    found = list(findings.routes(torch.device("cpu")))
    assert [finding.subject for finding in found] == [*backends.PRIMITIVES]
    assert all(finding.reason for finding in found)
    assert "native library" in findings.report()


@needs_triton
def test_no_operation_of_a_backend_needs_an_override(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a backend has is chosen where it can run. Layers ask for the products where a table says so."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "a GPU")
    monkeypatch.setattr(availability, "_obstacle", functools.cache(lambda index: ""))
    from wsn_fast.backends import triton

    for operation in backends.PRIMITIVES:
        assert (choose(operation, "cuda", torch.float32).name == "triton") == hasattr(triton, operation), operation
        if native.load().lib is not None:
            assert (choose(operation, "cpu", torch.float32).name == "native") == (operation in native.OPERATIONS)
