"""``python -m wsn_fast.doctor --tune``: what it measures, and the table that it writes."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from wsn_fast.backends import native, tables
from wsn_fast.backends import torch as portable
from wsn_fast.doctor import __main__ as doctor
from wsn_fast.doctor.measuring.checks import WrongResultError
from wsn_fast.doctor.measuring.timing import Turns
from wsn_fast.doctor.tuning import command, crossovers
from wsn_fast.doctor.tuning.gradients import GradientProduct
from wsn_fast.doctor.tuning.trials import Trials

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
needs_native = pytest.mark.skipif(native.load().lib is None, reason="the native library is not installed")


def interpreted(code: str, *arguments: str) -> None:
    """Run a program under Triton's interpreter."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "support")])
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], env=environment, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


# --- the Triton kernels
READ_BACK = """
import json, pathlib, sys, torch
from tiny_sweep import SWEEP
from wsn_fast.backends import tables
from wsn_fast.doctor.tuning import entries
from wsn_fast.doctor.tuning.command import Table
from wsn_fast.doctor.tuning.trials import Trials
folder = pathlib.Path(sys.argv[1])
if sys.argv[2] == "one way":
    entries.WAYS = entries.WAYS[-1:]
made = Table(torch.device("cpu"), folder, print)
trials = Trials(torch.device("cpu"), lambda calls: (calls[0](), 1.0)[1], float("inf"))
entries.measure_tiles(trials, SWEEP, made.found)
entries.measure_products(trials, SWEEP, made.found)
assert trials.not_measured == [], trials.not_measured
(path,) = folder.iterdir()
data = json.loads(path.read_text())
assert {"elementwise", "linear", "linear_grad", "linear_tasks", "conv"} <= data.keys()
found = tables.read(made.name, None, folder)
assert found.data == {key: data[key] for key in found.data} and len(found.data) == 5, found.notes
from wsn_fast.backends.triton.tuning import Gpu, Product, Table
table = Table(made.name, found)
assert list(vars(table.gate).values()) == data["elementwise"]["gate"]
assert vars(table.search(1, Gpu(1, 1))) == data["elementwise"]["threshold"]
for operation, entry in [(name, entry) for name in ("linear", "linear_grad") for entry in data[name]]:
    product = Product("masked_" + operation, torch.float32, entry["precision"], entry["source"], entry["backward"])
    rows, reason = table.fused_rows(product, entry["n"], entry["k"])
    assert rows == entry["max_rows"] and "as measured" in reason, reason
    tile = entry["tiles"][0]
    config, splits = table.tile(product, tile["rows"], entry["n"], entry["k"], Gpu(1, 232448))
    assert list(vars(config).values()) == tile["config"] and splits == tile["splits"]
for entry in data["conv"]:
    product = Product("masked_conv", torch.float32, entry["precision"], entry["source"], entry["backward"])
    wins, reason = table.conv_wins(product, entry["shape"])
    assert wins == entry["wins"] and "not been measured" not in reason, reason
"""


@needs_triton
@pytest.mark.parametrize("ways", [pytest.param(ways, marks=pytest.mark.ci) for ways in ("one way", "all ways")])
def test_a_table_is_read_back_as_written(tmp_path: Path, ways: str) -> None:
    interpreted(READ_BACK, str(tmp_path), ways)


TRIED = """
import dataclasses, torch
from tiny_sweep import SWEEP
from wsn_fast.doctor.tuning.entries import gradients
from wsn_fast.doctor.tuning.sweeps import IEEE
from wsn_fast.doctor.tuning.trials import Trials
tried = []
def clock(calls):
    tried.extend(call.args[2:4] for call in calls if len(call.args) == 5)
    return 1.0
trials = Trials(torch.device("cpu"), clock, float("inf"))
trials.processors = 16
(entry,) = gradients(trials, dataclasses.replace(SWEEP, grad_rows=(150,)), IEEE)
assert trials.not_measured == [], trials.not_measured
assert len({config for config, splits in tried}) == 3 and max(splits for config, splits in tried) > 1, tried
"""


