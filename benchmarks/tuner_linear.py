"""The tables of linear layers: fused products against a masked weight, or its gradient, in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from wsn_fast import reference
from wsn_fast.backends import torch as portable

from . import gradients, launches
from .cases import check_close, input_sets, name_of
from .products import RULE, SOURCES, Weight
from .trials import Precision, Size, Sweep, Trials, as_list, fp32_precision

GIVE_UP = 1.5
"""A fused product this many times slower than the way by memory is not tried with still more rows."""
MASK = ("packed", "scores", "tau", "rule")
"""The launchers' names for where a mask comes from."""
Measured = dict[str, Any]
"""The best tile at a number of rows, or an entry of a table."""
Measure = Callable[[int], Measured | None]


class LinearTables:
    """Measures linear layers of one sweep, in one precision at a time.

    Args:
        trials: what tries the tiles.
        sweep: sizes and rows.
    """

    def __init__(self, trials: Trials, sweep: Sweep) -> None:
        self.trials, self.sweep, self.device = trials, sweep, trials.device

    # --- one mask for the batch
    def linear(self, precision: Precision) -> Iterator[Measured]:
        """An entry for each size, source of the mask and direction."""
        for size in self.sweep.sizes:
            for source in SOURCES:
                for backward in (False, True):
                    what = f"linear {precision} {size[0]}x{size[1]} {source}{', dx' * backward}"
                    bytes_each = size[0] * size[1] * (4 if source == "packed" else 8)
                    weights = self.trials.attempt(what, partial(self._weights, size, bytes_each))
                    if weights is not None:
                        measure = partial(self._linear_rows, precision, size, source, backward, what, weights)
                        yield from self._entry(what, precision, size, source, backward, self.sweep.rows, measure)

    def _weights(self, size: Size, bytes_each: float, tasks: int = 1) -> list[Weight]:
        return [Weight.random(size, self.device, tasks) for _ in range(input_sets(bytes_each, self.device))]

    def _linear_rows(
        self, precision: Precision, size: Size, source: str, backward: bool, what: str, weights: list[Weight], rows: int
    ) -> Measured | None:
        terms, outputs = size if backward else reversed(size)
        x = torch.randn(rows, terms, device=self.device).to(precision.dtype)
        y = torch.empty(rows, outputs, dtype=precision.dtype, device=self.device)
        kernels = launches.kernels("matmul", self.device)

        def multiply(weight: Tensor, x: Tensor = x) -> Tensor:
            return x @ weight if backward else F.linear(x, weight)

        def fused(tile: Any, w: Weight) -> None:
            config, splits = tile
            kernels.masked_matmul(
                x, w.weight, y, **dict(zip(MASK, w.source(source), strict=True)), backward=backward, config=config,
                splits=splits, workspace=self._workspace(rows, outputs, splits), precision=precision.name,
            )  # fmt: skip

        def in_memory(w: Weight) -> Tensor:
            return multiply(w.in_memory(source, precision.dtype))

        keep = reference.select(weights[0].mask, weights[0].weight.to(precision.dtype))
        torchs, exact = multiply(keep), multiply(keep.double(), x.double())
        tiles = self._tiles(precision.product("masked_linear", source, backward, self.device), rows, outputs, terms)
        check = partial(check_close, y, torchs, exact, what)
        return self._compare(what, rows, tiles, fused, in_memory, weights, [y], check)

    # --- the gradients of weight and scores
    def linear_grad(self, precision: Precision) -> Iterator[Measured]:
        """An entry for each size."""
        for size in self.sweep.grad_sizes:
            what = f"linear_grad {precision} {size[0]}x{size[1]}"
            measure = partial(self._grad_rows, precision, size, what)
            yield from self._entry(what, precision, size, "scores", False, self.sweep.grad_rows, measure)

    def _grad_rows(self, precision: Precision, size: Size, what: str, rows: int) -> Measured | None:
        numel = size[0] * size[1]
        count = input_sets(gradients.BYTES_PER_WEIGHT * numel, self.device)
        sets = [gradients.Operands.random(size, rows, precision.dtype, self.device) for _ in range(count)]
        dw, ds = torch.empty_like(sets[0].w.weight), torch.empty_like(sets[0].w.scores)
        kernels = launches.kernels("matmul_grad", self.device)

        def fused(tile: Any, o: gradients.Operands) -> None:
            config, splits = tile
            kernels.masked_matmul_grad(
                o.dy, o.x, o.w.weight, dw, ds, scores=o.w.scores, tau=o.w.tau, union=o.packed_frozen, rule=RULE,
                config=config, splits=splits, workspace=self._workspace(*size, splits), precision=precision.name,
            )  # fmt: skip

        tiles = self._grad_tiles(precision.product(gradients.OPERATION, "scores", False, self.device), rows, size)
        check = partial(gradients.Expected(sets[0]).check, [dw, ds])
        return self._compare(what, rows, tiles, fused, gradients.Operands.in_memory, sets, [dw, ds], check)

    # --- rows of several tasks
    def linear_tasks(self, precision: Precision) -> Iterator[Measured]:
        """An entry for each size: rows of ``sweep.tasks`` tasks, mixed, against a masked weight per task."""
        tasks = self.sweep.tasks
        for size in self.sweep.task_sizes:
            what = f"linear_tasks {precision} {size[0]}x{size[1]}"
            weights = self.trials.attempt(what, partial(self._weights, size, size[0] * size[1] * 4, tasks))
            if weights is not None:
                measure = partial(self._task_rows, precision, size, what, weights)
                for entry in self._entry(what, precision, size, "packed", False, self.sweep.task_rows, measure):
                    yield entry | {"tasks": tasks}

    def _task_rows(
        self, precision: Precision, size: Size, what: str, weights: list[Weight], rows: int
    ) -> Measured | None:
        (n, k), tasks = size, self.sweep.tasks
        kernels = launches.kernels("matmul_tasks", self.device)
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

        tiles = self._tiles(precision.product("masked_linear_tasks", "packed", False, self.device), rows, n, k)
        check = partial(check_close, y, definition(precision.dtype), definition(torch.float64), what)
        return self._compare(what, rows, tiles, fused, in_memory, weights, [y], check)

    # --- the same for all
    def _entry(
        self,
        what: str,
        precision: Precision,
        size: Size,
        source: str,
        backward: bool,
        rows: Sequence[int],
        measure: Measure,
    ) -> Iterator[Measured]:
        """The entry of a size, from few rows to many, until the fused form has clearly lost; none if nothing was
        measured."""
        tiles: list[Measured] = []
        with fp32_precision(precision.name):
            for count in rows:
                tile = self.trials.attempt(f"{what} b{count}", partial(measure, count))
                if tile is None:
                    break
                tiles.append(tile)
                if tile["us"] > GIVE_UP * tile["us_dense"]:
                    break
        lost = (i for i, tile in enumerate(tiles) if tile["us"] >= tile["us_dense"])
        won = tiles[: next(lost, len(tiles))]
        if tiles:
            yield {
                "dtype": name_of(precision.dtype),
                "precision": precision.name,
                "n": size[0],
                "k": size[1],
                "source": source,
                "backward": backward,
                "max_rows": won[-1]["rows"] if won else 0,
                "tiles": tiles,
            }

    def _compare(
        self,
        what: str,
        rows: int,
        tiles: Sequence[Any],
        fused: Callable[[Any, Any], None],
        in_memory: Callable[[Any], object],
        sets: Sequence[Any],
        outputs: Sequence[Tensor],
        check: Callable[[], object],
    ) -> Measured | None:
        """The best tile and its time, beside that of the way by memory; what is wrong is not timed."""

        def time_one(tile: Any) -> float:
            for output in outputs:
                output.fill_(torch.nan)
            fused(tile, sets[0])
            check()
            return self.trials.clock([partial(fused, tile, operands) for operands in sets])

        best = self.trials.best(f"{what} b{rows}", tiles, time_one)
        in_turn = [partial(in_memory, operands) for operands in sets]
        dense = self.trials.attempt(f"{what} b{rows}, in memory", partial(self.trials.clock, in_turn))
        if best is None or dense is None:
            return None
        (config, splits), us = best
        return {
            "rows": rows,
            "config": as_list(config),
            "splits": splits,
            "us": round(us, 3),
            "us_dense": round(dense, 3),
        }

    def _tiles(self, product: Any, rows: int, outputs: int, terms: int) -> list[tuple[Any, int]]:
        """Tiles that hold the rows with little to spare, each with parts of the sum."""
        heights = sorted({c.block_m for c in product.configs})
        fitting = [h for h in heights if h >= rows] or heights[-1:]
        configs = [c for c in product.configs if c.block_m in fitting[:2]]
        sizes = [(-(-rows // c.block_m) * -(-outputs // c.block_o), -(-terms // c.block_r)) for c in configs]
        return [(c, splits) for c, size in zip(configs, sizes, strict=True) for splits in self._splits(*size)]

    def _grad_tiles(self, product: Any, rows: int, size: Size) -> list[tuple[Any, int]]:
        """Every tile, each with parts of the batch."""
        n, k = size
        sizes = [(-(-n // c.block_n) * -(-k // c.block_k), -(-rows // c.block_m)) for c in product.configs]
        return [(c, splits) for c, size in zip(product.configs, sizes, strict=True) for splits in self._splits(*size)]

    def _splits(self, programs: int, steps: int) -> list[int]:
        """Around as many parts as keep the GPU busy, of two steps or more each."""
        busy = self.trials.processors / programs
        return sorted({1} | {max(1, min(round(busy * factor), steps // 2, 32)) for factor in (0.5, 1, 2)})

    def _workspace(self, rows: int, outputs: int, splits: int) -> Tensor | None:
        numel = launches.kernels("matmul", self.device).workspace_numel(rows, outputs, splits)
        return torch.empty(numel, dtype=torch.float32, device=self.device) if numel else None
