"""CSV and LaTeX of runs."""

from __future__ import annotations

import csv
import io
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pages import made_up

from wsn_fast.train import command_line as cli
from wsn_fast.train import exports
from wsn_fast.train.records import Record
from wsn_fast.train.seeds import over_seeds


def lines(*runs: Record) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(exports.csv_of_runs(runs).decode("utf-8"))))


def of_paper(name: str = "a", **given: Any) -> Record:
    return made_up(10, name, **{"stream": "permuted", "data": "mnist", "data_dir": "d", **given})


def latex(*runs: Record) -> str:
    return exports.latex_of_seeds(over_seeds({run.name: run.results or {} for run in runs})).decode("ascii")


# --- CSV --------------------------------------------------------------------------------------------------
def test_csv_has_a_line_for_each_run_with_its_numbers_and_settings() -> None:
    one, two = lines(of_paper("runs/a", batch_size=64), made_up(name='b, "c"', seed=7))
    assert (one["run"], two["run"]) == ("runs/a", 'b, "c"')
    found = [one[name] for name in ("acc", "bwt", "fwt", "capacity_paper", "capacity", "forgetting")]
    assert found == ["95.5", "0.0", "1.25", "77.25", "88.5", "0.0"]
    assert [one[name] for name in ("batch_size", "density", "seed", "data", "tasks_done")] == [
        "64", "0.3", "0", "mnist", "10",
    ]  # fmt: skip
    assert (one["paper_acc"], one["paper_capacity"]) == ("96.41", "77.73")
    assert one["differs_in"] == "batch_size 64 (paper: 10)"
    assert [two[name] for name in ("paper_acc", "differs_in", "seed")] == ["", "", "7"]
    assert [one[name] for name in ("version_torch", "seconds_of_epochs", "seconds_of_tasks")] == ["9.9", "5.0", "40.0"]


def test_csv_has_every_digit_of_a_number() -> None:
    run = made_up()
    assert run.results is not None
    (line,) = lines(replace(run, results={**run.results, "acc": 100 / 3}))
    assert float(line["acc"]) == 100 / 3


def test_csv_of_a_run_without_results_has_empty_cells() -> None:
    (line,) = lines(replace(made_up(), results=None, finished=False, tasks=[]))
    assert [line[name] for name in ("finished", "tasks_done", "acc", "seconds_of_epochs")] == ["False", "0", "", ""]
    assert line["density"] == "0.3"


@pytest.mark.parametrize("name", ["=1+1", "+1", "-1", "@A1", " =1", "\t=1", "\uff1d1"])
def test_no_cell_of_csv_is_a_formula(name: str) -> None:
    (line,) = lines(made_up(name=name))
    assert line["run"][0] in ("'", "\\"), line["run"]


def test_a_negative_number_in_csv_stays_a_number() -> None:
    run = made_up()
    assert run.results is not None
    (line,) = lines(replace(run, results={**run.results, "fwt": -1.5}))
    assert line["fwt"] == "-1.5"


def test_text_of_runs_cannot_break_out_of_a_cell_of_csv() -> None:
    hostile = 'a"\r\nb,=1\x00\udcff\u202e'
    (line,) = lines(replace(made_up(name=hostile), versions={"torch": "=cmd|'x'", "evil": "x"}))
    assert line["run"] == 'a"' + r"\r\nb,=1\x00\udcff\u202e"
    assert line["version_torch"] == "'=cmd|'x'"
    assert "version_evil" not in line


# --- LaTeX ------------------------------------------------------------------------------------------------
UNESCAPED = re.compile(r"(?<!\\)[&%#$_^~]")


def columns_of(table: str) -> int:
    found = re.search(r"\\begin\{tabular\}\{(\w+)\}", table)
    assert found is not None
    return len(found[1])


