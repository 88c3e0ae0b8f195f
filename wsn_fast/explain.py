"""Explains which backend runs each operation of each layer, and why."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .backends import choose, tables
from .nn.gated import SubnetLayer
from .ops.fusion import Fusion

STEP = ("threshold", "gate", "gate_packed", "gate_backward")
"""The primitives that every layer calls."""


class Route(NamedTuple):
    """How one operation of one layer runs.

    Attributes:
        layer: the layer's name in the model.
        operation: a primitive of :mod:`wsn_fast.backends.torch`, "one-pass step" (with the storage of the running
            means where it is not float32), "product (training)" or "product (finished task)".
        backend: "torch", "triton" or "native".
        reason: why this backend runs it.
    """

    layer: str
    operation: str
    backend: str
    reason: str


class Explanation(list[Route]):
    """The routes of a model; its ``str`` is a table.

    Attributes:
        notes: a sentence for each tuning table that is ignored, with the reason.
    """

    def __init__(self, routes: Iterable[Route] = (), notes: Iterable[str] = ()) -> None:
        super().__init__(routes)
        self.notes = list(notes)

    def __str__(self) -> str:
        head = Route("layer", "operation", "backend", "reason")
        widths = [max(len(row[i]) for row in [head, *self]) for i in range(3)]
        lines = (
            "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row.reason])
            for row in [head, *self]
        )
        return "\n".join([*lines, *self.notes])


def explain(model: nn.Module, *, dtype: torch.dtype | None = None) -> Explanation:
    """Say which backend runs each operation of each subnet layer of ``model`` on its present device, and why.

    Args:
        model: any module with subnet layers, or one such layer.
        dtype: the compute dtype, as under autocast; None means the dtype of each layer's weight.

    Returns:
        A list with a :class:`Route` for each operation; it prints as a table. The reasons name an override
        (``layer.backend`` or the environment variable ``WSN_FAST_BACKEND``) if there is one.

    Raises:
        ValueError: ``model`` has no subnet layer.
    """
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, SubnetLayer)]
    if not layers:
        raise ValueError(f"model has no subnet layer: {type(model).__name__}")
    names = dict.fromkeys(tables.device_name(next(layer.gated()).param.device) for _, layer in layers)
    routes = Explanation(notes=[note for name in names for note in tables.of(name).notes if "ignored" in note])
    for name, layer in layers:
        first, backend = next(layer.gated()), layer.backend
        weight = first.param
        for operation in STEP:
            dtype_of = first.score.dtype if operation == "threshold" else weight.dtype
            chosen = choose(operation, weight.device, dtype_of, backend)
            routes.append(Route(name, operation, chosen.name, chosen.reason))
        if layer.one_pass:
            routes.append(_step(name, layer, weight))
        for source, when in (("scores", "training"), ("packed", "finished task")):
            fusion = _fusion(layer, dtype or weight.dtype, source)
            routes.append(Route(name, f"product ({when})", *_product(fusion)))
    return routes


def _step(name: str, layer: SubnetLayer, weight: Tensor) -> Route:
    optimizer: Any = layer.gate_state.owner
    chosen = choose(optimizer.primitive, weight.device, weight.dtype, layer.backend)
    stored = f", moments {optimizer.storage}" if optimizer.storage.is_coded else ""
    return Route(name, f"one-pass step{stored}", chosen.name, chosen.reason)


def _fusion(layer: SubnetLayer, dtype: torch.dtype, source: str) -> Fusion:
    if layer.one_pass and source == "scores":
        return Fusion(0, "a one-pass optimizer needs the masked weight and its gradient in memory")
    return layer.fusion(dtype, source)


def _product(fusion: Fusion) -> tuple[str, str]:
    if fusion.rows == 0:
        return "torch", f"masked weight in memory, then torch's product: {fusion.reason}"
    return "triton", f"mask applied while the weight is loaded: {fusion.reason}"
