"""``python -m wsn_fast.doctor --check``: every operation on this machine's devices, compared with the torch backend.

The torch backend is plain PyTorch and knows no mask kernels, so it serves as the measure. Operations that select, mask
and pack have to give the same bits. Updates may round differently: their frozen weights keep every bit, the next
threshold and masked weight are those of the weights and scores that the update left, and everything else is close.
Results that an operation writes in place lie between guards, which have to stay as they were.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends import PRIMITIVES, choose, moments
from ..backends import torch as portable
from ..backends.mask import GateOrder, GradientOrder, RestoreOrder
from ..backends.updates import (
    SGD,
    WINDOW,
    AdamW,
    AdamWState,
    Batch,
    CodedAdamWState,
    CodedSGDState,
    Gradient,
    Next,
    SGDState,
    Update,
)
from .comparing import SCORES, Guarded, close, same
from .findings import devices

SIZES = (1, 63, 1000, 5003)
"""The last one is larger than a sample of the search for a threshold."""
SHARES = (0.0, 0.5, 0.97)
RULES = ("magnitude", "value")
STEP = AdamW(0.01, 0.9, 0.999, 1e-8, 0.01, True)
MOMENTUM = SGD(0.01, 0.9, 0.0, 0.01, False, False)
PRODUCTS = ("masked_linear", "masked_linear_grad", "masked_linear_tasks", "masked_conv")


class Verdict(NamedTuple):
    """What was found about an operation on tensors of one dtype.

    Attributes:
        operation: one of ``PRIMITIVES``.
        dtype: of the tensors, or "bits" for operations on packed masks.
        backend: the backend that is chosen there.
        problem: what is wrong, or None.
        note: why it was not compared, or nothing.
    """

    operation: str
    dtype: str
    backend: str
    problem: str | None
    note: str = ""


# --- operations that give the same bits
def _unsigned_zero(tau: Tensor) -> Tensor:
    return torch.where(tau == 0, torch.zeros_like(tau), tau)


def _cases(dtype: torch.dtype, device: torch.device) -> Iterator[tuple[str, Tensor, Tensor, str, int]]:
    """Distribution, weight, scores, rule and rank."""
    for i, (name, make) in enumerate(SCORES.items()):
        for k, n in enumerate(SIZES):
            scores, weight = make(n).to(device, dtype), torch.randn(n).to(device, dtype)
            rank = round(SHARES[(i + k) % len(SHARES)] * (n - 1))
            yield f"{name}, {n} elements", weight, scores, RULES[(i + k) % 2], rank


def _threshold(module: ModuleType, dtype: torch.dtype, device: torch.device) -> Iterator[str]:
    for what, _, scores, rule, rank in _cases(dtype, device):
        expected = portable.threshold(scores, rank, rule)
        found = module.threshold(scores, rank, rule)
        yield from same(_unsigned_zero(found), _unsigned_zero(expected), f"the threshold of {what}, {rule}")


def _gate(name: str, module: ModuleType, dtype: torch.dtype, device: torch.device) -> Iterator[str]:
    """keep_mask, gate and gate_packed."""
    for what, weight, scores, rule, rank in _cases(dtype, device):
        tau = portable.threshold(scores, rank, rule)
        keep = portable.keep_mask(scores, tau, rule)
        arguments: dict[str, tuple[Any, ...]] = {
            "keep_mask": (scores, tau, rule),
            "gate": (weight, scores, tau, rule, dtype),
            "gate_packed": (weight, portable.pack(keep), dtype),
        }
        found, expected = (getattr(m, name)(*arguments[name]) for m in (module, portable))
        yield from same(found, expected, f"{name} of {what}, {rule}")


def _gates(module: ModuleType, dtype: torch.dtype, device: torch.device) -> Iterator[str]:
    """All of them in one call, and once more with what the first call left in the plan, after the scores moved."""
    cases = [*_cases(dtype, device)]
    guarded = [Guarded.like(weight) for _, weight, *_ in cases]
    orders = [
        GateOrder(weight, scores, rank, rule, room.inner)
        for (_, weight, scores, rule, rank), room in zip(cases, guarded, strict=True)
    ]
    plan: dict[Any, Any] = {}
    for turn in range(3):
        taus = module.gates(orders, plan)
        for (what, weight, scores, rule, rank), room, tau in zip(cases, guarded, taus, strict=True):
            expected = portable.threshold(scores, rank, rule)
            yield from same(_unsigned_zero(tau), _unsigned_zero(expected), f"tau of {what}, {rule}, call {turn}")
            masked = portable.gate(weight, scores, expected, rule, weight.dtype)
            yield from same(room.inner, masked, f"the masked weight of {what}, {rule}, call {turn}")
            if not room.is_intact():
                yield f"the masked weight of {what}, {rule}, call {turn}: written beyond its ends"
            scores.mul_(1.01 if turn else -1.5)


def _gradients(name: str, module: ModuleType, dtype: torch.dtype, device: torch.device) -> Iterator[str]:
    for what, weight, scores, rule, rank in _cases(dtype, device):
        grad, n = torch.randn_like(weight), weight.numel()
        union = portable.pack(torch.rand(n, device=device) < 0.3)
        tau = portable.threshold(scores, rank, rule)
        expected = portable.gate_backward(grad, weight, scores, tau, union, rule, True, True)
        if name == "gate_backward":
            found: Sequence[Tensor | None] = module.gate_backward(grad, weight, scores, tau, union, rule, True, True)
        else:
            rooms = [Guarded.like(weight) for _ in range(2)]
            found = [room.inner for room in rooms]
            module.gates_backward([GradientOrder(grad, weight, scores, tau, union, rule, *found)], None)
            if not all(room.is_intact() for room in rooms):
                yield f"the gradients of {what}, {rule}: written beyond their ends"
        for of, one, other in zip(("dW", "dS"), found, expected, strict=True):
            assert one is not None and other is not None
            yield from same(one, other, f"{of} of {what}, {rule}")


def _restore(name: str, module: ModuleType, dtype: torch.dtype, device: torch.device) -> Iterator[str]:
    for n in SIZES:
        saved, now = torch.randn(2, n, device=device).to(dtype)
        union = portable.pack(torch.rand(n, device=device) < 0.3)
        room, expected = Guarded.like(now), now.clone()
        portable.restore_frozen(expected, saved, union)
        if name == "restore_frozen":
            module.restore_frozen(room.inner, saved, union)
        else:
            module.restore_frozen_many([RestoreOrder(room.inner, saved, union)], None)
        yield from same(room.inner, expected, f"{n} restored elements")
        if not room.is_intact():
            yield f"{n} restored elements: written beyond their ends"


def _bits(name: str, module: ModuleType, device: torch.device) -> Iterator[str]:
    for n in SIZES:
        mask = torch.rand(n, device=device) < 0.4
        packed = portable.pack(mask)
        rows = torch.stack([portable.pack(torch.rand(n, device=device) < 0.3) for _ in range(3)])
        arguments: dict[str, tuple[Any, ...]] = {
            "pack": (mask,), "unpack": (packed, n), "union": (rows,), "popcount": (packed,),
        }  # fmt: skip
        found, expected = (getattr(m, name)(*arguments[name]) for m in (module, portable))
        yield from same(found, expected.to(found.dtype), f"{name} of {n} bits")


# --- updates
class _Made(NamedTuple):
    """An update of a copy, and what guards its tensors."""

    update: Update
    gradient: Gradient
    guarded: Sequence[Guarded]


def _state(name: str, n: int, device: torch.device, dtype: torch.dtype) -> Any:
    step = torch.ones((), device=device) * 3
    like = torch.empty(n, dtype=dtype, device=device)

    def mean(signed: bool) -> Any:
        values = torch.randn(n, device=device) * 0.1
        values = values if signed else values.square()
        if "coded" not in name:
            return values.to(dtype)
        stored = moments.zeros(like, "8bit", signed)
        moments.encode(values, stored, signed)
        return stored

    if name.startswith("adamw"):
        kind: Any = CodedAdamWState if "coded" in name else AdamWState
        return kind(mean(True), mean(False), mean(True), mean(False), step, step.clone())
    return (
        CodedSGDState(mean(True), mean(True), step, step.clone())
        if "coded" in name
        else SGDState(mean(True), mean(True))
    )


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, tuple):
        return type(value)(*map(_copied, value)) if hasattr(value, "_fields") else tuple(map(_copied, value))
    return value


def _made(update: Update, gradient: Gradient) -> _Made:
    """Copies between guards."""
    update = _copied(update)
    assert update.next is not None
    rooms = [Guarded.like(t) for t in (update.weight, update.scores, update.next.masked)]
    following = update.next._replace(masked=rooms[2].inner)
    update = update._replace(weight=rooms[0].inner, scores=rooms[1].inner, next=following)
    return _Made(update, _copied(gradient), rooms)


def _updates(dtype: torch.dtype, device: torch.device, name: str) -> Iterator[tuple[str, Update, Gradient]]:
    for i, n in enumerate(SIZES):
        scores, weight, grad = torch.randn(3, n, device=device).to(dtype)
        rule, rank = RULES[i % 2], n // 2
        tau = portable.threshold(scores, rank, rule)
        union = portable.pack(torch.rand(n, device=device) < 0.3)
        following = Next(
            torch.zeros_like(weight), tau.clone(), rank, torch.zeros(WINDOW, dtype=torch.int64, device=device)
        )
        update = Update(weight, scores, union, rule, _state(name, n, device, dtype), following)
        yield f"{n} elements, {rule}", update, Gradient(grad, None, tau)


def _step(name: str, module: ModuleType, dtype: torch.dtype, device: torch.device) -> Iterator[str]:
    settings = STEP if name.startswith("adamw") else MOMENTUM
    # Kernels may take a rough root where the means are coded.
    rtol = (64 if "coded" in name else 8) * torch.finfo(dtype).eps
    for what, update, gradient in _updates(dtype, device, name):
        mine, other = _made(update, gradient), _made(update, gradient)
        for m, made in ((module, mine), (portable, other)):
            getattr(m, name)(Batch([made.update], [made.gradient], None, {}), [(settings, settings)])
        new, expected = mine.update, other.update
        frozen = portable.unpack(update.union, update.weight.numel()) if update.union is not None else None
        assert frozen is not None and new.next is not None
        yield from same(new.weight[frozen], update.weight[frozen], f"the frozen weights of {what}")
        yield from close(new.weight, expected.weight, f"the weights of {what}", rtol)
        yield from close(new.scores, expected.scores, f"the scores of {what}", rtol)
        tau = portable.threshold(new.scores, new.next.rank, new.rule)
        masked = portable.gate(new.weight, new.scores, tau, new.rule, new.weight.dtype)
        yield from same(_unsigned_zero(new.next.tau), _unsigned_zero(tau), f"the next threshold of {what}")
        yield from same(new.next.masked, masked, f"the next masked weight of {what}")
        if not all(room.is_intact() for room in mine.guarded):
            yield f"the update of {what}: written beyond the ends of a tensor"


def _squares(module: ModuleType, dtype: torch.dtype, device: torch.device) -> Iterator[str]:
    for what, update, gradient in _updates(dtype, device, "adamw_step"):
        batch = Batch([update], [gradient], None, {})
        found, expected = (m.gradient_squares(batch) for m in (module, portable))
        yield from close(found, expected, f"the squares of {what}", 1e-5)


# --- all of them
def _problems(operation: str, module: ModuleType, dtype: torch.dtype | None, device: torch.device) -> Iterator[str]:
    if dtype is None:
        return _bits(operation, module, device)
    if operation in ("keep_mask", "gate", "gate_packed"):
        return _gate(operation, module, dtype, device)
    if operation in ("gate_backward", "gates_backward"):
        return _gradients(operation, module, dtype, device)
    if operation.startswith("restore"):
        return _restore(operation, module, dtype, device)
    if operation.endswith("_step"):
        return _step(operation, module, dtype, device)
    return {"threshold": _threshold, "gates": _gates, "gradient_squares": _squares}[operation](module, dtype, device)


DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ON_BITS = ("pack", "unpack", "union", "popcount")


def check(device: torch.device) -> Iterator[Verdict]:
    """Compare every operation that another backend than torch would do on ``device``, one at a time."""
    for operation in PRIMITIVES:
        for dtype in (None,) if operation in ON_BITS else DTYPES:
            choice = choose(operation, device, dtype)
            report = partial(Verdict, operation, "bits" if dtype is None else str(dtype).removeprefix("torch."))
            if choice.name == "torch":
                yield report("torch", None, choice.reason)
            elif operation in PRODUCTS:
                yield report(choice.name, None, "not compared: the shape decides which backend is used")
            else:
                yield report(choice.name, _first_problem(operation, choice.backend, dtype, device))


def _first_problem(operation: str, module: ModuleType, dtype: torch.dtype | None, device: torch.device) -> str | None:
    generator = torch.random.get_rng_state()
    torch.manual_seed(0)
    try:
        with torch.no_grad():
            return next(iter(_problems(operation, module, dtype, device)), None)
    except Exception as error:  # a kernel that fails is what this command looks for
        return f"{type(error).__name__}: {error}"
    finally:
        torch.random.set_rng_state(generator)


def main() -> int:
    """Check every device of this machine, and print a line for each operation. Return 1 if one is wrong, else 0."""
    wrong = 0
    for device, name in devices():
        print(f"{device}: {name}")
        for verdict in check(device):
            wrong += verdict.problem is not None
            says = "right" if verdict.problem is None else f"WRONG: {verdict.problem}"
            says = says if verdict.backend != "torch" and not verdict.note else verdict.note
            print(f"  {verdict.operation:20}{verdict.dtype:10}{verdict.backend:8}{says}", flush=True)
    print(
        f"{wrong} operations are wrong; report them with this output" if wrong else "every compared operation is right"
    )
    return min(wrong, 1)
