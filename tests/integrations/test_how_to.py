"""The pages on frameworks: their Python runs as it stands there."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from wsn_fast import WSN

PAGES = Path(__file__).parents[2] / "docs" / "how-to"

pytestmark = pytest.mark.filterwarnings("default", "error:::wsn_fast")


def run(page: str) -> dict[str, Any]:
    if find_spec(page) is None:
        pytest.skip(f'needs {page}: pip install "wsn-fast[{page}]"')
    names: dict[str, Any] = {"__name__": page}
    for code in re.findall(r"```python\n(.*?)```", (PAGES / f"{page}.md").read_text("utf-8"), re.DOTALL):
        exec(compile(code, f"{page}.md", "exec"), names)
    return names


def test_lightning() -> None:
    wsn = run("lightning")["module"].wsn
    assert isinstance(wsn, WSN)
    assert wsn.tasks == [1, 2, 3]


def test_clarena() -> None:
    names = run("clarena")
    assert names["backbone"].wsn.tasks == [1, 2]
    assert names["logits"].shape == (5, 3)
