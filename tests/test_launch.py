"""What several processes would print, the first one prints alone; the others wait until it has."""

from __future__ import annotations

import sys

import pytest

from wsn_fast import launch


@pytest.fixture
def waited(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that somebody waited, which take no time."""
    found: list[float] = []
    monkeypatch.setattr(launch.time, "sleep", found.append)
    return found


def end(code: int | str) -> None:
    """Say something and exit, as ``argparse`` does."""
    with launch.said_once():
        print("usage")
        print("error", file=sys.stderr)
        sys.exit(code)


@pytest.mark.parametrize("code", [2, "wrong"])
def test_a_later_process_is_silent_and_waits_for_the_first_one_to_speak(
    code: int | str, waited: list[float], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as ended:
        end(code)
    assert ended.value.code == code and capsys.readouterr() == ("", "")
    assert len(waited) == 1 and waited[0] >= 10, "the first one may have begun late"


def test_nobody_waits_when_all_is_well(
    waited: list[float], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit):
        end(0)  # --help
    with launch.said_once():
        print("usage")
    assert waited == [] and capsys.readouterr() == ("", "")
    print("after")
    assert capsys.readouterr() == ("after\n", "")


@pytest.mark.parametrize("given", [{}, {"WORLD_SIZE": "2", "RANK": "0"}, {"WORLD_SIZE": "2", "RANK": "one"}], ids=str)
def test_the_first_process_and_one_that_cannot_tell_speak_at_once(
    given: dict[str, str], waited: list[float], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as ended:
        end(2)
    assert ended.value.code == 2 and waited == [] and capsys.readouterr() == ("usage\n", "error\n")
