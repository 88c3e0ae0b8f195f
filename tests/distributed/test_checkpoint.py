"""Checkpoints of one number of processes are loaded by another one: see the cases in :mod:`checkpoint_cases`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from checkpoint_cases import ACROSS, DAMAGE, KINDS, OTHERS, differences, fresh, saved
from processes import needs_gloo, run_cases

pytestmark = needs_gloo
SAME = ["one pass", "guarded", "8 bits"]
REFUSED = {
    "a file is missing": r"lacks the file __1_0.distcp",
    "a file is cut": r"the file __1_0.distcp in .* has \d+ bytes of \d+",
    "a weight": r"damaged: wsn.model.1.weight are not what was saved",
    "a mask": r"damaged: wsn.model.1.weight_masks are",
    "a head": r"damaged: wsn.model.6.heads.i0.weight are",
    "the kind of a weight": r"wsn.model.1.weight cannot be read from",
    "the tasks": r"wsn._extra_state (in .* is damaged|are not what was saved)",
    "no metadata": r"there is no checkpoint in no metadata: it has no .metadata",
    "cut metadata": r".metadata in cut metadata is damaged",
    "wider": r"size mismatch for model.1.weight: the checkpoint has \(7, 36\), and the model \(8, 36\)",
    "longer": r"only one of the checkpoint and the model has these gated tensors: model.7.bias, model.7.weight",
    "without a norm": r'Unexpected key\(s\) in state_dict: "model.2.weight"',
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def seen(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    """What three and two processes have seen."""
    saved(fresh("one pass"), "one pass", 1, folder=folder)
    others = [
        "whole in each",
        "nothing is gathered",
        "sizes of files",
        *(f"refuse {name}" for name in (*DAMAGE, *OTHERS)),
    ]
    names = {
        3: ["save one pass", "one pass of 3"],
        2: [
            *("save " + kind for kind in SAME),
            *(f"{kind} of 2" for kind in SAME),
            "one pass of 1",
            "one pass of 3",
            *others,
        ],
    }
    runs = tmp_path_factory.mktemp("runs")
    return {n: run_cases("checkpoint_cases", n, _made(runs / str(n)), names[n], folder) for n in names}


@pytest.fixture(scope="module")
def every(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    """What any number of processes has seen of any number."""
    folder, runs = tmp_path_factory.mktemp("every"), tmp_path_factory.mktemp("runs")
    numbers = (1, 2, 3)
    for n in numbers:
        run_cases("checkpoint_cases", n, _made(runs / f"save {n}"), [f"save {kind}" for kind in KINDS], folder)
    names = [f"{kind} of {n}" for kind in KINDS for n in numbers]
    return {n: run_cases("checkpoint_cases", n, _made(runs / f"load {n}"), names, folder) for n in numbers}


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


@pytest.mark.parametrize("kind", SAME)
def test_as_many_processes_go_on_to_the_bit(kind: str, seen: dict[int, list[dict[str, Any]]]) -> None:
    assert [one[f"{kind} of 2"] for one in seen[2]] == [[], []]


def test_three_processes_of_which_one_has_no_rows_go_on_to_the_bit(seen: dict[int, Any]) -> None:
    assert [one["one pass of 3"] for one in seen[3]] == [[], [], []]


def test_two_processes_load_what_three_have_saved(seen: dict[int, Any]) -> None:
    assert [one["one pass of 3"] for one in seen[2]] == [[], []]


def test_two_processes_load_what_a_whole_model_has_saved(seen: dict[int, Any]) -> None:
    assert [one["one pass of 1"] for one in seen[2]] == [[], []]


@pytest.mark.parametrize("kind", SAME)
def test_a_whole_model_loads_what_two_processes_have_saved(kind: str, folder: Path, seen: dict[int, Any]) -> None:
    assert seen
    assert differences(fresh(kind, 5), kind, 2, exactly=False, folder=folder) == []


@pytest.mark.ci
@pytest.mark.parametrize("other", (1, 2, 3))
@pytest.mark.parametrize("own", (1, 2, 3))
@pytest.mark.parametrize("kind", KINDS)
def test_any_number_loads_what_any_other_has_saved(kind: str, own: int, other: int, every: dict[int, Any]) -> None:
    if kind in ACROSS or own == other:
        assert [one[f"{kind} of {other}"] for one in every[own]] == [[]] * own


def test_processes_that_have_the_whole_model_save_and_load_it(seen: dict[int, Any]) -> None:
    assert [one["whole in each"] for one in seen[2]] == [[], []]


def test_no_tensor_is_gathered(seen: dict[int, Any]) -> None:
    assert [one["nothing is gathered"] for one in seen[2]] == [None, None]


def test_each_process_writes_its_own_shards(seen: dict[int, Any]) -> None:
    mine, other = seen[2][0]["sizes of files"]
    assert 4 << 20 < mine <= other < (4 << 20) + 50_000


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_in_both_processes_and_nothing_changes(name: str, seen: dict[int, Any]) -> None:
    for one in seen[2]:
        assert re.search(REFUSED[name], one[f"refuse {name}"]), one[f"refuse {name}"]
