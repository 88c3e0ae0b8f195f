"""TaskHeads."""

from __future__ import annotations

import copy

import pytest
import torch

from wsn_fast import TaskHeads


def test_heads_of_several_widths_switch_with_the_active_task() -> None:
    heads = TaskHeads(5, tasks={1: 2, "b": 3})
    x = torch.randn(4, 5)
    for task, width in ((1, 2), ("b", 3)):
        heads.active = task
        assert heads(x).shape == (4, width)
        assert torch.equal(heads(x), heads.head(task)(x))


def test_the_int_and_the_string_are_two_tasks() -> None:
    heads = TaskHeads(5, 2, tasks=[1, "1"])
    assert heads.tasks == [1, "1"]


def test_names_that_modules_could_not_have() -> None:
    heads = TaskHeads(5, 2, tasks=["keys", "a.b", "a b", 10, 9])
    assert heads.tasks == [9, 10, "a b", "a.b", "keys"]


def test_later_heads_are_born_where_the_module_is() -> None:
    heads = TaskHeads(5, 2).to(torch.float64)
    assert heads.add(0).weight.dtype is torch.float64


def test_a_fresh_module_loads_heads_that_it_did_not_have() -> None:
    old = TaskHeads(5, tasks={0: 2, "x": 7})
    fresh = TaskHeads(5)
    fresh.load_state_dict(old.state_dict(), strict=True)
    assert fresh.tasks == [0, "x"]
    assert torch.equal(fresh.head("x").weight, old.head("x").weight)


def test_compiles() -> None:
    heads = TaskHeads(5, 2, tasks=["a.b"])
    heads.active = "a.b"
    x = torch.randn(4, 5)
    torch.testing.assert_close(torch.compile(heads, fullgraph=True, backend="aot_eager")(x), heads(x))


def test_deep_copy_keeps_the_active_task() -> None:
    heads = TaskHeads(5, 2, tasks=[0])
    heads.active = 0
    assert copy.deepcopy(heads).active == 0


def test_no_active_task() -> None:
    with pytest.raises(RuntimeError, match="no task is active"):
        TaskHeads(5, 2, tasks=[0])(torch.randn(1, 5))


def test_unknown_task() -> None:
    heads = TaskHeads(5, 2, tasks=[0])
    with pytest.raises(ValueError, match=r"task 'z' has no head; tasks that have one: \[0\]"):
        heads.active = "z"
    assert heads.active is None


def test_a_second_head_for_a_task() -> None:
    with pytest.raises(ValueError, match="task 0 already has a head"):
        TaskHeads(5, 2, tasks=[0]).add(0)


def test_a_head_without_a_width() -> None:
    with pytest.raises(ValueError, match="out_features must be given for task 0"):
        TaskHeads(5, tasks=[0])