@pytest.mark.ci
@needs_triton
def test_every_tile_of_a_gradient_is_right_when_its_sum_is_split() -> None:
    interpreted(TRIED)


TILES = """
import torch
from tiny_sweep import SWEEP
from wsn_fast.doctor.tuning.entries import measure_tiles
from wsn_fast.doctor.tuning.trials import Trials
found = []
trials = Trials(torch.device("cpu"), lambda calls: 1.0, float("inf"))
measure_tiles(trials, SWEEP, lambda table, entry: found.append((table, *entry)))
assert found == [("elementwise", "gate"), ("elementwise", "gate_backward"), ("elementwise", "threshold")], found
assert trials.not_measured == [], trials.not_measured
"""


@needs_triton
def test_the_tiles_of_the_elementwise_kernels_are_checked_and_measured() -> None:
    interpreted(TILES)


CALLED = """
import sys, torch
from wsn_fast.backends import triton
from wsn_fast.doctor.measuring.operations import OPERATIONS, Operands
from wsn_fast.doctor.measuring.weights import Weight
names = [name for name in OPERATIONS if hasattr(triton, name) and name.endswith("_step") == (sys.argv[1] == "steps")]
for name in names:
    operands = Operands(triton, Weight.random((100,), torch.device("cpu"), 2), torch.float32, 2)
    call = OPERATIONS[name].prepare(operands)
    call(), call()
assert len(names) == (4 if sys.argv[1] == "steps" else 13), names
"""


@needs_triton
@pytest.mark.parametrize("which", ["others", pytest.param("steps", marks=pytest.mark.ci)])
def test_every_operation_can_be_called_on_the_kernels(which: str) -> None:
    interpreted(CALLED, which)


@needs_triton
def test_a_kernel_that_writes_nothing_gets_no_entry(stand_in: Any, tmp_path: Path) -> None:
    """Over the stand-in Triton compiles and launches, and no result is right."""
    from tiny_sweep import SWEEP

    from wsn_fast.doctor.tuning.entries import measure_tiles

    found: list[Any] = []
    trials = Trials(CPU, lambda calls: 1.0, float("inf"))
    measure_tiles(trials, SWEEP, lambda table, entry: found.append(entry))
    assert stand_in.launches() and found == []
    assert trials.not_measured and all("WrongResultError" in line for line in trials.not_measured)


def test_without_triton_there_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    from tiny_sweep import SWEEP

    from wsn_fast.doctor.tuning.entries import measure_tiles

    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("the interpreter is on")
    trials = Trials(CPU, lambda calls: 1.0, float("inf"))
    measure_tiles(trials, SWEEP, lambda table, entry: None)
    (line,) = trials.not_measured
    assert "Triton kernels need a GPU" in line or "triton is not installed" in line


@pytest.mark.parametrize("wrong", ["dW", "dS"])
def test_a_wrong_gradient_of_a_product_is_found(wrong: str) -> None:
    product = GradientProduct((24, 40), 5, CPU, torch.float32)
    operands = product.operands()
    check, (dw, ds) = product.checker(operands), product.in_memory(operands)
    check((dw, ds))
    if wrong == "dW":
        dw[operands.w.frozen] = 1e-12  # the 2x rule would let it pass
    else:
        ds[0, 0] += 1.0
    with pytest.raises(WrongResultError, match=wrong):
        check((dw, ds))


# --- the choice between backends
def turns(*pairs: tuple[float, float], how: str = "host") -> list[Turns]:
    """Of the usual backend and of torch, in microseconds, by size."""
    return [Turns({"native": [a], "torch": [b]}, {"native": how, "torch": how}) for a, b in pairs]


