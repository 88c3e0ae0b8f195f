"""The README is short, and its Python runs as it is written there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import wsn_fast

README = Path(__file__).parents[2] / "README.md"
MARKS = ("<!-- main-line -->\n```sh\n", "<!-- test-line -->\n```sh\n", "<!-- example -->\n```python\n")


def test_it_fits_on_two_screens() -> None:
    lines = README.read_text("utf-8").splitlines()
    assert len(lines) <= 120
    assert [line for line in lines if len(line) > 140] == []


@pytest.mark.parametrize("mark", MARKS)
def test_each_marked_block_is_there_once(mark: str) -> None:
    assert README.read_text("utf-8").count(mark) == 1


def test_the_example_runs_and_keeps_its_promise() -> None:
    (code,) = re.findall(r"<!-- example -->\n```python\n(.*?)```", README.read_text("utf-8"), re.DOTALL)
    names: dict[str, object] = {}
    exec(compile(code, str(README), "exec"), names)
    wsn = names["wsn"]
    assert isinstance(wsn, wsn_fast.WSN)
    assert wsn.tasks == ["first", "second"]


@pytest.mark.parametrize("link", re.findall(r"\]\(([^)#:]+)\)", README.read_text("utf-8")))
def test_links_into_the_repository_lead_somewhere(link: str) -> None:
    assert (README.parent / link).exists()
