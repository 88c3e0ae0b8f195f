"""The one-pass optimizers against the torch backend: as exact as it is, in the same places, and frozen to the bit."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from distributions import RULES
from elementwise import assert_same_bits, planted, poisoned
from gated_updates import (
    ADAMW,
    MOMENTUM,
    PLAIN,
    Pair,
    Problem,
    Settings,
    batch_of,
    exact,
    make_problem,
    make_state,
    moved,
    moved_pairs,
    operands_of,
    pairs_of,
    run_step,
)
from torch import Tensor

from wsn_fast.backends import torch as portable
from wsn_fast.backends import triton
from wsn_fast.backends.triton import optimizer_steps
from wsn_fast.backends.updates import AdamWState, Gradient, SGDState, Update
from wsn_fast.kernels import _layout as layout
from wsn_fast.kernels import optimizer_step, step_coefficients, update_table

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero) encountered:RuntimeWarning")

SETTINGS: dict[str, Settings] = {
    "adamw": ADAMW,
    "adam": ADAMW._replace(decoupled=False),
    "far from the mean": ADAMW._replace(beta1=0.25),
    "without memory": ADAMW._replace(beta1=0.0, beta2=0.0, weight_decay=0.0),
    "sgd": PLAIN,
    "decay": PLAIN._replace(weight_decay=0.1),
    "momentum": MOMENTUM,
    "first momentum": MOMENTUM._replace(first=True),
    "nesterov": MOMENTUM._replace(nesterov=True, weight_decay=0.1),
    "dampened": MOMENTUM._replace(dampening=0.5),
}
SIZES = (*range(1, 10), 15, 16, 17, 31, 32, 33, 47, 63, 64, 65, 69, 70)


def check(
    problems: Sequence[Problem], settings: Any, device: torch.device, scores: Any = None, repeats: int = 1,
    scale: Tensor | None = None, steps: Any = (3.0, 3.0),
) -> None:  # fmt: skip
    """Errors against float64 at most twice those of the torch backend, beside a rounding of the largest value."""
    pairs = pairs_of(len(problems), settings, scores)
    problems = [
        problem.with_state(make_state(problem.update, *pair, steps))
        for problem, pair in zip(problems, pairs, strict=True)
    ]
    ours, theirs, true = (
        [moved(p, device) for p in problems],
        [moved(p, "cpu") for p in problems],
        [*map(exact, problems)],
    )
    for _ in range(repeats):
        step(triton, ours, moved_pairs(pairs, device), None if scale is None else scale.to(device))
        step(portable, theirs, pairs, scale)
        step(portable, true, pairs, scale)
    for k, operands in enumerate(zip(*map(rows_of, (ours, theirs, true)), strict=True)):
        assert_as_exact(*operands, f"operand {k}")
    for i, (problem, mine) in enumerate(zip(problems, ours, strict=True)):
        weight, union = problem.update.weight, problem.update.union
        if union is not None:
            frozen = portable.unpack(union, weight.numel())
            assert_same_bits(mine.update.weight.cpu()[frozen], weight[frozen], f"frozen weights of tensor {i}")


def step(backend: Any, problems: Sequence[Problem], pairs: Sequence[Pair], scale: Tensor | None = None) -> None:
    weights, scores = zip(*pairs, strict=True)
    run_step(backend, batch_of(problems, scale), weights, scores)


def rows_of(problems: Sequence[Problem]) -> list[Tensor]:
    """Weights, scores and each state, of all tensors one after the other, on the CPU."""
    rows = itertools.zip_longest(*(operands_of(problem.update) for problem in problems))
    return [torch.cat([x.cpu() for x in row if x is not None]) for row in rows]


def assert_as_exact(mine: Tensor, theirs: Tensor, true: Tensor, what: str) -> None:
    lossy = 8 * 2**-7 if INTERPRETED and mine.dtype is torch.bfloat16 else 0  # the interpreter truncates to bfloat16
    allowed = 2 * (theirs.double() - true).abs().max() + (torch.finfo(mine.dtype).eps + lossy) * true.abs().max()
    assert (mine.double() - true).abs().max() <= allowed, what


# --- the arithmetic
@pytest.mark.sample(9)
@pytest.mark.parametrize("kind", ["adamw", "nesterov"])
def test_small_sizes_in_one_call(kind: str, device: torch.device) -> None:
    check([make_problem(n, rule=RULES[n % 2], union=n % 3 > 0) for n in SIZES], SETTINGS[kind], device)


@pytest.mark.sample(9)
@pytest.mark.parametrize("kind", SETTINGS)
def test_every_setting(kind: str, device: torch.device) -> None:
    repeats = 2 if kind != "first momentum" else 1
    check([make_problem(n) for n in (5, 512, 1301)], SETTINGS[kind], device, repeats=repeats)


@pytest.mark.parametrize(
    "steps",
    [(1.0, 1.0), (2.0, 700.0), torch.tensor([123456.0, 1.0], dtype=torch.float64)],
    ids=["first", "each its own", "long ago, in float64"],
)
def test_every_number_of_steps(steps: Any, device: torch.device) -> None:
    """The weight and the scores have counts of their own."""
    for settings in (ADAMW, SETTINGS["adam"]):
        check([make_problem(n) for n in (5, 130)], settings, device, steps=steps)


@pytest.mark.sample(13)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    ("dtype", "grad"),
    [(torch.float32, torch.bfloat16), (torch.float32, torch.float16), (torch.bfloat16,) * 2, (torch.float16,) * 2],
    ids=str,
)
def test_every_dtype(dtype: torch.dtype, grad: torch.dtype, rule: str, device: torch.device) -> None:
    for kind in ("adamw", "momentum"):
        check([make_problem(n, dtype, grad, rule) for n in (70, 600)], SETTINGS[kind], device)


@pytest.mark.parametrize("config", range(len(optimizer_steps.CONFIGS)))
def test_every_tile_shape(config: int, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizer_steps, "CONFIGS", (optimizer_steps.CONFIGS[config],) * 2)
    items = optimizer_steps.CONFIGS[0].items
    check([make_problem(n) for n in (items, items + 3)], ADAMW, device)


@pytest.mark.parametrize("scale", [torch.tensor(0.3), torch.tensor(0.3, dtype=torch.float64)])
def test_a_scale(scale: Tensor, device: torch.device) -> None:
    for kind in ("adam", "sgd"):
        check([make_problem(n) for n in (9, 130)], SETTINGS[kind], device, scale=scale)


def test_given_gradients(device: torch.device) -> None:
    for kind in ("adamw", "decay"):
        problems = [make_problem(n, given=True) for n in (9, 130)]
        check(problems, SETTINGS[kind], device, scale=torch.tensor(2.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_learning_rate_on_the_device(dtype: torch.dtype, device: torch.device) -> None:
    for settings in (ADAMW, MOMENTUM):
        check([make_problem(70)], settings._replace(lr=torch.tensor(0.25, dtype=dtype)), device)


def test_tensors_and_scores_with_settings_of_their_own(device: torch.device) -> None:
    slow, fast = (ADAMW._replace(lr=0.01 * i) for i in (1, 2))
    problems = [make_problem(n) for n in (9, 130, 20, 31)]
    check(problems, [slow, slow, fast, slow], device, scores=ADAMW._replace(weight_decay=0.0))
    check(problems, [slow] * 4, device, scores=[slow, fast, fast, fast])
    momenta = [PLAIN, MOMENTUM, PLAIN, MOMENTUM]
    check(problems, momenta, device, scores=momenta[2:] + momenta[1::-1])


def test_unlike_tensors_in_one_call(device: torch.device) -> None:
    kinds = itertools.product((torch.float32, torch.float16), RULES, (True, False))
    problems = [make_problem(40 + i, grad=g, rule=rule, union=u) for i, (g, rule, u) in enumerate(kinds)]
    check([*problems, make_problem(0), make_problem(3, given=True)], ADAMW, device)


# --- what is not touched
def test_frozen_weights_keep_their_bits_whatever_comes(device: torch.device) -> None:
    n = 555
    union = portable.pack(torch.rand(n) < 0.5).to(device)
    frozen = portable.unpack(union, n)
    for settings in (ADAMW, SETTINGS["nesterov"]):
        weight, grad, scores = (planted(n, torch.float32).to(device) for _ in range(3))
        before, tau = weight.clone(), scores[3].abs()
        update = Update(weight, scores, union, "magnitude")
        update = update._replace(state=moved(make_state(update, settings), device))
        run_step(triton, batch_of([Problem(update, Gradient(grad, None, tau))]), settings)
        assert torch.equal(weight.view(torch.int32)[frozen], before.view(torch.int32)[frozen])
        assert not torch.equal(weight.view(torch.int32), before.view(torch.int32))


def test_moments_of_frozen_weights_decay(device: torch.device) -> None:
    update, gradient = moved(make_problem(8), device)
    union = torch.tensor([255], dtype=torch.uint8, device=device)
    state = moved(make_state(update, ADAMW), device)
    before = state.weight_avg_sq.clone()
    run_step(triton, batch_of([Problem(update._replace(union=union, state=state), gradient)]), ADAMW)
    torch.testing.assert_close(state.weight_avg_sq, 0.999 * before)


def test_the_counts_of_steps_are_only_read(device: torch.device) -> None:
    problem = make_problem(8)
    state = moved(make_state(problem.update, ADAMW, steps=(3.0, 7.0)), device)
    run_step(triton, batch_of([moved(problem, device).with_state(state)]), ADAMW)
    assert (float(state.weight_step), float(state.scores_step)) == (3.0, 7.0)


@pytest.mark.parametrize("first", [0, 1], ids=["aligned", "unaligned"])
def test_nothing_beyond_is_written(first: int, device: torch.device) -> None:
    def placed(x: Any) -> Any:
        if not isinstance(x, Tensor) or x.ndim == 0 or not x.is_floating_point():
            return moved(x, device)
        return poisoned(len(x) + first, x.dtype, device)[first:].copy_(x)

    problems = []
    for n in (1, 511, 513):
        update, gradient = make_problem(n)
        state = AdamWState(*map(placed, make_state(update, ADAMW)))
        update = Update(*map(placed, update))._replace(state=state)
        problems.append(Problem(update, Gradient(*map(placed, gradient))))
    before = [moved(problem.gradient.grad, device) for problem in problems]
    run_step(triton, batch_of(problems), ADAMW)
    for (update, gradient), old in zip(problems, before, strict=True):
        for tensor in operands_of(update):
            assert bool(tensor._base[first + len(tensor) :].isnan().all()) and not bool(tensor.isnan().any())
        assert_same_bits(gradient.grad, old.cpu(), "G")


# --- strides
def transposed(x: Tensor) -> Tensor:
    """The same values in a tensor [6, 11] that goes through memory by columns."""
    return x.view(6, 11).t().contiguous().t()


def every_other(x: Tensor) -> Tensor:
    return torch.stack([x.view(6, 11), torch.full((6, 11), torch.nan, device=x.device)], dim=-1)[..., 0]


def flat_problem(given: bool, device: torch.device) -> Problem:
    problem = make_problem(6 * 11, given=given)
    return moved(problem.with_state(make_state(problem.update, ADAMW)), device)


@pytest.mark.parametrize("planned", [False, True], ids=["without a plan", "with a plan"])
def test_strided_tensors(planned: bool, device: torch.device) -> None:
    flat = flat_problem(False, device)
    vectors = [transposed(x) for x in operands_of(flat.update)]
    state = AdamWState(*vectors[2:], *flat.update.state[4:])
    update = flat.update._replace(weight=vectors[0], scores=vectors[1], state=state)
    batch = batch_of([Problem(update, flat.gradient._replace(grad=transposed(flat.gradient.grad)))])
    batch = batch._replace(plan={} if planned else None)
    for _ in range(2):
        for x in (*vectors, *operands_of(flat.update)):  # somebody writes to them between the steps
            x.mul_(0.9)
        run_step(triton, batch, ADAMW)
        run_step(triton, batch_of([flat]), ADAMW)
    for mine, other in zip(vectors, operands_of(flat.update), strict=True):
        assert not mine.is_contiguous() and torch.equal(mine.reshape(-1), other)


@pytest.mark.parametrize("strided", [transposed, every_other])
@pytest.mark.parametrize("given", [False, True], ids=["G", "dW and dS"])
def test_strided_gradients(given: bool, strided: Callable[[Tensor], Tensor], device: torch.device) -> None:
    flat = flat_problem(given, device)
    shaped = Update(*(x.clone().view(6, 11) for x in flat.update[:2]), *flat.update[2:])
    shaped = shaped._replace(state=AdamWState(*(x.clone() for x in flat.update.state)))
    grad, score_grad, tau = flat.gradient
    views = Gradient(strided(grad), None if score_grad is None else strided(score_grad), tau)
    before = [view.clone() for view in views[:2] if view is not None]
    mine, other = batch_of([Problem(shaped, views)], plan={}), batch_of([flat])
    for _ in range(2):  # with the plan as it was made, and again
        assert torch.equal(triton.gradient_squares(mine), triton.gradient_squares(other))
        run_step(triton, mine, ADAMW)
        run_step(triton, other, ADAMW)
        for a, b in zip(operands_of(shaped), operands_of(flat.update), strict=True):
            assert torch.equal(a.reshape(-1), b)
    assert all(torch.equal(a, b) for a, b in zip([v for v in views[:2] if v is not None], before, strict=True))


# --- the norm
@pytest.mark.parametrize("scale", [None, torch.tensor(0.5)], ids=["as they are", "scaled"])
@pytest.mark.parametrize("rule", RULES)
def test_gradient_squares(rule: str, scale: Tensor | None, device: torch.device) -> None:
    problems = [make_problem(n, grad=g, rule=rule) for n in (1, 70, 2500) for g in (torch.float32, torch.float16)]
    problems += [make_problem(0), make_problem(30, rule=rule, union=False), make_problem(30, given=True)]
    found = triton.gradient_squares(batch_of([moved(p, device) for p in problems], moved(scale, device)))
    expected = portable.gradient_squares(batch_of([*map(exact, problems)], scale))
    torch.testing.assert_close(found.cpu().double(), expected, rtol=1e-5, atol=1e-12)


def test_gradient_squares_are_the_same_every_time(device: torch.device) -> None:
    batch = batch_of([moved(make_problem(5000), device)])
    assert torch.equal(triton.gradient_squares(batch), triton.gradient_squares(batch))


# --- arguments
def test_momentum_needs_a_buffer(device: torch.device) -> None:
    problem = moved(make_problem(4), device).with_state(SGDState(None, None))
    with pytest.raises(ValueError, match=r"scores_momentum must be a tensor for a momentum of 0\.9, got None"):
        run_step(triton, batch_of([problem]), PLAIN, MOMENTUM)


def test_beyond_32_bits(device: torch.device) -> None:
    """Only the program of the last weights runs. No other page is touched."""
    start, last = 2**31, 700
    large = [torch.empty(start + last, dtype=torch.bfloat16, device=device) for _ in range(3)]
    grad, *tails = [x[start:].copy_(torch.randn(last)).clone() for x in large]
    tau = tails[1][0].clone()
    update = Update(*tails, None, "value", SGDState(None, None))
    run_step(triton, batch_of([Problem(update, Gradient(grad, None, tau))]), PLAIN)

    config = update_table.CONFIGS[0]
    size = update_table.table_size([start + last], config)
    buffer = torch.empty(size, dtype=torch.int64, device=device)
    table = update_table.make_table([update_table.Gated(*large[1:])], buffer, config)
    table = table._replace(programs=torch.tensor([[0, start]], device=device))
    size = update_table.workspace_size(table)
    workspace = update_table.workspace(table, torch.empty(size, dtype=torch.int64, device=device))
    gradients = torch.zeros(layout.GRADIENTS, 1, dtype=torch.int64, device=device)
    gradients[layout.GRADIENT_WEIGHT.value], gradients[layout.GRADIENT_TAU.value] = large[0].data_ptr(), tau.data_ptr()
    settings = {"lr": PLAIN.lr, "momentum": 0.0, "rest": 1.0, "decay": 0.0, "nesterov": 0.0, "first": 0.0}
    step_coefficients.prepare(table, workspace, range(1), settings, settings, rule="value")
    optimizer_step.update(
        table, workspace, gradients, grad=torch.bfloat16, scale=None, given=False, aligned=True, rule="value"
    )
    for tensor, tail in zip(large, [grad, *tails], strict=True):
        assert torch.equal(tensor[start:], tail)