@pytest.mark.parametrize(
    ("measured", "chosen"),
    [
        (turns((10, 8), (10, 9)), "torch"),
        (turns((10, 8), (10, 9.5)), "native"),  # not clear at one size
        (turns((10, 20), (10, 1)), "native"),
        ([], "native"),
    ],
)
def test_torch_is_chosen_where_it_is_clearly_faster_at_every_size(measured: list[Turns], chosen: str) -> None:
    assert crossovers.choice("native", CPU, measured) == chosen


@pytest.mark.parametrize(("how", "chosen"), [("graph", "torch"), ("events (no graph: it waits)", "native")])
def test_torch_has_to_fit_into_a_graph_on_a_gpu(how: str, chosen: str) -> None:
    assert crossovers.choice("native", torch.device("cuda"), turns((10, 1), how=how)) == chosen


def rival(operation: str, **broken: Callable[..., Any]) -> crossovers.Rival:
    """An operation in float32 of a backend that is torch's but for what is ``broken``."""
    module: Any = SimpleNamespace(**vars(portable) | broken)
    return crossovers.Rival(operation, torch.float32, "native", module)


def slowly(name: str) -> Callable[..., Any]:
    def run(*arguments: Any) -> Any:
        time.sleep(2e-3)
        return getattr(portable, name)(*arguments)

    return run


def test_a_slow_backend_gives_way() -> None:
    entry = crossovers.compare(rival("keep_mask", keep_mask=slowly("keep_mask")), CPU, (8, 16), 0.0)
    assert entry["choose"] == "torch" and [*entry["times"]] == ["8", "16"]
    assert all(times["native"] > 2000 > times["torch"] > 0 for times in entry["times"].values())


def test_a_larger_size_is_measured_only_while_torch_may_be_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crossovers, "portable", SimpleNamespace(keep_mask=slowly("keep_mask")))
    entry = crossovers.compare(rival("keep_mask"), CPU, (8, 16), 0.0)
    assert entry["choose"] == "native" and [*entry["times"]] == ["8"]


def test_a_wrong_backend_is_not_timed() -> None:
    wrong = rival("keep_mask", keep_mask=lambda *arguments: ~portable.keep_mask(*arguments))
    trials = Trials(CPU, lambda calls: 1.0, float("inf"))
    assert trials.attempt("keep_mask", lambda: crossovers.compare(wrong, CPU, (8,), 0.0)) is None
    assert "WrongResultError: keep_mask of" in trials.not_measured[0]


@needs_native
def test_every_operation_of_the_native_library_has_a_rival() -> None:
    found = {(one.operation, one.dtype) for one in crossovers.rivals(CPU)}
    assert {operation for operation, _ in found} == native.OPERATIONS
    assert ("pack", None) in found and ("adamw_coded_step", torch.bfloat16) not in found


