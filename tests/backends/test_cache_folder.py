"""The folder for what was found out about this machine."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from wsn_fast.backends import cache_folder


def test_the_variable_names_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cache_folder.ENVIRONMENT_VARIABLE, str(tmp_path / "mine"))
    assert cache_folder.folder() == tmp_path / "mine"


def test_a_relative_variable_is_taken_from_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(cache_folder.ENVIRONMENT_VARIABLE, "mine")
    assert cache_folder.folder() == tmp_path / "mine"


@pytest.mark.skipif(os.name != "posix", reason="HOME is the home folder of POSIX systems")
@pytest.mark.parametrize("value", [None, ""])
def test_without_the_variable_it_is_the_users_own(
    value: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv(cache_folder.ENVIRONMENT_VARIABLE, raising=False)
    if value is not None:
        monkeypatch.setenv(cache_folder.ENVIRONMENT_VARIABLE, value)
    assert cache_folder.folder().name == "wsn_fast"
    assert tmp_path in cache_folder.folder().parents


def test_a_file_is_replaced_and_nothing_else_is_left(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file.json"
    for text in ("first", "größer"):
        assert cache_folder.write_text(path, text) == ""
        assert path.read_text("utf-8") == text
    assert [*path.parent.iterdir()] == [path]


def test_a_folder_that_cannot_be_made_is_a_reason(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    reason = cache_folder.write_text(tmp_path / "file" / "below.json", "text")
    assert "cannot be written" in reason


def test_a_file_that_cannot_be_replaced_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "taken" / "within").mkdir(parents=True)
    assert "cannot be written" in cache_folder.write_text(tmp_path / "taken", "text")
    assert [*tmp_path.iterdir()] == [tmp_path / "taken"]


def test_an_unknown_home_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "home folder is unknown" in cache_folder.write_text(Path("~/.cache/wsn_fast/file.json"), "text")
    assert [*tmp_path.iterdir()] == []
