"""What is done with shards beside training them: precision, bytes, tasks that come and go, states. Two processes run
all cases of :mod:`fsdp_uses` once."""

from __future__ import annotations

from typing import Any

import pytest
from fsdp_uses import CASES, POLICIES
from processes import needs_gloo, run_cases

pytestmark = needs_gloo
SAID = {"a written weight": "1.weight", "a written head": "6.weight"}
WIRE = [f"wire {name}" for name in POLICIES]


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_cases("fsdp_uses", 2, tmp_path_factory.mktemp("two"))


@pytest.mark.parametrize("case", [case for case in CASES if case not in WIRE])
def test_shards_do_what_a_whole_model_does(case: str, seen: list[dict[str, Any]]) -> None:
    assert [one[case] for one in seen] == [SAID.get(case)] * 2


@pytest.mark.parametrize("case", WIRE)
def test_a_step_sends_hardly_more_than_one_of_a_dense_model(case: str, seen: list[dict[str, Any]]) -> None:
    for one in seen:
        assert 1 <= one[case] <= 1.015
