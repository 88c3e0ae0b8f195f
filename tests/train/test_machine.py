"""How much memory a process may use, in a container too."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from wsn_fast.train import machine

UNLIMITED = "9223372036854771712"  # what the first version of control groups says


def limits(folder: Path, groups: str, files: dict[str, str]) -> list[int]:
    root = folder / "cgroup"
    for name, text in files.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n")
    listed = folder / "groups"
    listed.write_text(f"{groups}\n")
    return list(machine._limits(listed, root))


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("0::/", {"memory.max": "4096"}, [4096]),
        ("0::/", {"memory.max": "max"}, []),
        ("0::/job/step", {"job/step/memory.max": "max", "job/memory.max": "512", "memory.max": "900"}, [512, 900]),
        ("0::/../other", {"memory.max": "300"}, [300]),
        ("4:cpu:/a\n9:memory:/a:b\n0::/", {"memory/a:b/memory.limit_in_bytes": "77"}, [77]),
        ("9:memory:/a", {"memory/memory.limit_in_bytes": UNLIMITED}, [int(UNLIMITED)]),
        ("4:cpu:/a", {"memory.max": "1"}, []),
    ],
)
def test_the_limits_of_a_group_and_of_those_above_it_are_found(
    tmp_path: Path, groups: str, files: dict[str, str], expected: list[int]
) -> None:
    assert limits(tmp_path, groups, files) == expected


def test_a_system_without_groups_has_no_limits(tmp_path: Path) -> None:
    assert list(machine._limits(tmp_path / "missing", tmp_path)) == []


def test_the_smallest_limit_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_of_machine", lambda: iter([100]))
    monkeypatch.setattr(machine, "_limits", lambda *_: iter([300, 40]))
    assert machine.memory() == 40


def test_the_memory_is_not_known_where_nothing_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_of_machine", lambda: iter([]))
    monkeypatch.setattr(machine, "_limits", lambda *_: iter([]))
    assert machine.memory() is None


@pytest.mark.skipif(not hasattr(os, "sysconf"), reason="this system does not tell")
def test_no_more_than_the_memory_of_the_machine_counts() -> None:
    found = machine.memory()
    assert found is not None
    assert 0 < found <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
