"""The training of runs: what is read from the log, its curves and its time on the page, and the page's pictures."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pages import Page, made_up, render

from wsn_fast.page import markup
from wsn_fast.train import figures, records, task_logs
from wsn_fast.train.page import compare, training
from wsn_fast.train.page.numbers import Entry
from wsn_fast.train.task_logs import Epoch, TaskLog

TIME = {"data": 0.5, "training": 2.0, "evaluation": 1.0, "checkpoints": 0.5}


def read(folder: Path, *entries: dict[str, Any]) -> tuple[list[TaskLog], list[str]]:
    notes: list[str] = []
    (folder / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return task_logs.read(folder / "metrics.jsonl", notes), notes


def epoch(number: int, **given: Any) -> dict[str, Any]:
    numbers = {"seconds": 1.0, "loss": 0.5, "val_loss": 0.25, "val_acc": 90.0}
    return {"kind": "epoch", "task": 0, "epoch": number, **numbers, **given}


# --- the log ----------------------------------------------------------------------------------------------
def test_a_run_has_the_curve_of_every_task(finished: Path) -> None:
    logs = records.read(str(finished)).tasks
    assert [[epoch.number for epoch in log.curve] for log in logs] == [[1, 2], [1, 2]]
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    stored = [[line[name] for name in ("loss", "val_loss", "val_acc")] for line in lines if line["kind"] == "epoch"]
    assert [list(epoch[1:]) for log in logs for epoch in log.curve] == stored


def test_an_epoch_that_was_trained_again_takes_the_place_of_the_first(tmp_path: Path) -> None:
    (log,), _ = read(tmp_path, epoch(2), epoch(1), epoch(2, loss=0.125))
    assert [(at.number, at.loss) for at in log.curve] == [(1, 0.5), (2, 0.125)]


def test_a_log_without_losses_has_no_curve(tmp_path: Path) -> None:
    (log,), notes = read(tmp_path, {"kind": "epoch", "task": 0, "epoch": 1, "seconds": 1.0})
    assert (log.epochs, list(log.curve), notes) == (1, [], [])


@pytest.mark.parametrize("given", [{"loss": "x"}, {"val_loss": -1.0}, {"val_acc": 101}, {"loss": None}, {"loss": 1e99}])
def test_an_epoch_with_absurd_numbers_is_noted(tmp_path: Path, given: dict[str, Any]) -> None:
    (log,), notes = read(tmp_path, epoch(1), epoch(2, **given))
    assert (log.epochs, len(log.curve), len(notes)) == (1, 1, 1)


def test_the_time_of_a_task_is_read(tmp_path: Path) -> None:
    task = {"kind": "task", "task": 0, "best_epoch": 1, "time": {**TIME, "unknown": "x"}}
    (log,), notes = read(tmp_path, epoch(1), task)
    assert (log.time, notes) == (TIME, [])


@pytest.mark.parametrize("time", [{"data": -1}, {"training": "1"}, 3, ["data"], {"data": 1e300}, None])
def test_an_absurd_time_is_noted(tmp_path: Path, time: Any) -> None:
    (log,), notes = read(tmp_path, epoch(1), {"kind": "task", "task": 0, "best_epoch": 1, "time": time})
    assert (log.time, len(notes)) == ({}, 1)


def test_more_epochs_than_can_be_kept_are_counted_and_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task_logs, "_EPOCHS", 2)
    (log,), notes = read(tmp_path, *(epoch(number) for number in range(1, 6)), epoch(1, loss=0.0))
    assert (log.epochs, [at.number for at in log.curve], log.curve[0].loss) == (5, [1, 2], 0.0)
    assert ["more than 2 epochs" in note for note in notes] == [True]


# --- curves -----------------------------------------------------------------------------------------------
def panels(text: str) -> list[str]:
    return re.findall(r'<div><p>task (\d+)</p><svg [^>]*viewBox="0 0 160 116">', text)


@pytest.mark.parametrize("tasks", [1, 6, 20])
def test_there_is_a_panel_for_each_task(tasks: int) -> None:
    drawn = training.curves(made_up(tasks))
    assert Page(drawn).wrong == []
    assert panels(drawn) == [str(task) for task in range(tasks)]
    assert not drawn.startswith("<details>")


def test_the_panels_of_many_tasks_unfold() -> None:
    drawn = training.curves(made_up(45))
    assert drawn.startswith("<details>\n<summary>Learning curves of 45 tasks</summary>")
    assert len(panels(drawn)) == 45


def test_all_panels_have_the_same_scales() -> None:
    logs = [TaskLog(0, 2, 1, 1.0, None, None, [], [Epoch(1, 4.0, 2.0, 40.0), Epoch(3, 2.0, 1.0, 100.0)])]
    logs += [TaskLog(1, 1, 1, 1.0, None, None, [], [Epoch(1, 2.0, 0.0, 70.0)])]
    drawn = training.curves(replace(made_up(2), tasks=logs))
    paths = re.findall(r'<path stroke="#\w+" d="([^"]+)"/>', drawn)
    assert paths == [
        "M28.0 6.0L156.0 31.0h0", "M28.0 31.0L156.0 43.5h0", "M28.0 110.0L156.0 66.0h0",
        "M28.0 31.0h0", "M28.0 56.0h0", "M28.0 88.0h0",
    ]  # fmt: skip


def test_the_best_epoch_has_a_dot_and_its_numbers_are_in_the_table() -> None:
    parsed = Page(training.curves(made_up(1)))
    assert [(e["attributes"]["cx"], e["attributes"]["cy"]) for e in parsed.all("circle")] == [
        ("28.0", "31.0"), ("28.0", "99.0"),
    ]  # fmt: skip
    (row,) = parsed.rows("Losses and validation accuracy")[1:]
    assert row == ["0", "2", "1", "0.5000", "0.2500", "92.50"]


def test_a_curve_of_many_epochs_keeps_its_ends_and_no_more_points_than_can_be_seen() -> None:
    curve = [Epoch(number, 1.0 / number, 1.0, 90.0) for number in range(1, 1004)]
    drawn = training.curves(replace(made_up(1), tasks=[TaskLog(0, 1003, 1, 1.0, None, None, [], curve)]))
    path = re.findall(r'<path stroke="#\w+" d="M([^"]+)h0"/>', drawn)[0].split("L")
    assert 100 <= len(path) <= 202
    assert (path[0].split()[0], path[-1].split()[0]) == ("28.0", "156.0")


@pytest.mark.parametrize("at", [Epoch(1, 0.0, 0.0, 100.0), Epoch(10**18, 1e38, 1e38, 0.0)])
def test_curves_of_any_numbers_are_drawn(at: Epoch) -> None:
    drawn = training.curves(replace(made_up(1), tasks=[TaskLog(0, 1, 1, 1.0, None, None, [], [at])]))
    assert Page(drawn).wrong == []
    assert "nan" not in drawn and "inf" not in drawn


def test_a_run_without_curves_shows_none() -> None:
    logs = [replace(log, curve=[]) for log in made_up().tasks]
    assert training.curves(replace(made_up(), tasks=logs)) == ""


# --- time -------------------------------------------------------------------------------------------------
def test_the_page_says_where_the_time_went() -> None:
    parsed = render(made_up(2))
    says = "Where the time of 2 tasks went: data 1.0 s (12 %), training 4.0 s (50 %), evaluation 2.0 s (25 %)"
    assert [says in e["text"] for e in parsed.all("figcaption") if "the time of" in e["text"]] == [True]
    assert parsed.rows("Seconds of each task")[1] == ["0", "0.500", "2.000", "1.000", "0.500", "4.000"]


def test_a_page_says_nothing_of_a_time_that_was_not_logged() -> None:
    logs = [replace(log, time={}) for log in made_up().tasks]
    assert "the time" not in render(replace(made_up(), tasks=logs)).all("main")[0]["text"]


@pytest.mark.parametrize("time", [{"training": 0.0}, {"checkpoints": 1.0}])
def test_a_time_of_some_parts_is_shown(time: dict[str, float]) -> None:
    logs = [replace(log, time=time) for log in made_up().tasks]
    assert Page(training.time(Entry(1, replace(made_up(), tasks=logs)))).wrong == []


# --- side by side -----------------------------------------------------------------------------------------
def drawn_lines(chart: figures.Chart) -> list[Any]:
    from matplotlib.figure import Figure

    axes = Figure().add_subplot()
    figures.lines(axes, chart)
    return list(axes.lines)


def test_tasks_without_an_order_are_dots_side_by_side() -> None:
    lines = [figures.Line(number, "x", [1.0, 2.0]) for number in (1, 2)]
    one, two = drawn_lines(figures.Chart("", "", lines))
    assert (one.get_linestyle(), one.get_marker()) == ("None", "o")
    assert list(one.get_xdata()) != list(two.get_xdata())
    assert [round(x) for x in (*one.get_xdata(), *two.get_xdata())] == [0, 1, 0, 1]


def test_what_follows_in_time_is_a_line() -> None:
    (one,) = drawn_lines(figures.Chart("", "", [figures.Line(1, "x", [1.0, 2.0])], over_time=True))
    assert (one.get_linestyle(), list(one.get_xdata())) == ("-", [0, 1])


def test_the_average_accuracy_over_time_is_measured_after_each_task() -> None:
    parsed = Page(compare.charts([Entry(1, made_up())]))
    assert [row[1] for row in parsed.rows("Average accuracy so far")[1:]] == ["90.25", "90.75", "91.25"]
    kinds = [
        e["attributes"]["aria-label"].split(":")[0] for e in parsed.all("div") if e["attributes"].get("role") == "img"
    ]
    assert kinds == ["Line chart", "Dot chart", "Line chart", "Dot chart"]


# --- a phone and paper ------------------------------------------------------------------------------------
def test_on_a_phone_every_number_of_the_summary_stands_below_its_name() -> None:
    parsed = render(made_up(seed=1), made_up(seed=2, name="b"))
    for caption in ("Runs", "Over seeds"):
        table = next(e["around"][-1] for e in parsed.all("caption") if e["text"].startswith(caption))
        assert table["attributes"]["class"] == "cards"
        names = [e["attributes"]["data-label"] for e in parsed.all("td") if e["around"][2:] and table in e["around"]]
        head = parsed.rows(caption)[0][1:]
        assert names == head * (len(names) // len(head)) and "ACC" in head


@pytest.mark.parametrize(("columns", "left_out"), [(22, False), (23, True)])
def test_a_table_that_does_not_fit_on_paper_is_named_there_instead(columns: int, left_out: bool) -> None:
    text = markup.table("Caption", ["x"] * columns, [["1"] * columns])
    assert Page(text).wrong == []
    assert ("Caption: 23 columns are too many for paper." in text) == left_out
    assert ('class="scroll on-screen"' in text) == left_out


def test_the_style_of_paper_goes_before_the_dark_one() -> None:
    style = markup.style()
    dark, paper = style.index("prefers-color-scheme: dark"), style.index("@media print")
    assert dark < paper
    assert "--paper: #ffffff" in style[paper:]
