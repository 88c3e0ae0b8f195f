"""Tile shapes and crossovers of the Triton kernels, from the tables of the GPU (:mod:`wsn_fast.backends.tables`).

Nothing is tuned at run time, so that no step pays for it and a captured graph holds none of it. On a GPU that nobody
has measured, elementwise kernels use their default tile. A fused product is used there only if the user asks for it by
name; its tile then comes from :func:`default_tile`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import astuple
from typing import Any, NamedTuple

import torch

from ...kernels import (
    gate,
    gate_gradients,
    implicit_conv,
    masked_matmul,
    masked_matmul_grad,
    masked_matmul_tasks,
    threshold,
)
from ...kernels._elementwise import Config
from .. import tables

NEAR = 1.0
"""A measurement is used for another shape if each dimension is within a factor of ``2 ** NEAR`` of the measured one."""
BARRIERS = 64
"""Bytes of shared memory for the barriers of a pipeline, at most. On sm_100 they take 16."""
HOPPER = 227 * 1024
"""Bytes of shared memory that a block may use on sm_90."""


class Tile(NamedTuple):
    """How a masked product is cut: the tile of a program, and the parts that its sum is split into."""

    config: Any
    splits: int


class Gpu(NamedTuple):
    """What a GPU has: multiprocessors, and bytes of shared memory that one block may use."""

    processors: int
    shared: int


class Product(NamedTuple):
    """A kind of masked product, as the tables are keyed.

    Attributes:
        operation: "masked_linear", "masked_linear_grad", "masked_linear_tasks" or "masked_conv".
        dtype: the compute dtype.
        precision: how float32 is multiplied, "ieee" or "tf32".
        source: where the mask comes from: "packed" or "scores".
        backward: whether it is the gradient of the input.
    """

    operation: str
    dtype: torch.dtype
    precision: str
    source: str
    backward: bool = False

    @property
    def configs(self) -> tuple[Any, ...]:
        """The tiles to choose from."""
        conv = implicit_conv.DX_CONFIGS if self.backward else implicit_conv.CONFIGS
        choices = {
            "masked_linear": (masked_matmul.CONFIGS, masked_matmul.TF32_CONFIGS, masked_matmul.IEEE_CONFIGS),
            "masked_linear_tasks": (
                masked_matmul_tasks.TASKS_CONFIGS,
                masked_matmul_tasks.TASKS_TF32_CONFIGS,
                masked_matmul_tasks.TASKS_IEEE_CONFIGS,
            ),
            "masked_linear_grad": (
                masked_matmul_grad.CONFIGS, masked_matmul_grad.TF32_CONFIGS, masked_matmul_grad.IEEE_CONFIGS,
            ),
            "masked_conv": (conv, conv, implicit_conv.IEEE_CONFIGS),
        }  # fmt: skip
        half, tf32, ieee = choices[self.operation]
        if self.dtype is not torch.float32:
            return half
        return tf32 if self.precision == "tf32" else ieee

    def config_of(self, numbers: list[int]) -> Any:
        """The tile that a table has written as ``numbers``, or None if there is no such tile any more."""
        return next((config for config in self.configs if list(astuple(config)) == numbers), None)


class Table:
    """What was measured on one GPU model; empty for one that nobody has measured.

    Args:
        device_name: as ``torch.cuda.get_device_name`` gives it.
        found: what the tables hold; None reads those of the package and of the user.

    Attributes:
        digest: names the content in a few digits; empty if nothing was measured.
    """

    def __init__(self, device_name: str, found: tables.Tables | None = None) -> None:
        self.device_name = device_name
        self.data, self.notes, self.digest = tables.of(device_name) if found is None else found
        self._crossovers: dict[tuple[Product, int, int], tuple[int, str]] = {}

    @property
    def _why_empty(self) -> str:
        """What became of tables that were found, for a reason."""
        ignored = [note for note in self.notes if "ignored" in note]
        return "".join(f"; {note}" for note in ignored)

    @functools.cached_property
    def gate(self) -> Config:
        """The tile of :func:`wsn_fast.kernels.gate.gate`."""
        return self._elementwise("gate", gate.CONFIGS)

    @functools.cached_property
    def gate_backward(self) -> Config:
        """The tile of :func:`wsn_fast.kernels.gate_gradients.gate_backward`."""
        return self._elementwise("gate_backward", gate_gradients.CONFIGS)

    def _elementwise(self, operation: str, configs: Sequence[Config]) -> Config:
        measured = self.data.get("elementwise", {}).get(operation)
        return next((c for c in configs if measured == list(astuple(c))), configs[0])

    def search(self, scores: int, gpu: Gpu) -> threshold.Config:
        """The tile sizes of :func:`wsn_fast.kernels.threshold.select` for so many scores in all tensors together."""
        measured = self.data.get("elementwise", {}).get("threshold")
        found = next((config for config in threshold.CONFIGS if measured == vars(config)), None)
        return threshold.spread(threshold.CONFIGS[0], scores, gpu.processors) if found is None else found

    def fused_rows(self, product: Product, n: int, k: int) -> tuple[int, str]:
        """Up to how many rows the fused product is faster than a masked weight in memory, and how that is known. Layers
        ask this in every forward pass, so the answer is looked up once."""
        key = (product, n, k)
        if key not in self._crossovers:
            self._crossovers[key] = self._find_crossover(product, n, k)
        return self._crossovers[key]

    def _find_crossover(self, product: Product, n: int, k: int) -> tuple[int, str]:
        entry = self._nearest(product, n, k)
        if entry is None:
            where = f"near {n} x {k} on {self.device_name}{self._why_empty}"
            return 0, f"no crossover of {product.operation} has been measured {where}"
        rows = entry["max_rows"]
        verdict = f"faster up to {rows} rows" if rows else "slower at every number of rows"
        return rows, f"fused is {verdict}, as measured at {entry['n']} x {entry['k']} on {self.device_name}"

    def tile(self, product: Product, rows: int, n: int, k: int, gpu: Gpu) -> Tile:
        """The tile for a product of ``rows`` rows with a weight [n, k]. A tile that was measured, but may not fit into
        the shared memory of ``gpu``, is not used."""
        entry = self._nearest(product, n, k)
        for measured in entry["tiles"] if entry else ():
            config = product.config_of(measured["config"])
            if rows <= measured["rows"] and config is not None and fits(product, config, gpu):
                return Tile(config, measured["splits"])
        if product.operation == "masked_linear_grad":
            return default_grad_tile(product, rows, n, k, gpu)
        outputs, terms = (k, n) if product.backward else (n, k)
        return default_tile(product, rows, outputs, terms, gpu)

    def _nearest(self, product: Product, n: int, k: int) -> dict[str, Any] | None:
        def distance(entry: dict[str, Any]) -> float:
            return max(abs(math.log2(entry["n"] / n)), abs(math.log2(entry["k"] / k)))

        rows = self.data.get(product.operation.removeprefix("masked_"), ())
        matching = [entry for entry in rows if _is_of(entry, product)]
        best = min(matching, key=distance, default=None)
        return best if best is not None and distance(best) <= NEAR else None

    def conv_wins(self, product: Product, shape: dict[str, int] | None) -> tuple[bool, str]:
        """Whether the implicit convolution was measured to win at just this shape, and how that is known."""
        entry = self._conv(product, shape)
        if entry is None:
            where = f"on {self.device_name}{self._why_empty}"
            return False, f"the implicit convolution has not been measured at this shape {where}"
        verdict = "faster" if entry["wins"] else "slower"
        return entry["wins"], f"the implicit convolution is {verdict} at this shape on {self.device_name}"

    def conv_config(self, product: Product, shape: dict[str, int] | None, positions: int, gpu: Gpu) -> Any:
        """The tile of the implicit convolution of this shape, with that many positions in all its images."""
        entry = self._conv(product, shape)
        measured = product.config_of(entry["config"]) if entry else None
        if measured is not None and fits(product, measured, gpu):
            return measured
        return default_tile(product, positions, 1, 1, gpu).config

    def _conv(self, product: Product, shape: dict[str, int] | None) -> dict[str, Any] | None:
        rows = self.data.get("conv", ())
        return next((entry for entry in rows if entry["shape"] == shape and _is_of(entry, product)), None)


def _is_of(entry: dict[str, Any], product: Product) -> bool:
    """Whether a row of a table is about this kind of product."""
    return (
        entry["dtype"] == str(product.dtype).removeprefix("torch.")
        and entry["precision"] == product.precision
        and entry["source"] == product.source
        and entry["backward"] == product.backward
    )


@functools.cache
def table(device_name: str) -> Table:
    """The table of a GPU model, read once."""
    return Table(device_name)


def most_shared(product: Product, config: Any, most: int) -> int:
    """How many bytes of shared memory a product with this tile takes at most, on any GPU with ``most`` bytes, for any
    dtype of the weight and of the scores. ``tests/benchmarks/test_resources.py`` compares this bound with what the
    compiler takes."""
    size, end = product.dtype.itemsize, 0
    if product.operation == "masked_linear_grad":
        loaded = multiplied = size * config.block_m * (config.block_n + config.block_k)
        end = 4 * config.block_n * config.block_k  # G, before its columns are stored
    else:
        x, weights = size * config.block_m * config.block_r, config.block_o * config.block_r
        # Weight and scores are loaded as they are stored, in four bytes each at most. A packed mask has one bit for
        # each weight and slot.
        loaded = x + 4 * weights + (4 * weights if product.source == "scores" else config.slots * weights // 8)
        copies = 2 if most >= HOPPER else 1  # Triton 3.8 keeps a second one on sm_90
        multiplied = x + copies * config.slots * size * weights
    # A pipeline of n stages holds n - 1 steps. Beside them lies what is multiplied, where that goes through shared
    # memory.
    return max((config.num_stages - 1) * loaded + multiplied, end) + BARRIERS


def fits(product: Product, config: Any, gpu: Gpu) -> bool:
    """Whether a tile surely has room in the shared memory of a GPU."""
    return most_shared(product, config, gpu.shared) <= gpu.shared


def fitting(product: Product, gpu: Gpu) -> list[Any]:
    """The tiles that may be chosen on a GPU.

    Raises:
        RuntimeError: there is none, which is not so on any GPU from Ampere on.
    """
    found = [config for config in product.configs if fits(product, config, gpu)]
    if not found:
        raise RuntimeError(f"no tile of {product.operation} fits into {gpu.shared} bytes of shared memory")
    return found


def default_tile(product: Product, rows: int, outputs: int, terms: int, gpu: Gpu) -> Tile:
    """The tile to use without a measurement: the smallest one that holds all rows, with the sum split until every
    processor has work."""
    configs = fitting(product, gpu)
    whole = [c for c in configs if c.block_m >= rows]
    config = min(whole, key=lambda c: (c.block_m, c.slots)) if whole else max(configs, key=lambda c: c.block_m)
    programs = math.ceil(rows / config.block_m) * math.ceil(outputs / config.block_o)
    steps = math.ceil(terms / config.block_r)
    # At least four steps to a part. This is a guess: with fewer, the extra part is expected to cost more than it saves.
    return Tile(config, max(1, min(gpu.processors // programs, steps // 4)))


def default_grad_tile(product: Product, rows: int, n: int, k: int, gpu: Gpu) -> Tile:
    """The tile to use without a measurement for the gradient of a weight [n, k]: the largest one that gives every
    processor work; if there is none, the smallest one, with the batch split."""

    def programs(config: Any) -> int:
        return math.ceil(n / config.block_n) * math.ceil(k / config.block_k)

    configs = fitting(product, gpu)
    enough = [config for config in configs if programs(config) >= gpu.processors]
    if enough:
        return Tile(max(enough, key=lambda c: c.block_n * c.block_k), 1)
    config = max(configs, key=programs)
    return Tile(config, max(1, min(gpu.processors // programs(config), rows // (4 * config.block_m))))
