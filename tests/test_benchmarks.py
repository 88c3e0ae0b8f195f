"""The benchmarks themselves: they run, a wrong result gets no time, a failure costs one row, floors are computed."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("pytest_benchmark")
ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
HAS_TRITON = importlib.util.find_spec("triton") is not None

if importlib.util.find_spec("benchmarks") is None:  # pytest puts no folder of the checkout on the path
    sys.path.insert(0, str(ROOT))

from benchmarks import ceilings, device_report, published  # noqa: E402
from benchmarks.baselines import step_bytes  # noqa: E402
from benchmarks.cases import (  # noqa: E402
    Case,
    Prepared,
    Rates,
    UnavailableError,
    Work,
    WrongResultError,
    check_close,
    check_same,
    check_threshold,
    floor_us,
    verify,
)
from benchmarks.gradients import Expected, Operands  # noqa: E402
from benchmarks.provenance import COMMIT_VARIABLE, provenance, slug  # noqa: E402
from benchmarks.rows import Row, run_case  # noqa: E402
from benchmarks.shapes import TINY  # noqa: E402
from benchmarks.suite import cases  # noqa: E402


def run_python(*arguments: str, interpret: bool = HAS_TRITON) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environment |= {"TRITON_INTERPRET": "1"} if interpret else {}
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500
    )


# --- the programs
def test_pytest_benchmarks_runs() -> None:
    options = ("-q", "--benchmark-disable", "--shapes", "tiny", "--device", "cpu", "-p", "no:cacheprovider")
    done = run_python("-m", "pytest", "benchmarks", *options, interpret=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


def test_dry_report_has_a_row_for_every_case(tmp_path: Path) -> None:
    done = run_python("-m", "benchmarks.device_report", "--dry", "--no-compiled", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    report = json.loads((tmp_path / "report.json").read_text())
    planned = device_report.plan("tiny", CPU, compiled=False)
    assert [(r["operation"], r["contender"], r["shape"]) for r in report["rows"]] == [
        (p.case.operation, p.case.contender, p.case.shape) for p in planned
    ]
    assert report["facts"]["complete"]
    bad = [r for r in report["rows"] if r["status"] not in ("ok", "unavailable")]
    assert not bad, bad[0]
    assert all((r["median_us"] is not None) == (r["status"] == "ok") == bool(r["check"]) for r in report["rows"])
    profiled = [r for r in report["rows"] if r["section"] == "Profile"]
    assert len(profiled) == 3 and all(sum(kernel[3] for kernel in r["kernels"]) > 0.9 for r in profiled)
    assert "what it does" in (tmp_path / "report.md").read_text()
    if HAS_TRITON:
        assert any(r["contender"] == "triton backend" and r["status"] == "ok" for r in report["rows"])


@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
def test_dry_tuning_file_is_read_back_as_written(tmp_path: Path) -> None:
    done = run_python("-m", "benchmarks.tune", "--dry", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    (path,) = tmp_path.iterdir()
    data = json.loads(path.read_text())
    assert data["not_measured"] == []
    assert {"elementwise", "linear", "linear_grad", "linear_tasks", "conv"} <= data.keys()
    script = f"""
import json, pathlib, torch
from wsn_fast.backends.tuning import Gpu, Product, Table
data = json.loads(pathlib.Path({str(path)!r}).read_text())
table = Table(data["device"], pathlib.Path({str(tmp_path)!r}))
assert list(vars(table.gate()).values()) == data["elementwise"]["gate"]
assert vars(table.threshold()) == data["elementwise"]["threshold"]
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
    read = run_python("-c", script)
    assert read.returncode == 0, read.stderr[-2000:]


TRIED = """
import dataclasses, torch
from benchmarks.trials import IEEE, Trials
from benchmarks.tune import DRY
from benchmarks.tuner_linear import LinearTables
tried = []
def clock(calls):
    tried.extend(call.args[0] for call in calls if len(call.args) == 2)
    return 1.0
trials = Trials(torch.device("cpu"), clock, float("inf"))
trials.processors = 16
(entry,) = LinearTables(trials, dataclasses.replace(DRY, grad_rows=(150,))).linear_grad(IEEE)
assert trials.not_measured == [], trials.not_measured
assert len({config for config, splits in tried}) == 3 and max(splits for config, splits in tried) > 1, tried
"""


