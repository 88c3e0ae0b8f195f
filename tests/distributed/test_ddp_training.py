"""Tasks trained under DistributedDataParallel, against one process with the whole batch: the masks are those of all
processes at every step, in float64 also those of the single process, and finished tasks keep every bit."""

from __future__ import annotations

from typing import Any

import pytest
from ddp_cases import STORIES
from processes import needs_gloo, run_cases

pytestmark = needs_gloo

ORDINARY = (
    "once", "each task", "scores drawn anew", "accumulated", "any module", "known heads",
    "a module around that says nothing", "zero redundancy", "batch norm", "one pass", "one pass, accumulated",
    "one pass, bucket views", "one pass, bfloat16",
)  # fmt: skip
OTHERS = [name for name in STORIES if name not in ORDINARY]


def told(world: int, names: list[str], factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_cases("ddp_cases", world, factory.mktemp("processes"), names)


@pytest.fixture(scope="module")
def of_two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return told(2, [*ORDINARY], tmp_path_factory)


@pytest.fixture(scope="module")
def more_of_two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return told(2, OTHERS, tmp_path_factory)


@pytest.fixture(scope="module")
def of_three(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return told(3, [*STORIES], tmp_path_factory)


@pytest.mark.parametrize("name", ORDINARY)
def test_two_processes(name: str, of_two: list[dict[str, Any]]) -> None:
    assert [one[name] for one in of_two] == [[], []]


@pytest.mark.ci
@pytest.mark.parametrize("name", OTHERS)
def test_two_processes_in_other_ways(name: str, more_of_two: list[dict[str, Any]]) -> None:
    assert [one[name] for one in more_of_two] == [[], []]


@pytest.mark.ci
@pytest.mark.parametrize("name", STORIES)
def test_three_processes(name: str, of_three: list[dict[str, Any]]) -> None:
    assert [one[name] for one in of_three] == [[], [], []]