def assert_compiles(table: str) -> None:
    """As far as it can be seen without a LaTeX: ASCII, groups and environments that close, rows of as many cells."""
    body = re.sub(r"(?<!\\)%.*", "", table)
    depth = 0
    for brace in re.findall(r"(?<!\\)[{}]", body):
        depth += 1 if brace == "{" else -1
        assert depth >= 0
    assert depth == 0
    open_now = []
    for kind, name in re.findall(r"\\(begin|end)\{(\w+)\}", body):
        if kind == "begin":
            open_now.append(name)
        else:
            assert open_now.pop() == name
    assert open_now == []
    rows = body[body.index("\\midrule") : body.index("\\bottomrule")].splitlines()[1:]
    for row in filter(None, rows):
        assert row.endswith(r" \\")
        assert len(re.findall(r"(?<!\\)&", row)) == columns_of(table) - 1, row
        assert len(re.findall(r"(?<!\\)\$", row)) % 2 == 0
    known = [
        "begin",
        "end",
        "centering",
        "footnotesize",
        "setlength",
        "tabcolsep",
        "caption",
        "pm",
        "toprule",
        "multicolumn",
        "cmidrule",
        "midrule",
        "bottomrule",
        "textsuperscript",
        "par",
        "smallskip",
        "textbackslash",
        "textasciitilde",
        "textasciicircum",
        "textless",
        "textgreater",
        "textbar",
        "char",
    ]
    assert set(re.findall(r"\\([a-zA-Z]+)", body)) <= set(known)


def test_latex_has_means_beside_the_papers_numbers() -> None:
    a, b = of_paper("a", seed=1), of_paper("b", seed=2)
    assert b.results is not None
    table = latex(a, replace(b, results={**b.results, "acc": 96.5}), made_up(4, density=0.5))
    assert_compiles(table)
    assert (
        r"Permuted MNIST & 0.3 & 2 & $96.00 \pm 0.71$ & $0.00 \pm 0.00$ & $1.25 \pm 0.00$ & $77.25 \pm 0.00$ & "
        r"96.41\textsuperscript{1} & 77.73 \\" in table
    )
    assert r"permuted digits x4 paper & 0.5 & 1 & $95.50$ & $0.00$ & $1.25$ & $77.25$ & -- & -- \\" in table
    assert "sample standard deviation ($n - 1$)" in table


def test_latex_says_in_what_a_row_differs_and_says_the_same_once() -> None:
    table = latex(of_paper("a", batch_size=64), of_paper("b", batch_size=64, density=0.5), of_paper("c", density=0.1))
    assert_compiles(table)
    assert re.findall(r"\\textsuperscript\{(\d)\} & ", table) == ["1", "1", "2"]
    assert table.count(r"\textsuperscript{1}~batch\_size 64 (theirs: 10)") == 1
    assert r"\textsuperscript{2}~nothing but perhaps seed and device." in table


def test_every_special_character_of_latex_is_escaped() -> None:
    text = exports.latex('\\ { } $ & # _ % ~ ^ < > | " -- \u00e9 \x07 \udcff')
    assert text == (
        r"\textbackslash{} \{ \} \$ \& \# \_ \% \textasciitilde{} \textasciicircum{} \textless{} \textgreater{} "
        r"\textbar{} {\char34} -{}- \textbackslash{}xe9 \textbackslash{}x07 \textbackslash{}udcff"
    )


def test_names_of_data_are_escaped_in_latex() -> None:
    run = made_up(2, stream="datasets", data="caf\u00e9_1,b--c", data_dir="d")
    table = latex(run)
    assert_compiles(table)
    assert r"datasets caf\textbackslash{}xe9\_1,b-{}-c x2 paper & 0.3" in table


def test_a_latex_table_needs_a_finished_run() -> None:
    with pytest.raises(ValueError, match="--latex: expected a finished run, got none"):
        exports.latex_of_seeds([])


# --- the command ------------------------------------------------------------------------------------------
def test_the_files_are_written_whole_and_not_through_links(
    copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    victim = tmp_path / "victim"
    victim.write_text("stays")
    for name in ("x.csv", "x.tex"):
        os.symlink(victim, tmp_path / name)
    files = ["--csv", str(tmp_path / "x.csv"), "--latex", str(tmp_path / "x.tex")]
    assert cli.main(["report", str(copy), *files]) == 0
    assert victim.read_text() == "stays"
    (line,) = csv.DictReader(io.StringIO((tmp_path / "x.csv").read_text("utf-8")))
    assert line["run"] == str(copy)
    assert_compiles((tmp_path / "x.tex").read_text("ascii"))
    out = capsys.readouterr().out
    assert f"a line for each run in {tmp_path / 'x.csv'}\n" in out
    assert f"a LaTeX table over seeds in {tmp_path / 'x.tex'}\n" in out


def test_the_papers_table_is_printed_instead_of_that_of_the_runs(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["report", str(copy), "--paper"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("c            Permuted MNIST")
    assert "differs in" not in out
    assert "No finished run has a setting of this table." in out
