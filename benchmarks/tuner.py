"""The entries of a tuning file: the best tile of every kernel, and where a fused product wins against memory."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from wsn_fast.reference import specification

from .cases import compute_dtype, name_of
from .checks import WrongResultError, check_same, check_threshold
from .data import RULE, Weight, rank
from .gradients import GradientProduct
from .library import kernels, threshold
from .products import WAYS, ConvProduct, LinearProduct, Product, TaskProduct
from .shapes import ConvShape
from .timing import Call

GIVE_UP = 1.5
"""A fused product that is this many times slower than the way by memory is not tried with still more rows."""
Clock = Callable[[Sequence[Call]], float]
"""Microseconds of a call."""
Size = tuple[int, int]
"""[outputs, inputs] of a weight."""
Measured = dict[str, Any]
"""The best tile at a number of rows, or an entry of a table."""


class Precision(NamedTuple):
    """A compute dtype, and how float32 is multiplied. 16-bit types are listed under "tf32", which they do not use."""

    dtype: torch.dtype
    name: str

    def __str__(self) -> str:
        return f"{name_of(self.dtype)} {self.name}"


BF16, FP16 = Precision(torch.bfloat16, "tf32"), Precision(torch.float16, "tf32")
TF32, IEEE = Precision(torch.float32, "tf32"), Precision(torch.float32, "ieee")


@dataclass(frozen=True)
class Sweep:
    """What is measured. The first of ``precisions`` is measured in everything, the others in linear layers."""

    elementwise: int
    precisions: tuple[Precision, ...]
    sizes: tuple[Size, ...]
    rows: tuple[int, ...]
    grad_sizes: tuple[Size, ...]
    grad_rows: tuple[int, ...]
    tasks: int
    task_sizes: tuple[Size, ...]
    task_rows: tuple[int, ...]
    convs: tuple[ConvShape, ...]


class Trials:
    """Tries candidates until ``deadline``, of ``time.monotonic``. ``not_measured`` has a line for everything that
    failed or that there was no time for."""

    def __init__(self, device: torch.device, clock: Clock, deadline: float) -> None:
        self.device, self.clock, self.deadline = device, clock, deadline
        self.not_measured: list[str] = []
        self.processors = 1
        if device.type == "cuda":
            self.processors = torch.cuda.get_device_properties(device).multi_processor_count

    def attempt(self, what: str, measure: Callable[[], Any]) -> Any:
        """The result of ``measure``; None, and a line in ``not_measured``, if it failed or there is no time for it."""
        if time.monotonic() > self.deadline:
            self.not_measured.append(f"{what}: no time left")
            return None
        try:
            torch.manual_seed(0)
            return measure()
        except Exception as error:  # one candidate that does not compile or is wrong must not cost the rest
            self.not_measured.append(f"{what}: {type(error).__name__}: {str(error)[:200]}")
            return None

    def time(self, calls: Sequence[Call], outputs: Sequence[Tensor], check: Callable[[], object]) -> float:
        """The time of a call. The first one has to write the right ``outputs``: they are poisoned before it."""
        for output in outputs:
            output.fill_(torch.nan)
        calls[0]()
        check()
        return self.clock(calls)

    def best(self, what: str, candidates: Sequence[Any], time_one: Callable[[Any], float]) -> tuple[Any, float] | None:
        """The fastest candidate and its time; None if there is none."""
        times = [(c, self.attempt(f"{what}, {c}", partial(time_one, c))) for c in candidates]
        measured = [(c, us) for c, us in times if us is not None]
        return min(measured, key=lambda pair: pair[1]) if measured else None

    def splits(self, programs: int, steps: int) -> list[int]:
        """Numbers of parts of a sum that keep the device about busy; each part has at least two steps."""
        busy = self.processors / programs
        return sorted({1} | {max(1, min(round(busy * factor), steps // 2, 32)) for factor in (0.5, 1, 2)})


# --- the tables
def tables(trials: Trials, sweep: Sweep) -> dict[str, Any]:
    """The tables of a tuning file, one entry after the other until the time is up."""
    first, *others = sweep.precisions
    result: dict[str, Any] = {
        "elementwise": elementwise(trials, sweep.elementwise),
        "linear": list(linear(trials, sweep, first)),
        "linear_grad": list(gradients(trials, sweep, first)),
        "linear_tasks": list(mixed_tasks(trials, sweep, first)),
        "conv": list(convolutions(trials, sweep, first)),
    }
    for precision in others:
        result["linear"] += linear(trials, sweep, precision)
        result["linear_grad"] += gradients(trials, sweep, precision)
    return result


def elementwise(trials: Trials, n: int) -> dict[str, Any]:
    """The tile of gate and gradient masking, and the tile sizes of the selection, for n weights."""
    device, dtype = trials.device, compute_dtype(trials.device)
    w = Weight.random((n,), device)
    gates, grads, select = (kernels(name, device) for name in ("gate", "gate_gradients", "threshold_table"))
    out, dw, ds = torch.empty_like(w.weight, dtype=dtype), torch.empty_like(w.weight), torch.empty_like(w.scores)
    masked = w.as_specified(dtype)
    expected = specification.gate_backward(w.grad.float(), w.weight, w.scores, w.mask, w.frozen)

    def check_gradients() -> None:
        for got, right in zip((dw, ds), expected, strict=True):
            check_same(got, right, "gradient")

    def gate(config: Any) -> float:
        call = partial(gates.gate, w.weight, w.scores, w.tau, out, None, rule=RULE, config=config)
        return trials.time([call], [out], lambda: check_same(out, masked, "gate"))

    def gate_backward(config: Any) -> float:
        operands = (w.grad, w.weight, w.scores, w.tau, w.packed_frozen, dw, ds)
        call = partial(grads.gate_backward, *operands, rule=RULE, config=config)
        return trials.time([call], [dw, ds], check_gradients)

    def selection(config: Any) -> float:
        call, tau = threshold([w.scores], [rank(n)], RULE, config)
        return trials.time([call], [tau], lambda: check_threshold(tau[0], w.scores, rank(n), RULE))

    best = {
        "gate": trials.best("gate", gates.CONFIGS, gate),
        "gate_backward": trials.best("gate_backward", grads.CONFIGS, gate_backward),
        "threshold": trials.best("threshold", select.CONFIGS, selection),
    }
    found = {name: pair[0] for name, pair in best.items() if pair is not None}
    return {name: vars(config) if name == "threshold" else list(astuple(config)) for name, config in found.items()}


def linear(trials: Trials, sweep: Sweep, precision: Precision) -> Iterator[Measured]:
    """An entry for each size, source of the mask and direction."""
    for size, (source, backward) in itertools.product(sweep.sizes, WAYS):
        way = {"source": source, "backward": backward, "device": trials.device, "dtype": precision.dtype}
        yield from entry(trials, precision, "linear", size, partial(LinearProduct, size, **way), sweep.rows)


def gradients(trials: Trials, sweep: Sweep, precision: Precision) -> Iterator[Measured]:
    """An entry for each size: the gradients of weight and scores."""
    for size in sweep.grad_sizes:
        make = partial(GradientProduct, size, device=trials.device, dtype=precision.dtype)
        yield from entry(trials, precision, "linear_grad", size, make, sweep.grad_rows)


def mixed_tasks(trials: Trials, sweep: Sweep, precision: Precision) -> Iterator[Measured]:
    """An entry for each size: rows of ``sweep.tasks`` tasks, mixed, against a masked weight per task."""
    for size in sweep.task_sizes:
        make = partial(TaskProduct, size, tasks=sweep.tasks, device=trials.device, dtype=precision.dtype)
        for found in entry(trials, precision, "linear_tasks", size, make, sweep.task_rows):
            yield found | {"tasks": sweep.tasks}


def convolutions(trials: Trials, sweep: Sweep, precision: Precision) -> Iterator[Measured]:
    """An entry for each shape, source of the mask and direction."""
    names = ("batch", "channels", "height", "width", "out_channels", "kernel", "stride", "padding", "groups")
    for s, (source, backward) in itertools.product(sweep.convs, WAYS):
        values = (s.batch, s.channels, s.size, s.size, s.outputs, s.kernel, s.stride, s.padding, s.groups)
        product = ConvProduct(s, source, backward, trials.device, precision.dtype)
        what = f"conv {s} {source}{', dx' * backward}"
        found = trials.attempt(what, partial(compare, trials, precision, what, product))
        if found is not None:
            del found["splits"]
            shape = {"shape": dict(zip(names, values, strict=True))}
            yield _key(precision, product) | shape | found | {"wins": found["us"] < found["us_dense"]}


# --- one entry
def _key(precision: Precision, product: Product) -> Measured:
    names = {"dtype": name_of(precision.dtype), "precision": precision.name}
    return names | {"source": product.source, "backward": product.backward}


def entry(
    trials: Trials,
    precision: Precision,
    table: str,
    size: Size,
    make: Callable[[int], Product],
    rows: Sequence[int],
    measure: Callable[[Trials, Precision, str, Product], Measured] | None = None,
) -> Iterator[Measured]:
    """The entry of a size, from few rows to many, until the fused form has clearly lost; none if nothing was
    measured."""
    tiles: list[Measured] = []
    with fp32_precision(precision.name):
        for count in rows:
            product = make(count)
            name = f"{table} {precision} {size[0]}x{size[1]} {product.source}{', dx' * product.backward} b{count}"
            tile = trials.attempt(name, partial(measure or compare, trials, precision, name, product))
            if tile is None:
                break
            tiles.append({"rows": count} | tile)
            if tile["us"] > GIVE_UP * tile["us_dense"]:
                break
    lost = (i for i, tile in enumerate(tiles) if tile["us"] >= tile["us_dense"])
    won = tiles[: next(lost, len(tiles))]
    if tiles:
        key = _key(precision, product) | {"n": size[0], "k": size[1]}
        yield key | {"max_rows": won[-1]["rows"] if won else 0, "tiles": tiles}


def compare(trials: Trials, precision: Precision, what: str, product: Product) -> Measured:
    """The best tile of a product and its time, beside that of the way by memory; raises ``WrongResultError`` if no tile
    gives the right result, or if there was no time to try one."""
    sets = product.sets()
    outputs = tuple(torch.empty_like(t) for t in product.definition(sets[0], precision.dtype))
    check = product.checker(sets[0])

    def time_one(tile: tuple[Any, int]) -> float:
        calls = [partial(product.launch, o, outputs, *tile, precision.name) for o in sets]
        return trials.time(calls, outputs, lambda: check(outputs))

    kernels("masked_matmul", trials.device)  # it says so where there is no Triton
    from wsn_fast.backends.triton import tuning
    from wsn_fast.backends.triton.device import gpu_of

    key = tuning.Product(product.operation, precision.dtype, precision.name, product.source, product.backward)
    configs = product.fitting(tuning.fitting(key, gpu_of(trials.device)))
    tiles = [(config, splits) for config in configs for splits in trials.splits(*product.grid(config))]
    best = trials.best(what, tiles, time_one)
    if best is None:
        raise WrongResultError("no tile was measured")
    dense = trials.clock([partial(product.in_memory, o) for o in sets])
    (config, splits), us = best
    return {"config": list(astuple(config)), "splits": splits, "us": round(us, 3), "us_dense": round(dense, 3)}


@contextmanager
def fp32_precision(name: str) -> Iterator[None]:
    """Sets how PyTorch multiplies float32 inside, for a comparison on equal terms."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = name
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
