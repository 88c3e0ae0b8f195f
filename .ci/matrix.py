#!/usr/bin/env python3
"""Runs the tests with every supported version of Python and with the oldest and the newest torch and NumPy.

Each cell of ``CELLS`` gets a fresh copy of the last commit and a fresh environment, which is deleted afterwards. The
results are in ``docs/results/versions``, one file for each cell. The exit code is 1 if a test failed.

    python3 .ci/matrix.py                                   all cells, about 7 GB of disk and 15 minutes for each
    python3 .ci/matrix.py --cells python3.13-torch2.14.1    one of them
    python3 .ci/matrix.py --tests "-n 2 tests/nn"           other tests, whose results are only printed
    python3 .ci/matrix.py --failed                          again what failed last time, after a correction
    python3 .ci/matrix.py --table                           no tests; prints the table of the files
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results" / "versions"
TESTS = "-n 2"  # the arguments of the README's test line
SHOWN = ("torch", "numpy", "triton", "safetensors", "pytest", "hypothesis")


class Cell(NamedTuple):
    """Versions that are tested together."""

    python: str
    torch: str
    numpy: str

    @property
    def name(self) -> str:
        return f"python{self.python}-torch{self.torch}"

    @property
    def file(self) -> Path:
        return RESULTS / f"{self.name}.json"


CELLS = (
    Cell("3.10", "2.13.0", "2.2.6"),  # the last NumPy for Python 3.10
    Cell("3.11", "2.11.0", "2.0.2"),  # the oldest that are supported
    Cell("3.11", "2.13.0", "2.3.5"),  # the versions of constraints.txt
    Cell("3.11", "2.14.1", "2.3.5"),
    Cell("3.12", "2.13.0", "2.3.5"),
    Cell("3.13", "2.14.1", "2.4.6"),  # the newest
)


def constraints(cell: Cell, text: str) -> str:
    """``constraints.txt`` with the torch and the NumPy of a cell."""
    others = [line for line in text.splitlines() if not re.match(r"(torch|numpy)==", line)]
    return "\n".join([*others, f"torch=={cell.torch}", f"numpy=={cell.numpy}", ""])


def interpreter(version: str, programs: Iterable[str]) -> str:
    """The first of these programs that is a Python of this version, else ``pythonX.Y``."""
    code = "import sys; print('%d.%d' % sys.version_info[:2])"
    for program in (*programs, f"python{version}"):
        with contextlib.suppress(FileNotFoundError):
            found = subprocess.run([program, "-c", code], capture_output=True, text=True, check=False)
            if found.stdout.strip() == version:
                return program
    raise SystemExit(f"python{version} was not found; give it with --python PROGRAM")


# --- one cell -------------------------------------------------------------------------------------------------
def install(cell: Cell, program: str, folder: Path) -> Path:
    """Make an environment and install the last commit into it. Returns its Python."""
    copy, venv = folder / "copy", folder / "venv"
    shutil.rmtree(copy, ignore_errors=True)
    copy.mkdir(parents=True)
    archive = subprocess.run(["git", "archive", "HEAD"], cwd=ROOT, stdout=subprocess.PIPE, check=True).stdout
    subprocess.run(["tar", "-x", "-C", copy], input=archive, check=True)
    python = venv / "bin" / "python"
    if not python.exists():
        subprocess.run([program, "-m", "venv", venv], check=True)
    versions = folder / "constraints.txt"
    versions.write_text(constraints(cell, (copy / "constraints.txt").read_text("utf-8")), "utf-8")
    pip = [python, "-m", "pip", "install", "--quiet", "--no-cache-dir"]
    # A pip that is older than its Python may not read the constraint of a newer one.
    subprocess.run([*pip, "--upgrade", "pip"], check=True)
    subprocess.run([*pip, "-c", versions, ".[test]"], cwd=copy, check=True)
    return python


def versions_of(python: Path) -> dict[str, Any]:
    """The versions in an environment, and whether the native library was built."""
    code = f"""if True:
        import importlib.metadata, json, pathlib, platform
        found = {{"python": platform.python_version()}}
        for name in {SHOWN}:
            try:
                found[name] = importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                found[name] = None
        import torch
        found["torch"] = torch.__version__
        files = importlib.metadata.files("wsn-fast")
        found["native library"] = any(file.suffix == ".so" for file in files)
        print(json.dumps(found))"""
    # Not in the copy, whose wsn_fast would hide the installed one.
    result = subprocess.run([python, "-c", code], cwd=python.parent, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def run_tests(python: Path, copy: Path, arguments: Sequence[str]) -> dict[str, Any]:
    """Run pytest; returns counts, failures and the reasons of what was skipped."""
    report = copy.parent / "report.xml"
    report.unlink(missing_ok=True)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    date, tested = time.strftime("%Y-%m-%d", time.gmtime()), commit()
    command = [python, "-m", "pytest", "-o", "junit_family=xunit1", f"--junitxml={report}", *arguments]
    code = subprocess.run(command, cwd=copy, env=environment, check=False).returncode
    if code not in (0, 1):  # pytest itself failed, or found no test
        raise SystemExit(f"pytest ended with exit code {code}")
    return {"date": date, "commit": tested, **read_report(report)}


def read_report(report: Path) -> dict[str, Any]:
    """What a JUnit file of pytest says."""
    cases = list(ET.parse(report).iter("testcase"))
    failed = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = [case for case in cases if case not in failed and case.find("skipped") is not None]
    reasons = Counter(case.find("skipped").get("message", "") for case in skipped)  # type: ignore[union-attr]
    return {
        "seconds": round(sum(float(suite.get("time", 0)) for suite in ET.parse(report).iter("testsuite"))),
        "passed": len(cases) - len(failed) - len(skipped),
        "failed": len(failed),
        "skipped": len(skipped),
        "failures": sorted({node(case) for case in failed}),
        "skips": dict(reasons.most_common()),
    }


def node(case: ET.Element) -> str:
    """The name that pytest takes for a test: ``file::Class::test[case]``."""
    file, name = case.get("file", ""), case.get("name", "")
    classes = case.get("classname", "").removeprefix(file.removesuffix(".py").replace("/", "."))
    return "::".join([file, *classes.strip(".").split("."), name] if classes.strip(".") else [file, name])


def commit() -> str:
    """The commit that is tested."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def run_cell(cell: Cell, options: argparse.Namespace, folder: Path) -> bool:
    """Test a cell. Returns whether all went well."""
    record = json.loads(cell.file.read_text("utf-8")) if cell.file.exists() else {"runs": []}
    arguments = shlex.split(options.tests)
    if options.failed:
        if not record["runs"] or not record["runs"][-1]["failures"]:
            print(f"{cell.name}: nothing failed")
            return True
        # Of a test that is sampled, other cases are in the ordinary set when fewer are collected.
        arguments += ["-m", "not slow and not ecosystem", *record["runs"][-1]["failures"]]
    try:
        python = install(cell, interpreter(cell.python, options.python), folder)
        words = f"{options.tests} and what had failed" if options.failed else options.tests
        run = {"tests": words, **run_tests(python, folder / "copy", arguments)}
        versions = versions_of(python)
    finally:
        if not options.keep:
            shutil.rmtree(folder, ignore_errors=True)
    print(cell.name, json.dumps({"versions": versions, **run}, indent=2))
    if options.failed or not any(word.startswith("tests") for word in arguments):
        runs = [*record["runs"], run] if options.failed else [run]
        RESULTS.mkdir(parents=True, exist_ok=True)
        cell.file.write_text(json.dumps({"cell": cell._asdict(), "versions": versions, "runs": runs}, indent=2) + "\n")
    return not run["failed"]


