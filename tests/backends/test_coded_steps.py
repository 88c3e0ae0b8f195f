"""The steps of the torch backend over running means in fewer bytes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from elementwise import assert_same_bits
from gated_updates import ADAMW, MOMENTUM, Problem, batch_of, make_problem, make_state, moved, run_step
from torch import Tensor

from wsn_fast.backends import moments
from wsn_fast.backends import torch as portable
from wsn_fast.backends.moments import Stored
from wsn_fast.backends.updates import AdamW, AdamWState, CodedAdamWState, CodedSGDState, SGDState, State

SETTINGS = pytest.mark.parametrize("settings", [ADAMW, MOMENTUM], ids=["adamw", "momentum"])
N = 300


def coded(state: State, storage: str) -> State:
    """The same means in another storage."""
    if isinstance(state, AdamWState):
        pairs = zip(state[:4], (True, False, True, False), strict=True)
        return CodedAdamWState(*(stored(mean, storage, signed) for mean, signed in pairs), *state[4:])
    assert isinstance(state, SGDState)
    return CodedSGDState(*(stored(mean, storage, True) for mean in state if mean is not None), *counts())


def stored(mean: Tensor, storage: str, signed: bool) -> Stored:
    place = moments.zeros(mean, storage, signed)
    moments.encode(mean, place, signed)
    return place


def counts() -> tuple[Tensor, Tensor]:
    return torch.tensor(3.0), torch.tensor(3.0)


def values_of(state: Any) -> list[Tensor]:
    parts = [part for mean in state for part in (mean if isinstance(mean, Stored) else (mean,))]
    return [part for part in parts if part is not None and part.ndim]


@SETTINGS
def test_means_in_float32_make_the_plain_step(settings: Any) -> None:
    problem = make_problem(N)
    plain = problem.with_state(make_state(problem.update, settings))
    assert plain.update.state is not None
    other = moved(plain, "cpu").with_state(coded(moved(plain.update.state, "cpu"), "float32"))
    for one in (plain, other):
        run_step(portable, batch_of([one]), settings)
    for a, b in zip(other.update[:2], plain.update[:2], strict=True):
        assert_same_bits(a, b, "parameter")
    for a, b in zip(values_of(other.update.state), values_of(plain.update.state), strict=True):
        assert_same_bits(a, b, "mean")


@SETTINGS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parameters_of_16_bits_are_updated_in_float32(dtype: torch.dtype, settings: Any) -> None:
    narrow = make_problem(N, dtype, dtype, given=True)
    wide = moved(narrow, "cpu", torch.float32)
    state = coded(make_state(wide.update, settings), "8bit")
    narrow, wide = narrow.with_state(moved(state, "cpu")), wide.with_state(state)
    for one in (narrow, wide):
        run_step(portable, batch_of([one]), settings)
    for a, b in zip(narrow.update[:2], wide.update[:2], strict=True):
        frozen = portable.unpack(narrow.update.union, N) if a is narrow.update[0] else torch.zeros(N, dtype=torch.bool)
        assert_same_bits(a[~frozen], b[~frozen].to(dtype), "parameter")
    for a, b in zip(values_of(narrow.update.state), values_of(wide.update.state), strict=True):
        assert_same_bits(a, b, "mean")


@SETTINGS
@pytest.mark.parametrize("storage", ["bfloat16", "8bit"])
def test_the_means_of_frozen_weights_decay_and_the_weights_stay(storage: str, settings: Any) -> None:
    problem = make_problem(N)
    problem = problem.with_state(coded(make_state(problem.update, settings), storage))
    update: Any = problem.update
    before, mean = update.weight.clone(), moments.decode(update.state[0], update.weight, True)
    run_step(portable, batch_of([Problem(update, problem.gradient)]), settings)
    frozen = portable.unpack(update.union, N)
    assert_same_bits(update.weight[frozen], before[frozen], "weight")
    if isinstance(settings, AdamW):
        after = moments.decode(update.state[0], update.weight, True)
        torch.testing.assert_close(after[frozen], 0.9 * mean[frozen], rtol=1 / 8, atol=1e-3)
