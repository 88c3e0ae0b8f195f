"""What the folders of runs say, and the command that reports it."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pages import Page, render

from wsn_fast.train import checkpoint, records, report
from wsn_fast.train import command_line as cli
from wsn_fast.train.run import Run
from wsn_fast.train.samples import Samples
from wsn_fast.train.task_logs import TaskLog

SMALL = ["--epochs", "2", "--batch-size", "128", "--device", "cpu", "--quiet"]


@pytest.fixture(scope="module")
def unfinished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stopped in the second of three tasks, after its first epoch."""
    folder = tmp_path_factory.mktemp("unfinished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        train_epoch = Run._train_epoch

        def counted(self: Run, *data: Samples) -> None:
            if (self.progress.task, self.progress.epoch) == (1, 1):
                raise KeyboardInterrupt
            train_epoch(self, *data)

        patch.setattr(Run, "_train_epoch", counted)
        assert cli.main(["train", "split", "--tasks", "5", *SMALL, "--one-pass", "--out", str(folder)]) == 130
    return folder


# --- what folders say -------------------------------------------------------------------------------------
MEASURED = (*report.NUMBERS, *report.DETAILS)


def test_a_finished_run_is_read_from_its_results(finished: Path) -> None:
    run = records.read(str(finished))
    stored = json.loads((finished / "results.json").read_text())
    assert (run.finished, run.results, run.command, list(run.notes)) == (True, stored, stored["command"], [])


def test_the_checkpoint_says_of_a_run_what_its_results_do(copy: Path) -> None:
    stored = json.loads((copy / "results.json").read_text())
    (copy / "results.json").unlink()
    run = records.read(str(copy))
    assert not run.finished
    assert run.results is not None
    assert {name: run.results[name] for name in MEASURED} == {name: stored[name] for name in MEASURED}


def test_details_that_older_results_lack_come_from_the_checkpoint(copy: Path) -> None:
    stored = json.loads((copy / "results.json").read_text())
    less = {name: value for name, value in stored.items() if name not in report.DETAILS}
    (copy / "results.json").write_text(json.dumps(less))
    assert records.read(str(copy)).results == stored


def test_older_results_without_a_checkpoint_have_no_details(copy: Path) -> None:
    stored = json.loads((copy / "results.json").read_text())
    less = {name: value for name, value in stored.items() if name not in report.DETAILS}
    (copy / "results.json").write_text(json.dumps(less))
    shutil.rmtree(copy / "checkpoint")
    run = records.read(str(copy))
    assert run.results == less
    assert [f"no checkpoint in {copy}" in note for note in run.notes] == [True]
    assert len(render(run).all("figure")) == 4 + 2 + 1 + any(log.time for log in run.tasks)


def test_an_unfinished_run_shows_what_it_has(unfinished: Path) -> None:
    run = records.read(str(unfinished))
    parsed = render(run)
    assert [(log.task, log.epochs, log.best_epoch is None) for log in run.tasks] == [(0, 2, False), (1, 1, True)]
    assert parsed.rows("Runs")[1][1] == "1 of 5"
    assert "Not finished: 1 of 5 tasks; task 1 has 1 of at most 2 epochs" in parsed.all("main")[0]["text"]
    assert [row[0] for row in parsed.rows("Task by task")[1:]] == ["0", "1"]


def test_a_run_before_its_first_task_has_ended(finished: Path, tmp_path: Path) -> None:
    shutil.copy(finished / "config.json", tmp_path)
    run = records.read(str(tmp_path))
    assert run.results is None
    assert render(run).wrong == []


def test_what_runs_the_operations_is_written_down(finished: Path, unfinished: Path) -> None:
    plain, one_pass = (records.read(str(folder)).tasks for folder in (finished, unfinished))
    assert {log.optimizer for log in one_pass} == {"wsn_fast SubnetAdamW"}
    for log in (*plain, *one_pass):
        assert {"threshold", "gate", "product (training)"} <= {path["operation"] for path in log.paths}
        assert {layer for path in log.paths for layer in path["layers"]} == {"features.1", "features.3"}
        assert all(path["reason"] for path in log.paths)
    assert {log.train_samples for log in plain} == {1298}  # of 1442, a tenth is held out


def test_time_and_throughput() -> None:
    log = TaskLog(0, 4, 2, 2.0, 100, "torch Adam", [])
    assert (log.epoch_seconds, log.samples_per_second) == (0.5, 200.0)
    begun = replace(log, epochs=0, seconds=0.0)
    assert (begun.epoch_seconds, begun.samples_per_second) == (None, None)


def test_epochs_of_a_resumed_run_are_counted_once_and_a_line_on_its_way_is_left_out(copy: Path) -> None:
    log = copy / "metrics.jsonl"
    before = records.read(str(copy)).tasks
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join([*lines, lines[1], lines[-1][:20]]))
    run = records.read(str(copy))
    assert (run.tasks, list(run.notes)) == (before, [])


