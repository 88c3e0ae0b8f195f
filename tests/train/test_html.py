"""The page that `wsn-fast report` writes."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from pages import NOON, Page, made_up, render

from wsn_fast.train import page
from wsn_fast.train.page import compare
from wsn_fast.train.page.numbers import Entry
from wsn_fast.train.task_logs import TaskLog

HOSTILE = "<img src=x onerror=alert(1)> & $x$ \"q\" 'r' _ \u202e\x07"


# --- the page as such -------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def both() -> str:
    """A page of two runs that differ in much."""
    return page.render([made_up(), made_up(2, HOSTILE, density=0.1)], [HOSTILE], NOON)


def test_the_page_is_well_formed(both: str) -> None:
    assert Page(both).wrong == []


def test_the_page_needs_neither_network_nor_script(both: str) -> None:
    parsed = Page(both)
    assert {"script", "link", "img", "iframe", "object"}.isdisjoint(e["tag"] for e in parsed.elements)
    values = [(name, v or "") for e in parsed.elements for name, v in e["attributes"].items()]
    assert [name for name, _ in values if name.startswith("on") or name == "src"] == []
    assert [
        v for name, v in values if name.endswith("href") and not v.startswith(("#", "data:image/png;base64,"))
    ] == []
    urls = re.findall(r"url\((.)", both)
    assert urls and set(urls) == {"#"}
    policy = [e["attributes"]["content"] for e in parsed.all("meta") if "http-equiv" in e["attributes"]]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'; img-src data:"]


def test_ids_are_unique_and_every_reference_has_one(both: str) -> None:
    ids = [e["attributes"]["id"] for e in Page(both).elements if "id" in e["attributes"]]
    assert len(ids) == len(set(ids))
    assert set(re.findall(r"(?:url\(#|href=\"#)([^\")]+)", both)) <= set(ids)


def test_names_are_shown_as_they_are(both: str) -> None:
    shown = HOSTILE.replace("\u202e", r"\u202e").replace("\x07", r"\x07")
    parsed = Page(both)
    assert f"2. {shown}" in [e["text"] for e in parsed.all("h2")]
    assert shown in [e["text"] for e in parsed.all("li")]
    assert not re.search("[\u202e\x07]", both)


def test_a_name_that_is_no_unicode_can_be_written(tmp_path: Path) -> None:
    page.write(tmp_path / "page.html", [made_up(name="runs/\udcff")])
    assert r"runs/\udcff" in (tmp_path / "page.html").read_text("utf-8")


def test_every_picture_says_what_it_shows_and_has_its_numbers_in_a_table(both: str) -> None:
    parsed = Page(both)
    figures = parsed.all("figure")
    assert len(figures) == 4 + 2 * 7
    for figure in figures:
        inside = [e for e in parsed.elements if any(around is figure for around in e["around"])]
        assert [bool(e["attributes"].get("aria-label")) for e in inside if e["attributes"].get("role") == "img"] == [
            True
        ]
        assert {e["attributes"]["aria-hidden"] for e in inside if e["tag"] == "svg"} == {"true"}
        assert "table" in [e["tag"] for e in inside]


def test_pictures_take_the_colour_of_the_text(both: str) -> None:
    assert "#000000" not in both.split("</style>", 1)[1]
    assert "prefers-color-scheme: dark" in both


def test_the_same_runs_give_the_same_page() -> None:
    assert page.render([made_up()], [], NOON) == page.render([made_up()], [], NOON)


@pytest.mark.parametrize("tasks", [1, 2, 16, 45])
def test_runs_of_any_number_of_tasks(tasks: int) -> None:
    parsed = render(made_up(tasks), made_up(3))
    assert parsed.wrong == []
    assert [row[1] for row in parsed.rows("Runs")[1:]] == [str(tasks), "3"]


def test_more_runs_than_colours() -> None:
    runs = [made_up(2, f"runs/{number}") for number in range(1, 13)]
    drawn = compare.charts([Entry(number, run) for number, run in enumerate(runs, 1)])
    assert Page(drawn).wrong == []
    assert "12 12" in drawn


# --- what it says -----------------------------------------------------------------------------------------
def test_the_summary_has_the_main_numbers() -> None:
    row = render(made_up()).rows("Runs")[1]
    assert row[1:] == ["3", "0.3", "95.50", "+0.00", "+1.25", "0.00", "77.25", "88.50", "4,000", "1.5 s"]


def test_the_papers_numbers_stand_beside_the_runs() -> None:
    known = made_up(10, stream="permuted", data="mnist", data_dir="d", batch_size=64)
    parsed = render(known, made_up(3))
    rows = parsed.rows("Runs beside the paper")
    assert [row[-2:] for row in rows[1:]] == [["96.41 (-0.91)", "77.73 (-0.48)"], ["-", "-"]]
    assert "1: batch_size 64 (paper: 10)" in [e["text"] for e in parsed.all("li")]


def test_no_run_is_compared_with_the_paper_before_it_is_finished() -> None:
    run = made_up(9, stream="permuted", data="mnist", data_dir="d")
    settings = {**run.settings, "tasks": 10}
    assert run.results is not None
    half = replace(run, settings=settings, finished=False, results={**run.results, "config": settings})
    assert "paper: ACC" not in render(half).rows("Runs")[0]


def test_settings_that_differ_are_apart_from_those_that_do_not() -> None:
    other = replace(made_up(seed=7), versions={"torch": "8.8"})
    parsed = render(made_up(), other)
    assert parsed.rows("What differs")[1:] == [["seed", "0", "7"], ["version of torch", "9.9", "8.8"]]
    assert ["density", "0.3"] in parsed.rows("The same in all runs")


def test_paths_stand_side_by_side_and_with_their_reasons() -> None:
    old = replace(made_up(2), tasks=[TaskLog(0, 1, 1, 1.0, None, None, [])])
    parsed = render(made_up(), old)
    assert parsed.rows("The optimizer")[1:] == [["optimizer", "torch Adam", "-"], ["gate", "native", "-"]]
    assert parsed.rows("What ran each operation in tasks 0 to 2")[1:] == [
        ["gate", "native", "because", "first, second"]
    ]


def test_matrices_are_there_as_numbers() -> None:
    parsed = render(made_up())
    assert parsed.rows("Test accuracy (%), after task")[1:] == [
        ["0", "90.25", "-", "-"],
        ["1", "90.25", "91.25", "-"],
        ["2", "90.25", "91.25", "92.25"],
    ]
    assert parsed.rows("Of the weights of task")[1] == ["0", "100.00", "62.50", "62.50"]
    assert parsed.rows("Reuse (%)")[1] == ["first.weight", "12,345", "0.00", "50.00", "50.00"]
    assert parsed.rows("Owned so far (%)")[1] == ["first.weight", "12,345", "15.00", "30.00", "45.00"]
