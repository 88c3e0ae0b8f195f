"""wsn.heads: which heads exist."""

from __future__ import annotations

import pytest
import torch
from small_models import mlp
from torch import Tensor, nn

from wsn_fast import WSN, FastSubnetLinear, TaskHeads


class TwoHeads(nn.Module):
    """A model with classes and boxes."""

    def __init__(self) -> None:
        super().__init__()
        self.body = FastSubnetLinear(36, 12)
        self.classes, self.boxes = TaskHeads(12, 3), TaskHeads(12, 4, tasks=["b"])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.body(x.flatten(1))
        return self.classes(x), self.boxes(x)


def test_heads_come_with_tasks_and_go_with_them() -> None:
    wsn = WSN(mlp())
    heads = wsn.heads
    assert 0 not in heads and list(heads) == [] and len(heads) == 0 and not heads
    wsn.begin_task(10)
    assert 10 in heads and heads[10] is wsn.model[5].head(10)  # the view follows the model
    wsn.end_task()
    for task in ("b", 2):
        wsn.begin_task(task)
        wsn.end_task()
    assert list(heads) == [2, 10, "b"] and len(heads) == 3
    assert dict(heads.items()) == {task: wsn.model[5].head(task) for task in (2, 10, "b")}
    assert repr(heads) == "heads of [2, 10, 'b']"
    wsn.remove_task(10)
    assert 10 not in wsn.heads


def test_a_head_may_exist_before_its_task() -> None:
    model = mlp()
    model[5].add(4)
    wsn = WSN(model)
    assert 4 in wsn.heads and wsn.tasks == [] and wsn.current_task is None


@pytest.mark.parametrize("task", ["10", 11, "", None, 10.0, True, (), [10]])
def test_what_is_not_in_it(task: object) -> None:
    wsn = WSN(mlp())
    wsn.begin_task(10)
    wsn.model[5].add(1)
    assert task not in wsn.heads


def test_integers_of_other_kinds() -> None:
    wsn = WSN(mlp())
    wsn.begin_task(10)
    assert torch.tensor(10) in wsn.heads
    assert wsn.heads[torch.tensor(10)] is wsn.heads[10]  # type: ignore[index]


def test_no_such_head() -> None:
    wsn = WSN(mlp())
    wsn.begin_task(10)
    with pytest.raises(KeyError, match=r"task 3 has no head; tasks that have one: \[10\]"):
        wsn.heads[3]
    assert wsn.heads.get(3) is None
    with pytest.raises(TypeError, match="task must be an int or a str"):
        wsn.heads[1.5]  # type: ignore[index]


def test_it_cannot_be_written_to() -> None:
    wsn = WSN(mlp())
    with pytest.raises(TypeError, match="does not support item assignment"):
        wsn.heads[0] = nn.Linear(12, 3)  # type: ignore[index]
    with pytest.raises(AttributeError):
        wsn.heads = {}  # type: ignore[assignment,misc]


def test_a_model_with_several() -> None:
    wsn = WSN(TwoHeads())
    assert list(wsn.heads) == ["b"]
    assert wsn.heads["b"] == {"boxes": wsn.model.boxes.head("b")}
    wsn.begin_task(0)
    assert list(wsn.heads) == [0, "b"]
    assert wsn.heads[0] == {"classes": wsn.model.classes.head(0), "boxes": wsn.model.boxes.head(0)}


def test_a_model_without_heads() -> None:
    wsn = WSN(nn.Sequential(FastSubnetLinear(36, 12)))
    wsn.begin_task(0)
    assert list(wsn.heads) == [] and 0 not in wsn.heads
