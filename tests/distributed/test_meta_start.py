"""Models that no process could hold begin on the meta device. Two processes run the cases of :mod:`meta_cases`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from meta_cases import CASES
from processes import needs_gloo, run_cases

pytestmark = needs_gloo
LONG = "resident bytes"
REFUSED = {
    "restless": r"ValueError: reset_parameters\(\) of Restless writes to (bias|weight|first\.bias) of an inner module",
    "lost": r"ValueError: these tensors have no memory yet: \['model.shift'\]. Load them first",
}


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("two")
    return run_cases("meta_cases", 2, folder, [case for case in CASES if case != LONG], folder)


@pytest.mark.parametrize("case", [case for case in CASES if case.startswith("values")])
def test_the_values_are_those_of_one_process(case: str, seen: list[dict[str, Any]]) -> None:
    assert [one[case] for one in seen] == [None, None]


@pytest.mark.parametrize("case", ["training", "a checkpoint"])
def test_a_model_from_meta_is_used_as_any_other(case: str, seen: list[dict[str, Any]]) -> None:
    assert [one[case] for one in seen] == [None, None]


def test_all_processes_draw_the_same_numbers_afterwards(seen: list[dict[str, Any]]) -> None:
    assert torch.equal(seen[0]["seeds"], seen[1]["seeds"])


@pytest.mark.parametrize("case", REFUSED)
def test_it_is_refused_in_both_processes(case: str, seen: list[dict[str, Any]]) -> None:
    for one in seen:
        assert re.match(REFUSED[case], str(one[case])), one[case]


def test_no_process_holds_more_than_its_shards_and_a_layer(seen: list[dict[str, Any]]) -> None:
    for one in seen:
        most, shards, layer = one["live bytes"]
        assert shards <= most <= shards + layer


@pytest.mark.ci
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux tells the peak of one call")
def test_the_resident_memory_grows_by_the_shards_and_a_layer(tmp_path: Path) -> None:
    for one in run_cases("meta_cases", 2, tmp_path, [LONG]):
        most, shards, layer = one[LONG]
        assert 0.9 * shards < most < shards + 1.5 * layer  # of 3 layers that a whole model would add
