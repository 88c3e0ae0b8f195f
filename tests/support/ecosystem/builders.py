"""What the lines of the table in ``zoo.py`` are made of: how to build a model of a package, and what to give it."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

Inputs = Callable[[], dict[str, Any]]
"""Draws a batch: the keyword arguments of a forward pass."""
Heads = str | tuple[str, ...] | None


@dataclass(frozen=True)
class Model:
    """A line of the table.

    Attributes:
        package: the package that has to be installed.
        kind: the class of the model.
        build: makes the model, with random weights.
        inputs: draws a batch.
        heads: what ``convert(heads=...)`` is given: the names of the classifiers. None: the model has none, or none
            that belongs to a task.
        owners: further arguments of ``WSN`` that this model needs.
        exception: why less than the usual share of this model is gated; empty for most.
    """

    package: str
    kind: str
    build: Callable[[], nn.Module]
    inputs: Inputs
    heads: Heads = None
    owners: Mapping[str, Any] = field(default_factory=dict)
    exception: str = ""

    @cached_property
    def lacks(self) -> str:
        """Why the model cannot be built here, or an empty string."""
        root = self.package.partition(".")[0]
        return "" if importlib.util.find_spec(root) else f"needs {root}"


# --- inputs
def image(size: int = 32, *, channels: int = 3, name: str = "x", batch: int = 2) -> Inputs:
    """Images ``[batch, channels, size, size]``."""
    return lambda: {name: torch.randn(batch, channels, size, size)}


def normal(*shape: int, name: str = "x") -> Inputs:
    """A tensor of this shape from the normal distribution."""
    return lambda: {name: torch.randn(shape)}


def tokens(vocabulary: int = 64, length: int = 8, *, name: str = "input_ids", end: int = 2) -> Inputs:
    """Token ids ``[2, length]`` that end with the token ``end``; 0 to 3 are left to special tokens."""

    def draw() -> dict[str, Tensor]:
        ids = torch.randint(4, vocabulary, (2, length))
        ids[:, -1] = end
        return {name: ids}

    return draw


def both(*parts: Inputs) -> Inputs:
    """The arguments of all ``parts`` together."""
    return lambda: {name: value for part in parts for name, value in part().items()}


def constant(**arguments: Any) -> Inputs:
    """The same arguments in every batch."""
    return lambda: dict(arguments)


# --- models
def from_config(kind: str, config: str, **options: Any) -> Callable[[], nn.Module]:
    """A class of transformers, made from a config of that package."""

    def build() -> nn.Module:
        transformers = importlib.import_module("transformers")
        transformers.logging.set_verbosity_error()  # configs that are as small as these get advice
        return getattr(transformers, kind)(getattr(transformers, config)(**options))

    return build


def of_transformers(
    kind: str, config: str, inputs: Inputs, heads: Heads = None, exception: str = "", **options: Any
) -> Model:
    """A line of the table for a class of transformers with the options of its config."""
    return Model("transformers", kind, from_config(kind, config, **options), inputs, heads, exception=exception)


def created(name: str, **options: Any) -> Callable[[], nn.Module]:
    """A model of timm by its name."""
    return lambda: importlib.import_module("timm").create_model(name, pretrained=False, **options)
