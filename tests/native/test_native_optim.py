"""The one-pass optimizer steps: as accurate as PyTorch's optimizers on the same gradients, and frozen to the bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from distributions import DISTRIBUTIONS
from torch import Tensor

from wsn_fast.backends import native
from wsn_fast.backends import torch as portable
from wsn_fast.backends.updates import SGD, WINDOW, AdamW, AdamWState, Next, SGDState, Update

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
    default = AdamW(lr=1e-2, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0, step=torch.ones(()), decoupled=False)
    return default._replace(**settings)


def sgd_settings(**settings: Any) -> SGD:
    default = SGD(lr=1e-2, momentum=0, dampening=0, weight_decay=0, nesterov=False, first=False)
    return default._replace(**settings)


def adamw_steps(n: int, dtype: torch.dtype, **settings: Any) -> tuple[list[Tensor], list[Tensor]]:
    weight, scores, grads, union = problem(n, dtype)
    states = [torch.zeros_like(weight) for _ in range(4)]
    for step, grad in enumerate(grads, start=1):
        tau = portable.threshold(scores, n // 2, RULE)
        now = adamw_settings(step=torch.tensor(float(step)), **settings)
        native.adamw_step([Update(grad, None, weight, scores, tau, union, RULE)], [AdamWState(*states)], [now], [now])
    return [weight, scores], states


def sgd_steps(n: int, dtype: torch.dtype, **settings: Any) -> tuple[list[Tensor], list[Tensor]]:
    weight, scores, grads, union = problem(n, dtype)
    # Buffers that were never written: the first step must not read them.
    buffers = [torch.full_like(weight, torch.nan) for _ in range(2)]
    for step, grad in enumerate(grads):
        tau = portable.threshold(scores, n // 2, RULE)
        now = sgd_settings(first=step == 0, **settings)
        native.sgd_step([Update(grad, None, weight, scores, tau, union, RULE)], [SGDState(*buffers)], [now], [now])
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
    states = [torch.randn(n).abs() for _ in range(4)]
    now = adamw_settings(lr=1, weight_decay=0.5, decoupled=True)
    update = Update(grads[0], None, weight, scores, scores[0].abs(), union, RULE)
    native.adamw_step([update], [AdamWState(*states)], [now], [now])
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


def test_strided_tensors_change_in_place() -> None:
    grad, weight, scores, mean, square = torch.randn(5, 7, 6)
    tau, union = scores[0, 0].abs(), portable.pack(torch.rand(42) < 0.3)
    expected = [x.clone() for x in (weight, scores, mean, square.abs())]
    strided = [x.t().contiguous().t() for x in expected]
    for tensors, like in ((expected, grad), (strided, grad.t().contiguous().t())):
        w, s, m, v = tensors
        states = AdamWState(m, v, m.clone(), v.clone())
        native.adamw_step([Update(like, None, w, s, tau, union, RULE)], [states], [ADAMW], [ADAMW])
    assert all(torch.equal(a, b) and not b.is_contiguous() for a, b in zip(expected, strided, strict=True))


# --- gradients as they are, factors, several tensors, sums of squares
def adamw_of(update: Update) -> list[Tensor]:
    """Weight, scores and moments after a step on copies."""
    weight, scores = update.weight.clone(), update.scores.clone()
    states = AdamWState(*(torch.full_like(weight, 0.25) for _ in range(4)))
    native.adamw_step([update._replace(weight=weight, scores=scores)], [states], [ADAMW], [ADAMW])
    return [weight, scores, *states]


def operands(n: int = 1025, dtype: torch.dtype = torch.float32) -> Update:
    weight, scores, grads, union = problem(n, dtype)
    return Update(grads[0], None, weight, scores, portable.threshold(scores, n // 2, RULE), union, RULE)


def formed(update: Update) -> Update:
    """The same step with both gradients given."""
    assert update.tau is not None
    dw, ds = portable.gate_backward(
        update.grad, update.weight, update.scores, update.tau, update.union, RULE, True, True
    )
    assert dw is not None
    return update._replace(grad=dw, score_grad=ds, tau=None)


def assert_same(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for mine, expected in zip(ours, theirs, strict=True):
        assert torch.equal(mine.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("scale", [None, torch.tensor(0.3)], ids=["as they are", "clipped"])
def test_gradients_may_be_given(scale: Tensor | None) -> None:
    update = operands()._replace(scale=scale)
    assert_same(adamw_of(update), adamw_of(formed(update)))


def test_a_factor_is_that_of_the_gradients() -> None:
    update, factor = operands(), torch.tensor(0.3)
    given = formed(update)
    assert given.score_grad is not None
    product = given._replace(grad=given.grad * factor, score_grad=given.score_grad * factor)
    assert_same(adamw_of(update._replace(scale=factor)), adamw_of(product))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_gradient_may_have_another_dtype(dtype: torch.dtype) -> None:
    update = operands()
    grad = update.grad.to(dtype)
    assert_same(adamw_of(update._replace(grad=grad)), adamw_of(update._replace(grad=grad.float())))


def test_several_tensors_are_each_as_alone() -> None:
    updates = [operands(n)._replace(union=None) for n in (1, 70, 100_003)]
    alone = [adamw_of(update) for update in updates]
    states = [AdamWState(*(torch.full_like(u.weight, 0.25) for _ in range(4))) for u in updates]
    native.adamw_step(updates, states, [ADAMW] * 3, [ADAMW] * 3)
    for update, state, expected in zip(updates, states, alone, strict=True):
        assert_same([update.weight, update.scores, *state], expected)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sums_of_squares(dtype: torch.dtype, given: bool) -> None:
    updates = [operands(n, dtype) for n in (1, 70, 300_007)]
    updates = [formed(update) for update in updates] if given else updates
    found = native.gradient_squares(updates)
    torch.testing.assert_close(found, portable.gradient_squares(updates), rtol=1e-12, atol=0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert torch.equal(native.gradient_squares(updates), found)
    torch.set_num_threads(threads)


def test_means_that_nothing_feeds_end_at_zero() -> None:
    """Where PyTorch's shrink to the smallest denormal number and stay there, at a hundredth of the speed."""
    weight = torch.ones(64)
    states = AdamWState(*(torch.full((64,), 2e-38) for _ in range(4)))
    update = Update(torch.zeros(64), torch.zeros(64), weight, weight.clone(), None, None, RULE)
    for _ in range(8):
        native.adamw_step([update], [states], [ADAMW], [ADAMW])
    assert states.weight_avg.count_nonzero() == 0
    buffer = torch.full((64,), 2e-38)
    for _ in range(8):
        native.sgd_step([update], [SGDState(buffer, buffer.clone())], [SGD_], [SGD_])
    assert buffer.count_nonzero() == 0


