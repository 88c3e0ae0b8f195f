"""The README's Python runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import wsn_fast

README = Path(__file__).parents[1] / "README.md"


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
