"""Running means in fewer bytes: the native steps store the same bits as those of the torch backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from elementwise import assert_same_bits
from gated_updates import Problem, batch_of, make_problem, moved, run_step
from torch import Tensor

from wsn_fast.backends import moments, native
from wsn_fast.backends import torch as portable
from wsn_fast.backends.moments import Stored
from wsn_fast.backends.updates import SGD, AdamW, CodedAdamWState, CodedSGDState, Gradient, State, Update

SIZES = [0, 1, 255, 1025, 20_001]
# With these settings, and gradients of few bits, no sum and no product is rounded: so all means are exact.
ADAMW = AdamW(0.0, 0.5, 0.5, 1e-8, 0.0, True)
MOMENTUM = SGD(0.0, 0.5, 0.0, 0.0, False, False)
STORAGES = [("8bit", "8bit"), ("bfloat16", "bfloat16"), ("8bit", "float32"), ("bfloat16", "8bit")]

pytestmark = pytest.mark.usefixtures("library", "level")


def new_state(update: Update, storages: tuple[str, str], adamw: bool) -> State:
    counts = torch.tensor(0.0), torch.tensor(0.0)
    signs = (True, False) if adamw else (True,)
    means = [moments.zeros(update.weight, storage, signed) for storage in storages for signed in signs]
    return CodedAdamWState(*means, *counts) if adamw else CodedSGDState(*means, *counts)


def few_bits(n: int) -> Tensor:
    """Numbers of two bits over sixty octaves, and zeros."""
    values = torch.randint(-3, 4, (n,)) * 2.0 ** torch.randint(-50, 10, (n,))
    return torch.where(torch.rand(n) < 0.1, 0.0, values)


def take_steps(backend: Any, problem: Problem, gradients: list[Gradient], settings: Any) -> Update:
    """What a backend makes of copies of the operands."""
    update: Update = moved(problem.update, "cpu")
    for step, gradient in enumerate(gradients):
        assert update.state is not None
        for count in update.state[-2:]:
            count += 1  # type: ignore[operator]
        one = Problem(update, gradient)
        first = settings._replace(first=step == 0) if isinstance(settings, SGD) else settings
        run_step(backend, batch_of([one]), first)
    return update


def tensors_of(update: Update) -> list[Tensor]:
    assert update.state is not None
    means = [mean for mean in update.state if isinstance(mean, Stored)]
    return [update.weight, update.scores, *(part for mean in means for part in mean if part is not None)]


def assert_same(problem: Problem, gradients: list[Gradient], settings: Any) -> None:
    mine, theirs = (take_steps(backend, problem, gradients, settings) for backend in (native, portable))
    for k, (a, b) in enumerate(zip(tensors_of(mine), tensors_of(theirs), strict=True)):
        assert_same_bits(a, b, f"operand {k}")


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("storages", STORAGES, ids=", ".join)
@pytest.mark.parametrize("settings", [ADAMW, MOMENTUM], ids=["adamw", "momentum"])
def test_given_gradients(settings: Any, storages: tuple[str, str], n: int) -> None:
    torch.manual_seed(n)
    problem = make_problem(n, given=True)
    problem = problem.with_state(new_state(problem.update, storages, isinstance(settings, AdamW)))
    assert_same(problem, [Gradient(few_bits(n), few_bits(n), None) for _ in range(4)], settings)


@pytest.mark.parametrize("rule", ["magnitude", "value"])
@pytest.mark.parametrize("settings", [ADAMW, MOMENTUM], ids=["adamw", "momentum"])
def test_the_gradient_of_the_masked_weight(settings: Any, rule: str) -> None:
    torch.manual_seed(0)
    n = 1025
    problem = make_problem(n, rule=rule)
    problem.update.weight.copy_(2.0 ** torch.randint(-8, 8, (n,)))
    problem = problem.with_state(new_state(problem.update, ("8bit", "8bit"), isinstance(settings, AdamW)))
    tau = problem.gradient.tau
    assert_same(problem, [Gradient(few_bits(n), None, tau) for _ in range(4)], settings)


@pytest.mark.parametrize("storage", ["bfloat16", "8bit"])
def test_numbers_that_are_not_finite_and_those_too_small(storage: str) -> None:
    n = 600
    problem = make_problem(n, given=True, union=False)
    problem = problem.with_state(new_state(problem.update, (storage, storage), True))
    gradient = few_bits(n)
    gradient[[3, 300]], gradient[[4, 301]], gradient[5] = torch.inf, torch.nan, -torch.inf
    gradient[6], gradient[512:] = 2.0**-70, 2.0**-60
    mine, theirs = (take_steps(one, problem, [Gradient(gradient, gradient, None)], ADAMW) for one in (native, portable))
    for a, b in zip(tensors_of(mine)[2:], tensors_of(theirs)[2:], strict=True):  # the weight has NaN of any bits
        assert_same_bits(a, b, "mean")


@pytest.mark.parametrize("storage", ["bfloat16", "8bit"])
def test_tensors_that_are_not_contiguous(storage: str) -> None:
    rows, columns = 30, 41
    problem = make_problem(rows * columns, given=True)
    weight, scores = (tensor.view(columns, rows).t() for tensor in problem.update[:2])
    update = problem.update._replace(weight=weight, scores=scores)
    problem = Problem(update._replace(state=new_state(update, (storage, storage), True)), problem.gradient)
    assert not weight.is_contiguous()
    gradients = [few_bits(rows * columns).view(columns, rows).t() for _ in range(4)]
    assert_same(problem, [Gradient(grad, grad, None) for grad in gradients], ADAMW)


def test_ordinary_steps_are_close() -> None:
    """Their sums are rounded, so that a code may differ here and there."""
    torch.manual_seed(0)
    n = 10_000
    problem = make_problem(n)
    problem = problem.with_state(new_state(problem.update, ("8bit", "8bit"), True))
    gradients = [Gradient(torch.randn(n), None, problem.gradient.tau) for _ in range(5)]
    settings = AdamW(0.01, 0.9, 0.999, 1e-8, 0.1, True)
    mine, theirs = (take_steps(backend, problem, gradients, settings) for backend in (native, portable))
    for a, b in zip(tensors_of(mine), tensors_of(theirs), strict=True):
        assert (a != b).float().mean() < (0.02 if a.is_floating_point() else 1e-3)
        torch.testing.assert_close(a.float(), b.float(), rtol=1e-3, atol=1.01 if not a.is_floating_point() else 1e-4)
