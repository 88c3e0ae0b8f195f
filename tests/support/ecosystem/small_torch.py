"""Small modules of torch itself that are no plain linear or convolution layers, each in a model with a classifier."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, spectral_norm, weight_norm

WIDTH, CLASSES = 16, 5


def transformer() -> nn.Module:
    return nn.Transformer(WIDTH, 2, 1, 1, 32, batch_first=True)


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 32, batch_first=True)
    return Embedded(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))


def attention() -> nn.Module:
    return SelfAttention(nn.MultiheadAttention(WIDTH, 2, batch_first=True, add_bias_kv=True))


def cross_attention() -> nn.Module:
    return SelfAttention(nn.MultiheadAttention(WIDTH, 2, batch_first=True, kdim=8, vdim=4), 8, 4)


def recurrent(kind: Any) -> nn.Module:
    return First(kind(WIDTH, WIDTH // 2, num_layers=2, bidirectional=True, batch_first=True))


def bag() -> nn.Module:
    return nn.Sequential(_names(("bag", nn.EmbeddingBag(64, WIDTH)), ("head", nn.Linear(WIDTH, CLASSES))))


def _names(*modules: tuple[str, nn.Module]) -> Any:
    from collections import OrderedDict

    return OrderedDict(modules)


class Embedded(nn.Module):
    """Tokens, an encoder and a classifier."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.embedding, self.body, self.head = nn.Embedding(64, WIDTH), body, nn.Linear(WIDTH, CLASSES)
        self.position = nn.Parameter(torch.randn(1, 8, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.embedding(x) + self.position).mean(1))


class Reader(nn.Module):
    """A linear layer, a module that maps ``[N, L, 16]`` to the same shape, and a classifier."""

    def __init__(self, body: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.first, self.body, self.head = nn.Linear(WIDTH, WIDTH), body(), nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.first(x)).mean(1))


class SelfAttention(nn.Module):
    """Attention of a sequence to itself; keys and values may be narrower."""

    def __init__(self, inner: nn.MultiheadAttention, keys: int = WIDTH, values: int = WIDTH) -> None:
        super().__init__()
        self.inner, self.keys, self.values = inner, keys, values

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, x[..., : self.keys], x[..., : self.values], need_weights=False)[0]


class First(nn.Module):
    """The first output of a module."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)[0]


class Cells(nn.Module):
    """A recurrent cell over a sequence, and a classifier."""

    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.first, self.cell, self.head = nn.Linear(WIDTH, WIDTH), kind(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for step in self.first(x).unbind(1):
            state = self.cell(step, state)
        return self.head(state[0] if isinstance(state, tuple) else state)


class Pairs(nn.Module):
    """A bilinear layer after a linear one, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.pair = nn.Linear(WIDTH, WIDTH), nn.Bilinear(WIDTH, 12, WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.head(self.pair(self.first(x), y))


class WithTable(nn.Module):
    """A convolution and a bare parameter that is read without any layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.table = nn.Conv2d(3, WIDTH, 3), nn.Parameter(torch.randn(WIDTH, WIDTH))
        self.scale, self.head = nn.Parameter(torch.ones(WIDTH)), nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).mean((2, 3)) @ self.table * self.scale)


# The vectors of the old spectral norm are buffers that change in training.
OWNERS = {"spectral_norm": {"per_task": ("weight_u", "weight_v")}}
WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "weight_norm": weight_norm,
    "spectral_norm": spectral_norm,
    "parametrizations.weight_norm": parametrizations.weight_norm,
    "parametrizations.spectral_norm": parametrizations.spectral_norm,
}


def wrapped(wrap: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """A convolution and a linear layer whose weights are computed, and one of each that is plain."""
    return nn.Sequential(
        wrap(nn.Conv2d(3, 8, 3)),
        nn.Conv2d(8, 8, 3),
        nn.Flatten(),
        wrap(nn.Linear(128, WIDTH)),
        nn.ReLU(),
        nn.Linear(WIDTH, CLASSES),
    )
