"""The one-pass mode trains as the standard mode does: step by step, whatever the precision."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from elementwise import assert_same_bits
from one_pass_models import (
    CLIP,
    KINDS,
    assert_close,
    assert_ready,
    backward,
    each_backend,
    frozen_of,
    make_wsn,
    masks,
    union_of,
)
from torch import Tensor, nn

from wsn_fast import WSN, convert
from wsn_fast.optim.optimizers import SubnetAdamW

RULES = ("magnitude", "value")
KINDS_AND_BACKENDS = [*((kind, "native") for kind in KINDS), ("adamw", "torch"), ("nesterov", "torch")]
# Every kind, backend and rule in the ordinary run; every combination in the run of .ci/run.
COMBINATIONS = pytest.mark.parametrize(
    ("kind", "backend", "rule"),
    [
        pytest.param(kind, backend, rule, marks=[] if RULES[number % 2] == rule else pytest.mark.ci)
        for number, (kind, backend) in enumerate(KINDS_AND_BACKENDS)
        for rule in RULES
    ],
    indirect=["backend"],
)
backend = each_backend


# --- the same training
def two_tasks(wsn: WSN, kind: str, one_pass: bool, steps: int) -> Iterator[tuple[list[Tensor], Tensor]]:
    """Two tasks with accumulation and clipping: masks and norm at every step. What the first task uses stays."""
    kept: list[Tensor] = []
    union: dict[str, Tensor] = {}
    for task in range(2):
        torch.manual_seed(task)  # for the new head
        wsn.begin_task(task)
        optimizer = KINDS[kind](wsn, one_pass=one_pass)
        for step in range(steps):
            for part in range(1 + step % 2):
                backward(wsn, task, 2 * step + part)
            norm = optimizer.clip_grad_norm_(CLIP)
            optimizer.step()
            optimizer.zero_grad()
            if one_pass and step % 5 == 0:
                assert_ready(wsn)
            yield masks(wsn), norm
        wsn.end_task()
        for before, now in zip(kept, frozen_of(wsn, union) if kept else (), strict=True):
            assert_same_bits(now, before, "what the first task uses")
        union = union_of(wsn)
        kept = [x.clone() for x in frozen_of(wsn, union)]
    wsn.verify()


@pytest.mark.sample(2)
@COMBINATIONS
def test_two_hundred_steps_in_float64_are_those_of_the_standard_mode(kind: str, rule: str, backend: str) -> None:
    found, expected = make_wsn(rule, backend=backend), make_wsn(rule, backend=backend)
    clipped = 0
    runs = two_tasks(found, kind, True, 100), two_tasks(expected, kind, False, 100)
    for (mine, norm), (theirs, their_norm) in zip(*runs, strict=True):
        assert all(map(torch.equal, mine, theirs))
        torch.testing.assert_close(norm, their_norm, rtol=0, atol=1e-9)
        clipped += int(norm > CLIP)
    assert clipped > 20
    assert_close(found, expected, atol=1e-9)


class InStep:
    """The one-pass mode at some precision, and beside it, put into its state before every step, the standard mode at
    the same precision and one in float64."""

    def __init__(self, kind: str, rule: str, weights: torch.dtype, backend: str) -> None:
        self.models = [make_wsn(rule, dtype, backend) for dtype in (weights, weights, torch.float64)]
        self.kind = kind
        self.optimizers: list[Any] = []
        self.errors: dict[str, list[float]] = {}

    def begin(self, task: int) -> None:
        for wsn in self.models:
            wsn.begin_task(task)
        modes = zip(self.models, (True, False, False), strict=True)
        self.optimizers = [KINDS[self.kind](wsn, one_pass=one_pass) for wsn, one_pass in modes]

    @torch.no_grad()
    def join(self) -> None:
        """Bring the others to where the one-pass mode is."""
        leader, optimizer = self.models[0], self.optimizers[0]
        for wsn, other in zip(self.models[1:], self.optimizers[1:], strict=True):
            for mine, theirs in zip(wsn.parameters(), leader.parameters(), strict=True):
                mine.copy_(theirs)
            other.load_state_dict(copy.deepcopy(optimizer.state_dict()))

    def step(self, task: int, step: int, autocast: torch.dtype | None) -> None:
        for wsn, optimizer in zip(self.models, self.optimizers, strict=True):
            for part in range(2):
                backward(wsn, task, 2 * step + part, autocast=None if wsn is self.models[2] else autocast)
            optimizer.clip_grad_norm_(CLIP)
            optimizer.step()
            optimizer.zero_grad()
        ours, standard, exact = (dict(self.numbers(i)) for i in range(3))
        for name, truth in exact.items():
            sums = self.errors.setdefault(name, [0.0, 0.0])
            for i, found in enumerate((ours, standard)):
                sums[i] += float((found[name].double() - truth).square().sum())

    def numbers(self, i: int) -> Iterator[tuple[str, Tensor]]:
        for name, param in self.models[i].named_parameters():
            yield name, param.detach()
            for key, value in self.optimizers[i].state.get(param, {}).items():
                if isinstance(value, Tensor):
                    yield f"{name} {key}", value

    def assert_as_accurate(self) -> None:
        assert len(self.errors) > 10
        for name, (ours, standard) in self.errors.items():
            assert ours**0.5 <= 2 * standard**0.5, f"{name}: {ours**0.5:.3g} against {standard**0.5:.3g}"


@pytest.mark.parametrize("precision", ["float32", "bfloat16 autocast", "bfloat16 weights"])
@COMBINATIONS
def test_every_step_from_a_common_state_is_as_accurate(kind: str, rule: str, precision: str, backend: str) -> None:
    weights = torch.bfloat16 if precision == "bfloat16 weights" else torch.float32
    runs = InStep(kind, rule, weights, backend)
    for task in range(2):
        runs.begin(task)
        union = union_of(runs.models[0])
        kept = [x.clone() for x in frozen_of(runs.models[0], union)] if union else []
        for step in range(10):
            runs.join()
            runs.step(task, step, torch.bfloat16 if precision == "bfloat16 autocast" else None)
            assert_ready(runs.models[0])
            for now, before in zip(frozen_of(runs.models[0], union) if kept else (), kept, strict=True):
                assert_same_bits(now, before, "what the first task uses")
        runs.join()
        for wsn in runs.models:
            wsn.end_task()
    runs.models[0].verify()
    runs.assert_as_accurate()


def conv_wsn(channels_last: bool) -> WSN:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 2, groups=2), nn.Flatten(), nn.Linear(36, 3)
    ).double()
    wsn = WSN(convert(net, density=0.4, heads="4"))
    return wsn.to(memory_format=torch.channels_last) if channels_last else wsn


@pytest.mark.parametrize("channels_last", [False, True])
def test_convolutions(channels_last: bool, backend: str) -> None:
    ends = []
    for one_pass in (True, False):
        wsn = conv_wsn(channels_last)
        for layer in wsn.subnet_layers().values():
            layer.backend = backend
        for task in range(2):
            torch.manual_seed(task)
            wsn.begin_task(task)
            optimizer = SubnetAdamW(wsn, 0.01, weight_decay=0.1, one_pass=one_pass)
            for _ in range(5):
                x = torch.randn(4, 3, 6, 6, dtype=torch.float64)
                x = x.to(memory_format=torch.channels_last) if channels_last else x
                F.cross_entropy(wsn(x), torch.tensor([0, 1, 2, 0])).backward()
                optimizer.clip_grad_norm_(CLIP)
                optimizer.step()
                optimizer.zero_grad()
            if task == 0:
                wsn.end_task()
        ends.append(wsn)
    assert_close(*ends)
