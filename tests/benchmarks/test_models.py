"""The page of models is what the command writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import models

FOLDER = Path(__file__).parents[2] / "docs" / "results"


def row(**changes: Any) -> dict[str, Any]:
    kept = dict.fromkeys(models.COLUMNS, "yes")
    about = {"model": "timm:tiny", "package": "timm", "kind": "tiny", "parameters": 1234, "share": 0.987}
    return {**about, "typed": ["heads"], "exception": "", **kept, **changes}


FACTS = {"date": "2026-01-02T03:04", "commit": "0123456789", "python": "3.11", "versions": {"torch": "2", "timm": "1"}}


def test_the_page_in_the_documentation_was_made_from_the_stored_results() -> None:
    stored = json.loads((FOLDER / "models.json").read_text("utf-8"))
    assert (FOLDER / "models.md").read_text("utf-8") == models.page(stored["facts"], stored["models"])


def test_a_model_is_a_line() -> None:
    page = models.page(FACTS, [row()])
    assert "| timm | `tiny` | 1,234 | 98.7% | heads | yes | yes | yes | yes | yes | yes | yes |" in page
    assert "2026-01-02 with torch 2, timm 1 and Python 3.11, at commit 0123456" in page
    assert "What is not kept" not in page


def test_a_broken_promise_is_told() -> None:
    page = models.page(FACTS, [row(dense="to_dense differs", load="-")])
    assert "| yes | yes | **no** | - | yes |" in page
    assert "- timm:tiny: dense: to_dense differs" in page
    assert "keep every promise below" in page and "Of these, 0 " in page


@pytest.mark.parametrize(("row_of", "status"), [(row(), 0), (row(probe="reads a weight"), 1)])
def test_the_exit_status_says_whether_a_promise_is_broken(tmp_path: Path, row_of: dict[str, Any], status: int) -> None:
    (tmp_path / "models.json").write_text(json.dumps({"facts": FACTS, "models": [row_of]}))
    assert models.main(["--page-only", "--out", str(tmp_path)]) == status
    assert (tmp_path / "models.md").read_text("utf-8") == models.page(FACTS, [row_of])