# --- the table ------------------------------------------------------------------------------------------------
def table(cells: Iterable[Cell] = CELLS) -> str:
    """The results of all cells in Markdown."""
    lines = ["| Python | torch | NumPy | Triton | passed | failed | skipped | commit |", "|" + "---|" * 8]
    for cell in cells:
        if not cell.file.exists():
            lines.append(f"| {cell.python} | {cell.torch} | {cell.numpy} | | not run | | | |")
            continue
        record = json.loads(cell.file.read_text("utf-8"))
        versions, (first, *later) = record["versions"], record["runs"]
        failed = str(first["failed"])
        for again in later:
            failed += f"; of these, {again['passed']} passed and {again['failed']} failed at {again['commit']}"
        lines.append(
            f"| {versions['python']} | {versions['torch']} | {versions['numpy']} | {versions['triton']} "
            f"| {first['passed']} | {failed} | {first['skipped']} | {first['commit']} |"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = {cell.name: cell for cell in CELLS}
    parser.add_argument("--cells", nargs="+", choices=names, default=list(names), metavar="CELL", help="which cells")
    parser.add_argument("--tests", default=TESTS, metavar="ARGS", help=f"arguments of pytest (default: {TESTS!r})")
    parser.add_argument("--python", action="append", default=[], metavar="PROGRAM", help="a Python that is not on PATH")
    parser.add_argument("--failed", action="store_true", help="run only the tests that failed in the last run")
    parser.add_argument("--keep", metavar="FOLDER", help="keep the environments here, and use those that are here")
    parser.add_argument("--table", action="store_true", help="print the table of earlier results")
    options = parser.parse_args(argv)
    ok = True
    if not options.table:
        for name in options.cells:
            folder = Path(options.keep, name).resolve() if options.keep else Path(tempfile.mkdtemp())
            ok &= run_cell(names[name], options, folder)
    print(table())
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
