"""The one-pass optimizer steps: as accurate as PyTorch's optimizers on the same gradients, and frozen to the bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from gated_updates import Problem, batch_of, operands_of, run_step
from torch import Tensor

from wsn_fast.backends import native
from wsn_fast.backends import torch as portable
from wsn_fast.backends.updates import SGD, WINDOW, AdamW, AdamWState, Gradient, Next, SGDState, Update

SIZES = [1, 70, 1025, 100_003]
STEPS = 4
RULE = "magnitude"

pytestmark = pytest.mark.usefixtures("library")


def problem(n: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """weight, scores, one gradient per step, packed union: the same float32 numbers for every dtype."""
    torch.manual_seed(n)
    weight, scores = torch.randn(2, n).to(dtype)
    return weight, scores, torch.randn(STEPS, n).to(dtype), portable.pack(torch.rand(n) < 0.3)


def torch_steps(
    make: Callable[[list[Tensor]], torch.optim.Optimizer], n: int, dtype: torch.dtype
) -> tuple[list[Tensor], list[dict[str, Any]]]:
    """What PyTorch's optimizer makes of the gradients of the portable backend, frozen weights put back."""
    weight, scores, grads, union = problem(n, dtype)
    params = [torch.nn.Parameter(x) for x in (weight, scores)]
    optimizer = make(params)
    saved = weight.clone()
    for grad in grads:
        w, s = (p.detach() for p in params)
        tau = portable.threshold(s, n // 2, RULE)
        params[0].grad, params[1].grad = portable.gate_backward(grad, w, s, tau, union, RULE, True, True)
        optimizer.step()
        portable.restore_frozen(w, saved, union)
    return [p.detach() for p in params], [optimizer.state[p] for p in params]


def adamw_settings(**settings: Any) -> AdamW:
    default = AdamW(lr=1e-2, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0, decoupled=False)
    return default._replace(**settings)


def sgd_settings(**settings: Any) -> SGD:
    default = SGD(lr=1e-2, momentum=0, dampening=0, weight_decay=0, nesterov=False, first=False)
    return default._replace(**settings)


def first_counts() -> tuple[Tensor, Tensor]:
    """Of the first update of a weight and of its scores."""
    return torch.tensor(1.0), torch.tensor(1.0)


def adamw_steps(n: int, dtype: torch.dtype, **settings: Any) -> tuple[list[Tensor], list[Tensor]]:
    weight, scores, grads, union = problem(n, dtype)
    state = AdamWState(*(torch.zeros_like(weight) for _ in range(4)), *first_counts())
    for grad in grads:
        gradient = Gradient(grad, None, portable.threshold(scores, n // 2, RULE))
        update = Update(weight, scores, union, RULE, state)
        run_step(native, batch_of([Problem(update, gradient)]), adamw_settings(**settings))
        for count in state[4:]:
            count += 1
    return [weight, scores], list(state[:4])


def sgd_steps(n: int, dtype: torch.dtype, **settings: Any) -> tuple[list[Tensor], list[Tensor]]:
    weight, scores, grads, union = problem(n, dtype)
    # Buffers that were never written: the first step must not read them.
    buffers = [torch.full_like(weight, torch.nan) for _ in range(2)]
    for step, grad in enumerate(grads):
        gradient = Gradient(grad, None, portable.threshold(scores, n // 2, RULE))
        update = Update(weight, scores, union, RULE, SGDState(*buffers))
        run_step(native, batch_of([Problem(update, gradient)]), sgd_settings(first=step == 0, **settings))
    return [weight, scores], buffers


def assert_as_accurate(ours: Tensor, theirs: Tensor, exact: Tensor, what: str) -> None:
    """Our error against float64 is at most twice PyTorch's."""
    error, allowed = ((x.double() - exact).abs().max() for x in (ours, theirs))
    assert error <= 2 * allowed, f"{what}: {error:.3g} against {allowed:.3g}"


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0), {}),
        (lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1), {"weight_decay": 0.1, "decoupled": True}),
        (lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=0.1), {"weight_decay": 0.1}),
        (lambda p: torch.optim.Adam(p, lr=1e-2, betas=(0.3, 0.9), eps=1e-3), {"beta1": 0.3, "beta2": 0.9, "eps": 1e-3}),
    ],
    ids=["no decay", "decoupled", "coupled", "other betas"],
)
def test_adamw(make: Callable[[list[Tensor]], torch.optim.Optimizer], settings: dict[str, Any], n: int) -> None:
    exact, exact_states = torch_steps(make, n, torch.float64)
    theirs, their_states = torch_steps(make, n, torch.float32)
    ours, our_states = adamw_steps(n, torch.float32, **settings)
    names = ("weight", "scores", "weight exp_avg", "weight exp_avg_sq", "scores exp_avg", "scores exp_avg_sq")
    for name, mine, torchs, truth in zip(
        names, ours + our_states, theirs + moments(their_states), exact + moments(exact_states), strict=True
    ):
        assert_as_accurate(mine, torchs, truth, name)
    for mine, truth in zip(adamw_steps(n, torch.float64, **settings)[0], exact, strict=True):
        torch.testing.assert_close(mine, truth, rtol=1e-12, atol=1e-13)


