"""Task ids and their encodings."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from wsn_fast.tasks import TaskId, check_task, decode_json, encode_json, task_from_key, task_key

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
