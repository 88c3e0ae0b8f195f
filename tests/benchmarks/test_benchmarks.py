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
import workers
from torch import Tensor

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
HAS_TRITON = importlib.util.find_spec("triton") is not None

if importlib.util.find_spec("benchmarks") is None:  # pytest puts no folder of the checkout on the path
    sys.path.insert(0, str(ROOT))

from benchmarks import device_report, forgetting, picture  # noqa: E402
from benchmarks.cases import Case, Prepared, Work, verify  # noqa: E402
from benchmarks.checks import check_threshold  # noqa: E402
from benchmarks.provenance import COMMIT_VARIABLE, provenance  # noqa: E402
from benchmarks.rows import Row, load, run_case  # noqa: E402
from benchmarks.shapes import TINY  # noqa: E402
from benchmarks.suite import Planned, plan  # noqa: E402
from wsn_fast.doctor.measuring.checks import (  # noqa: E402
    UnavailableError,
    WrongResultError,
    check_close,
    check_same,
)
from wsn_fast.train.data import load as load_data  # noqa: E402


def run_python(*arguments: str, interpret: bool = HAS_TRITON) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environment |= {"TRITON_INTERPRET": "1"} if interpret else {}
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500
    )


# --- the programs
def test_pytest_benchmarks_runs_and_ends_with_a_table(tmp_path: Path) -> None:
    options = ("-q", "--seconds", "0", "--shapes", "tiny", "--device", "cpu", "-p", "no:cacheprovider")
    few = "(step or inference or threshold) and not (lenet and (ours or paper or eager))"
    options += ("-k", few, "--results", str(tmp_path / "results.json"))
    done = run_python("-m", "pytest", "benchmarks", *options, interpret=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    table = done.stdout.split("benchmarks ===")[-1]
    measured = ("linear step 24x40", "net step mlp", "net step lenet", "conv step", "inference mlp", "threshold 1000")
    assert all(f"| {name}" in table for name in measured)
    facts, rows = load(tmp_path / "results.json")
    assert {"commit", "device", "torch", "threads"} <= facts.keys()
    assert len(rows) > 30 and all(row.median_us and row.check for row in rows if row.status == "ok")
    forgotten = {
        "settings": {"epochs": 1, "tasks": 2, "data": "d", "seeds": [0], "optimizer": "Adam", "weight_decay": 0.1}
    }
    forgotten["curves"] = {"ours": [[90.0, 90.0]], "paper": [[90.0, 20.0]], "clarena": [[90.0, 21.0]]}
    picture.write(picture.draw(facts, rows, forgotten, "linear step 24x40 b5"), tmp_path / "picture.svg")
    svg = (tmp_path / "picture.svg").read_text()
    assert all(name in svg for name in (*picture.BARS.values(), *picture.CURVES.values(), "prefers-color-scheme"))


@pytest.mark.ci
def test_pytest_benchmarks_runs_every_case() -> None:
    options = ("-q", "--seconds", "0", "--shapes", "tiny", "--device", "cpu", "-p", "no:cacheprovider")
    done = run_python("-m", "pytest", "benchmarks", *options, interpret=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


@pytest.mark.parametrize("only", ["linear step", pytest.param("", marks=pytest.mark.ci)], ids=["linear", "all"])
def test_dry_report_has_a_row_for_every_case(tmp_path: Path, only: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    if HAS_TRITON and not only:
        monkeypatch.setenv("TRITON_INTERPRET", "1")  # for the worker
    assert device_report.main(["--dry", "--no-compiled", "--out", str(tmp_path), "--only", only]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    planned = plan(TINY, CPU, compiled=False, only=only)
    assert [(r["operation"], r["contender"], r["shape"]) for r in report["rows"]] == [
        (p.case.operation, p.case.contender, p.case.shape) for p in planned
    ]
    assert report["facts"]["complete"]
    bad = [r for r in report["rows"] if r["status"] not in ("ok", "unavailable")]
    assert not bad, bad[0]
    assert all((r["median_us"] is not None) == (r["status"] == "ok") == bool(r["check"]) for r in report["rows"])
    assert "check, or why there is no time" in (tmp_path / "report.md").read_text()
    if HAS_TRITON and not only:
        assert any(r["contender"] == "triton backend" and r["status"] == "ok" for r in report["rows"])


def test_ours_does_not_forget_where_the_published_programs_do() -> None:
    data = load_data("digits")
    ours, paper = (forgetting.run(program, data, seed=0, epochs=2) for program in ("ours", "paper"))
    assert len(ours) == len(paper) == 1 + 2 * (forgetting.TASKS - 1)
    assert set(ours) == {ours[0]} and ours[0] > 60
    assert paper[0] > 60 and paper[-1] < 50


# --- a report survives its rows
def case(prepare: Callable[[], Prepared]) -> Case:
    return Case("operation", "contender", "shape", "float32", prepare)


def run(prepare: Callable[[], Prepared], remaining: float = 60.0) -> Row:
    return run_case("section", case(prepare), CPU, seconds=0.0, remaining=remaining)


def refuse(result: object = None) -> str:
    raise WrongResultError("3 of 8 differ")


def test_a_wrong_result_gets_no_time() -> None:
    row = run(lambda: Prepared([lambda: None], refuse, Work(8)))
    assert (row.status, row.error, row.median_us, row.p20_us) == ("wrong", "3 of 8 differ", None, None)


def test_a_result_that_turns_wrong_gets_no_time() -> None:
    row = run(lambda: Prepared([lambda: None], lambda _: "right at first", Work(8), recheck=refuse))
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
    row = run(lambda: Prepared([lambda: time.sleep(0.02)], lambda _: "right", Work()), remaining=0.05)
    assert row.status == "skipped"
    assert "of the section were left" in row.error


@pytest.fixture
def three() -> device_report.Report:
    return device_report.Report([Planned("s", 1.0, case(lambda: Prepared([], str, Work()))) for _ in range(3)])


def test_a_row_that_kills_its_process_costs_that_row_alone(tmp_path: Path, three: device_report.Report) -> None:
    device_report.supervise(workers.dies_in_row_1, three, tmp_path, time.time() + 60)
    assert [row.status for row in three.rows] == ["ok", "failed", "ok"]
    assert "the process ended with status" in three.rows[1].error


def test_a_fault_between_rows_costs_no_row(tmp_path: Path, three: device_report.Report) -> None:
    assert device_report.FAULT == workers.FAULT
    device_report.supervise(workers.dies_after_row_1, three, tmp_path, time.time() + 60)
    assert [row.status for row in three.rows] == ["ok", "ok", "ok"]


def test_a_row_that_hangs_costs_that_row_alone(
    tmp_path: Path, three: device_report.Report, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Rows(list[Row]):
        """Once the first row is there, the second one hangs, and only then is there no patience."""

        def append(self, row: Row) -> None:
            super().append(row)
            monkeypatch.setattr(device_report, "ROW_SECONDS", 0.5 if len(self) == 1 else 120.0)

    three.rows = Rows()
    monkeypatch.setattr(device_report, "ROW_SECONDS", 120.0)
    device_report.supervise(workers.hangs_in_row_1, three, tmp_path, time.time() + 300)
    assert [row.status for row in three.rows] == ["ok", "failed", "ok"]


def test_a_worker_that_cannot_start_is_an_error(tmp_path: Path, three: device_report.Report) -> None:
    with pytest.raises(RuntimeError, match="before its first row"):
        device_report.supervise(workers.ends_at_once, three, tmp_path, time.time() + 60)


# --- the checks have teeth
def test_memory_of_a_checked_call_is_poisoned() -> None:
    seen: list[Tensor] = []
    verify(Prepared([lambda: seen.append(torch.empty(4))], lambda _: "", Work()))
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


@pytest.mark.parametrize("density", [0.03, 0.3, 0.5, 1.0])
def test_the_papers_threshold_is_the_specified_one(density: float) -> None:
    from wsn_fast.reference import specification
    from wsn_fast.reference.trainer import PaperGate

    scores = torch.randn(999)
    assert PaperGate(scores).threshold(scores, density) == specification.topc_threshold(scores, density).item()


# --- work, provenance


def test_a_named_commit_goes_before_git(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(COMMIT_VARIABLE, "abc123+dirty")
    facts = provenance(CPU)
    assert (facts["commit"], facts["dirty"]) == ("abc123", True)


def test_the_list_of_cases_names_each_once() -> None:
    names = [str(row.case) for row in plan(TINY, CPU, compiled=True)]
    assert len(names) == len(set(names)) > 80
