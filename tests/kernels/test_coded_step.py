"""The one-pass optimizers over running means in fewer bytes, against the torch backend.

With settings and gradients of few bits no sum and no product is rounded. So the means are exact on every backend, and
their codes have to be the same to the bit. The weights are close: the root and the quotient are not exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from elementwise import assert_same_bits, poisoned
from gated_updates import Problem, batch_of, make_problem, make_state, moved, run_step
from torch import Tensor

from wsn_fast.backends import moments, triton
from wsn_fast.backends import torch as portable
from wsn_fast.backends.moments import Stored
from wsn_fast.backends.updates import (
    SGD,
    WINDOW,
    AdamW,
    CodedAdamWState,
    CodedSGDState,
    Gradient,
    Next,
    State,
    Update,
)

pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero) encountered:RuntimeWarning")

EXACT_ADAMW = AdamW(0.125, 0.5, 0.5, 1e-8, 0.0, True)
EXACT_MOMENTUM = SGD(0.125, 0.5, 0.0, 0.0, False, False)
KINDS = pytest.mark.parametrize("settings", [EXACT_ADAMW, EXACT_MOMENTUM], ids=["adamw", "momentum"])
STORAGES = [("8bit", "8bit"), ("bfloat16", "bfloat16"), ("8bit", "float32"), ("bfloat16", "8bit")]
SIZES = (1, 255, 513, 1025)


def new_state(update: Update, storages: tuple[str, str], settings: Any, count: float = 0.0) -> State:
    counts = torch.tensor(count), torch.tensor(count)
    adamw = isinstance(settings, AdamW)
    signs = (True, False) if adamw else (True,)
    means = [moments.zeros(update.weight, storage, signed) for storage in storages for signed in signs]
    return CodedAdamWState(*means, *counts) if adamw else CodedSGDState(*means, *counts)


def few_bits(n: int) -> Tensor:
    """Numbers of two bits over forty octaves, and zeros."""
    values = torch.randint(-3, 4, (n,)) * 2.0 ** torch.randint(-30, 10, (n,))
    return torch.where(torch.rand(n) < 0.1, 0.0, values)


def problem_of(n: int, storages: tuple[str, str], settings: Any, **how: Any) -> Problem:
    problem = make_problem(n, **how)
    return problem.with_state(new_state(problem.update, storages, settings))


def take_steps(
    backend: Any, problems: Sequence[Problem], gradients: Sequence[Sequence[Gradient]], settings: Any, place: Any,
    plan: bool = False,
) -> list[Update]:  # fmt: skip
    """What a backend makes of copies of the operands at a place."""
    updates = [moved(problem.update, place) for problem in problems]
    kept: Any = {} if plan else None
    for step, given in enumerate(gradients):
        for update in updates:
            for count in update.state[-2:]:
                count += 1
        first = settings._replace(first=step == 0) if isinstance(settings, SGD) else settings
        batch = batch_of([Problem(u, moved(g, place)) for u, g in zip(updates, given, strict=True)])
        run_step(backend, batch._replace(updates=updates, plan=kept), first)
    return updates


def means_of(update: Update) -> list[Tensor]:
    assert update.state is not None
    means = [mean for mean in update.state if isinstance(mean, Stored)]
    return [part for mean in means for part in mean if part is not None]


def assert_same_means(mine: Sequence[Update], theirs: Sequence[Update]) -> None:
    for i, (a, b) in enumerate(zip(mine, theirs, strict=True)):
        for k, (x, y) in enumerate(zip(means_of(a), means_of(b), strict=True)):
            assert_same_bits(x, y, f"part {k} of the means of tensor {i}")


def assert_close(mine: Sequence[Update], theirs: Sequence[Update]) -> None:
    for a, b in zip(mine, theirs, strict=True):
        for x, y in zip(a[:2], b[:2], strict=True):
            torch.testing.assert_close(x.cpu(), y, rtol=1e-5, atol=1e-5)
        if a.union is not None:
            frozen = portable.unpack(b.union, b.weight.numel())
            assert_same_bits(a.weight.cpu()[frozen], b.weight[frozen], "frozen weights")


@KINDS
@pytest.mark.parametrize("storages", STORAGES, ids=", ".join)
def test_several_tensors_in_one_call(settings: Any, storages: tuple[str, str], device: torch.device) -> None:
    problems = [problem_of(n, storages, settings, given=True, union=n % 3 > 0) for n in SIZES]
    gradients = [[Gradient(few_bits(n), few_bits(n), None) for n in SIZES] for _ in range(2)]
    mine = take_steps(triton, problems, gradients, settings, device, plan=True)
    theirs = take_steps(portable, problems, gradients, settings, "cpu")
    assert_same_means(mine, theirs)
    assert_close(mine, theirs)


@KINDS
@pytest.mark.parametrize("rule", ["magnitude", "value"])
def test_the_gradient_of_the_masked_weight(settings: Any, rule: str, device: torch.device) -> None:
    n = 1300
    problem = problem_of(n, ("8bit", "8bit"), settings, rule=rule)
    problem.update.weight.copy_(2.0 ** torch.randint(-8, 8, (n,)))
    gradients = [[Gradient(few_bits(n), None, problem.gradient.tau)]]
    mine = take_steps(triton, [problem], gradients, settings, device)
    theirs = take_steps(portable, [problem], gradients, settings, "cpu")
    assert_same_means(mine, theirs)
    assert_close(mine, theirs)


@pytest.mark.parametrize("storage", ["bfloat16", "8bit"])
def test_numbers_that_are_not_finite_and_those_too_small(storage: str, device: torch.device) -> None:
    n = 1200
    problem = problem_of(n, (storage, storage), EXACT_ADAMW, given=True, union=False)
    gradient = few_bits(n)
    gradient[[3, 300, 1100]], gradient[[4, 301]], gradient[5] = torch.inf, torch.nan, -torch.inf
    gradient[6], gradient[512:900] = 2.0**-70, 2.0**-60
    gradients = [[Gradient(gradient, gradient.clone(), None)]] * 2
    mine = take_steps(triton, [problem], gradients, EXACT_ADAMW, device)
    theirs = take_steps(portable, [problem], gradients, EXACT_ADAMW, "cpu")
    assert_same_means(mine, theirs)


@pytest.mark.parametrize("storages", STORAGES[::3], ids=", ".join)
@pytest.mark.parametrize(
    ("dtype", "grad"),
    [(torch.float32, torch.bfloat16), (torch.bfloat16,) * 2, (torch.float16,) * 2],
    ids=["mixed", "bfloat16", "float16"],
)
def test_other_dtypes(dtype: torch.dtype, grad: torch.dtype, storages: Any, device: torch.device) -> None:
    n = 600
    settings = EXACT_ADAMW._replace(lr=2.0**-6)
    problem = make_problem(n, dtype, grad)
    problem = problem.with_state(new_state(problem.update, storages, settings))
    gradients = [[Gradient(few_bits(n).clamp(-4, 4).to(grad), None, problem.gradient.tau)]]
    mine = take_steps(triton, [problem], gradients, settings, device)
    theirs = take_steps(portable, [problem], gradients, settings, "cpu")
    for a, b in zip([*mine[0][:2], *means_of(mine[0])], [*theirs[0][:2], *means_of(theirs[0])], strict=True):
        # A product of 16 bits may be rounded otherwise in the interpreter, which then changes a code by one.
        if a.is_floating_point():
            torch.testing.assert_close(a.cpu(), b, rtol=2**-6, atol=2**-6)
        else:
            assert (a.cpu().int() - b.int()).abs().max() <= 1


@KINDS
def test_views_that_are_not_aligned(settings: Any, device: torch.device) -> None:
    n, storages = 1100, ("8bit", "bfloat16")

    def shifted(x: Any) -> Any:
        if isinstance(x, Stored):
            return Stored(*map(shifted, x))
        if not isinstance(x, Tensor) or x.ndim == 0:
            return x if x is None else moved(x, device)
        return poisoned(len(x) + 1, x.dtype, device)[1:].copy_(x)

    problem = problem_of(n, storages, settings, given=True)
    gradient = Gradient(few_bits(n), few_bits(n), None)
    assert problem.update.state is not None
    state = type(problem.update.state)(*map(shifted, problem.update.state))
    update = Update(*map(shifted, problem.update[:3]), problem.update.rule, state)
    for count in (*state[-2:], *problem.update.state[-2:]):
        count += 1  # type: ignore[operator]
    run_step(triton, batch_of([Problem(update, Gradient(*map(shifted, gradient)))]), settings)
    run_step(portable, batch_of([problem._replace(gradient=gradient)]), settings)
    assert_same_means([update], [problem.update])
    assert_close([update], [problem.update])
    for part in means_of(update):
        beyond = part._base[1 + part.numel() :]
        assert bool((beyond.isnan() if part.is_floating_point() else beyond == 255).all()), "written beyond the end"


def test_strided_tensors(device: torch.device) -> None:
    rows, columns = 30, 41
    problem = make_problem(rows * columns, given=True)
    weight, scores = (tensor.view(columns, rows).t() for tensor in problem.update[:2])
    update = problem.update._replace(weight=weight, scores=scores)
    problem = Problem(update._replace(state=new_state(update, ("8bit", "8bit"), EXACT_ADAMW)), problem.gradient)
    gradients = [[Gradient(*(few_bits(rows * columns).view(columns, rows).t() for _ in range(2)), None)]]
    mine = take_steps(triton, [problem], gradients, EXACT_ADAMW, device)
    theirs = take_steps(portable, [problem], gradients, EXACT_ADAMW, "cpu")
    assert_same_means(mine, theirs)
    for a, b in zip(mine[0][:2], theirs[0][:2], strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("rule", "storages"),
    [("magnitude", ("8bit", "8bit")), ("value", ("bfloat16", "bfloat16")), ("value", ("bfloat16", "8bit"))],
    ids=str,
)
def test_the_next_masked_weight(rule: str, storages: tuple[str, str], device: torch.device) -> None:
    """Step by step the threshold and the masked weight are those of the updated weight and scores."""
    sizes = (1, 1300)
    problems = []
    for n in sizes:
        problem = moved(problem_of(n, storages, EXACT_ADAMW, rule=rule), device)
        window = torch.zeros(WINDOW, dtype=torch.int64, device=device)
        following = Next(torch.empty(n, device=device), torch.zeros((), device=device), n // 2, window)
        problems.append(problem._replace(update=problem.update._replace(next=following)))
    settings = EXACT_ADAMW._replace(lr=0.01)
    updates, plan = [problem.update for problem in problems], {}
    for _ in range(5):
        gradients = [
            Gradient(torch.randn(n).to(device), None, portable.threshold(u.scores.cpu(), n // 2, rule).to(device))
            for n, u in zip(sizes, updates, strict=True)
        ]
        for update in updates:
            for count in update.state[-2:]:
                count += 1
        batch = batch_of([Problem(u, g) for u, g in zip(updates, gradients, strict=True)])
        run_step(triton, batch._replace(updates=updates, plan=plan), settings)
        for update in updates:
            tau = portable.threshold(update.scores.cpu(), update.next.rank, rule)
            masked = portable.gate(update.weight.cpu(), update.scores.cpu(), tau, rule, torch.float32)
            assert_same_bits(update.next.tau.cpu(), tau, "threshold")
            assert_same_bits(update.next.masked.cpu(), masked, "masked weight")
    hits, _ = updates[1].next.window[6:8].tolist()
    assert hits >= 3, "most updates find the threshold in their window"


def test_means_in_float32_beside_codes_make_the_plain_step(device: torch.device) -> None:
    """The scores have float32 means: they and the means are those of the step without codes, to the bit."""
    settings = AdamW(0.01, 0.9, 0.999, 1e-8, 0.1, True)
    problem = make_problem(1300)
    plain = moved(problem.with_state(make_state(problem.update, settings)), device)
    coded = moved(problem.with_state(new_state(problem.update, ("8bit", "float32"), settings, 3.0)), device)
    for mine, other in zip(coded.update.state[2:4], plain.update.state[2:4], strict=True):
        mine.values.copy_(other)
    for one in (plain, coded):
        run_step(triton, batch_of([one]), settings)
    assert_same_bits(coded.update.scores, plain.update.scores, "scores")
    for mine, other in zip(coded.update.state[2:4], plain.update.state[2:4], strict=True):
        assert_same_bits(mine.values, other, "mean of scores")


@pytest.mark.parametrize("storage", ["bfloat16", "8bit"])
def test_ordinary_steps_are_close(storage: str, device: torch.device) -> None:
    """Their sums are rounded, so that a code may differ here and there."""
    n = 1500
    settings = AdamW(0.01, 0.9, 0.999, 1e-8, 0.1, True)
    problem = problem_of(n, (storage, storage), settings)
    gradients = [[Gradient(torch.randn(n), None, problem.gradient.tau)] for _ in range(3)]
    mine = take_steps(triton, [problem], gradients, settings, device)
    theirs = take_steps(portable, [problem], gradients, settings, "cpu")
    for a, b in zip(means_of(mine[0]), means_of(theirs[0]), strict=True):
        assert (a.cpu() != b).float().mean() < 2e-3
    for a, b in zip(mine[0][:2], theirs[0][:2], strict=True):
        assert ((a.cpu() - b).abs() > 1e-5).float().mean() < 2e-3
        torch.testing.assert_close(a.cpu(), b, rtol=1e-2, atol=1e-2)


def test_momentum_needs_a_buffer(device: torch.device) -> None:
    problem = moved(problem_of(4, ("8bit", "8bit"), EXACT_MOMENTUM), device)
    state = CodedSGDState(problem.update.state[0], None, *problem.update.state[2:])
    with pytest.raises(ValueError, match=r"scores_momentum must be a tensor for a momentum of 0\.5, got None"):
        run_step(triton, batch_of([problem.with_state(state)]), EXACT_MOMENTUM)


def test_momentum_of_the_weight_alone(device: torch.device) -> None:
    problem = problem_of(300, ("8bit", "8bit"), EXACT_MOMENTUM, given=True)
    problem = problem.with_state(CodedSGDState(problem.update.state[0], None, *problem.update.state[2:]))
    mine, theirs = moved(problem, device), problem
    plain = EXACT_MOMENTUM._replace(momentum=0.0)
    for backend, one in ((triton, mine), (portable, theirs)):
        run_step(backend, batch_of([one]), EXACT_MOMENTUM, plain)
    torch.testing.assert_close(mine.update.scores.cpu(), theirs.update.scores)
    torch.testing.assert_close(mine.update.weight.cpu(), theirs.update.weight)
