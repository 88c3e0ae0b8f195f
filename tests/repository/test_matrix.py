"""The versions that are tested are those that the project says it supports, and the page shows what was measured."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from wsn_fast import versions

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / ".ci" / "matrix.py"
pytestmark = pytest.mark.skipif(not SCRIPT.exists(), reason="a source distribution has no .ci")


@pytest.fixture(scope="module")
def matrix() -> ModuleType:
    spec = importlib.util.spec_from_file_location("matrix", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]


def numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def oldest_of(requirements: list[str], name: str) -> tuple[int, ...]:
    (bound,) = [line.removeprefix(f"{name}>=") for line in requirements if line.startswith(f"{name}>=")]
    return (*numbers(bound), 0)[:2]


@pytest.mark.parametrize("name", ["torch", "numpy"])
def test_the_oldest_package_that_installs_is_tested(matrix: ModuleType, project: dict[str, Any], name: str) -> None:
    oldest = oldest_of(project["dependencies"], name)
    assert min(numbers(getattr(cell, name)) for cell in matrix.CELLS)[:2] == oldest


@pytest.mark.parametrize("name", ["torch", "numpy"])
def test_the_oldest_package_that_installs_can_be_imported(project: dict[str, Any], name: str) -> None:
    assert versions.OLDEST[name] == oldest_of(project["dependencies"], name)


def test_every_python_that_the_project_names_is_tested(matrix: ModuleType, project: dict[str, Any]) -> None:
    tested = {cell.python for cell in matrix.CELLS}
    named = {line.rpartition(" ")[2] for line in project["classifiers"] if re.search(r"Python :: 3\.\d+$", line)}
    oldest = min(tested, key=numbers)
    assert tested == named
    assert project["requires-python"] == f">={oldest}"
    assert numbers(oldest) == versions.OLDEST_PYTHON


def test_the_versions_of_the_constraints_are_tested(matrix: ModuleType) -> None:
    text = (ROOT / "constraints.txt").read_text("utf-8")
    torch, numpy = (re.findall(rf"^{name}==([\d.]+)", text, re.MULTILINE)[0] for name in ("torch", "numpy"))
    assert (torch, numpy) in {(cell.torch, cell.numpy) for cell in matrix.CELLS}


def test_a_cell_replaces_torch_and_numpy_in_the_constraints(matrix: ModuleType) -> None:
    text = 'torch==1\nnumpy==2; python_version >= "3.11"\nnumpy==3\npytest==4\n# torch\n'
    made = matrix.constraints(matrix.Cell("3.12", "5", "6"), text)
    assert made == "pytest==4\n# torch\ntorch==5\nnumpy==6\n"


def test_names_of_cells_differ(matrix: ModuleType) -> None:
    assert len({cell.name for cell in matrix.CELLS}) == len(matrix.CELLS)


# --- results
def test_every_result_belongs_to_a_cell(matrix: ModuleType) -> None:
    cells = {cell.file: cell._asdict() for cell in matrix.CELLS}
    for path in matrix.RESULTS.glob("*"):
        record = json.loads(path.read_text("utf-8"))
        assert record["cell"] == cells[path]
        found = {name: record["versions"][name].partition("+")[0] for name in ("torch", "numpy")}
        assert found == {name: record["cell"][name] for name in found}
        assert record["versions"]["python"].startswith(f"{record['cell']['python']}.")


def test_what_failed_passed_after_a_correction(matrix: ModuleType) -> None:
    for path in matrix.RESULTS.glob("*"):
        first, *later = json.loads(path.read_text("utf-8"))["runs"]
        left = set(first["failures"])
        for run in later:
            assert run["passed"] + run["failed"] + run["skipped"] == len(left)
            left = set(run["failures"])
        assert not left, path.name


def test_the_page_shows_the_results(matrix: ModuleType) -> None:
    assert matrix.table() in (ROOT / "docs" / "support.md").read_text("utf-8")


def test_the_table_counts_what_was_run_again(matrix: ModuleType, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(matrix, "RESULTS", tmp_path)
    cell, other = matrix.Cell("3.12", "2.13.0", "2.3.5"), matrix.Cell("3.13", "2.14.1", "2.4.6")
    first = {"passed": 8, "failed": 2, "skipped": 1, "commit": "abc"}
    again = {"passed": 2, "failed": 0, "skipped": 0, "commit": "def"}
    found = {"python": "3.12.1", "torch": "2.13.0+cpu", "numpy": "2.3.5", "triton": "3.9.0"}
    cell.file.write_text(json.dumps({"cell": cell._asdict(), "versions": found, "runs": [first, again]}))
    assert matrix.table([cell, other]).splitlines()[2:] == [
        "| 3.12.1 | 2.13.0+cpu | 2.3.5 | 3.9.0 | 8 | 2; of these, 2 passed and 0 failed at def | 1 | abc |",
        "| 3.13 | 2.14.1 | 2.4.6 | | not run | | | |",
    ]


def test_a_report_of_pytest_is_counted(matrix: ModuleType, tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    report.write_text("""<testsuites><testsuite time="2.6">
        <testcase classname="tests.nn.test_a" file="tests/nn/test_a.py" name="test_good"/>
        <testcase classname="tests.nn.test_a" file="tests/nn/test_a.py" name="test_bad[1-x]"><failure/></testcase>
        <testcase classname="tests.nn.test_a.Machine.TestCase" file="tests/nn/test_a.py" name="runTest">
            <error/></testcase>
        <testcase classname="tests.nn.test_a" file="tests/nn/test_a.py" name="test_gpu">
            <skipped message="needs a GPU"/></testcase>
        </testsuite></testsuites>""")
    assert matrix.read_report(report) == {
        "seconds": 3,
        "passed": 1,
        "failed": 2,
        "skipped": 1,
        "failures": ["tests/nn/test_a.py::Machine::TestCase::runTest", "tests/nn/test_a.py::test_bad[1-x]"],
        "skips": {"needs a GPU": 1},
    }


# --- interpreters
def test_the_program_of_a_version_is_found(matrix: ModuleType) -> None:
    own = ".".join(map(str, sys.version_info[:2]))
    assert matrix.interpreter(own, [sys.executable]) == sys.executable


def test_a_missing_version_is_named(matrix: ModuleType) -> None:
    with pytest.raises(SystemExit, match=r"^python3\.1 was not found"):
        matrix.interpreter("3.1", [sys.executable])
