from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from wsn_fast.train import paper_numbers, report, tables
from wsn_fast.train.choices import FIVE_DATASETS
from wsn_fast.train.config import portable, resolve


def results(tasks: int = 10, **given: Any) -> dict[str, Any]:
    """Made-up results of a run of the paper's Permuted MNIST, or of what ``given`` makes of it."""
    settings = resolve(**{"stream": "permuted", "data": "mnist", "data_dir": "d", "tasks": tasks, **given})
    row = [90.0 + task for task in range(tasks)]
    reuse = [
        {"task": t, "density": 30.0, "reuse": 50.0 if t else 0.0, "new": 15.0 if t else 30.0} for t in range(tasks)
    ]
    return {
        "accuracy_matrix": [[*row[: i + 1], *[None] * (tasks - i - 1)] for i in range(tasks)],
        "acc": 94.5,
        "bwt": 0.0,
        "fwt": 1.25,
        "forgetting": [0.0] * tasks,
        "capacity": 88.5,
        "capacity_paper": 77.25,
        "union_density": 70.0,
        "compression": 12.0,
        "reuse": reuse,
        "random_init": [10.0] * tasks,
        "before_training": [11.0] * tasks,
        "config": portable(settings),
    }


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"density": 0.3}, (96.41, 77.73)),
        ({"density": 0.03}, (94.84, 19.87)),
        ({"stream": "split", "data": "cifar100", "density": 0.1}, (74.55, 39.87)),
        ({"stream": "split", "data": "folder", "density": 0.5, "tasks": 40}, (69.06, 92.03)),
    ],
)
def test_the_papers_numbers_stand_beside_its_settings(given: dict[str, Any], expected: tuple[float, float]) -> None:
    found = paper_numbers.beside_paper(results(**given))
    assert found is not None
    assert found[:2] == expected


def test_the_papers_own_settings_differ_in_nothing() -> None:
    assert paper_numbers.beside_paper(results(seed=5, device="cpu", checkpoint_seconds=9)) == (96.41, 77.73, "")


@pytest.mark.parametrize(
    ("net", "differences"),
    [({}, "net resnet18 (paper: resnet18_stateless)"), ({"net": "resnet18_stateless"}, "")],
)
def test_norms_with_statistics_are_not_the_papers(net: dict[str, str], differences: str) -> None:
    given = {"stream": "datasets", "data": FIVE_DATASETS, "tasks": 5, "density": 0.3, **net}
    assert paper_numbers.beside_paper(results(**given)) == (93.22, 62.3, differences)


def test_what_a_run_does_otherwise_is_listed() -> None:
    found = paper_numbers.beside_paper(results(batch_size=64, epochs=3))
    assert found is not None
    assert found[2] == "epochs 3 (paper: 5), batch_size 64 (paper: 10)"


@pytest.mark.parametrize(
    "given",
    [
        {"density": 0.2},
        {"tasks": 9},
        {"stream": "rotated"},
        {"data": "fashion_mnist"},
        {"preset": "clarena"},
        {"reinit_scores": True},
        {"score_init": "N01"},
    ],
    ids=str,
)
def test_other_settings_have_no_numbers_of_the_paper(given: dict[str, Any]) -> None:
    assert paper_numbers.beside_paper(results(**given)) is None


def test_the_table_has_the_numbers_of_run_and_paper_in_columns() -> None:
    lines = tables.of_runs({"runs/a": results(batch_size=64), "b": results(density=0.2)}).splitlines()
    assert len({line.index("0.00") + len("0.00") for line in lines[1:3]}) == 1
    assert lines[1].split()[:1] == ["runs/a"]
    numbers = ["0.3", "94.50", "0.00", "1.25", "77.25", "88.50", "96.41", "77.73"]
    assert lines[1].split()[5:13] == numbers
    assert lines[1].endswith("batch_size 64 (paper: 10)")
    assert lines[2].split()[-2:] == ["-", "-"]


@pytest.mark.parametrize("columns", [30, 60, 100])
def test_a_table_fits_a_narrow_terminal(columns: int) -> None:
    runs = {"runs/a": results(batch_size=64), "b": results(density=0.2)}
    text = tables.of_runs(runs, columns)
    assert max(map(len, text.splitlines())) <= columns
    words = " ".join(text.split())
    assert "runs/a permuted mnist x10 paper c 0.3, ACC 94.50, BWT 0.00" in words
    assert "CAP* 88.50, paper: ACC 96.41, paper: CAP 77.73, differs in batch_size 64 (paper: 10)" in words
    assert tables.of_runs(runs, 1000) == tables.of_runs(runs), "a wide one has columns"


def test_differences_are_exact_and_named() -> None:
    stored, measured = results(), results()
    assert report.differences(stored, measured) == []
    measured["acc"] += 1e-12
    measured["reuse"][3]["new"] = 0.0
    assert [line.split(":")[0] for line in report.differences(stored, measured)] == ["acc", "reuse"]


@pytest.mark.parametrize("tasks", [1, 5, 40])
def test_plots_are_drawn(tmp_path: Path, tasks: int) -> None:
    report.plot(results(tasks), tmp_path)
    for name in ("accuracy_matrix.png", "capacity.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG"), name


def test_plots_touch_no_global_state(tmp_path: Path) -> None:
    code = "import sys; from wsn_fast.train import paper_numbers, report, tables; print('matplotlib' in sys.modules); "
    code += f"report.plot({results(2)!r}, __import__('pathlib').Path({str(tmp_path)!r})); "
    code += "print('matplotlib.pyplot' in sys.modules)"
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def show(console: report.Console) -> None:
    assert list(console.loading(range(7), 7, "reading images")) == [*range(7)]
    console.task_started(0, 2, 3, 10, 1)
    for _ in range(20):
        console.step()
    console.epoch_ended(3, 0.5, 90.0, 1e-3)
    console.task_ended(0, 2, 91.234, 2, {"evaluation": 0.3, "training": 1.2})


def test_a_terminal_gets_bars(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    show(report.Console())
    out, err = capsys.readouterr()
    assert "task 0 (1/2)" in err
    assert "30/30" in err
    assert out == "task 0 (1/2): test accuracy 91.23 % (best epoch 2, 1.5 s: training 80 %, evaluation 20 %)\n"


def test_long_loads_get_a_bar_on_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    loading: Any = report.Console().loading(range(3), 3, "reading images")
    assert loading.delay == 1  # seconds
    loading.delay = loading.mininterval = 0
    assert list(loading) == [0, 1, 2]
    said = capsys.readouterr().err
    assert "reading images: " in said and "3/3" in said
    assert said.endswith("\r"), "the bar goes when all is read"


def test_elsewhere_there_are_only_lines(capsys: pytest.CaptureFixture[str]) -> None:
    show(report.Console())
    out, err = capsys.readouterr()
    assert (out.count("\n"), err) == (1, "")
    items = range(3)
    assert report.Console().loading(items, 3, "reading images") is items, "no bar, however long it takes"


def test_quiet_is_quiet_on_a_terminal_too(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    console = report.Console(quiet=True)
    show(console)
    items = range(3)
    assert console.loading(items, 3, "reading images") is items
    console.say("something")
    assert capsys.readouterr() == ("", "")