def moments(states: list[dict[str, Any]]) -> list[Tensor]:
    return [state[name] for state in states for name in ("exp_avg", "exp_avg_sq")]


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"weight_decay": 0.1},
        {"momentum": 0.9},
        {"momentum": 0.9, "dampening": 0.5, "weight_decay": 0.1},
        {"momentum": 0.9, "nesterov": True},
    ],
    ids=["plain", "decay", "momentum", "dampening", "nesterov"],
)
def test_sgd(settings: dict[str, Any], n: int) -> None:
    def make(params: list[Tensor]) -> torch.optim.Optimizer:
        return torch.optim.SGD(params, lr=1e-2, **settings)

    exact, exact_states = torch_steps(make, n, torch.float64)
    theirs, their_states = torch_steps(make, n, torch.float32)
    ours, buffers = sgd_steps(n, torch.float32, **settings)
    if "momentum" in settings:
        ours += buffers
        theirs += [state["momentum_buffer"] for state in their_states]
        exact += [state["momentum_buffer"] for state in exact_states]
    for i, (mine, torchs, truth) in enumerate(zip(ours, theirs, exact, strict=True)):
        assert_as_accurate(mine, torchs, truth, f"tensor {i}")
    for mine, truth in zip(sgd_steps(n, torch.float64, **settings)[0], exact, strict=False):
        torch.testing.assert_close(mine, truth, rtol=1e-12, atol=1e-13)


def test_frozen_weights_keep_every_bit() -> None:
    n = 1025
    weight, scores, grads, union = problem(n, torch.float32)
    weight[::5], grads[0, ::7] = float("nan"), float("inf")
    before, frozen = weight.view(torch.int32).clone(), portable.unpack(union, n)
    state = AdamWState(*(torch.randn(n).abs() for _ in range(4)), *first_counts())
    gradient = Gradient(grads[0], None, scores[0].abs())
    batch = batch_of([Problem(Update(weight, scores, union, RULE, state), gradient)])
    run_step(native, batch, adamw_settings(lr=1, weight_decay=0.5, decoupled=True))
    after = weight.view(torch.int32)
    assert torch.equal(after[frozen], before[frozen])
    assert (after != before)[~frozen & ~weight.isnan()].all()


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("steps", [adamw_steps, sgd_steps])
def test_threads_do_not_change_the_step(steps: Callable[..., tuple[list[Tensor], list[Tensor]]]) -> None:
    n = 300_007
    threads = torch.get_num_threads()
    several = steps(n, torch.float32, weight_decay=0.1)[0]
    torch.set_num_threads(1)
    one = steps(n, torch.float32, weight_decay=0.1)[0]
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(several, one, strict=True))


# --- strides
def transposed(x: Tensor) -> Tensor:
    """The same values in a tensor that goes through memory by columns."""
    return x.t().contiguous().t()


def every_other(x: Tensor) -> Tensor:
    return torch.stack([x, torch.full_like(x, torch.nan)], dim=-1)[..., 0]


def expanded(x: Tensor) -> Tensor:
    """The first value everywhere, once in memory."""
    return x[:1, :1].expand(x.shape)


def matrix() -> Problem:
    """A tensor [7, 6] with a state."""
    weight, scores, mean, square, grad = torch.randn(5, 7, 6)
    state = AdamWState(mean, square.abs(), mean.clone(), square.abs(), *first_counts())
    update = Update(weight, scores, portable.pack(torch.rand(42) < 0.3), RULE, state)
    return Problem(update, Gradient(grad, None, scores[0, 0].abs()))


def changed(one: Problem) -> list[Tensor]:
    """What a step changes, after this step."""
    run_step(native, batch_of([one]), ADAMW)
    return operands_of(one.update)


