"""The one-pass optimizers against the torch backend: as exact as it is, in the same places, and frozen to the bit."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from distributions import RULES
from elementwise import assert_same_bits, planted, poisoned
from torch import Tensor

from wsn_fast.backends import torch as portable
from wsn_fast.backends import triton, triton_updates
from wsn_fast.backends.updates import SGD, AdamW, AdamWState, SGDState, Update
from wsn_fast.kernels import optimizer, prepare, update_table

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero) encountered:RuntimeWarning")

ADAMW = AdamW(0.01, 0.9, 0.999, 1e-8, 0.1, torch.tensor(3.0), True)
PLAIN = SGD(0.05, 0.0, 0.0, 0.0, False, False)
MOMENTUM = PLAIN._replace(momentum=0.9)
SETTINGS: dict[str, AdamW | SGD] = {
    "adamw": ADAMW,
    "adam": ADAMW._replace(decoupled=False),
    "first step": ADAMW._replace(step=torch.tensor(1.0)),
    "long ago": ADAMW._replace(step=torch.tensor(123456.0, dtype=torch.float64)),
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
State = AdamWState | SGDState


def make_update(
    n: int, dtype: torch.dtype = torch.float32, grad: torch.dtype = torch.float32, rule: str = "magnitude",
    union: bool = True, **more: Any,
) -> Update:  # fmt: skip
    weight, scores = torch.randn(n).to(dtype), torch.randn(n).to(dtype)
    packed = portable.pack(torch.rand(n) < 0.3) if union else None
    tau = portable.threshold(scores, n // 2, rule) if n else torch.zeros((), dtype=dtype)
    return Update(torch.randn(n).to(grad), None, weight, scores, tau, packed, rule)._replace(**more)


def make_state(update: Update, settings: AdamW | SGD, scores: AdamW | SGD | None = None) -> State:
    def random(like: Tensor) -> Tensor:
        return torch.randn_like(like) * 0.1

    w, s = update.weight, update.scores
    if isinstance(settings, AdamW):
        return AdamWState(random(w), random(w).square(), random(s), random(s).square())
    buffers = [random(t) if one.momentum else None for t, one in ((w, settings), (s, scores or settings))]
    if settings.first:  # whatever is there has to go
        buffers = [buffer if buffer is None else torch.full_like(buffer, float("nan")) for buffer in buffers]
    return SGDState(*buffers)


def moved(value: Any, device: torch.device, dtype: torch.dtype | None = None) -> Any:
    """A copy of an update, a state or settings on another device, and of its floats in another dtype."""
    if isinstance(value, Tensor):
        floating = value.is_floating_point() and value.ndim > 0
        return value.to(device, dtype if floating else None, copy=True)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(moved(part, device, dtype) for part in value))
    return value


def exact(update: Update) -> Update:
    wide = moved(update, torch.device("cpu"), torch.float64)
    return wide._replace(tau=None if update.tau is None else update.tau.cpu().double())


def step(
    backend: Any, updates: Sequence[Update], states: Sequence[State], settings: Any, scores: Any, **more: Any
) -> None:
    each = [[one] * len(updates) if isinstance(one, (AdamW, SGD)) else one for one in (settings, scores)]
    run = backend.adamw_step if isinstance(each[0][0], AdamW) else backend.sgd_step
    run(updates, states, *each, **more)


def check(
    updates: Sequence[Update], settings: Any, device: torch.device, scores: Any = None, steps: int = 1
) -> None:  # fmt: skip
    """Errors against float64 at most twice those of the torch backend, beside a rounding of the largest value."""
    cpu, scores = torch.device("cpu"), settings if scores is None else scores
    listed = [[one] * len(updates) if isinstance(one, (AdamW, SGD)) else one for one in (settings, scores)]
    states = [make_state(u, w, s) for u, w, s in zip(updates, *listed, strict=True)]
    ours, theirs, true = ([moved(u, d) for u in updates] for d in (device, cpu, cpu))
    true = [exact(u) for u in true]
    all_states = [[moved(s, device) for s in states], [moved(s, cpu) for s in states]]
    all_states.append([moved(s, cpu, torch.float64) for s in states])
    for _ in range(steps):
        step(triton, ours, all_states[0], *([moved(s, device) for s in of_one] for of_one in listed))
        step(portable, theirs, all_states[1], *listed)
        step(portable, true, all_states[2], *listed)
    for k, operands in enumerate(zip(*map(tensors_of, (ours, theirs, true), all_states), strict=True)):
        assert_as_exact(*operands, f"operand {k}")
    for i, update in enumerate(updates):
        if update.union is not None:
            frozen = portable.unpack(update.union, update.weight.numel())
            assert_same_bits(ours[i].weight.cpu()[frozen], update.weight[frozen], f"frozen weights of tensor {i}")


def tensors_of(updates: Sequence[Update], states: Sequence[State]) -> list[Tensor]:
    """Weights, scores and each state, of all updates one after the other, on the CPU."""
    rows = zip(*((u.weight, u.scores, *s) for u, s in zip(updates, states, strict=True)), strict=True)
    return [torch.cat([x.cpu() for x in row if x is not None] or [torch.zeros(1)]) for row in rows]


def assert_as_exact(mine: Tensor, theirs: Tensor, true: Tensor, what: str) -> None:
    lossy = 8 * 2**-7 if INTERPRETED and mine.dtype is torch.bfloat16 else 0  # the interpreter truncates to bfloat16
    allowed = 2 * (theirs.double() - true).abs().max() + (torch.finfo(mine.dtype).eps + lossy) * true.abs().max()
    assert (mine.double() - true).abs().max() <= allowed, what


# --- the arithmetic
@pytest.mark.parametrize("kind", ["adamw", "nesterov"])
def test_small_sizes_in_one_call(kind: str, device: torch.device) -> None:
    check([make_update(n, rule=RULES[n % 2], union=n % 3 > 0) for n in SIZES], SETTINGS[kind], device)


@pytest.mark.parametrize("kind", SETTINGS)
def test_every_setting(kind: str, device: torch.device) -> None:
    check([make_update(n) for n in (5, 512, 1301)], SETTINGS[kind], device, steps=2 if kind != "first momentum" else 1)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    ("dtype", "grad"),
    [(torch.float32, torch.bfloat16), (torch.float32, torch.float16), (torch.bfloat16,) * 2, (torch.float16,) * 2],
    ids=str,
)
def test_every_dtype(dtype: torch.dtype, grad: torch.dtype, rule: str, device: torch.device) -> None:
    for kind in ("adamw", "momentum"):
        check([make_update(n, dtype, grad, rule) for n in (70, 600)], SETTINGS[kind], device)


@pytest.mark.parametrize("config", range(len(triton_updates.CONFIGS)))
def test_every_tile_shape(config: int, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_updates, "CONFIGS", (triton_updates.CONFIGS[config],) * 2)
    items = triton_updates.CONFIGS[0].items
    check([make_update(n) for n in (items, items + 3)], ADAMW, device)


@pytest.mark.parametrize("scale", [torch.tensor(0.3), torch.tensor(0.3, dtype=torch.float64)])
def test_a_scale(scale: Tensor, device: torch.device) -> None:
    for kind in ("adam", "sgd"):
        check([make_update(n, scale=scale) for n in (9, 130)], SETTINGS[kind], device)


def test_given_gradients(device: torch.device) -> None:
    for kind in ("adamw", "decay"):
        updates = [make_update(n, score_grad=torch.randn(n), tau=None, scale=torch.tensor(2.0)) for n in (9, 130)]
        check(updates, SETTINGS[kind], device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_learning_rate_on_the_device(dtype: torch.dtype, device: torch.device) -> None:
    for settings in (ADAMW, MOMENTUM):
        check([make_update(70)], settings._replace(lr=torch.tensor(0.25, dtype=dtype)), device)


def test_tensors_and_scores_with_settings_of_their_own(device: torch.device) -> None:
    rates = [ADAMW._replace(lr=0.01 * i) for i in (1, 1, 2, 1)]
    check([make_update(n) for n in (9, 130, 20, 31)], rates, device, scores=ADAMW._replace(weight_decay=0.0))
    momenta = [PLAIN, MOMENTUM, PLAIN, MOMENTUM]
    check([make_update(n) for n in (9, 130, 20, 31)], momenta, device, scores=momenta[2:] + momenta[1::-1])


def test_unlike_tensors_in_one_call(device: torch.device) -> None:
    kinds = itertools.product((torch.float32, torch.float16), RULES, (True, False))
    updates = [make_update(40 + i, grad=g, rule=rule, union=u) for i, (g, rule, u) in enumerate(kinds)]
    check([*updates, make_update(0), make_update(3, scale=torch.tensor(0.5))], ADAMW, device)


# --- what is not touched
def test_frozen_weights_keep_their_bits_whatever_comes(device: torch.device) -> None:
    n = 555
    union = portable.pack(torch.rand(n) < 0.5).to(device)
    frozen = portable.unpack(union, n)
    for settings in (ADAMW, SETTINGS["nesterov"]):
        update = moved(make_update(n), device)
        weight, grad, scores = (planted(n, torch.float32).to(device) for _ in range(3))
        update = update._replace(weight=weight.clone(), grad=grad, scores=scores, union=union)
        step(triton, [update], [moved(make_state(update, settings), device)], *[moved(settings, device)] * 2)
        assert torch.equal(update.weight.view(torch.int32)[frozen], weight.view(torch.int32)[frozen])
        assert not torch.equal(update.weight.view(torch.int32), weight.view(torch.int32))


def test_moments_of_frozen_weights_decay(device: torch.device) -> None:
    update = moved(make_update(8), device)._replace(union=torch.tensor([255], dtype=torch.uint8, device=device))
    state = moved(make_state(update, ADAMW), device)
    before = state.weight_avg_sq.clone()
    step(triton, [update], [state], *[moved(ADAMW, device)] * 2)
    torch.testing.assert_close(state.weight_avg_sq, 0.999 * before)


@pytest.mark.parametrize("first", [0, 1], ids=["aligned", "unaligned"])
def test_nothing_beyond_is_written(first: int, device: torch.device) -> None:
    sizes = (1, 511, 513)

    def placed(x: Tensor) -> Tensor:
        return poisoned(len(x) + first, x.dtype, device)[first:].copy_(x)

    updates = [make_update(n) for n in sizes]
    updates = [u._replace(grad=placed(u.grad), weight=placed(u.weight), scores=placed(u.scores)) for u in updates]
    updates = [u._replace(tau=u.tau.to(device), union=u.union.to(device)) for u in updates]
    states = [AdamWState(*map(placed, make_state(make_update(n), ADAMW))) for n in sizes]
    before = [moved(u, device) for u in updates]
    step(triton, updates, states, *[moved(ADAMW, device)] * 2)
    for update, state, old in zip(updates, states, before, strict=True):
        for tensor in (update.weight, update.scores, *state):
            assert bool(tensor._base[first + len(tensor) :].isnan().all()) and not bool(tensor.isnan().any())
        assert_same_bits(update.grad, old.grad.cpu(), "G")


def test_strided_tensors(device: torch.device) -> None:
    flat, settings = make_update(6 * 11), [moved(ADAMW, device)] * 2
    state = make_state(flat, ADAMW)

    def strided(x: Tensor) -> Tensor:
        return x.view(6, 11).t().contiguous().t().to(device)

    update = flat._replace(grad=strided(flat.grad), weight=strided(flat.weight), scores=strided(flat.scores))
    update = update._replace(tau=flat.tau.to(device), union=flat.union.to(device))
    views, flat, plain = AdamWState(*map(strided, state)), moved(flat, device), moved(state, device)
    step(triton, [update], [views], *settings)
    step(triton, [flat], [plain], *settings)
    for mine, other in zip((update.weight, update.scores, *views), (flat.weight, flat.scores, *plain), strict=True):
        assert not mine.is_contiguous() and torch.equal(mine.reshape(-1), other)


# --- the plan
def test_a_plan_changes_nothing(device: torch.device) -> None:
    """Gradients that move, tensors that come and go, settings that change: as without a plan."""
    updates = [moved(make_update(n), device) for n in (70, 9, 1100)]
    twins = [moved(u, device) for u in updates]
    states = [moved(make_state(u, ADAMW), device) for u in updates]
    others = [moved(s, device) for s in states]
    plan: dict[Any, Any] = {}
    kept: list[Tensor] = []
    settings = moved(ADAMW, device)
    for i, part in enumerate([slice(3), slice(3), slice(1), slice(3), slice(1, 3), slice(3)]):
        settings = settings._replace(lr=0.01 * i)
        settings.step.fill_(i + 1)
        fresh = [torch.randn_like(u.grad) for u in updates]
        kept += fresh  # so that none gets the address of another
        mine, other = ([u._replace(grad=g) for u, g in zip(us, fresh, strict=True)][part] for us in (updates, twins))
        squares = triton.gradient_squares(mine, plan)
        assert torch.equal(squares, triton.gradient_squares(other))
        step(triton, mine, states[part], settings, settings, plan=plan)
        step(triton, other, others[part], settings, settings)
        for a, b in zip((u.weight for u in updates), (u.weight for u in twins), strict=True):
            assert torch.equal(a, b), f"step {i}"
    assert len(plan) == 6, "three sets of tensors, for steps and for squares"


def test_a_plan_does_not_grow_for_ever(device: torch.device) -> None:
    plan: dict[Any, Any] = {}
    updates = [moved(make_update(4), device) for _ in range(triton_updates.TABLES + 3)]
    for update in updates:
        triton.gradient_squares([update], plan)
    assert len(plan) == triton_updates.TABLES


def test_a_plan_writes_only_what_moved(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    updates = [moved(make_update(4), device) for _ in range(20)]
    plan: dict[Any, Any] = {}
    triton.gradient_squares(updates, plan)
    written: list[int] = []
    kernel = triton_updates.update_table.write_kernel

    class Counted:
        def __getitem__(self, grid: Any) -> Any:
            written.append(1)
            return kernel[grid]

    monkeypatch.setattr(triton_updates.update_table, "write_kernel", Counted())
    triton.gradient_squares(updates, plan)
    assert not written
    updates[3] = updates[3]._replace(grad=updates[3].grad.clone())
    triton.gradient_squares(updates, plan)
    assert len(written) == 1


# --- the norm
@pytest.mark.parametrize("rule", RULES)
def test_gradient_squares(rule: str, device: torch.device) -> None:
    updates = [make_update(n, grad=g, rule=rule) for n in (1, 70, 2500) for g in (torch.float32, torch.float16)]
    updates += [make_update(0), make_update(30, rule=rule, union=False, scale=torch.tensor(0.5))]
    updates += [make_update(30, score_grad=torch.randn(30), tau=None)]
    found = triton.gradient_squares([moved(u, device) for u in updates])
    expected = portable.gradient_squares([exact(u) for u in updates])
    torch.testing.assert_close(found.cpu().double(), expected, rtol=1e-5, atol=1e-12)


def test_gradient_squares_are_the_same_every_time(device: torch.device) -> None:
    updates = [moved(make_update(5000), device)]
    assert torch.equal(triton.gradient_squares(updates), triton.gradient_squares(updates))


# --- arguments
def test_momentum_needs_a_buffer(device: torch.device) -> None:
    with pytest.raises(ValueError, match=r"scores_momentum must be a tensor for a momentum of 0\.9, got None"):
        triton.sgd_step([moved(make_update(4), device)], [SGDState(None, None)], [PLAIN], [MOMENTUM])


def test_beyond_32_bits(device: torch.device) -> None:
    """Only the program of the last weights runs. No other page is touched."""
    start, last = 2**31, 700
    large = [torch.empty(start + last, dtype=torch.bfloat16, device=device) for _ in range(3)]
    tails = [x[start:].copy_(torch.randn(last)).clone() for x in large]
    tau = tails[1][0].clone()
    step(triton, [Update(tails[0], None, *tails[1:], tau, None, "value")], [SGDState(None, None)], PLAIN, PLAIN)

    config = update_table.CONFIGS[0]
    size = update_table.table_size([start + last], config)
    buffer = torch.empty(size, dtype=torch.int64, device=device)
    table = update_table.make_table([update_table.Gated(*large[1:])], buffer, config)
    table = table._replace(programs=torch.tensor([[0, start]], device=device))
    size = update_table.workspace_size(table)
    workspace = update_table.workspace(table, torch.empty(size, dtype=torch.int64, device=device))
    addresses = torch.tensor([large[0].data_ptr(), 0, tau.data_ptr(), 0], device=device)
    settings = {"lr": PLAIN.lr, "momentum": 0.0, "rest": 1.0, "decay": 0.0, "nesterov": 0.0, "first": 0.0}
    prepare.prepare(table, workspace, range(1), settings, settings, rule="value")
    optimizer.update(
        table, workspace, addresses.view(4, 1), grad=torch.bfloat16, scale=None, given=False, aligned=True, rule="value"
    )
    for tensor, tail in zip(large, tails, strict=True):
        assert torch.equal(tensor[start:], tail)