@pytest.mark.parametrize("line", ["{", "[]", '{"kind": "epoch"}', '{"kind": "begin", "task": 0, "paths": [3]}', "\xff"])
def test_a_damaged_line_is_noted_and_the_rest_is_read(copy: Path, line: str) -> None:
    before = records.read(str(copy)).tasks
    with open(copy / "metrics.jsonl", "a", encoding="latin-1") as file:
        file.write(line + "\n")
    run = records.read(str(copy))
    number = (copy / "metrics.jsonl").read_bytes().count(b"\n")
    assert run.tasks == before
    assert [note.startswith(f"{copy / 'metrics.jsonl'}, line {number} is damaged") for note in run.notes] == [True]


def test_a_damaged_checkpoint_is_noted(copy: Path) -> None:
    (copy / "results.json").unlink()
    for path in (copy / "checkpoint").iterdir():
        path.write_bytes(path.read_bytes()[:-1])
    run = records.read(str(copy))
    assert run.results is None
    assert len(run.tasks) == 2
    assert ["is damaged or truncated" in note for note in run.notes] == [True]


def test_a_checkpoint_of_something_else_is_noted(copy: Path) -> None:
    (copy / "results.json").unlink()
    kept = checkpoint.load_from(copy / "checkpoint")
    checkpoint.save(copy / "checkpoint", kept.number + 1, {"progress": {"matrix": [[1.0]]}}, kept.tensors)
    run = records.read(str(copy))
    assert run.results is None
    assert ["is not that of a run" in note for note in run.notes] == [True]


def damage(name: str, value: Any) -> Any:
    return pytest.param(name, value, id=f"{name}={json.dumps(value)[:24]}")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        damage("acc", "high"),
        damage("acc", None),
        damage("accuracy_matrix", []),
        damage("accuracy_matrix", [[1.0, None]]),
        damage("accuracy_matrix", [[1.0, 2.0], [1.0, 2.0]]),
        damage("accuracy_matrix", [[None, None], [1.0, 2.0]]),
        damage("forgetting", [0.0]),
        damage("reuse", [{"task": 0}, {"task": 1}]),
        damage("overlap", [[100.0]]),
        damage("overlap", [[100.0, True], [1.0, 2.0]]),
        damage("layers", [{"name": "a", "elements": 3, "tasks": []}]),
        damage("layers", 3),
        damage("config", {}),
        damage("versions", []),
    ],
)
def test_results_of_another_shape_are_damaged(copy: Path, name: str, value: Any) -> None:
    path = copy / "results.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))
    with pytest.raises(ValueError, match=re.escape(f"{path} is damaged: ")):
        records.read(str(copy))


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"config": {"density": 3}}'])
def test_a_damaged_config_is_an_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / "config.json"))):
        records.read(str(tmp_path))


# --- the command ------------------------------------------------------------------------------------------
def test_the_page_of_one_run_lies_in_its_folder(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", str(copy)]) == 0
    assert Page((copy / "report.html").read_text("utf-8")).wrong == []
    assert f"all of it in {copy / 'report.html'}\n" in capsys.readouterr().out


def test_the_page_of_several_runs_lies_here(
    copy: Path, unfinished: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["report", str(copy), str(unfinished), str(copy)]) == 0
    rows = Page(Path("wsn-fast-report.html").read_text("utf-8")).rows("Runs")
    assert [row[0].split("permuted")[0].split("split")[0] for row in rows[1:]] == [f"1. {copy}", f"2. {unfinished}"]


def test_the_page_lies_where_it_is_wanted(copy: Path, tmp_path: Path) -> None:
    assert cli.main(["report", str(copy), "--html", str(tmp_path / "x.html")]) == 0
    assert (tmp_path / "x.html").is_file()
    assert not (copy / "report.html").exists()


def test_an_unfinished_run_is_only_read(unfinished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in unfinished.rglob("*")}
    assert cli.main(["report", str(unfinished), "--html", str(tmp_path / "x.html")]) == 0
    assert {path: path.stat().st_mtime_ns for path in unfinished.rglob("*")} == before
    assert "split digits x5 paper, 1 done" in capsys.readouterr().out


def test_broken_and_foreign_folders_are_named_and_the_rest_is_reported(
    copy: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (copy / "results.json").write_text("{")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "file").write_text("")
    bad = [str(copy), *(str(tmp_path / name) for name in ("foreign", "missing", "file"))]
    assert cli.main(["report", *bad, str(finished), "--html", str(tmp_path / "x.html")]) == 2
    out, err = capsys.readouterr()
    assert [name in line for name, line in zip(bad, err.splitlines(), strict=True)] == [True] * 4
    assert str(finished) in out
    parsed = Page((tmp_path / "x.html").read_text("utf-8"))
    named = [e["text"] for e in parsed.all("li")]
    assert [any(text.startswith(name) for text in named) for name in bad] == [True] * 4
    assert len(parsed.rows("Runs")) == 2
