"""Means over seeds: in rows, on the console and on the page."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from pages import made_up, render

from wsn_fast.train import tables
from wsn_fast.train.records import Record
from wsn_fast.train.seeds import over_seeds


def run(name: str, acc: float = 95.5, **given: Any) -> Record:
    """A made-up run whose average accuracy is ``acc``."""
    one = made_up(name=name, **given)
    assert one.results is not None
    return replace(one, results={**one.results, "acc": acc})


def results(*runs: Record) -> dict[str, Any]:
    return {one.name: one.results for one in runs}


THREE = [run("a", 90.0, seed=1), run("b", 91.0, seed=2), run("c", 95.0, seed=3)]


def test_runs_that_differ_in_the_seed_are_one_row() -> None:
    (row,) = over_seeds(results(*THREE))
    assert (list(row.runs), row.seeds, row.count) == (["a", "b", "c"], 3, "3")
    assert row.numbers["acc"].mean == 92.0


def test_the_deviation_is_that_of_a_sample() -> None:
    (row,) = over_seeds(results(*THREE))
    assert row.numbers["acc"].deviation == 7**0.5  # (4 + 1 + 9) / (3 - 1)


def test_one_seed_has_no_deviation() -> None:
    (row,) = over_seeds(results(THREE[0]))
    assert row.numbers["acc"] == (90.0, None)
    assert row.numbers["acc"].text() == "90.00"


def test_runs_of_the_same_seed_count_once() -> None:
    again = run("again", 94.0, seed=1, threads=2, device="cpu", checkpoint_seconds=9)
    (row,) = over_seeds(results(*THREE, again))
    assert (row.seeds, row.count) == (3, "3 (4 runs)")
    assert row.numbers["acc"].mean == pytest.approx((92.0 + 91.0 + 95.0) / 3)


@pytest.mark.parametrize("name", ["density", "batch_size", "one_pass", "lr", "net"])
def test_runs_that_differ_in_more_are_different_rows(name: str) -> None:
    other = {"density": 0.1, "batch_size": 64, "one_pass": False, "lr": 0.5, "net": "lenet"}[name]
    assert [list(row.runs) for row in over_seeds(results(*THREE, run("d", **{name: other})))] == [list("abc"), ["d"]]


def test_runs_on_other_data_are_different_rows() -> None:
    assert THREE[1].results is not None
    other = replace(THREE[1], results={**THREE[1].results, "data_fingerprint": "e" * 32})
    rows = over_seeds(results(THREE[0], other))
    assert [row.setting for row in rows] == [
        f"permuted digits x3 paper, data fingerprint {letter * 12}" for letter in "fe"
    ]


def test_a_run_that_is_not_finished_is_in_no_row() -> None:
    half = run("half", seed=4)
    assert half.results is not None
    half = replace(half, results={**half.results, "config": {**half.settings, "tasks": 5}})
    assert over_seeds(results(half)) == []


def test_rows_say_in_what_they_differ_from_rows_that_look_the_same() -> None:
    rows = over_seeds(results(run("a", lr=0.5), run("b", lr=0.25), run("c", density=0.1, lr=0.125)))
    assert [row.setting for row in rows] == [
        "permuted digits x3 paper, lr 0.5", "permuted digits x3 paper, lr 0.25", "permuted digits x3 paper",
    ]  # fmt: skip


def test_a_printed_row_has_means_deviations_and_seeds() -> None:
    head, row, caption = tables.of_seeds(over_seeds(results(*THREE))).splitlines()
    assert head.split()[:4] == ["setting", "seeds", "c", "ACC"]
    assert "x3 paper      3  0.3  92.00 +- 2.65  0.00 +- 0.00  1.25 +- 0.00  77.25 +- 0.00  88.50 +- 0.00" in row
    assert "sample standard deviation (n - 1)" in caption


@pytest.mark.parametrize("columns", [30, 60])
def test_printed_rows_fit_a_narrow_terminal(columns: int) -> None:
    text = tables.of_seeds(over_seeds(results(*THREE)), columns)
    assert max(map(len, text.splitlines())) <= columns
    assert "seeds 3 c 0.3, ACC 92.00 +- 2.65" in " ".join(text.split())


def test_the_page_has_a_row_over_seeds_and_still_every_run() -> None:
    parsed = render(*THREE, run("d", density=0.1, seed=1))
    assert [row[0][:2] for row in parsed.rows("Runs")[1:]] == ["1.", "2.", "3.", "4."]
    head, *rows = parsed.rows("Over seeds: mean and sample standard deviation (n - 1)")
    assert head[:5] == ["setting", "runs", "seeds", "density", "ACC"]
    assert [row[1:5] for row in rows] == [["1, 2, 3", "3", "0.3", "92.00 ± 2.65"], ["4", "1", "0.1", "95.50"]]


def test_a_page_of_one_seed_has_no_row_over_seeds() -> None:
    assert "Over seeds" not in render(THREE[0], run("d", density=0.1)).all("main")[0]["text"]


# --- the paper's table ------------------------------------------------------------------------------------
def of_paper(name: str, **given: Any) -> Record:
    return run(name, **{"tasks": 10, "stream": "permuted", "data": "mnist", "data_dir": "d", **given})


def test_the_papers_table_is_all_there() -> None:
    lines = tables.of_paper([]).splitlines()
    names = ["Permuted MNIST", "5-Datasets", "Omniglot Rotation", "CIFAR-100 Split", "CIFAR-100 Superclass"]
    assert lines[0].split("  ")[-1] == "TinyImageNet"
    assert [name in lines[0] for name in names] == [True] * 5
    assert [line.split()[0] for line in lines[1:6]] == ["0.03", "0.05", "0.1", "0.3", "0.5"]
    last = "96.24 / 98.10 93.41 / 86.10 79.80 / 121.20 76.38 / 99.13 61.79 / 80.93 69.06 / 92.03"
    assert " ".join(lines[5].split()[2:]) == last
    assert lines[-1] == "No finished run has a setting of this table."


def test_ours_stands_below_the_papers_in_its_column() -> None:
    runs = [of_paper("a", acc=96.0, seed=1), of_paper("b", acc=97.0, seed=2)]
    other = run("c", acc=60.0, tasks=20, stream="superclass", data="cifar100", data_dir="d", epochs=3)
    lines = tables.of_paper(over_seeds(results(*runs, other))).splitlines()
    paper, ours = next((lines[i], lines[i + 1]) for i, line in enumerate(lines) if line.startswith("0.3"))
    assert ours.split()[0] == "ours"
    assert paper.index("96.41 / 77.73") == ours.index("96.50 +- 0.71 / 77.25 +- 0.00 [1]")
    assert paper.index("61.47 / 63.47") == ours.index("60.00 / 77.25 [2]")
    assert lines[-2] == "[1] Permuted MNIST, c 0.3, seeds: 2; differs in nothing but perhaps seed and device"
    assert lines[-1] == "[2] CIFAR-100 Superclass, c 0.3, seeds: 1; differs in epochs 3 (paper: 50)"


def test_several_rows_of_a_setting_stand_below_each_other() -> None:
    rows = over_seeds(results(of_paper("a"), of_paper("b", batch_size=64)))
    lines = [line for line in tables.of_paper(rows).splitlines() if line.strip().startswith("ours")]
    assert [line.split()[-1] for line in lines] == ["[1]", "[2]"]


def test_in_a_narrow_terminal_every_column_of_the_paper_is_a_table() -> None:
    text = tables.of_paper(over_seeds(results(of_paper("a", batch_size=64))), 50)
    assert max(map(len, text.splitlines())) <= 50
    assert [line.split("  ")[-1].strip() for line in text.splitlines() if line.startswith("c  ")] == [
        "Permuted MNIST", "5-Datasets", "Omniglot Rotation", "CIFAR-100 Split", "CIFAR-100 Superclass", "TinyImageNet",
    ]  # fmt: skip
    assert "differs in batch_size 64 (paper: 10)" in " ".join(text.split())