# --- the gate of the next forward pass
class Training:
    """Steps with the scores as somebody changes them in between; each leaves the exact gate."""

    def __init__(self, scores: Tensor, rule: str, masked: torch.dtype = torch.float32) -> None:
        n = scores.numel()
        torch.manual_seed(0)
        self.weight, self.scores, self.rule = torch.randn(n, dtype=scores.dtype), scores.clone(), rule
        self.states = AdamWState(*(torch.zeros_like(scores) for _ in range(4)))
        window = torch.zeros(WINDOW, dtype=torch.int64)
        self.next = Next(torch.full((n,), torch.nan, dtype=masked), scores.new_empty(()), (2 * n) // 3, window)
        self.next.tau.copy_(portable.threshold(scores, self.next.rank, rule))

    def step(self, lr: float, grad: Tensor | None = None) -> None:
        grad = torch.randn_like(self.weight) if grad is None else grad
        update = Update(grad, None, self.weight, self.scores, self.next.tau, None, self.rule, next=self.next)
        now = adamw_settings(lr=lr)
        native.adamw_step([update], [self.states], [now], [now])
        tau = portable.threshold(self.scores, self.next.rank, self.rule)
        masked = portable.gate(self.weight, self.scores, tau, self.rule, self.next.masked.dtype)
        assert torch.equal(self.next.tau, tau) or (self.next.tau.isnan() and tau.isnan())
        assert torch.equal(self.next.masked.nan_to_num(), masked.nan_to_num())
        assert torch.equal(self.next.masked.isnan(), masked.isnan())

    @property
    def found(self) -> int:
        return int(self.next.window[-2])

    @property
    def searched(self) -> int:
        return int(self.next.window[-1])


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("masked", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rule", ["magnitude", "value"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [1, 2, 70, 1025, 100_003])
def test_the_next_gate_is_exact_and_mostly_found(n: int, dtype: torch.dtype, rule: str, masked: torch.dtype) -> None:
    torch.manual_seed(n)
    training = Training(torch.randn(n, dtype=dtype), rule, masked)
    for _ in range(12):
        training.step(1e-3)
    assert training.found + training.searched == 12
    assert training.found >= 8 or n < 100_003


@pytest.mark.parametrize("rule", ["magnitude", "value"])
@pytest.mark.parametrize("kind", list(DISTRIBUTIONS))
def test_the_next_gate_of_any_distribution(kind: str, rule: str) -> None:
    torch.manual_seed(0)
    training = Training(DISTRIBUTIONS[kind](20_011, torch.float32), rule)
    for lr in (0.0, 1e-3, 1e-3, 0.0, 1.0, 0.0):
        training.step(lr)


def test_scores_that_do_not_move_are_found_however_many_are_equal() -> None:
    training = Training(torch.ones(20_011), RULE)
    for _ in range(10):
        training.step(0.0)
    assert training.searched == 1


def test_scores_may_change_behind_the_back_of_the_window() -> None:
    training = Training(torch.randn(20_011), RULE)
    changes: list[Callable[[], object]] = [
        lambda: training.scores.normal_(),
        lambda: training.scores.mul_(1e3),
        lambda: training.scores.fill_(1.0),
        lambda: training.scores.normal_(),
        lambda: training.scores[::3].fill_(torch.nan),
        lambda: training.scores.fill_(torch.nan),
        lambda: training.scores.normal_(),
        lambda: training.next.window.fill_(-1),
        lambda: training.next.window.fill_(2**62),
        lambda: training.next.tau.fill_(torch.nan),
    ]
    for change in changes:
        change()
        for _ in range(3):
            training.step(1e-3)


@pytest.mark.usefixtures("threads")
def test_the_next_gate_of_several_threads() -> None:
    training = Training(torch.randn(700_001), RULE)
    for _ in range(6):
        training.step(1e-3)
    assert training.found >= 3


X = torch.ones(4)
HALF = X.half()
ADAMW, SGD_ = adamw_settings(), sgd_settings(momentum=0.9)
UPDATE = Update(X, None, X, X, X[0], None, RULE)
NEXT = Next(X, X[0], 0, torch.zeros(WINDOW, dtype=torch.int64))
FOUR, TWO = AdamWState(X, X, X, X), SGDState(X, X)


def adamw(update: Update, states: AdamWState = FOUR) -> None:
    native.adamw_step([update], [states], [ADAMW], [ADAMW])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: adamw(UPDATE, FOUR._replace(weight_avg_sq=X.double())),
            TypeError,
            "weight_avg_sq must be a torch.float32 tensor, got torch.float64",
        ),
        (
            lambda: native.sgd_step([UPDATE], [SGDState(None, None)], [sgd_settings()], [SGD_]),
            ValueError,
            "scores_momentum must be a tensor for a momentum of 0.9, got None",
        ),
        (
            lambda: adamw(UPDATE._replace(scores=X.double())),
            TypeError,
            "scores must be a torch.float32 tensor, got torch.float64",
        ),
        (lambda: adamw(UPDATE._replace(grad=X[:2])), ValueError, r"grad must have shape \(4,\), got \(2,\)"),
        (lambda: adamw(UPDATE._replace(union=X.byte())), ValueError, "union must have 1 bytes for 4 elements"),
        (
            lambda: adamw(Update(HALF, None, HALF, HALF, HALF[0], None, RULE)),
            TypeError,
            "weight must be a float32 or float64 tensor, got torch.float16",
        ),
        (
            lambda: adamw(UPDATE._replace(score_grad=X.double())),
            TypeError,
            "grad and score_grad must be torch.float32, got torch.float32 and torch.float64",
        ),
        (lambda: adamw(UPDATE._replace(tau=None)), ValueError, "tau must be a tensor where score_grad is None"),
        (lambda: adamw(UPDATE._replace(next=NEXT._replace(masked=X[:2]))), ValueError, "masked must be contiguous"),
        (lambda: adamw(UPDATE._replace(next=NEXT._replace(rank=4))), ValueError, r"rank must be in \[0, 4\), got 4"),
        (lambda: adamw(UPDATE._replace(next=NEXT._replace(window=X))), ValueError, "window must be 8 int64"),
    ],
)
def test_bad_input_is_refused(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
