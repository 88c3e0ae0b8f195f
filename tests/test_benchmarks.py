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
from torch import Tensor, nn

pytest.importorskip("pytest_benchmark")
ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
HAS_TRITON = importlib.util.find_spec("triton") is not None

if importlib.util.find_spec("benchmarks") is None:  # pytest puts no folder of the checkout on the path
    sys.path.insert(0, str(ROOT))

from benchmarks import ceilings, device_report, memory, published  # noqa: E402
from benchmarks import profile as profiles  # noqa: E402
from benchmarks.baselines import COMPETITORS, Clarena, Competitor, Ours, OursOnePass, Paper, step_bytes  # noqa: E402
from benchmarks.cases import (  # noqa: E402
    Case,
    Kernel,
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
from benchmarks.markdown import markdown  # noqa: E402
from benchmarks.problem import Problem, StepShape  # noqa: E402
from benchmarks.provenance import COMMIT_VARIABLE, provenance, slug  # noqa: E402
from benchmarks.rows import Row, run_case  # noqa: E402
from benchmarks.shapes import TINY, LinearShape  # noqa: E402
from benchmarks.steps import step_cases  # noqa: E402
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


LAYER, NET = TINY.steps[0], TINY.nets[0]


class _KeepsNothing(Ours):
    """A bug: it forgets to protect the weights of earlier tasks."""

    def build(self, net: nn.Module) -> None:
        super().build(net)
        for layer in self.layers.values():
            layer.weight_union = None


class _KeepsNothingInOnePass(_KeepsNothing, OursOnePass):
    """The same bug in the one-pass mode."""


class _KeepsAnotherMask(Ours):
    """A bug: the layers rank scores by another rule than they should."""

    def build(self, net: nn.Module) -> None:
        super().build(net)
        for layer in self.layers.values():
            layer.rule = "value"


class _LosesTheGate(Paper):
    """A bug: the whole weight goes into the product."""

    def build(self, net: nn.Module) -> None:
        super().build(net)
        for layer in self.layers.values():
            layer.masked_weight = lambda layer=layer: layer.weight + 0 * layer.scores


class _ForgetsTheOptimizer(Paper):
    """A bug: nothing learns."""

    def make_optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters.values(), 0.0)


class _ForgetsTheHead(Paper):
    """A bug: the head alone does not learn."""

    def make_optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.Adam([p for name, p in self.parameters.items() if "head" not in name], 1e-6)


@pytest.mark.parametrize("shape", [LAYER, NET], ids=str)
@pytest.mark.parametrize(
    "broken", [_KeepsNothing, _KeepsNothingInOnePass, _KeepsAnotherMask, _LosesTheGate, _ForgetsTheOptimizer]
)
def test_a_broken_competitor_is_found(broken: type[Competitor], shape: StepShape) -> None:
    competitor = broken(Problem(shape, CPU))
    competitor.step()
    with pytest.raises(WrongResultError):
        competitor.check()


def test_a_head_that_does_not_learn_is_found() -> None:
    competitor = _ForgetsTheHead(Problem(NET, CPU))
    competitor.step()
    with pytest.raises(WrongResultError, match=r"head\.weight: the optimizer is"):
        competitor.check()


def test_a_missing_gradient_is_found() -> None:
    competitor = Ours(Problem(NET, CPU))
    competitor.step()
    results = competitor.results()
    del results["head.weight"]
    masks = {name: competitor.mask(name, competitor.problem.start[f"{name}.scores"]) for name in competitor.layers}
    with pytest.raises(WrongResultError, match="head.weight"):
        competitor.problem.check(results, masks, "magnitude")


def test_the_one_pass_competitor_writes_no_gradient_of_the_scores() -> None:
    competitor = OursOnePass(Problem(LAYER, CPU))
    competitor.step()
    assert competitor.parameters["0.scores"].grad is None
    raw = competitor.parameters["0.weight"].grad
    assert raw is not None and bool((raw[competitor.problem.unions["0"]] != 0).any())


def test_the_standard_competitor_has_gradients_of_the_usual_kind() -> None:
    competitor = Ours(Problem(LAYER, CPU))
    competitor.step()
    assert competitor.parameters["0.scores"].grad is not None
    dw = competitor.parameters["0.weight"].grad
    assert dw is not None and bool((dw[competitor.problem.unions["0"]] == 0).all())


@pytest.mark.parametrize("shape", [LAYER, NET], ids=str)
def test_a_restarted_competitor_steps_as_at_first(shape: StepShape) -> None:
    competitor = Ours(Problem(shape, CPU))
    for _ in range(3):
        competitor.step()
    competitor.restart()
    for state in competitor.optimizer.state.values():
        for value in state.values():
            value.zero_()
    competitor.step()
    competitor.check()


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


