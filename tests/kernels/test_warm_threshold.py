"""The threshold and the masked weight that an update leaves behind: those of a fresh select and gate, to the bit,
whatever the window says; and the ways through it."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from distributions import DISTRIBUTIONS, RULES
from elementwise import assert_same_bits, poisoned
from torch import Tensor

from wsn_fast.backends import torch as portable
from wsn_fast.backends import triton
from wsn_fast.backends.triton import optimizer_steps
from wsn_fast.backends.updates import SGD, WINDOW, AdamW, AdamWState, Batch, Gradient, Next, SGDState, Update
from wsn_fast.kernels import _layout as layout

pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero) encountered:RuntimeWarning")

STILL = SGD(0.0, 0.0, 0.0, 0.0, False, False)
EACH_DTYPE = [(torch.float32, torch.float32), (torch.float32, torch.float16), (torch.bfloat16, torch.bfloat16)]
EACH_DTYPE += [(torch.float16, torch.float16)]
NAN = 0x7F800001  # the key of NaN among magnitudes of float32


def make(scores: Tensor, rule: str, masked: torch.dtype, device: torch.device, share: float = 0.5) -> Update:
    """An update that is to prepare the next forward pass; the last one's threshold is that of ``scores``."""
    scores = scores.to(device)
    n, rank = scores.numel(), int(share * (scores.numel() - 1))
    tau = portable.threshold(scores, rank, rule).to(device)
    following = Next(poisoned(n, masked, device), tau, rank, torch.zeros(WINDOW, dtype=torch.int64, device=device))
    weight = torch.randn(n, device=device).to(scores.dtype)
    return Update(weight, scores, None, rule, SGDState(None, None), following)


def run(updates: list[Update], plan: dict[Any, Any] | None = None) -> None:
    """Updates that change nothing: the scores stay what a test has made of them."""
    gradients = [Gradient(torch.zeros_like(u.weight), None, u.next and u.next.tau) for u in updates]
    triton.sgd_step(Batch(updates, gradients, None, plan), [(STILL, STILL)] * len(updates))


def assert_right(update: Update, what: str) -> None:
    """What is there is what a select and a gate of now would make."""
    following = update.next
    assert following is not None
    expected = portable.threshold(update.scores.cpu(), following.rank, update.rule)
    expected = torch.where(expected == 0, torch.zeros_like(expected), expected)
    assert_same_bits(following.tau.cpu(), expected, f"tau {what}")
    # By the kernel's own gate: in the interpreter, the torch backend rounds to bfloat16 in another way.
    gated = triton.gate(update.weight, update.scores, following.tau, update.rule, following.masked.dtype)
    assert_same_bits(following.masked, gated.cpu(), f"masked {what}")
    assert bool(following.masked._base[update.weight.numel() :].isnan().all()), f"beyond {what}"


def counts(update: Update) -> tuple[int, int]:
    """Hits and misses."""
    assert update.next is not None
    hits, misses = update.next.window[-2:].tolist()
    return hits, misses


def key_of(tau: Tensor) -> int:
    """The key of a threshold of magnitudes in float32."""
    return int(tau.view(torch.int32))


# --- exact
@pytest.mark.sample(17)
@pytest.mark.parametrize(("dtype", "masked"), EACH_DTYPE, ids=str)
def test_every_distribution(dtype: torch.dtype, masked: torch.dtype, device: torch.device) -> None:
    """Cold, warm with the same scores, warm after all changed a little, and after they changed places."""
    sizes, shares = (600, 300, 37) * 4, (0.5, 0.1, 0.999, 0.0) * 3
    updates = [
        make(DISTRIBUTIONS[name](n, dtype), RULES[i % 2], masked, device, share)
        for i, (name, n, share) in enumerate(zip(DISTRIBUTIONS, sizes, shares, strict=False))
    ]
    plan: dict[Any, Any] = {}
    for i, change in enumerate((lambda s: s, lambda s: s, lambda s: s * 1.01, lambda s: s.flip(0) + 1)):
        for update in updates:
            update.scores.copy_(change(update.scores))
        run(updates, plan)
        for name, update in zip(DISTRIBUTIONS, updates, strict=True):
            assert_right(update, f"{name} {i}")


@pytest.mark.ci
def test_small_sizes(device: torch.device) -> None:
    sizes = (*range(1, 10), 15, 16, 17, 31, 32, 33, 47, 63, 64, 65, 70)
    updates = [make(torch.randn(n), RULES[n % 2], torch.float32, device, n % 7 / 6) for n in sizes]
    for i in range(2):
        run(updates)
        for update in updates:
            assert_right(update, f"{update.weight.numel()} {i}")
            update.scores.add_(0.01 * torch.randn_like(update.scores))