@pytest.mark.parametrize("strided", [transposed, every_other])
def test_strided_tensors_change_in_place(strided: Callable[[Tensor], Tensor]) -> None:
    plain = matrix()
    weight, scores, *means = map(strided, operands_of(plain.update))
    state = AdamWState(*means, *first_counts())
    update = plain.update._replace(weight=weight, scores=scores, state=state)
    found = changed(Problem(update, plain.gradient._replace(grad=strided(plain.gradient.grad))))
    for mine, expected in zip(found, changed(plain), strict=True):
        assert torch.equal(mine, expected) and not mine.is_contiguous()


@pytest.mark.parametrize("strided", [transposed, every_other, expanded])
@pytest.mark.parametrize("given", [False, True], ids=["G", "dW and dS"])
def test_gradients_may_have_any_strides(given: bool, strided: Callable[[Tensor], Tensor]) -> None:
    """Those of a layer whose output was transposed, and those of a sum."""
    one = formed(matrix()) if given else matrix()
    grad, score_grad, tau = one.gradient
    views = Gradient(strided(grad), None if score_grad is None else strided(score_grad), tau)
    dense = Gradient(*(None if x is None else x.clone(memory_format=torch.contiguous_format) for x in views))
    mine, other = one._replace(gradient=views), copied(one)._replace(gradient=dense)
    squares = [native.gradient_squares(batch_of([each])) for each in (mine, other)]
    assert torch.equal(*squares)
    assert_same(changed(mine), changed(other))
    for view, value in zip(views[:2], dense[:2], strict=True):
        assert view is None or (torch.equal(view, value) and not view.is_contiguous())


# --- gradients as they are, factors, several tensors, sums of squares
def copied(one: Problem) -> Problem:
    """The same update of copies of weight, scores and state."""
    weight, scores, union, rule, state, _ = one.update
    state = AdamWState(*(tensor.clone() for tensor in state))
    return one._replace(update=Update(weight.clone(), scores.clone(), union, rule, state))


def adamw_of(one: Problem, scale: Tensor | None = None) -> list[Tensor]:
    """Weight, scores and moments after a step on copies."""
    copy = copied(one)
    run_step(native, batch_of([copy], scale), ADAMW)
    return operands_of(copy.update)


