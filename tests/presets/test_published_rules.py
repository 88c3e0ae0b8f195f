"""The presets train as their papers say, to the bit: every mask and every weight, over three tasks."""

from __future__ import annotations

import copy
from typing import Any

import published_presets as published
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor, nn

from wsn_fast import WSN
from wsn_fast.presets import PackNet, piggyback, supsup

SGD = {"lr": 0.05, "momentum": 0.9}
PATH = {"conv": "0", "linear": "3"}


def data(task: int, steps: int = 4) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(task)
    xs = torch.randn(steps, 16, 1, 6, 6, generator=generator, dtype=torch.float64)
    return [*zip(xs, torch.randint(3, (steps, 16), generator=generator), strict=True)]


def train(wsn: WSN, batches: list[tuple[Tensor, Tensor]], **settings: float) -> None:
    optimizer = wsn.guard(torch.optim.SGD(wsn.parameters(), **settings))
    for x, y in batches:
        optimizer.zero_grad()
        F.cross_entropy(wsn(x), y).backward()
        optimizer.step()


def head_of(wsn: WSN, task: int) -> nn.Linear:
    head: Any = wsn.heads[task]
    return copy.deepcopy(head)


def layers(wsn: WSN) -> dict[str, Any]:
    return {name: wsn.subnet_layers()[path] for name, path in PATH.items()}


def assert_same_outputs(wsn: WSN, plain: published.Plain, masks: dict[int, dict[str, Tensor]]) -> None:
    x = data(99)[0][0]
    for row, (task, mask) in enumerate(masks.items()):
        weights = {name: weight * mask[name] for name, weight in plain.weights.items()}
        expected = published.compute(x, weights, plain.biases, plain.heads[task])
        for name, layer in layers(wsn).items():
            assert torch.equal(layer.mask("weight", row), mask[name]), f"{name}, task {task}"
        with wsn.use_task(task):
            assert torch.equal(wsn(x), expected), f"task {task}"


def test_packnet() -> None:
    wsn, plain = PackNet(published.net(), 0.4, heads="4"), published.PackNet(published.net(), 0.4)
    masks: dict[int, dict[str, Tensor]] = {}
    for task in (1, 2, 3):
        wsn.begin_task(task)
        plain.begin(head_of(wsn, task))
        for phase in range(2):
            train(wsn, data(10 * task + phase), **SGD)
            plain.train(data(10 * task + phase), **SGD)
            if phase == 0:
                wsn.prune()
                plain.prune()
            for name, layer in layers(wsn).items():
                mask = plain.mask(name, task) | (plain.owner[name] == task)
                assert torch.equal(layer.masks_of_scores()["weight"], mask), f"{name}, task {task}"
                assert torch.equal(layer.weight * mask, plain.weights[name]), f"{name}, task {task}"
                assert torch.equal(layer.bias, plain.biases[name]), f"{name}, task {task}"
        wsn.end_task()
        for name, layer in layers(wsn).items():
            assert torch.equal(layer.weight, plain.weights[name]), "free weights begin at 0"
        masks[task] = {name: plain.mask(name, task) for name in published.WEIGHTS}
        assert_same_outputs(wsn, plain, masks)
    assert all((plain.owner[name] == task).any() for name in published.WEIGHTS for task in (0, 1, 2, 3))


@pytest.mark.parametrize("kind", [published.Piggyback, published.SupSup])
def test_masks_over_weights_that_never_change(kind: type[published.Masking]) -> None:
    wsn = (piggyback if kind is published.Piggyback else supsup)(published.net(), heads="4")
    plain = kind(wsn.model)
    settings = {"lr": 3.0 if kind is published.Piggyback else 0.5}
    before = {name: layer.weight.detach().clone() for name, layer in layers(wsn).items()}
    masks: dict[int, dict[str, Tensor]] = {}
    for task in (1, 2, 3):
        wsn.begin_task(task)
        plain.begin(task, head_of(wsn, task), {name: layer.weight_score for name, layer in layers(wsn).items()})
        first = {name: plain.mask(name) for name in published.WEIGHTS}
        for batch in data(task, steps=6):
            train(wsn, [batch], **settings)
            plain.train(task, [batch], **settings)
            for name, layer in layers(wsn).items():
                assert torch.equal(layer.masks_of_scores()["weight"], plain.mask(name)), f"{name}, task {task}"
                assert torch.equal(layer.weight_score, plain.scores[name]), f"{name}, task {task}"
                assert torch.equal(layer.weight, before[name])
        wsn.end_task()
        masks[task] = {name: plain.mask(name) for name in published.WEIGHTS}
        assert all(not torch.equal(masks[task][name], first[name]) for name in first), "otherwise this shows little"
        assert_same_outputs(wsn, plain, masks)


@given(
    weight=hnp.arrays("float32", st.integers(1, 24), elements=st.sampled_from([0.0, 1.0, -1.0, 2.0, -3.0])),
    percent=st.integers(1, 100),
)
def test_packnet_removes_ties_as_published(weight: Any, percent: int) -> None:
    tensor, density = torch.from_numpy(weight)[:, None], percent / 100
    wsn = PackNet(nn.Sequential(nn.Linear(1, len(tensor), bias=False)), density)
    wsn.begin_task(0)
    layer: Any = wsn.subnet_layers()["0"]
    with torch.no_grad():
        layer.weight.copy_(tensor)
    keep = ~published.removed(tensor, torch.ones_like(tensor, dtype=torch.bool), density)
    if keep.any():
        wsn.prune()
        assert torch.equal(layer.masks_of_scores()["weight"], keep)
        assert torch.equal(layer.weight, tensor.where(keep, torch.zeros(())))
    else:
        with pytest.raises(ValueError, match=r"keeps none of the \d+ weights of 0\.weight"):
            wsn.prune()
        assert torch.equal(layer.weight, tensor)
