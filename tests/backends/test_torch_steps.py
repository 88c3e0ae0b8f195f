"""The optimizer steps of the torch backend in every dtype and with any strides: those of float64, but for rounding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from gated_updates import (
    ADAMW,
    MOMENTUM,
    PLAIN,
    Problem,
    Settings,
    batch_of,
    exact,
    make_problem,
    make_state,
    moved,
    operands_of,
    run_step,
)
from torch import Tensor

from wsn_fast.backends import torch as portable
from wsn_fast.backends.updates import Gradient

SETTINGS: dict[str, Settings] = {
    "adamw": ADAMW,
    "adam": ADAMW._replace(decoupled=False),
    "sgd": PLAIN._replace(weight_decay=0.1),
    "first momentum": MOMENTUM._replace(first=True),
    "momentum": MOMENTUM._replace(dampening=0.5, weight_decay=0.1),
    "nesterov": MOMENTUM._replace(nesterov=True),
}
STRIDES: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.t().contiguous().t(),
    "with gaps": lambda x: torch.stack([x, torch.full_like(x, torch.nan)], dim=-1)[..., 0],
}


def reshaped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A tuple with its vectors of floats changed."""
    parts = (change(x) if isinstance(x, Tensor) and x.ndim and x.is_floating_point() else x for x in value)
    return type(value)(*parts)


def matrix(one: Problem) -> Problem:
    def as_matrix(x: Tensor) -> Tensor:
        return x.view(7, 14)

    state = reshaped(one.update.state, as_matrix)
    return Problem(reshaped(one.update, as_matrix)._replace(state=state), reshaped(one.gradient, as_matrix))


@pytest.mark.parametrize("kind", SETTINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("strides", STRIDES)
@pytest.mark.parametrize("given", [False, True], ids=["G", "dW and dS"])
def test_a_step_is_that_of_float64(given: bool, strides: str, dtype: torch.dtype, kind: str) -> None:
    """The operands are longer than the vectors of a CPU, with a rest."""
    settings = SETTINGS[kind]
    one = make_problem(98, dtype, dtype, given=given)
    one = matrix(one.with_state(make_state(one.update, settings)))
    true, change = exact(one), STRIDES[strides]
    mine = moved(one, "cpu")
    state = reshaped(mine.update.state, change)
    mine = Problem(reshaped(mine.update, change)._replace(state=state), reshaped(mine.gradient, change))
    for step in (mine, true):
        run_step(portable, batch_of([step]), settings)
    for i, (found, expected) in enumerate(zip(operands_of(mine.update), operands_of(true.update), strict=True)):
        error, allowed = (found.double() - expected).abs().max(), 2 * torch.finfo(dtype).eps * expected.abs().max()
        assert error <= allowed, f"operand {i}: {error:.3g} against {allowed:.3g}"


def test_gradients_are_not_changed() -> None:
    for settings in (ADAMW, SETTINGS["momentum"]):
        one = make_problem(98, given=True)
        before = [x.clone() for x in one.gradient[:2] if x is not None]
        run_step(portable, batch_of([one.with_state(make_state(one.update, settings))]), settings)
        assert all(torch.equal(x, b) for x, b in zip(Gradient(*one.gradient)[:2], before, strict=True))