def operands(n: int = 1025, dtype: torch.dtype = torch.float32) -> Problem:
    weight, scores, grads, union = problem(n, dtype)
    state = AdamWState(*(torch.full_like(weight, 0.25) for _ in range(4)), *first_counts())
    gradient = Gradient(grads[0], None, portable.threshold(scores, n // 2, RULE))
    return Problem(Update(weight, scores, union, RULE, state), gradient)


def formed(one: Problem) -> Problem:
    """The same step with both gradients given."""
    (weight, scores, union, *_), (grad, _, tau) = one
    assert tau is not None
    dw, ds = portable.gate_backward(grad, weight, scores, tau, union, RULE, True, True)
    assert dw is not None
    return one._replace(gradient=Gradient(dw, ds, None))


def assert_same(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for mine, expected in zip(ours, theirs, strict=True):
        assert torch.equal(mine.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("scale", [None, torch.tensor(0.3)], ids=["as they are", "clipped"])
def test_gradients_may_be_given(scale: Tensor | None) -> None:
    one = operands()
    assert_same(adamw_of(one, scale), adamw_of(formed(one), scale))


def test_a_factor_is_that_of_the_gradients() -> None:
    one, factor = operands(), torch.tensor(0.3)
    dw, ds, _ = formed(one).gradient
    assert ds is not None
    product = one._replace(gradient=Gradient(dw * factor, ds * factor, None))
    assert_same(adamw_of(one, factor), adamw_of(product))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_gradient_may_have_another_dtype(dtype: torch.dtype) -> None:
    one = operands()
    grad = one.gradient.grad.to(dtype)
    assert_same(adamw_of(one.with_gradient(grad=grad)), adamw_of(one.with_gradient(grad=grad.float())))


def test_weight_and_scores_have_counts_of_their_own() -> None:
    """Each is updated as in a step in which both have its count."""
    one = operands()

    def with_counts(*counts: float) -> list[Tensor]:
        assert isinstance(one.update.state, AdamWState)
        return adamw_of(one.with_state(AdamWState(*one.update.state[:4], *map(torch.tensor, counts))))

    weight, scores, *_ = with_counts(2.0, 70.0)
    assert_same([weight, scores], [with_counts(2.0, 2.0)[0], with_counts(70.0, 70.0)[1]])
    assert not torch.equal(weight, with_counts(70.0, 70.0)[0])


def test_several_tensors_are_each_as_alone() -> None:
    several = [operands(n) for n in (1, 70, 100_003)]
    several = [one._replace(update=one.update._replace(union=None)) for one in several]
    alone = [adamw_of(one) for one in several]
    run_step(native, batch_of(several), ADAMW)
    for one, expected in zip(several, alone, strict=True):
        assert_same(operands_of(one.update), expected)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sums_of_squares(dtype: torch.dtype, given: bool) -> None:
    several = [operands(n, dtype) for n in (1, 70, 300_007)]
    batch = batch_of([formed(one) for one in several] if given else several)
    found = native.gradient_squares(batch)
    torch.testing.assert_close(found, portable.gradient_squares(batch), rtol=1e-12, atol=0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert torch.equal(native.gradient_squares(batch), found)
    torch.set_num_threads(threads)


def test_means_that_nothing_feeds_end_at_zero() -> None:
    """Where PyTorch's shrink to the smallest denormal number and stay there, at a hundredth of the speed."""
    weight = torch.ones(64)
    gradient = Gradient(torch.zeros(64), torch.zeros(64), None)
    state = AdamWState(*(torch.full((64,), 2e-38) for _ in range(4)), *first_counts())
    one = Problem(Update(weight, weight.clone(), None, RULE, state), gradient)
    for _ in range(8):
        run_step(native, batch_of([one]), ADAMW)
    assert state.weight_avg.count_nonzero() == 0
    buffer = torch.full((64,), 2e-38)
    for _ in range(8):
        run_step(native, batch_of([one.with_state(SGDState(buffer, buffer.clone()))]), SGD_)
    assert buffer.count_nonzero() == 0


X = torch.ones(4)
HALF = X.half()
ADAMW, SGD_ = adamw_settings(), sgd_settings(momentum=0.9)
STATE = AdamWState(X, X, X, X, X[0], X[0])
UPDATE = Update(X, X, None, RULE, STATE)
NEXT = Next(X, X[0], 0, torch.zeros(WINDOW, dtype=torch.int64))


def adamw(
    update: Update = UPDATE, grad: Tensor = X, score_grad: Tensor | None = None, tau: Tensor | None = X[0]
) -> None:
    run_step(native, batch_of([Problem(update, Gradient(grad, score_grad, tau))]), ADAMW)


def sgd(update: Update, settings: SGD, scores: SGD) -> None:
    run_step(native, batch_of([Problem(update, Gradient(X, None, X[0]))]), settings, scores)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: adamw(UPDATE._replace(state=STATE._replace(weight_avg_sq=X.double()))),
            TypeError,
            "weight_avg_sq must be a torch.float32 tensor, got torch.float64",
        ),
        (
            lambda: sgd(UPDATE._replace(state=SGDState(None, None)), sgd_settings(), SGD_),
            ValueError,
            "scores_momentum must be a tensor for a momentum of 0.9, got None",
        ),
        (
            lambda: adamw(UPDATE._replace(scores=X.double())),
            TypeError,
            "scores must be a torch.float32 tensor, got torch.float64",
        ),
        (lambda: adamw(grad=X[:2]), ValueError, r"grad must have shape \(4,\), got \(2,\)"),
        (lambda: adamw(UPDATE._replace(union=X.byte())), ValueError, "union must have 1 bytes for 4 elements"),
        (
            lambda: adamw(UPDATE._replace(weight=HALF, scores=HALF, state=AdamWState(*[HALF] * 4, X[0], X[0]))),
            TypeError,
            "weight must be a float32 or float64 tensor, got torch.float16",
        ),
        (
            lambda: adamw(score_grad=X.double()),
            TypeError,
            "grad and score_grad must be torch.float32, got torch.float32 and torch.float64",
        ),
        (lambda: adamw(tau=None), ValueError, "tau must be a tensor where score_grad is None"),
        (lambda: adamw(UPDATE._replace(next=NEXT._replace(masked=X[:2]))), ValueError, "masked must be contiguous"),
        (lambda: adamw(UPDATE._replace(next=NEXT._replace(rank=4))), ValueError, r"rank must be in \[0, 4\), got 4"),
        (lambda: adamw(UPDATE._replace(next=NEXT._replace(window=X))), ValueError, "window must be 8 int64"),
    ],
)
def test_bad_input_is_refused(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