@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
def test_every_tile_of_a_gradient_is_right_when_its_sum_is_split() -> None:
    done = run_python("-c", TRIED)
    assert done.returncode == 0, done.stderr[-2000:]


# --- a report survives its rows
def case(prepare: Callable[[], Prepared]) -> Case:
    return Case("operation", "contender", "shape", "float32", prepare)


def run(prepare: Callable[[], Prepared], remaining: float = 60.0) -> Row:
    return run_case("section", case(prepare), CPU, Rates(1e9, {}), seconds=0.0, remaining=remaining)


def refuse() -> str:
    raise WrongResultError("3 of 8 differ")


def test_a_wrong_result_gets_no_time() -> None:
    row = run(lambda: Prepared([lambda: None], refuse, [Work(8)]))
    assert (row.status, row.error, row.median_us, row.floor_us) == ("wrong", "3 of 8 differ", None, None)


def test_a_result_that_turns_wrong_gets_no_time() -> None:
    row = run(lambda: Prepared([lambda: None], lambda: "right at first", [Work(8)], recheck=refuse))
    assert (row.status, row.median_us) == ("wrong", None)


def test_a_failure_is_a_row_without_paths() -> None:
    def prepare() -> Prepared:
        raise RuntimeError("no memory in /somewhere/of/mine/file.py")

    row = run(prepare)
    assert (row.status, row.error) == ("failed", "RuntimeError: no memory in file.py")


def test_what_is_not_there_says_why() -> None:
    def prepare() -> Prepared:
        raise UnavailableError("no GPU")

    assert (run(prepare).status, run(prepare).error) == ("unavailable", "no GPU")


def test_a_case_that_would_take_too_long_is_skipped_and_says_so() -> None:
    row = run(lambda: Prepared([lambda: time.sleep(0.02)], lambda: "right", [Work()]), remaining=0.05)
    assert row.status == "skipped"
    assert "of the section were left" in row.error


WORKER = """
import json, os, pathlib, sys
journal, first = pathlib.Path(sys.argv[1]), int(sys.argv[3])
with journal.open("a", encoding="utf-8") as file:
    for index in range(first, 3):
        print(json.dumps({"begin": index}), file=file, flush=True)
        if index == 1:
            os.abort()
        row = dict(section="s", operation="o", contender=str(index), shape="", dtype="", status="ok", ratio=None)
        print(json.dumps({"end": index, "row": row}), file=file, flush=True)
"""


def test_a_row_that_kills_its_process_costs_that_row_alone(tmp_path: Path) -> None:
    journal = device_report.Journal(tmp_path / "journal")
    planned = [device_report.Planned("s", 1.0, case(lambda: Prepared([], str, []))) for _ in range(3)]
    command = [sys.executable, "-c", WORKER, str(journal.path)]
    device_report.supervise(command, journal, planned, lambda: None, time.time() + 60)
    rows = journal.rows()
    assert [rows[i].status for i in range(3)] == ["ok", "failed", "ok"]
    assert "the process ended with status" in rows[1].error


def test_a_worker_that_cannot_start_is_an_error(tmp_path: Path) -> None:
    journal = device_report.Journal(tmp_path / "journal")
    planned = [device_report.Planned("s", 1.0, case(lambda: Prepared([], str, [])))]
    with pytest.raises(RuntimeError, match="before its first row"):
        device_report.supervise([sys.executable, "-c", "exit(7)"], journal, planned, lambda: None, time.time() + 60)


