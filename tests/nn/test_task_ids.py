"""Task ids and their encodings."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from wsn_fast.nn.task_ids import TaskId, check_task, decode_json, encode_json, task_from_key, task_key

ids = st.one_of(st.integers(), st.text(st.characters(exclude_categories=["Cs"]), min_size=1))


@given(ids)
def test_keys_round_trip_and_fit_module_names(task: TaskId) -> None:
    key = task_key(task)
    assert "." not in key
    assert task_from_key(key) == task
    assert type(task_from_key(key)) is type(task)
    torch.nn.ModuleDict({key: torch.nn.Identity()})


@given(st.lists(ids))
def test_lists_round_trip(tasks: list[TaskId]) -> None:
    assert decode_json(encode_json({"tasks": tasks})) == {"tasks": tasks}


def test_integers_of_other_libraries() -> None:
    assert check_task(np.int64(3)) == check_task(torch.tensor(3)) == 3
    assert type(check_task(np.int64(3))) is int


@pytest.mark.parametrize("task", [True, 1.0, None, (1,), b"a"])
def test_wrong_types(task: object) -> None:
    with pytest.raises(TypeError, match="task must be an int or a str, got"):
        check_task(task)


def test_empty_name() -> None:
    with pytest.raises(ValueError, match="empty"):
        check_task("")


@pytest.mark.parametrize("task", [10**99, -(10**200)])
def test_a_task_that_no_reader_takes_is_refused(task: int) -> None:
    assert check_task(10**98) == 10**98
    with pytest.raises(ValueError, match="fewer than 100 digits"):
        check_task(task)


@pytest.mark.parametrize("encoded", [torch.ones(3), torch.ones(2, 2, dtype=torch.uint8), None, [1], b"{}"])
def test_what_is_no_tensor_of_bytes_is_refused(encoded: object) -> None:
    with pytest.raises(ValueError, match="1-d uint8 tensor"):
        decode_json(encoded)


@pytest.mark.parametrize(
    "key", ["i07", "i+7", "i 7", "i\u0663", "i--1", "i-0", "i" + "9" * 200, "s%41", "sa.b", "s%", "s"]
)
def test_a_key_has_one_spelling(key: str) -> None:
    with pytest.raises(ValueError, match="is not the key of a task"):
        task_from_key(key)
