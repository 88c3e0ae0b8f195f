"""``python -m wsn_fast.doctor --check`` finds what is wrong: each way to be wrong is planted in one operation."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from wsn_fast.backends import choice
from wsn_fast.backends import torch as portable
from wsn_fast.doctor import __main__ as command
from wsn_fast.doctor import checking


def raises(*args: object) -> None:
    raise RuntimeError("no kernel image")


@pytest.fixture
def _few(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison itself has tests of its own."""
    monkeypatch.setattr(checking.comparison, "ALL", checking.comparison.FEW)
    monkeypatch.setattr(checking, "DTYPES", (torch.float32,))


def test_the_command_checks_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    before = torch.random.get_rng_state()
    assert command.main(["--check"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("cpu: ") and printed.endswith("every compared operation is right\n")
    assert all(operation in printed for operation in choice.PRIMITIVES)
    assert torch.equal(before, torch.random.get_rng_state()), "random numbers go on as before"


@pytest.mark.usefixtures("_few")
def test_the_command_fails_where_something_is_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    backend = SimpleNamespace(**{name: getattr(portable, name) for name in choice.PRIMITIVES} | {"pack": raises})
    monkeypatch.setattr(checking, "candidate", lambda *_: choice.Choice(backend, "mine", "planted"))
    assert command.main(["--check"]) == 1
    assert "WRONG: RuntimeError: no kernel image" in capsys.readouterr().out


@pytest.mark.ci
def test_help_is_quick_to_read() -> None:
    done = subprocess.run([sys.executable, "-m", "wsn_fast.doctor", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "--check" in done.stdout
