"""The documentation is true: its Python runs, its commands parse, and the tests and files that it names exist.

The blocks of Python on one page run in their order, in one namespace and an empty folder. A block is left out if the
comment ``<!-- not run: why -->`` stands right before it.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import re
import shlex
from pathlib import Path
from typing import NamedTuple

import pytest

import wsn_fast
from wsn_fast import distributed, presets, train
from wsn_fast.train import command_line

ROOT = Path(__file__).parents[2]
SITE = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [*(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")), *SITE]
TESTS = ROOT / "tests"
# Paths that exist only after a build.
BUILT = ("build/", "wsn_fast/_lib")

_FENCE = re.compile(
    r"(?:^<!-- (?P<comment>[^\n]*) -->\n+)?^```(?P<language>\w*)\n(?P<code>.*?)^```$", re.DOTALL | re.MULTILINE
)


class Block(NamedTuple):
    """A fenced block: its language, its text, the line it starts at, and the comment before it."""

    language: str
    code: str
    line: int
    comment: str

    @property
    def left_out(self) -> str:
        """Why it is not run; empty if it is."""
        kind, _, reason = self.comment.partition(": ")
        return reason if kind == "not run" else ""


def blocks(page: Path, *languages: str) -> list[Block]:
    text = page.read_text("utf-8")
    found = []
    for match in _FENCE.finditer(text):
        line = text.count("\n", 0, match.start("code")) + 1
        found.append(Block(match["language"], match["code"], line, match["comment"] or ""))
    return [block for block in found if block.language in languages]


def of_pages(*languages: str) -> pytest.MarkDecorator:
    pages = [page for page in PAGES if blocks(page, *languages)]
    return pytest.mark.parametrize("page", pages, ids=lambda page: str(page.relative_to(ROOT)))


# --- Python
@of_pages("python")
def test_python_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "__main__"}
    ran = 0
    for block in blocks(page, "python"):
        if not block.left_out:
            # As many empty lines before it as in the page, so that a traceback has the page's line.
            code = "\n" * (block.line - 1) + block.code
            exec(compile(code, str(page), "exec", dont_inherit=True), names)
            ran += 1
    if not ran:
        pytest.skip("; ".join(block.left_out for block in blocks(page, "python")))


# --- commands
def commands(block: Block) -> list[list[str]]:
    """The words of each command, without comments, assignments before it, redirections and what it is piped into."""
    found = []
    for line in block.code.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="&|;<>")
        lexer.whitespace_split = True
        command: list[str] = []
        for word in [*lexer, ";"]:
            if re.fullmatch(r"[&|;<>]+", word):
                found += [command] if command else []
                command = []
            elif command or not re.fullmatch(r"\w+=.*", word):
                command.append(word)
    return found


def problem(words: list[str]) -> str:
    """What is wrong with a command of ours, or "" if nothing is. One of another program must be known by name."""
    program = words[0].removeprefix(".venv/bin/")
    arguments = words[1:]
    if program == "wsn-fast":
        try:
            command_line._parser().parse_args(arguments)
        except SystemExit as error:
            return "" if error.code == 0 else "wsn-fast does not take these arguments"
        except argparse.ArgumentError as error:
            return str(error)
        return ""
    if program in ("python", "python3") and "-m" in arguments:
        module = arguments[arguments.index("-m") + 1]
        known = importlib.util.find_spec(module) is not None
        return "" if known else f"there is no module {module}"
    if "/" in program:
        return "" if (ROOT / program).exists() else f"there is no file {program}"
    others = (
        "git",
        "cd",
        "pip",
        "python",
        "python3",
        "bash",
        "torchrun",
        "ruff",
        "mypy",
        "pytest",
        "export",
        "mkdocs",
        "pre-commit",
    )
    return "" if program in others else f"{program} is no program that these pages use"


@of_pages("sh", "bash", "shell", "console")
def test_commands_parse(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))  # for python -m benchmarks
    for block in blocks(page, "sh", "bash", "shell", "console"):
        if not block.left_out:
            for words in commands(block):
                assert problem(words) == "", f"{page.name}, block at line {block.line}: {shlex.join(words)}"


@pytest.mark.parametrize(
    "command", ["wsn-fast train permuted --densty 0.3", "wsn-fast trian", "python -m wsn_fast.novelty", "rm -rf x"]
)
def test_a_wrong_command_is_found(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert problem(shlex.split(command)) != ""


def test_every_block_says_what_it_is_in() -> None:
    for page in PAGES:
        unnamed = [block.line for block in blocks(page, "") if re.search(r"\bimport \w|^wsn-fast ", block.code, re.M)]
        assert unnamed == [], page


# --- what pages name
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    text = _FENCE.sub("", page.read_text("utf-8"))
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text)
    assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_tests_that_are_named_exist(page: Path) -> None:
    for file, name in re.findall(r"`(?:tests/)?([\w/]+\.py)::(\w+)`", page.read_text("utf-8")):
        tree = ast.parse((TESTS / file).read_text("utf-8"))
        assert name in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}, f"{file}::{name}"


# A folder or file of the repository, named from its root. Text in code marks with a space is a command.
_PATH = re.compile(r"`((?:wsn_fast|kernels|csrc|tests|benchmarks|docs|examples|\.ci|\.github)/[^`\s:]*)`")


def missing_paths(text: str) -> list[str]:
    return [path for path in _PATH.findall(text) if not path.startswith(BUILT) and not (ROOT / path).exists()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_paths_that_are_named_exist(page: Path) -> None:
    assert missing_paths(page.read_text("utf-8")) == []


def test_a_missing_path_is_found() -> None:
    assert missing_paths("`wsn_fast/nn/`, `kernels/no_such.py`, `tests/nn run`") == ["kernels/no_such.py"]


def test_the_design_says_where_things_are() -> None:
    text = (ROOT / "docs" / "design.md").read_text("utf-8")
    table = text.partition("## Where is ...?")[2].partition("\n## ")[0]
    rows = [line for line in table.splitlines() if line.startswith("| Where")]
    assert len(rows) == 12
    assert [row for row in rows if not re.search(r"`[\w./]+`", row.split("|")[2])] == []


def test_every_page_is_in_the_navigation() -> None:
    listed = re.findall(r"[\w/-]+\.md", (ROOT / "mkdocs.yml").read_text("utf-8"))
    assert sorted(listed) == sorted(str(page.relative_to(ROOT / "docs")) for page in SITE)


def test_the_index_lists_every_how_to_page() -> None:
    index = (ROOT / "docs" / "index.md").read_text("utf-8")
    pages = [f"how-to/{page.name}" for page in SITE if page.parent.name == "how-to"]
    assert [page for page in pages if f"({page})" not in index] == []


def test_the_reference_has_every_public_name() -> None:
    pages = [page.read_text("utf-8") for page in SITE if page.parent.name == "reference"]
    entries = {name for page in pages for name in re.findall(r"^::: [\w.]+\.(\w+)$", page, re.MULTILINE)}
    packages = (wsn_fast, wsn_fast.optim, distributed, presets, train)
    public = {name for package in packages for name in package.__all__} - {"__version__"}
    assert sorted(public - entries) == []


def test_the_table_of_benchmark_files_is_complete() -> None:
    table = (ROOT / "benchmarks" / "README.md").read_text("utf-8").partition("\n## Files\n")[2]
    named = {name for row in table.splitlines() if "|" in row for name in re.findall(r"`(\w+\.py)`", row.split("|")[1])}
    assert named == {path.name for path in (ROOT / "benchmarks").glob("*.py")} - {"__init__.py"}


def test_the_fidelity_page_names_every_test_of_published_faults() -> None:
    tree = ast.parse((TESTS / "continual" / "test_published_faults.py").read_text("utf-8"))
    tests = [node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]
    page = (ROOT / "docs" / "fidelity.md").read_text("utf-8")
    assert [name for name in tests if name not in page] == []
