"""What several processes would do to a WSN in silence is right, or refused with the name of the tensor or wrapper and a
way out. Two processes run all cases once; tests/distributed has the training."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from parallel_cases import REFUSED_CASES
from processes import needs_gloo, run_cases

pytestmark = needs_gloo

REFUSED = {
    "DistributedDataParallel inside": r"wrapped in DistributedDataParallel inside of the WSN.*wrap the whole WSN",
    "DataParallel inside": r"wrapped in DataParallel inside of the WSN.*Train on one process",
    "sharded before begin_task": r"is a DTensor: after fully_shard alone.*wsn_fast\.distributed\.shard",
    "sharded after guard": r"is a DTensor: after fully_shard alone.*wsn_fast\.distributed\.shard",
    "sharded after begin_task": r"is a DTensor: after fully_shard alone.*wsn_fast\.distributed\.shard",
    "different weights": r"different values of model.1.weight: .*with one seed, or load one state",
    "different densities": r"different values of the density or rule of 1: .*in the same way",
    "different masks": r"different values of model.1.weight_masks: .*load one state",
    "other tensors": r"different values of model.more: ",
    "one pass after the wrapper": r"waits for gradients of model.1.weight_score, .*build the one-pass optimizer before",
    "frozen since": r"waits for gradients of model.1.weight, model.1.bias, .*Wrap the WSN again",
    "mixed precision": r"mixed_precision=.*rounds the scores.*use torch.autocast",
    "join": r"join\(\) does not know.*as many batches",
    "wrapped in use": r"task [01] is finished and in use: leave use_task before DistributedDataParallel",
    "another reducer": r"optimize_ddp must not be 'python_reducer'",
    "compiled whole": r"(?s:.*)torch.compile has compiled a WSN inside of DistributedDataParallel.*wsn.compile\(\)",
    "stepping in backward": r"optimizer must not be a ZeroRedundancyOptimizer\(overlap_with_ddp=True\).*Use overlap",
    "different tasks in a module that says nothing": r"task [01] is finished and in use inside of.*_masks.*leave_a",
}


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_cases("parallel_cases", 2, tmp_path_factory.mktemp("processes"))


@pytest.mark.parametrize("case", REFUSED)
def test_it_is_refused_in_all_processes(case: str, seen: list[dict[str, Any]]) -> None:
    for one in seen:
        assert re.match(f"(RuntimeError|TypeError|Unsupported): .*{REFUSED[case]}", str(one[case])), one[case]


def test_every_case_has_an_expectation() -> None:
    assert REFUSED_CASES.keys() == REFUSED.keys()


@pytest.mark.parametrize(
    "case", ["different tasks", "different tasks of a convnet", "different tasks in a module around"]
)
def test_processes_evaluate_different_tasks_through_the_wrapper(case: str, seen: list[dict[str, Any]]) -> None:
    assert [one[case] for one in seen] == [True, True]


def test_a_value_that_one_process_has_changed_is_found_when_the_task_ends(seen: list[dict[str, Any]]) -> None:
    for one in seen:
        error, then = one["changed in one process"]
        assert "different values of 3.bias" in error and "still in progress" in error
        assert then == "ended: [0]"


def test_what_one_process_has_forgotten_stops_the_others(seen: list[dict[str, Any]]) -> None:
    assert str(seen[1]["forgotten in one process"]).startswith("ForgottenError: ")
    assert re.match(
        r"(?s)OtherFailedError: another process of the group has failed\nprocess 1: ForgottenError: .*task 0: 5.bias",
        str(seen[0]["forgotten in one process"]),
    )


def test_a_task_that_one_process_cannot_begin_stops_the_others(seen: list[dict[str, Any]]) -> None:
    assert str(seen[1]["not begun in one process"]).startswith("ValueError: density must be")
    assert "process 1: ValueError: density must be" in str(seen[0]["not begun in one process"])


def test_what_a_removed_task_leaves_is_drawn_once(seen: list[dict[str, Any]]) -> None:
    assert [one["removed"] for one in seen] == [True, True]


def test_heads_and_scores_are_sent_when_a_task_begins(seen: list[dict[str, Any]]) -> None:
    assert [one["sent when begun"] for one in seen] == [True, True]


def test_a_wsn_that_is_no_part_of_the_wrapper_is_left_alone(seen: list[dict[str, Any]]) -> None:
    assert [one["teacher"] for one in seen] == [None, None]


@pytest.mark.parametrize("case", ["statistics", "leveled statistics"])
def test_all_processes_keep_the_running_statistics_of_the_first(seen: list[dict[str, Any]], case: str) -> None:
    (first, kept), (other, kept_too) = seen[0][case], seen[1][case]
    assert not torch.equal(first, other)
    assert torch.equal(kept, first) and torch.equal(kept_too, first)


@pytest.mark.parametrize(
    ("case", "most"),
    [
        ("wire: standard", 16.1),
        ("wire: standard, bfloat16", 8.1),
        ("wire: one pass", 8.1),
        ("wire: one pass, bfloat16", 4.1),
    ],
)
def test_bytes_of_a_step_for_each_weight(case: str, most: float, seen: list[dict[str, Any]]) -> None:
    for one in seen:
        assert most - 0.1 <= one[case] <= most


def test_nothing_is_sent_under_no_sync(seen: list[dict[str, Any]]) -> None:
    buckets, head = 1, 1
    assert [one["no sync"] for one in seen] == [[0, buckets + head]] * 2


def test_without_a_wrapper_the_whole_wsn_is_compiled(seen: list[dict[str, Any]]) -> None:
    assert [one["compiled without a wrapper"] for one in seen] == [True, True]


def test_only_gradients_of_gated_tensors_are_rounded(seen: list[dict[str, Any]]) -> None:
    for one in seen:
        assert all(one["rounded"]) and len(one["rounded"]) > 4


def test_the_threads_of_gloo_get_time_at_the_end_of_the_process(seen: list[dict[str, Any]]) -> None:
    assert [one["the end of the process"] for one in seen] == [1, 1]


def test_wrong_arguments(seen: list[dict[str, Any]]) -> None:
    assert seen[0]["wrong arguments"] == [
        "TypeError: module must be a torch.nn.Module, got int",
        "ValueError: module must contain a WSN",
        "ValueError: scores=True is for a module around the WSN: build the one-pass optimizer before "
        "DistributedDataParallel(wsn)",
        "TypeError: wsn must be a WSN, got Linear",
        "TypeError: ddp must be a DistributedDataParallel, got WSN",
        "ValueError: module must contain a WSN",
    ]
