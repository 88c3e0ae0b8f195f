"""The programs of a tensor search its threshold together, and wait for each other. Their order depends on the GPU. So
here the programs of a launch run at the same time, in an order that is random."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import pytest
import torch
from distributions import DISTRIBUTIONS, RULES
from elementwise import assert_same_bits
from interleaved import interleaved
from torch import Tensor

from wsn_fast.backends import torch as portable
from wsn_fast.backends import triton
from wsn_fast.backends.triton import optimizer_steps
from wsn_fast.backends.updates import SGD, WINDOW, Batch, Gradient, Next, SGDState, Update
from wsn_fast.kernels import update_table
from wsn_fast.kernels.threshold import Config, make_table, select, workspace_size

pytestmark = [
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="a GPU chooses the order itself"),
    pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero) encountered:RuntimeWarning"),
]

# Several programs for a tensor of a few hundred scores, and a list of several parts, or of one that others wait for.
ALONE = (16, 8192)
SEARCH = Config(window_block=128, digit_block=32, items=128, sample=64)
UPDATE = update_table.Config(block=128, items=128, num_warps=1, digit_block=32, share=4, fix_block=16)
STILL = SGD(0.0, 0.0, 0.0, 0.0, False, False)
CHANGES = (lambda s: s, lambda s: s * 1.01)


def expected(scores: Tensor, rank: int, rule: str) -> Tensor:
    tau = portable.threshold(scores, rank, rule)
    return torch.where(tau == 0, torch.zeros_like(tau), tau)


@pytest.mark.sample(13)
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("alone", ALONE)
def test_the_search_for_a_first_threshold(alone: int, rule: str, seed: int) -> None:
    names = list(DISTRIBUTIONS)[seed::3]
    scores = [DISTRIBUTIONS[name](500 - 3 * i, torch.float32) for i, name in enumerate(names)]
    ranks = [(i * len(s)) // len(names) for i, s in enumerate(scores)]
    table = make_table(scores, ranks, replace(SEARCH, alone=alone))
    table.tensors[::2, 5:7] = torch.tensor([-1, 64])  # a window that is too wide, so that all scores are searched
    tau, workspace = torch.empty(len(names)), torch.full((workspace_size(table),), -1)
    with interleaved(seed):
        select(table=table, tau=tau, workspace=workspace, rule=rule)
    for i, (name, one) in enumerate(zip(names, scores, strict=True)):
        assert_same_bits(tau[i], expected(one, ranks[i], rule), name)


@pytest.mark.sample(13)
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("alone", ALONE)
def test_the_search_after_an_update(alone: int, rule: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizer_steps, "CONFIGS", (replace(UPDATE, alone=alone),) * 2)
    settle = optimizer_steps.warm_threshold.settle

    def settle_in_any_order(*args: Any, **kwargs: Any) -> None:
        with interleaved(seed):
            settle(*args, **kwargs)

    monkeypatch.setattr(optimizer_steps.warm_threshold, "settle", settle_in_any_order)
    updates = []
    names = list(DISTRIBUTIONS)[seed::3]
    for i, name in enumerate(names):
        scores = DISTRIBUTIONS[name](300 - 3 * i, torch.float32)
        rank, window = (i * len(scores)) // len(names), torch.zeros(WINDOW, dtype=torch.int64)
        following = Next(torch.full_like(scores, 7.0), expected(scores, rank, rule), rank, window)
        updates.append(Update(torch.randn_like(scores), scores, None, rule, SGDState(None, None), following))
    for i, change in enumerate(CHANGES):
        for update in updates:
            update.scores.copy_(change(update.scores))
        gradients = [Gradient(torch.zeros_like(u.weight), None, u.next and u.next.tau) for u in updates]
        triton.sgd_step(Batch(updates, gradients), [(STILL, STILL)] * len(updates))
        for name, (weight, scores, *_, following) in zip(names, updates, strict=True):
            assert following is not None
            tau = expected(scores, following.rank, rule)
            assert_same_bits(following.tau, tau, f"{name} {i}")
            assert_same_bits(following.masked, portable.gate(weight, scores, tau, rule, weight.dtype), f"{name} {i}")
