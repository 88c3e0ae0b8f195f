"""What one is told who lacks the framework."""

from __future__ import annotations

import importlib.util
import sys

import pytest


@pytest.mark.parametrize("name", ["lightning", "clarena", "avalanche", "transformers"])
def test_a_missing_framework_is_named_with_its_extra(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in [m for m in sys.modules if m.startswith("wsn_fast.integrations")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(importlib.util, "find_spec", lambda found: None)
    with pytest.raises(ImportError, match=rf"pip install \"wsn-fast\[{name}\]\""):
        importlib.import_module(f"wsn_fast.integrations.{name}")
