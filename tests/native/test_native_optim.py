"""The one-pass optimizer steps: as accurate as PyTorch's optimizers on the same gradients, and frozen to the bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from wsn_fast.backends import native
from wsn_fast.backends import torch as portable

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


def adamw_settings(**settings: Any) -> portable.AdamW:
    default = portable.AdamW(
        lr=1e-2, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0, step=torch.ones(()), decoupled=False
    )
    return default._replace(**settings)


def sgd_settings(**settings: Any) -> portable.SGD:
    default = portable.SGD(lr=1e-2, momentum=0, dampening=0, weight_decay=0, nesterov=False, first=False)
    return default._replace(**settings)


def adamw_steps(n: int, dtype: torch.dtype, **settings: Any) -> tuple[list[Tensor], list[Tensor]]:
    weight, scores, grads, union = problem(n, dtype)
    states = [torch.zeros_like(weight) for _ in range(4)]
    for step, grad in enumerate(grads, start=1):
        tau = portable.threshold(scores, n // 2, RULE)
        now = adamw_settings(step=torch.tensor(float(step)), **settings)
        native.adamw_step(
            grad, weight, scores, tau, union, RULE, (states[0], states[1]), (states[2], states[3]), now, now
        )
    return [weight, scores], states


def sgd_steps(n: int, dtype: torch.dtype, **settings: Any) -> tuple[list[Tensor], list[Tensor]]:
    weight, scores, grads, union = problem(n, dtype)
    # Buffers that were never written: the first step must not read them.
    buffers = [torch.full_like(weight, torch.nan) for _ in range(2)]
    for step, grad in enumerate(grads):
        tau = portable.threshold(scores, n // 2, RULE)
        now = sgd_settings(first=step == 0, **settings)
        native.sgd_step(grad, weight, scores, tau, union, RULE, *buffers, now, now)
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
    native.adamw_step(
        grads[0], weight, scores, scores[0].abs(), union, RULE, (states[0], states[1]), (states[2], states[3]), now, now
    )
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
        native.adamw_step(like, w, s, tau, union, RULE, (m, v), (m.clone(), v.clone()), ADAMW, ADAMW)
    assert all(torch.equal(a, b) and not b.is_contiguous() for a, b in zip(expected, strided, strict=True))


X = torch.ones(4)
HALF = X.half()
ADAMW, SGD = adamw_settings(), sgd_settings(momentum=0.9)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: native.adamw_step(X, X, X, X[0], None, RULE, (X, X.double()), (X, X), ADAMW, ADAMW),
            TypeError,
            "weight_state must be a torch.float32 tensor, got torch.float64",
        ),
        (
            lambda: native.sgd_step(X, X, X, X[0], None, RULE, None, None, sgd_settings(), SGD),
            ValueError,
            "scores_momentum must be a tensor for a momentum of 0.9, got None",
        ),
        (
            lambda: native.sgd_step(X, X, X.double(), X[0], None, RULE, X, X, SGD, SGD),
            TypeError,
            "scores must be a torch.float32 tensor, got torch.float64",
        ),
        (
            lambda: native.sgd_step(X[:2], X, X, X[0], None, RULE, X, X, SGD, SGD),
            ValueError,
            r"grad must have shape \(4,\), got \(2,\)",
        ),
        (
            lambda: native.sgd_step(X, X, X, X[0], X.byte(), RULE, X, X, SGD, SGD),
            ValueError,
            "union must have 1 bytes for 4 elements",
        ),
        (
            lambda: native.sgd_step(HALF, HALF, HALF, HALF[0], None, RULE, HALF, HALF, SGD, SGD),
            TypeError,
            "weight must be a float32 or float64 tensor, got torch.float16",
        ),
    ],
)
def test_bad_input_is_refused(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