# --- the table
@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Two operations to choose for, which take no time. Returns what is being measured."""
    begun: list[str] = []

    def compare(one: crossovers.Rival, *_: object) -> dict[str, Any]:
        begun.append(one.operation)
        return {"choose": "native", "times": {"1000": {"native": 1.0, "torch": 2.0}}}

    monkeypatch.setattr(crossovers, "rivals", lambda device: [rival("gate"), rival("threshold")])
    monkeypatch.setattr(crossovers, "compare", compare)
    return begun


def run(folder: Path, minutes: float = 1.0) -> tuple[int, list[str], tables.Tables]:
    lines: list[str] = []
    status = command.main([CPU], folder, minutes, lines.append)
    return status, lines, tables.read(tables.device_name(CPU), None, folder)


def test_a_table_holds_what_was_measured_and_where_it_comes_from(tmp_path: Path, few: list[str]) -> None:
    status, lines, found = run(tmp_path)
    assert status == 0 and found.data["backends"].keys() == {"gate", "threshold"}
    (path,) = tmp_path.iterdir()
    data = json.loads(path.read_text())
    assert data["facts"].keys() >= {"date", "torch", "cpu", "threads"} and data["versions"] == tables.versions(CPU)
    assert lines[-1] == f"2 entries in {path} (table {found.digest})"
    assert "  backends: gate float32: native (1000: native 1 us, torch 2 us)" in lines


def test_without_time_nothing_is_measured_and_the_table_says_so(tmp_path: Path, few: list[str]) -> None:
    status, lines, found = run(tmp_path, minutes=0.0)
    assert status == 0 and few == [] and found.data == {}
    (path,) = tmp_path.iterdir()
    expected = ["gate float32: no time left", "threshold float32: no time left"]
    assert json.loads(path.read_text())["not_measured"] == expected
    assert [f"  not measured: {line}" in lines for line in expected] == [True, True]


def test_a_stop_leaves_what_was_measured(tmp_path: Path, few: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    measured = crossovers.compare

    def stop(one: crossovers.Rival, *rest: Any) -> dict[str, Any]:
        if one.operation == "threshold":
            raise KeyboardInterrupt
        return measured(one, *rest)

    monkeypatch.setattr(crossovers, "compare", stop)
    status, lines, found = run(tmp_path)
    assert status == 130 and found.data["backends"].keys() == {"gate"}
    assert any("the tuner was stopped" in line for line in lines)


def test_what_is_not_measured_again_stays(tmp_path: Path, few: list[str]) -> None:
    name = tables.device_name(CPU)
    kept = {"choose": "torch", "times": {"1000": {"native": 4.0, "torch": 1.0}}}
    old = {"pack": {"bits": kept}, "gate": {"float32": kept}}
    data = {"format": 1, "device": name, "versions": tables.versions(CPU), "backends": old}
    (tmp_path / tables.file_name(name)).write_text(json.dumps(data))
    _, _, found = run(tmp_path)
    assert found.data["backends"].keys() == {"pack", "gate", "threshold"}
    assert found.data["backends"]["gate"]["float32"]["choose"] == "native"


def test_a_damaged_table_is_replaced(tmp_path: Path, few: list[str]) -> None:
    (tmp_path / tables.file_name(tables.device_name(CPU))).write_text("{")
    assert run(tmp_path)[2].data["backends"].keys() == {"gate", "threshold"}


def test_a_folder_that_cannot_be_written_to_costs_no_measurement(tmp_path: Path, few: list[str]) -> None:
    (tmp_path / "file").write_text("in the way")
    status, lines, _ = run(tmp_path / "file")
    assert status == 1 and few == [] and "cannot be written" in lines[-1]


def test_without_a_folder_the_table_goes_into_the_users_own(
    tmp_path: Path, few: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WSN_FAST_CACHE", str(tmp_path))
    assert doctor.main(["--tune", "--device", "cpu"]) == 0
    assert (tmp_path / "tuning" / tables.file_name(tables.device_name(CPU))).is_file()


def test_devices_share_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[float] = []
    monkeypatch.setattr(command, "tune", lambda device, folder, minutes, say: given.append(minutes) or 0)
    assert command.main([CPU, CPU], tmp_path, 3.0) == 0
    assert given == [pytest.approx(1.5, abs=0.1), pytest.approx(3.0, abs=0.1)]


# --- the command line
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--minutes", "3"], "--minutes goes with --tune and --report"),
        (["--check", "--out", "x"], "--out goes with --tune and --report, and not with --check"),
        (["--device", "cpu"], "--device goes with --tune and --report"),
        (["--tune", "--report"], "not allowed with argument --tune"),
        (["--tune", "--minutes", "-1"], "must be a number of minutes"),
        (["--tune", "--minutes", "nan"], "must be a number of minutes"),
        (["--tune", "--device", "toaster"], "'toaster' is no device"),
        (["--report", "--device", "cuda:63"], "there is no cuda:63 here, but cpu"),
    ],
)
def test_a_wrong_command_line_is_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        doctor.main(arguments)
    assert message in capsys.readouterr().err
