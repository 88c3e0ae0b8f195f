"""The entries of a tuning file: the best tile of every kernel, and where a fused product wins against memory."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple
from functools import partial
from typing import Any

import torch

from ...backends.tables import dtype_name
from ..measuring import oracle
from ..measuring.checks import UnavailableError, WrongResultError, check_same
from ..measuring.launchers import kernels, threshold
from ..measuring.weights import RULE, Weight, compute_dtype, rank
from .gradients import GradientProduct
from .products import WAYS, ConvProduct, LinearProduct, Product, TaskProduct
from .sweeps import Precision, Size, Sweep
from .trials import Found, Trials

GIVE_UP = 1.5
"""A fused product that is this many times slower than the way by memory is not tried with still more rows."""
Measured = dict[str, Any]
"""The best tile at a number of rows, or an entry of a table."""


# --- the tables
def measure_tiles(trials: Trials, sweep: Sweep, found: Found) -> None:
    """The tiles of the elementwise kernels."""
    for name, tile in elementwise(trials, sweep.elementwise):
        found("elementwise", {name: tile})


def measure_products(trials: Trials, sweep: Sweep, found: Found) -> None:
    """The tables of the products, one entry after the other until the time is up."""
    first, *others = sweep.precisions
    tables = {"linear": linear, "linear_grad": gradients, "linear_tasks": mixed_tasks, "conv": convolutions}
    order = [(table, first) for table in tables]
    order += [(table, precision) for precision in others for table in ("linear", "linear_grad")]
    for table, precision in order:
        for one in tables[table](trials, sweep, precision):
            found(table, one)


def elementwise(trials: Trials, n: int) -> Iterator[tuple[str, Any]]:
    """The tile of gate and gradient masking, and the tile sizes of the selection, for n weights."""
    try:
        kernels("gate", trials.device)
    except UnavailableError as reason:
        trials.not_measured.append(f"tiles of gate, gradients and selection: {reason}")
        return
    device, dtype = trials.device, compute_dtype(trials.device)
    w = Weight.random((n,), device)
    gates, grads, select = (kernels(name, device) for name in ("gate", "gate_gradients", "threshold_table"))
    out, dw, ds = torch.empty_like(w.weight, dtype=dtype), torch.empty_like(w.weight), torch.empty_like(w.scores)
    masked = w.as_defined(dtype)
    expected = oracle.gate_backward(w.grad.float(), w.weight, w.scores, w.mask, w.frozen)

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
        return trials.time([call], [tau], lambda: check_same(tau[0], w.tau, "threshold"))

    tried: dict[str, tuple[Any, Any]] = {
        "gate": (gates.CONFIGS, gate),
        "gate_backward": (grads.CONFIGS, gate_backward),
        "threshold": (select.CONFIGS, selection),
    }
    for name, (configs, time_one) in tried.items():
        best = trials.best(name, configs, time_one)
        if best is not None:
            yield name, vars(best[0]) if name == "threshold" else list(astuple(best[0]))


def linear(trials: Trials, sweep: Sweep, precision: Precision) -> Iterator[Measured]:
    """An entry for each size, source of the mask and direction."""
    for size, (source, backward) in itertools.product(sweep.sizes, WAYS):
        way: dict[str, Any] = {"source": source, "backward": backward, "device": trials.device}
        make = partial(LinearProduct, size, dtype=precision.dtype, **way)
        yield from entry(trials, precision, "linear", size, make, sweep.rows)


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
    names = {"dtype": dtype_name(precision.dtype), "precision": precision.name}
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
    from ...backends.triton import tuning
    from ...backends.triton.device import gpu_of

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
