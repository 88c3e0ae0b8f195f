"""Training of shards is training of the whole model: see the stories in :mod:`fsdp_cases`."""

from __future__ import annotations

from typing import Any

import pytest
from fsdp_cases import STORIES
from processes import needs_gloo, run_cases

pytestmark = needs_gloo
OF_THREE = ["one pass", "one pass, clipped", "standard, accumulated", "guarded"]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_cases("fsdp_cases", 2, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_cases("fsdp_cases", 3, tmp_path_factory.mktemp("three"), OF_THREE)


@pytest.mark.parametrize("story", STORIES)
def test_two_processes_train_as_one_does(story: str, two: list[dict[str, Any]]) -> None:
    assert [seen[story] for seen in two] == [[], []]


@pytest.mark.parametrize("story", OF_THREE)
def test_three_processes_of_which_one_has_no_rows_train_as_one_does(story: str, three: list[dict[str, Any]]) -> None:
    assert [seen[story] for seen in three] == [[], [], []]
