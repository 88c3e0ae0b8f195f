"""How the tuner measures: candidates checked, then timed, for each entry of a tuning file."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from wsn_fast import reference
from wsn_fast.backends import torch as portable

from . import launches
from .cases import WrongResultError, check_close, check_same, check_threshold, compute_dtype, input_sets, name_of
from .data import Gate, rank, scores
from .products import RULE, SOURCES, Weight, conv_definition, conv_operands, convolve
from .shapes import ConvShape
from .timing import Call

GIVE_UP = 1.5
"""A fused product this many times slower than the masked weight in memory is not tried with still more rows."""
Clock = Callable[[Sequence[Call]], float]
"""Microseconds of a call."""
_MASK = ("packed", "scores", "tau", "rule")  # the launchers' names for where a mask comes from


class Precision(NamedTuple):
    """A compute dtype, and how float32 is multiplied; 16-bit types are under "tf32", which they do not use."""

    dtype: torch.dtype
    name: str


BF16, FP16 = Precision(torch.bfloat16, "tf32"), Precision(torch.float16, "tf32")
TF32, IEEE = Precision(torch.float32, "tf32"), Precision(torch.float32, "ieee")


@dataclass(frozen=True)
class Sweep:
    """What is measured. ``precisions``: the first is measured in everything before the others in linear layers."""

    elementwise: int
    precisions: tuple[Precision, ...]
    sizes: tuple[tuple[int, int], ...]
    rows: tuple[int, ...]
    tasks: int
    task_sizes: tuple[tuple[int, int], ...]
    task_rows: tuple[int, ...]
    convs: tuple[ConvShape, ...]


class Tuner:
    """Measures one entry after the other until the time is up.

    Args:
        device: where.
        clock: how calls are timed.
        deadline: of ``time.monotonic``.
    """

    def __init__(self, device: torch.device, clock: Clock, deadline: float) -> None:
        self.device, self.clock, self.deadline = device, clock, deadline
        self.not_measured: list[str] = []
        self.processors = 1
        if device.type == "cuda":
            self.processors = torch.cuda.get_device_properties(device).multi_processor_count

    def run(self, sweep: Sweep) -> dict[str, Any]:
        """The tables of a tuning file."""
        first, *others = sweep.precisions
        tables: dict[str, Any] = {"elementwise": self.elementwise(sweep.elementwise), "linear": []}
        linear = tables["linear"]
        linear += self.linear(sweep, first)
        tables["linear_tasks"] = list(self.linear_tasks(sweep, first))
        tables["conv"] = list(self.conv(sweep, first))
        for precision in others:
            linear += self.linear(sweep, precision)
        return tables

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

    def best(self, what: str, candidates: Sequence[Any], time_one: Callable[[Any], float]) -> tuple[Any, float] | None:
        """The fastest candidate and its time; None if there is none."""
        times = [(c, self.attempt(f"{what}, {c}", partial(time_one, c))) for c in candidates]
        measured = [(c, us) for c, us in times if us is not None]
        return min(measured, key=lambda pair: pair[1]) if measured else None

    # --- elementwise
    def elementwise(self, n: int) -> dict[str, Any]:
        """The tile of gate and gradient masking, and the tile sizes of the selection."""
        dtype = compute_dtype(self.device)
        g = Gate.random(n, self.device, dtype, 1)
        mask, grad = launches.kernels("mask", self.device), launches.kernels("grad", self.device)
        select = launches.kernels("threshold", self.device)
        out, dw, ds = torch.empty_like(g.weight, dtype=dtype), torch.empty_like(g.weight), torch.empty_like(g.scores)
        expected = reference.gate_backward(g.grad.float(), g.weight, g.scores, g.mask, g.frozen)
        s = scores(n, self.device)

        def gate(config: Any) -> float:
            call = partial(mask.gate, g.weight, g.scores, g.tau, out, None, rule=RULE, config=config)
            out.fill_(torch.nan)
            call()
            check_same(out, reference.select(g.mask, g.weight.to(dtype)), "gate")
            return self.clock([call])

        def gate_backward(config: Any) -> float:
            operands = (g.grad, g.weight, g.scores, g.tau, g.packed_frozen, dw, ds)
            call = partial(grad.gate_backward, *operands, rule=RULE, config=config)
            dw.fill_(torch.nan)
            ds.fill_(torch.nan)
            call()
            check_same(dw, expected[0], "dW")
            check_same(ds, expected[1], "dS")
            return self.clock([call])

        def threshold(config: Any) -> float:
            call, tau = launches.threshold([s], [rank(n)], RULE, config)
            tau.fill_(torch.nan)
            call()
            check_threshold(tau[0], s, rank(n), RULE)
            return self.clock([call])

        found = {
            "gate": self.best("gate", mask.CONFIGS, gate),
            "gate_backward": self.best("gate_backward", grad.CONFIGS, gate_backward),
            "threshold": self.best("threshold", select.CONFIGS, threshold),
        }
        return {
            name: vars(best[0]) if name == "threshold" else _as_list(best[0])
            for name, best in found.items()
            if best is not None
        }

    # --- linear layers
    def linear(self, sweep: Sweep, precision: Precision) -> Iterator[dict[str, Any]]:
        """An entry for each size, source of the mask and direction."""
        for n, k in sweep.sizes:
            for source in SOURCES:
                for backward in (False, True):
                    what = f"linear {name_of(precision.dtype)} {precision.name} {n}x{k} {source}{', dx' * backward}"
                    measure = partial(self._linear_entry, sweep, precision, n, k, source, backward, what)
                    entry = self.attempt(what, measure)
                    if entry is not None:
                        yield entry

    def _linear_entry(
        self, sweep: Sweep, precision: Precision, n: int, k: int, source: str, backward: bool, what: str
    ) -> dict[str, Any]:
        product = self._product("masked_linear", precision, source, backward)
        bytes_each = n * k * (4 if source == "packed" else 8)
        weights = [Weight.random((n, k), self.device) for _ in range(input_sets(bytes_each, self.device))]

        def measure(rows: int) -> dict[str, Any] | None:
            x = torch.randn(rows, n if backward else k, device=self.device).to(precision.dtype)
            y = torch.empty(rows, k if backward else n, dtype=precision.dtype, device=self.device)

            def multiply(weight: Tensor, x: Tensor = x) -> Tensor:
                return x @ weight if backward else F.linear(x, weight)

            def fused(tile: Any, w: Weight) -> None:
                mask = dict(zip(_MASK, w.source(source), strict=True))
                self._matmul(x, w.weight, y, tile, precision, backward=backward, **mask)

            keep = reference.select(weights[0].mask, weights[0].weight.to(precision.dtype))
            exact = multiply(keep.double(), x.double())

            def in_memory(w: Weight) -> Tensor:
                return multiply(w.in_memory(source, precision.dtype))

            tiles = self._tiles(product, rows, y.shape[1], n if backward else k)
            return self._compare(f"{what} b{rows}", rows, tiles, fused, in_memory, weights, y, multiply(keep), exact)

        with _fp32_precision(precision.name):
            tiles = self._rows(sweep.rows, measure)
        return self._entry(precision, n, k, source, backward, tiles)

    def linear_tasks(self, sweep: Sweep, precision: Precision) -> Iterator[dict[str, Any]]:
        """An entry for each size: rows of ``sweep.tasks`` tasks, mixed, against a masked weight per task."""
        for n, k in sweep.task_sizes:
            what = f"linear_tasks {name_of(precision.dtype)} {n}x{k}"
            entry = self.attempt(what, partial(self._tasks_entry, sweep, precision, n, k, what))
            if entry is not None:
                yield entry | {"tasks": sweep.tasks}

    def _tasks_entry(self, sweep: Sweep, precision: Precision, n: int, k: int, what: str) -> dict[str, Any]:
        product, tasks = self._product("masked_linear_tasks", precision, "packed", False), sweep.tasks
        kernels = launches.kernels("matmul_tasks", self.device)
        weights = [Weight.random((n, k), self.device, tasks) for _ in range(input_sets(n * k * 4, self.device))]

        def measure(rows: int) -> dict[str, Any] | None:
            x = torch.randn(rows, k, device=self.device).to(precision.dtype)
            y = torch.empty(rows, n, dtype=precision.dtype, device=self.device)
            of_row = torch.arange(rows, device=self.device, dtype=torch.int32) % tasks
            order = of_row.argsort().to(torch.int32)
            rows_of = [(of_row == t).nonzero().flatten() for t in range(min(tasks, rows))]

            def fused(tile: Any, w: Weight) -> None:
                config, splits = tile
                kernels.masked_matmul_tasks(
                    x, w.weight, y, packed=w.task_masks, tasks=of_row, order=order, config=config, splits=splits,
                    workspace=self._workspace(rows, n, splits), precision=precision.name,
                )  # fmt: skip

            def in_memory(w: Weight) -> Tensor:
                result = torch.empty_like(y)
                for task, at in enumerate(rows_of):
                    result[at] = F.linear(x[at], w.in_memory("packed", precision.dtype, w.task_masks[task]))
                return result

            def definition(dtype: torch.dtype) -> Tensor:
                result = torch.empty(rows, n, dtype=dtype, device=self.device)
                for task, at in enumerate(rows_of):
                    masked = portable.gate_packed(weights[0].weight, weights[0].task_masks[task], precision.dtype)
                    result[at] = F.linear(x[at].to(dtype), masked.to(dtype))
                return result

            tiles, exact = self._tiles(product, rows, n, k), definition(torch.float64)
            torchs = definition(precision.dtype)
            return self._compare(f"{what} b{rows}", rows, tiles, fused, in_memory, weights, y, torchs, exact)

        with _fp32_precision(precision.name):
            tiles = self._rows(sweep.task_rows, measure)
        return self._entry(precision, n, k, "packed", False, tiles)

    def _compare(
        self,
        what: str,
        rows: int,
        tiles: Sequence[Any],
        fused: Callable[[Any, Weight], None],
        in_memory: Callable[[Weight], Tensor],
        weights: Sequence[Weight],
        y: Tensor,
        torchs: Tensor,
        exact: Tensor,
    ) -> dict[str, Any] | None:
        """The best tile and its time beside that of the masked weight in memory."""

        def time_one(tile: Any) -> float:
            y.fill_(torch.nan)
            fused(tile, weights[0])
            check_close(y, torchs, exact, what)
            return self.clock([partial(fused, tile, w) for w in weights])

        best = self.best(what, tiles, time_one)
        dense = self.attempt(f"{what}, in memory", lambda: self.clock([partial(in_memory, w) for w in weights]))
        if best is None or dense is None:
            return None
        (config, splits), us = best
        return {
            "rows": rows,
            "config": _as_list(config),
            "splits": splits,
            "us": round(us, 3),
            "us_dense": round(dense, 3),
        }

    @staticmethod
    def _rows(rows: Sequence[int], measure: Callable[[int], dict[str, Any] | None]) -> list[dict[str, Any]]:
        """From few rows to many, until the fused form has clearly lost."""
        tiles: list[dict[str, Any]] = []
        for count in rows:
            tile = measure(count)
            if tile is None:
                break
            tiles.append(tile)
            if tile["us"] > GIVE_UP * tile["us_dense"]:
                break
        return tiles

    @staticmethod
    def _entry(
        precision: Precision, n: int, k: int, source: str, backward: bool, tiles: list[dict[str, Any]]
    ) -> dict[str, Any]:
        max_rows = 0
        for tile in tiles:
            if tile["us"] >= tile["us_dense"]:
                break
            max_rows = tile["rows"]
        return {
            "dtype": name_of(precision.dtype),
            "precision": precision.name,
            "n": n,
            "k": k,
            "source": source,
            "backward": backward,
            "max_rows": max_rows,
            "tiles": tiles,
        }

    def _tiles(self, product: Any, rows: int, outputs: int, terms: int) -> list[tuple[Any, int]]:
        """Tiles that hold the rows with little to spare, and around as many parts of the sum as keep the GPU busy."""
        heights = sorted({c.block_m for c in product.configs})
        fitting = [h for h in heights if h >= rows] or heights[-1:]
        tiles = []
        for config in (c for c in product.configs if c.block_m in fitting[:2]):
            programs = -(-rows // config.block_m) * -(-outputs // config.block_o)
            steps = -(-terms // config.block_r)
            busy = self.processors / programs
            splits = {max(1, min(round(busy * factor), steps // 2, 32)) for factor in (0.5, 1, 2)}
            tiles += [(config, s) for s in sorted(splits | {1})]
        return tiles

    def _matmul(self, x: Tensor, w: Tensor, y: Tensor, tile: Any, precision: Precision, **rest: Any) -> None:
        config, splits = tile
        launches.kernels("matmul", self.device).masked_matmul(
            x, w, y, config=config, splits=splits, workspace=self._workspace(y.shape[0], y.shape[1], splits),
            precision=precision.name, **rest,
        )  # fmt: skip

    def _workspace(self, rows: int, outputs: int, splits: int) -> Tensor | None:
        numel = launches.kernels("matmul", self.device).workspace_numel(rows, outputs, splits)
        return torch.empty(numel, dtype=torch.float32, device=self.device) if numel else None

    def _product(self, operation: str, precision: Precision, source: str, backward: bool) -> Any:
        """The key of the tables, which knows the tiles to choose from."""
        launches.kernels("matmul", self.device)
        from wsn_fast.backends import tuning

        return tuning.Product(operation, precision.dtype, precision.name, source, backward)

    # --- convolutions
    def conv(self, sweep: Sweep, precision: Precision) -> Iterator[dict[str, Any]]:
        """An entry for each shape, source of the mask and direction."""
        for shape in sweep.convs:
            for source in SOURCES:
                for backward in (False, True):
                    what = f"conv {shape} {source}{', dx' * backward}"
                    entry = self.attempt(what, partial(self._conv_entry, shape, source, backward, precision, what))
                    if entry is not None:
                        yield entry

    def _conv_entry(self, s: ConvShape, source: str, backward: bool, precision: Precision, what: str) -> dict[str, Any]:
        kernels = launches.kernels("conv", self.device)
        product = self._product("masked_conv", precision, source, backward)
        count = input_sets(precision.dtype.itemsize * s.batch * s.channels * s.size**2, self.device)
        sets = [conv_operands(s, backward, self.device) for _ in range(count)]
        torchs, exact = (conv_definition(s, backward, sets[0], dtype) for dtype in (precision.dtype, torch.float64))
        y = torch.empty_like(torchs)

        def fused(config: Any, o: Any) -> None:
            mask = dict(zip(_MASK, o.w.source(source), strict=True))
            kernels.masked_conv(
                o.x, o.w.weight, y, **mask, stride=(s.stride,) * 2, padding=(s.padding,) * 2, dilation=(1, 1),
                groups=s.groups, backward=backward, config=config, precision=precision.name,
            )  # fmt: skip

        def time_one(config: Any) -> float:
            y.fill_(torch.nan)
            fused(config, sets[0])
            check_close(y, torchs, exact, what)
            return self.clock([partial(fused, config, o) for o in sets])

        def in_memory(o: Any) -> Tensor:
            return convolve(s, backward, o.x, o.w.in_memory(source, precision.dtype))

        best = self.best(what, product.configs, time_one)
        if best is None:
            raise WrongResultError("no tile is right")
        dense = self.clock([partial(in_memory, o) for o in sets])
        names = ("batch", "channels", "height", "width", "out_channels", "kernel", "stride", "padding", "groups")
        values = (s.batch, s.channels, s.size, s.size, s.outputs, s.kernel, s.stride, s.padding, s.groups)
        return {
            "dtype": name_of(precision.dtype),
            "precision": precision.name,
            "source": source,
            "backward": backward,
            "shape": dict(zip(names, values, strict=True)),
            "config": _as_list(best[0]),
            "us": round(best[1], 3),
            "us_dense": round(dense, 3),
            "wins": best[1] < dense,
        }


@contextmanager
def _fp32_precision(name: str) -> Iterator[None]:
    """How PyTorch multiplies float32 inside, for a comparison on equal terms."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = name
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def _as_list(config: Any) -> list[int]:
    return list(astuple(config))
