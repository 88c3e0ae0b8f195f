"""``python -m wsn_fast.doctor --report``: what it collects, and the page."""

from __future__ import annotations

import getpass
import json
import platform
from pathlib import Path
from typing import Any

import pytest
import torch
from pages import Page

from wsn_fast.backends import choice, tables
from wsn_fast.doctor import checking
from wsn_fast.doctor.measuring import scrub
from wsn_fast.doctor.measuring.attempts import Attempts
from wsn_fast.doctor.measuring.operations import OPERATIONS
from wsn_fast.doctor.measuring.ours import OursOnePass
from wsn_fast.doctor.measuring.shapes import LinearShape
from wsn_fast.doctor.measuring.timing import Timing
from wsn_fast.doctor.report import command, operations, page, steps
from wsn_fast.doctor.report.collect import Plan, collect, plan_of

CPU = torch.device("cpu")
SHAPE = LinearShape(24, 40, 5)
TINY = Plan(1000, (96,), (SHAPE,), 0.0)


def quiet(line: str) -> None:
    pass


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A report with tiny shapes, as it is read from its file."""
    folder = tmp_path_factory.mktemp("report")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checking, "DTYPES", (torch.float32,))
        assert command.main([CPU], folder, 5.0, quiet, lambda device: TINY) == 0
    read = json.loads((folder / "wsn-fast-report.json").read_text("utf-8"))
    return read | {"page": (folder / "wsn-fast-report.html").read_text("utf-8")}


def device(report: dict[str, Any]) -> dict[str, Any]:
    (one,) = report["devices"]
    return one


# --- what it collects
def test_everything_was_measured(report: dict[str, Any]) -> None:
    assert report["not_measured"] == []
    assert report["format"] == 1 and report["seconds"] > 0


def test_a_report_names_versions_and_hardware(report: dict[str, Any]) -> None:
    assert {"wsn_fast", "python", "torch", "native library"} <= {x["subject"] for x in report["installation"]}
    assert device(report)["name"] == tables.device_name(CPU)
    assert device(report)["facts"].keys() >= {"cpu", "cpus", "threads", "torch", "platform"}


def test_a_report_has_every_choice_with_a_reason_and_every_verdict(report: dict[str, Any]) -> None:
    assert [line["subject"] for line in device(report)["choices"]] == list(choice.PRIMITIVES)
    assert all(line["reason"] for line in device(report)["choices"])
    verdicts = device(report)["verdicts"]
    assert {verdict["operation"] for verdict in verdicts} == {*choice.PRIMITIVES}
    assert {verdict["problem"] for verdict in verdicts} == {None}


def test_pytorch_is_the_choice_for_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    verdicts = [
        checking.Verdict("gates", "float32", "native", "1 of 1 differ"),
        checking.Verdict("gate", "bfloat16", "native", "1 of 1 differ"),
        checking.Verdict("pack", "bits", "native", "1 of 1 differ"),
    ]
    monkeypatch.setattr(checking, "check", lambda device: iter(verdicts))
    lines = {line["subject"]: line for line in device(collect([CPU], 5.0, quiet, lambda device: TINY))["choices"]}
    wrong = {name for name, line in lines.items() if line["reason"] == "native is wrong here"}
    assert wrong == {"gates", "pack"} and {lines[name]["found"] for name in wrong} == {"torch"}


def test_every_operation_stands_beside_its_floor_and_torch(report: dict[str, Any]) -> None:
    rows = {row["operation"]: row for row in device(report)["operations"]}
    assert rows.keys() == OPERATIONS.keys()
    assert rows["adamw_step"]["bytes"] == 56.125 * 96
    for row in rows.values():
        assert row["time"]["p20_us"] <= row["time"]["median_us"] <= row["time"]["p80_us"]
        assert row["floor_us"] > 0 and row["x_floor"] > 0
        assert (row["torch"] is None) == (row["x_torch"] is None) == (row["backend"] == "torch")


def test_every_step_stands_beside_the_dense_and_the_best_eager_one(report: dict[str, Any]) -> None:
    rows = {row["step"]: row for row in device(report)["steps"]}
    assert [*rows] == ["dense", "best eager", "ours", "ours, one pass", "ours, one pass, 8 bits"]
    assert rows["dense"]["x_dense"] == rows["best eager"]["x_eager"] == 1
    assert all(row["x_dense"] > 0 and row["x_eager"] > 0 and row["shape"] == str(SHAPE) for row in rows.values())


def test_a_step_that_is_wrong_has_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def forget(self: OursOnePass) -> None:
        for layer in self.layers.values():
            layer.weight_union = None

    right = OursOnePass.build
    monkeypatch.setattr(OursOnePass, "build", lambda self, net: (right(self, net), forget(self))[0])
    monkeypatch.setattr(steps, "KINDS", (steps.Dense, OursOnePass))
    attempts = Attempts(float("inf"))
    rows = steps.times(attempts, CPU, (SHAPE,), 0.0)
    assert [row["step"] for row in rows] == ["dense"]
    assert attempts.not_measured[0].startswith("ours, one pass on 24x40 b5: WrongResultError")


def test_without_time_a_report_says_what_is_missing() -> None:
    found = collect([CPU], 0.0, quiet, lambda device: TINY)
    assert device(found)["steps"] == device(found)["operations"] == []
    assert f"steps of {SHAPE} on cpu: no time left" in found["not_measured"]
    assert "<h2>Not measured</h2>" in page.render(found)


def test_a_floor_is_what_must_move_at_the_speed_of_a_copy() -> None:
    copy = operations.Copy(8e6, Timing(1000.0, 1.0, 1.0, 1, "host"))  # 8 GB/s
    (row,) = (
        row for row in operations.times(Attempts(float("inf")), CPU, (80,), copy, 0.0) if row["operation"] == "gate"
    )
    assert row["floor_us"] == pytest.approx(12 * 80 / 8000, abs=1e-3)


def test_plans_have_two_or_three_sizes() -> None:
    for kind in ("cpu", "cuda"):
        plan = plan_of(torch.device(kind))
        assert 2 <= len(plan.elements) <= 3 and 2 <= len(plan.layers) <= 3


# --- no secrets
def test_neither_file_names_user_machine_or_folders(report: dict[str, Any]) -> None:
    text = json.dumps(report)
    assert str(Path.home()) + "/" not in text and str(Path(__file__).parents[2]) not in text
    names = {getpass.getuser(), platform.node()} - {"root", "user"}
    assert not [name for name in names if len(name) > 3 and name in text]


@pytest.mark.parametrize(
    ("said", "published"),
    [
        ("loaded from /home/me/venv/lib/x.so, using AVX2", "loaded from x.so, using AVX2"),
        (r"C:\Users\me\venv\x.dll is missing", "x.dll is missing"),
        ("in /tmp/a-b/c.d/~e/f.py, line 3", "in f.py, line 3"),
        ("3.5 GB/s and 1/2", "3.5 GB/s and 1/2"),
        ("bob's machine far-host.example", "(name)'s machine (name)"),
        ("bobsled", "bobsled"),
    ],
)
def test_a_message_loses_folders_and_names(said: str, published: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scrub, "_names", lambda: ("far-host.example", "bob"))
    assert scrub.scrubbed(said) == published


def test_a_folder_with_spaces_goes_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scrub, "_folders", lambda: ("/home/my name/",))
    assert scrub.scrubbed("in /home/my name/a/b.py") == "in b.py"


# --- the page
def test_the_page_is_whole_and_needs_nothing(report: dict[str, Any]) -> None:
    shown = Page(report["page"])
    assert shown.wrong == []
    assert not shown.all("script") and not shown.all("link") and not shown.all("img")
    assert "http" not in report["page"].replace("http-equiv", "")


def test_the_page_shows_steps_and_operations(report: dict[str, Any]) -> None:
    shown = Page(report["page"])
    names = [row[0] for row in shown.rows("24x40, batch of 5")]
    assert names[1:] == ["dense", "best eager", "ours", "ours, one pass", "ours, one pass, 8 bits"]
    assert {row[0] for row in shown.rows("96 elements")} >= OPERATIONS.keys()
    assert f"All {sum(v['backend'] != 'torch' for v in device(report)['verdicts'])} compared" in report["page"]


def test_every_link_leads_somewhere(report: dict[str, Any]) -> None:
    shown = Page(report["page"])
    targets = {element["attributes"].get("id") for element in shown.elements}
    assert {link["attributes"]["href"].removeprefix("#") for link in shown.all("a")} <= targets


def test_a_wrong_operation_stands_out(report: dict[str, Any]) -> None:
    wrong = json.loads(json.dumps(report))
    verdict = {"operation": "gate", "dtype": "float32", "backend": "native", "problem": "<b>3 differ</b>", "note": ""}
    device(wrong)["verdicts"] = [verdict]
    text = page.render(wrong)
    assert "1 of 1 compared operations are WRONG: gate float32." in text
    assert "gate float32: &lt;b&gt;3 differ" in text


def test_the_page_shows_the_table_in_use(report: dict[str, Any]) -> None:
    tuned = json.loads(json.dumps(report))
    entry = {"choose": "torch", "times": {"1000": {"native": 20.0, "torch": 10.0}}}
    entries = {"backends": {"gate": {"float32": entry}}}
    device(tuned)["table"] = {"digest": "0123456789ab", "notes": ["your table x.json is used"], "entries": entries}
    shown = page.render(tuned)
    assert "The tuning table 0123456789ab is in use." in shown
    assert ["gate", "float32", "torch", "1000: native 20 us, torch 10 us"] in Page(shown).rows("The faster backend")


def test_memory_is_shown_where_it_was_measured(report: dict[str, Any]) -> None:
    assert "peak bytes per weight" not in report["page"]
    on_gpu = json.loads(json.dumps(report))
    for row in device(on_gpu)["steps"]:
        row["peak_bytes_per_weight"] = 20.5
    assert [row[4] for row in Page(page.render(on_gpu)).rows("24x40")][:2] == ["peak bytes per weight", "20.5"]


@pytest.mark.parametrize(
    ("value", "text"), [(0.1234, "0.123"), (1.234, "1.23"), (12.34, "12.3"), (123.4, "123"), (12345.6, "12,346")]
)
def test_numbers_have_three_digits(value: float, text: str) -> None:
    assert page._digits(value) == text


def test_a_folder_that_cannot_be_written_to_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr(command, "collect", lambda *_: {})
    monkeypatch.setattr(page, "render", lambda report: "")
    lines: list[str] = []
    assert command.main([CPU], tmp_path / "file", 0.0, lines.append) == 1
    assert "cannot be written" in lines[-1]
