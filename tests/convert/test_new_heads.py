"""convert(heads=...) with classifiers that are no nn.Linear."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from wsn_fast import WSN, FastSubnetLinear, TaskHeads, convert, materialize
from wsn_fast.nn import per_task


class Plain(nn.Linear):
    """A subclass without a forward of its own."""


class Attends(nn.Module):
    """A head with attention, which convert refuses elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.out = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(self.attention(x, x, x, need_weights=False)[0])
        return out


CLASSIFIERS: dict[str, Callable[[], nn.Module]] = {
    "subclass": lambda: Plain(8, 3),
    "convolution": lambda: nn.Conv1d(8, 3, 1),
    "sequence": lambda: nn.Sequential(nn.Dropout(), nn.Linear(8, 3)),
    "mlp": lambda: nn.Sequential(nn.Linear(8, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3)),
    "attention": Attends,
}


def net(kind: str = "mlp") -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.ReLU(), CLASSIFIERS[kind]())


@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_any_module_may_be_a_classifier(kind: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the subclass does not stay dense: it is a head
        model = convert(net(kind).eval(), 0.3, heads={"3": [0, "b"]})
    assert isinstance(model[3], TaskHeads) and model[3].tasks == [0, "b"]
    assert [type(m) for m in model if isinstance(m, FastSubnetLinear)] == [FastSubnetLinear]
    for task in (0, "b"):
        head = model[3].head(task)
        assert type(head) is type(CLASSIFIERS[kind]()) and not head.training
        assert not any(isinstance(m, FastSubnetLinear) or per_task.marked(m) for m in head.modules())
    assert per_task.marked(model[1]) == ("weight", "bias")


@pytest.mark.parametrize(
    ("kind", "spec", "widths"),
    [
        ("subclass", 7, {0: 7}),
        ("subclass", {0: 2, "b": 5}, {0: 2, "b": 5}),
        ("convolution", 7, {0: 7}),
        ("convolution", {0: 2, "b": 5}, {0: 2, "b": 5}),
    ],
)
def test_widths(kind: str, spec: Any, widths: dict[int | str, int]) -> None:
    heads = convert(net(kind), heads={"3": spec})[3]
    if isinstance(spec, int):
        heads.add(0)
    else:
        with pytest.raises(ValueError, match="these heads have no common width"):
            heads.add("more")
    assert {task: len(heads.head(task).weight) for task in heads.tasks} == widths


def test_the_classifier_may_appear_twice() -> None:
    model = net()
    model.classifier = model[3]
    convert(model, heads="classifier")
    assert model.classifier is model[3] and isinstance(model[3], TaskHeads)


def test_a_module_that_is_also_used_elsewhere_is_converted_there() -> None:
    model = net("sequence")
    model.again = model[3][1]  # the head gets a copy
    convert(model, heads="3")
    assert isinstance(model.again, FastSubnetLinear)
    assert type(model[3].add(0)[1]) is nn.Linear


def test_a_head_tied_to_the_rest_is_untied() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8)))
    model[2][0].weight = model[1].weight
    convert(model, heads="2")
    assert model[2].add(0)[0].weight is not model[1].weight


def test_stateless_batch_norm_is_for_the_rest() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), CLASSIFIERS["mlp"]())
    convert(model, heads={"2": [0]}, batch_norm="stateless")
    assert model[1].running_mean is None
    assert model[2].head(0)[1].running_mean is not None


@pytest.mark.parametrize(
    ("heads", "message"),
    [
        ({"3": 5}, r"heads\['3'\]: out_features must be None, got 5: the heads are copies of a Sequential"),
        ({"3": {0: 5}}, r"heads\['3'\]: out_features must be None, got 5: the heads are copies of a Sequential"),
        ("2", r"heads\['2'\]: template must have parameters to train, and this ReLU has none"),
        ("4", "heads: the model has no module inside it that is named '4'"),
        ({"3": [0], "3.0": [0]}, "heads: '3.0' is inside '3', of which each task has a copy: name one"),
    ],
)
def test_what_is_refused_before_anything_has_changed(heads: Any, message: str) -> None:
    model = net()
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match=message):
        convert(model, heads=heads)
    assert [type(m) for m in model.modules()] == [type(m) for m in before.modules()]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))


def test_a_head_that_was_converted_before() -> None:
    model = convert(net())
    with pytest.raises(ValueError, match=r"heads\['3'\]: template must be an ordinary module, and 0"):
        convert(model, heads="3")


def test_heads_of_an_earlier_convert_stay_as_they_are() -> None:
    model = convert(nn.Sequential(nn.Linear(6, 6), net("attention")), heads={"1.3": [0]}, exclude_modules="1.0")
    convert(model)  # the attention in the head is no obstacle
    assert isinstance(model[1][0], FastSubnetLinear)
    assert type(model[1][3].head(0).out) is nn.Linear


def test_a_model_that_is_built_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = convert(net(), heads={"3": [0]})
    wsn = WSN(materialize(model, "cpu"))
    for task in (0, 1):
        wsn.begin_task(task)
        assert wsn(torch.randn(4, 6)).isfinite().all()
        wsn.end_task()
    assert not torch.equal(wsn.heads[0][0].weight, wsn.heads[1][0].weight)  # type: ignore[index]