@pytest.mark.sample(9)
@pytest.mark.parametrize(("rule", "config"), [*zip(RULES, range(len(optimizer_steps.CONFIGS)), strict=True)])
def test_training(rule: str, config: int, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of AdamW on tensors of one and of two programs, with a union, and a leap in between."""
    monkeypatch.setattr(optimizer_steps, "CONFIGS", (optimizer_steps.CONFIGS[config],) * 2)
    sizes = (optimizer_steps.CONFIGS[0].items + 300, 300)
    updates = [make(torch.randn(n), rule, torch.float16, device, 0.7) for n in sizes]
    step = torch.zeros((), device=device)
    updates = [
        u._replace(
            union=portable.pack(torch.rand(u.weight.shape, device=device) < 0.3),
            state=AdamWState(*(torch.zeros_like(u.weight) for _ in range(4)), step, step),
        )
        for u in updates
    ]
    plan: dict[Any, Any] = {}
    settings = AdamW(0.01, 0.9, 0.999, 1e-8, 0.0, True)
    for i in range(7):
        # The threshold of the last forward pass may lie where that of the next one is written, or elsewhere.
        taus = [u.next.tau.clone() if i % 2 else u.next.tau for u in updates if u.next]
        gradients = [Gradient(torch.randn_like(u.weight), None, tau) for u, tau in zip(updates, taus, strict=True)]
        step += 1
        for update in updates:
            update.scores.add_(5.0 if i == 5 else 0.0)
        triton.adamw_step(Batch(updates, gradients, None, plan), [(settings, settings)] * 2)
        for update in updates:
            assert_right(update, f"{update.weight.numel()} {i}")
    for update in updates:
        hits, misses = counts(update)
        assert hits + misses == 7 and hits >= 2 and misses >= 2


# --- windows that say anything
def window_for(low: int, high: int, guess: int) -> Tensor:
    return torch.tensor([1, low, high, guess, 10, 0, 0, 0])


@pytest.mark.ci
@pytest.mark.parametrize("rule", RULES)
def test_any_window(rule: str, device: torch.device) -> None:
    """The threshold and the guess in the window, at its ends and beyond; few scores equal to any of them, or many."""
    base, shift = key_of(torch.tensor(0.5)), 2**31 if rule == "value" else 0
    updates, windows = [], []
    for i, spread in enumerate((4, 2**22)):
        keys = (base + torch.randint(-spread, spread + 1, (400,))).to(torch.int32)
        scores = keys.view(torch.float32) * (1 if rule == "value" else torch.randn(400).sign())
        low, middle, high = (base + shift + d for d in (-3 * spread // 4, 0, 3 * spread // 4))
        nan = NAN + shift
        chosen = [(a, b, c) for a in (low, middle) for b in (middle, high) for c in (low, middle, high) if a <= c <= b]
        chosen += [(low, nan, nan), (0, nan, middle), (0, high, 0), (nan, nan, nan), (0, 0, 0)]
        for k, (window, share) in enumerate(itertools.product(chosen, (0.1, 0.5, 0.9))):
            if k % 2 == i:
                windows.append(window)
                updates.append(make(scores, rule, torch.float32, device, share))
                updates[-1].next.window.copy_(window_for(*window))
    run(updates)
    for update, window in zip(updates, windows, strict=True):
        assert_right(update, str(window))
    assert {counts(update) for update in updates} == {(1, 0), (0, 1)}


def test_garbage_in_the_window(device: torch.device) -> None:
    garbage = torch.randint(-(2**62), 2**62, (6, WINDOW))
    garbage[:3, 0] = 1
    garbage = torch.cat([garbage, torch.full((1, WINDOW), -1), torch.full((1, WINDOW), 2**62)])
    garbage = torch.cat([garbage, torch.tensor([[1, 9, 5, 7, 0, 0, 0, 0], [1, 5, 9, 10, -5, 0, 0, 0]])])
    updates = [make(torch.randn(300), RULES[i % 2], torch.float32, device) for i in range(len(garbage))]
    for update, window in zip(updates, garbage, strict=True):
        update.next.window.copy_(window)
    for i in range(2):
        run(updates)
        for update in updates:
            assert_right(update, str(i))


def test_nan_thresholds_keep_everything(device: torch.device) -> None:
    nan = torch.full((300,), float("nan"))
    update = make(torch.cat([torch.randn(100), nan]), "magnitude", torch.float32, device)
    for i, scores in enumerate((update.scores, update.scores, torch.randn(400), torch.cat([torch.randn(100), nan]))):
        update.scores.copy_(scores)
        run([update])
        assert_right(update, str(i))


# --- the ways through
def settled(scores: Tensor, window: Tensor, device: torch.device, share: float = 0.5) -> Update:
    update = make(scores, "magnitude", torch.float32, device, share)
    assert update.next is not None
    update.next.window.copy_(window)
    run([update])
    assert_right(update, "")
    return update


def test_a_threshold_in_the_window_is_found_there(device: torch.device) -> None:
    scores = torch.randn(4000)
    tau = key_of(scores.abs().sort().values[1999])
    assert counts(settled(scores, window_for(tau - 2**15, tau + 2**15, tau + 999), device)) == (1, 0)
    assert counts(settled(scores, window_for(tau, tau + 5, tau + 1), device)) == (1, 0)
    assert counts(settled(scores, window_for(tau - 5, tau, tau - 1), device)) == (1, 0)
    assert counts(settled(scores, window_for(tau + 1, tau + 5, tau + 1), device)) == (0, 1)
    assert counts(settled(scores, window_for(tau - 5, tau - 1, tau - 1), device)) == (0, 1)
    assert counts(settled(scores, window_for(0, NAN, tau), device)) == (0, 1), "more than the list has room for"
    assert counts(settled(scores, window_for(0, tau, tau), device)) == (1, 0), "at the high end, all counted"


def test_a_program_with_the_most_blocks_counts_all(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every counter of a thread as full as it can be, and a list that runs over."""
    monkeypatch.setattr(optimizer_steps, "spread", lambda config, *_: config)
    scores = torch.full((optimizer_steps.CONFIGS[0].items,), 0.5)
    key = key_of(scores[0])
    assert counts(settled(scores, window_for(key, key + 9, key), device)) == (1, 0), "at the low end"
    assert counts(settled(scores, window_for(key - 9, key, key), device)) == (1, 0), "at the high end"
    assert counts(settled(scores, window_for(key + 1, key + 9, key + 1), device)) == (0, 1), "below"
    assert counts(settled(scores, window_for(key - 9, key + 9, key), device)) == (0, 1), "inside"
    scores[1::128] = 0.75
    assert counts(settled(scores, window_for(key - 9, key_of(scores[1]), key), device, 0.999)) == (1, 0), "all but some"


@pytest.mark.sample(13)
@pytest.mark.parametrize("name", ["all_equal", "two_values", "mostly_nan", "normal"])
def test_scores_that_rest_are_searched_once_or_twice(name: str, device: torch.device) -> None:
    update = make(DISTRIBUTIONS[name](1000, torch.float32), "value", torch.float32, device)
    for _ in range(6):
        run([update])
    hits, misses = counts(update)
    assert hits + misses == 6 and misses <= 2
    assert_right(update, name)


@pytest.mark.ci
def test_a_common_score_beside_the_threshold_does_not_fill_the_list_for_ever(device: torch.device) -> None:
    scores = torch.cat([torch.full((500,), 0.5), torch.linspace(0.5001, 0.6, 500)])
    update = make(scores, "magnitude", torch.float32, device, 0.51)
    for i in range(14):
        update.scores[500:] += 1e-6 * (i % 2)
        run([update])
        assert_right(update, str(i))
    assert counts(update)[0] >= 9


def test_a_threshold_that_drifts_is_followed(device: torch.device) -> None:
    update = make(torch.randn(1000), "magnitude", torch.float32, device)
    for _ in range(12):
        update.scores.mul_(1.003)
        run([update])
    assert_right(update, "drift")
    assert counts(update)[0] >= 9


@pytest.mark.parametrize("drift", [9_000, -9_000])
def test_the_next_threshold_is_expected_where_the_last_ones_lead(drift: int, device: torch.device) -> None:
    """All keys move by as much in every step: the guess is right soon. When they rest, so does the guess."""
    keys = torch.randint(2**29, 2**29 + 2**20, (400,), dtype=torch.int32)
    update = make(keys.view(torch.float32), "magnitude", torch.float32, device)
    assert update.next is not None
    off = []
    for step in range(40):
        keys += drift if step < 20 else 0
        update.scores.copy_(keys.view(torch.float32))
        guess = int(update.next.window[layout.WINDOW_GUESS.value])
        run([update])
        assert_right(update, f"step {step}")
        off.append(abs(key_of(update.next.tau) - guess))
    assert off[1] == abs(drift) and max(off[16:20]) <= 1 and max(off[-3:]) == 0


def test_fixing_touches_only_what_the_guess_got_wrong(device: torch.device) -> None:
    """Between the pass and the fix somebody marks the masked weight: right elements keep the mark."""
    scores = torch.randn(4000)
    order = scores.abs().sort()
    low, tau, guess = (key_of(order.values[i]) for i in (1900, 1999, 2040))
    update = make(scores, "magnitude", torch.float32, device)
    assert update.next is not None
    update.next.window.copy_(window_for(low, key_of(order.values[2100]), guess))
    fix = optimizer_steps.warm_threshold.settle

    def marked(*args: Any, **kwargs: Any) -> None:
        assert update.next is not None
        update.next.masked.fill_(77.0)
        fix(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optimizer_steps.warm_threshold, "settle", marked)
        run([update])
    changed = (update.next.masked != 77.0).nonzero().view(-1).cpu()
    assert sorted(changed.tolist()) == sorted(order.indices[1999:2040].tolist())
    assert key_of(update.next.tau.cpu()) == tau