@pytest.mark.parametrize("shape", [LinearShape(30, 41, 7), NET], ids=str)
@pytest.mark.parametrize("kind", [c for c in COMPETITORS if not c.compiled], ids=lambda c: c.name)
def test_a_competitor_is_right_at_first_and_keeps_frozen_weights(kind: type[Competitor], shape: StepShape) -> None:
    competitor = kind(Problem(shape, CPU))
    competitor.step()
    competitor.check()
    for _ in range(20):
        competitor.step()
    competitor.check_later()


def test_who_has_no_convolutions_is_not_among_the_competitors_of_one() -> None:
    of = {shape: {c.contender for c in step_cases([shape], CPU, False)} for shape in (*TINY.conv_steps, *TINY.nets)}
    assert [Clarena.name in names for names in of.values()] == [False, True, False]


# --- memory, profiles
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the kernel cannot reset a peak")
def test_the_memory_of_a_dense_step_is_weight_gradient_and_moments() -> None:
    shape = LinearShape(2048, 2048, 8)
    peak = memory.on_cpu(COMPETITORS[0], shape)[memory.NOTE]
    batch = 4 * 8 * (2048 + 2048) * 2 / 2048**2  # input and result, and their gradients
    assert peak == pytest.approx(4 * 4 + batch, abs=0.7)


def test_small_layers_have_no_measured_memory() -> None:
    assert memory.on_cpu(COMPETITORS[0], LAYER) == {}


def test_kernels_are_added_up_and_explained() -> None:
    problem = Problem(LinearShape(24, 40, 5), CPU)
    runs = [("void at::native::sort<float>(x)", 5.0), ("adamw_kernel", 60.0), ("adamw_kernel", 30.0), ("odd", 5.0)]
    update, sort, odd = profiles.kernels(runs * profiles.STEPS, problem, one_pass=False)
    assert update == Kernel("adamw_kernel", 2, 90.0, pytest.approx(0.9), update.role, pytest.approx(2 * 56.125 * 960))
    assert (sort.name, sort.role, sort.bytes) == ("at::native::sort", "torch's selection", None)
    assert (odd.role, odd.us) == ("", 5.0)


def test_a_large_kernel_that_nobody_knows_stands_out() -> None:
    row = Row("Profile", "linear step profile", "ours", "", "float32", "ok", median_us=2.0)
    row.kernels = [Kernel("update", 1, 1.0, 0.9, "our update", 2e6), Kernel("odd", 2, 0.1, 0.1, "", None)]
    text = markdown("Report", {}, [row])
    assert "| update | 1 | 1.00 | 90.0% | our update | 2.00 | 2000 |" in text
    assert "| odd | 2 | 0.10 | 10.0% | **not known** |  |  |" in text


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


def rows_of_a_step(*times: tuple[str, float], shape: str = "2048x2048 b64") -> list[Row]:
    key = {"section": "Steps", "operation": "linear step", "shape": shape, "dtype": "float32"}
    return [Row(**key, contender=name, status="ok", check="right", median_us=us, floor_us=10.0) for name, us in times]


def test_markdown_shows_losses() -> None:
    failed = Row("Steps", "linear step", "CLArena", "2048x2048 b64", "float32", "failed", error="too | large")
    text = markdown("Report", {"device": "none"}, [*rows_of_a_step(("ours", 50.0), ("paper", 100.0)), failed])
    assert "| 50.00 |  |  | 10.00 | 5.00 | 1.00 |" in text
    assert "| 100 |  |  | 10.00 | 10.00 | 2.00 |" in text
    assert "**failed**: too / large" in text


def test_targets_are_of_the_one_pass_step_and_stand_beside_every_row() -> None:
    rows = rows_of_a_step(("dense", 10.0), ("ours", 50.0), ("ours, one pass", 16.0), ("paper", 100.0))
    text = markdown("Report", {"device": "none"}, rows)
    ratio = "ours, one pass (linear step 2048x2048 b64) / dense (linear step 2048x2048 b64)"
    assert f"| {ratio} | 1.60 | at most 1.8 | met | 5.00 |" in text
    assert "dense: 5.00, at most 1.8, **missed** by 178%; paper: 2.00, at least 5, **missed** by 150% |" in text
    assert "dense: 1.60, at most 1.8, met; paper: 6.25, at least 5, met |" in text


def test_memory_has_a_target() -> None:
    (row,) = rows_of_a_step(("ours, one pass", 16.0), shape="4096x4096 b32")
    row.notes[memory.NOTE] = 33.0
    text = markdown("Report", {}, [row])
    assert "/ 30 B | 1.10 | at most 1 | **missed** by 10% |" in text
    assert "memory over 30 B: 1.10, at most 1, **missed** by 10% |" in text