# --- the checks have teeth
def test_memory_of_a_checked_call_is_poisoned() -> None:
    seen: list[Tensor] = []
    verify(Prepared([lambda: seen.append(torch.empty(4))], lambda: "", []))
    assert seen[0].isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_one_wrong_element_in_a_million_is_found() -> None:
    exact = torch.randn(1 << 20, dtype=torch.float64)
    torchs = exact.to(torch.bfloat16)
    check_close(torchs.clone(), torchs, exact, "y")
    wrong = torchs.clone()
    wrong[12345] = 0.0 if abs(wrong[12345]) > 0.5 else 1.0
    with pytest.raises(WrongResultError, match="largest error"):
        check_close(wrong, torchs, exact, "y")


def test_a_small_error_everywhere_is_found() -> None:
    exact = torch.randn(1 << 16, dtype=torch.float64)
    torchs = exact.to(torch.bfloat16)
    with pytest.raises(WrongResultError, match="error"):
        check_close((exact * 1.008).to(torch.bfloat16), torchs, exact, "y")


@pytest.mark.parametrize("value", [float("nan"), 2.0])
def test_values_are_compared_with_nan(value: float) -> None:
    expected = torch.tensor([1.0, float("nan"), 3.0])
    check_same(expected.clone(), expected, "x")
    with pytest.raises(WrongResultError, match="1 of 3 differ, the first at"):
        check_same(torch.tensor([value, float("nan"), 3.0]), expected, "x")


def test_a_threshold_one_rank_off_is_found() -> None:
    scores = torch.randn(1001)
    keys = scores.abs().sort().values
    check_threshold(keys[500], scores, 500, "magnitude")
    with pytest.raises(WrongResultError, match="threshold"):
        check_threshold(keys[501], scores, 500, "magnitude")


@pytest.mark.parametrize("wrong", ["dW", "dS"])
def test_a_wrong_gradient_of_a_product_is_found(wrong: str) -> None:
    operands = Operands.random((24, 40), 5, torch.float32, CPU)
    expected, (dw, ds) = Expected(operands), operands.in_memory()
    expected.check([dw, ds])
    if wrong == "dW":
        dw[operands.frozen] = 1e-12  # the 2x rule would let it pass
    else:
        ds[0, 0] += 1.0
    with pytest.raises(WrongResultError, match=wrong):
        expected.check([dw, ds])


@pytest.mark.parametrize("density", [0.03, 0.3, 0.5, 1.0])
def test_the_papers_threshold_is_the_specified_one(density: float) -> None:
    from wsn_fast import reference

    scores = torch.randn(999)
    assert published.paper_threshold(scores, density) == reference.topc_threshold(scores, density).item()


# --- floors, provenance
def test_a_floor_is_the_sum_of_its_stages() -> None:
    rates = Rates(1e12, {"bfloat16": 1e14})
    assert floor_us([Work(1e6, 1e9), Work(4e6)], rates, "bfloat16") == pytest.approx(10 + 4)
    assert floor_us([Work(1e6, 1e9)], rates, "float16") is None


def test_a_step_moves_the_bytes_of_its_parts() -> None:
    assert step_bytes(1, 2, masked=False) == 2 + 24 + 2  # bf16 gradient and weight, fp32 weight and moments both ways
    assert step_bytes(2, 2, masked=True) == pytest.approx(52.4, abs=0.05)


def test_rates_come_from_the_rows() -> None:
    def row(operation: str, dtype: str, amount: float) -> Row:
        notes = {"amount": amount}
        return Row(ceilings.SECTION, operation, "torch", "", dtype, "ok", median_us=2.0, notes=notes)

    rates = ceilings.rates([row("copy", "float32", 4e6), row("matmul", "bfloat16", 6e8)])
    assert rates == Rates(pytest.approx(2e12), {"bfloat16": pytest.approx(3e14)})
    assert ceilings.rates([row("matmul", "bfloat16", 6e8)]) is None


def test_a_named_commit_goes_before_git(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(COMMIT_VARIABLE, "abc123+dirty")
    facts = provenance(CPU)
    assert (facts["commit"], facts["dirty"]) == ("abc123", True)
    assert slug("NVIDIA H200") == "nvidia-h200"


def test_the_list_of_cases_names_each_once() -> None:
    names = [str(c) for c in cases(TINY, CPU, compiled=True)]
    assert len(names) == len(set(names)) > 80
