"""Nets with the layers of well-known models, so narrow that the CPU takes no time for what torch computes in them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Shape(NamedTuple):
    """How to make a net and its batch; how they are smaller than the model's; the layer that becomes one head for each
    task; and what :class:`wsn_fast.WSN` has to know about parameters that tasks share."""

    net: Callable[[], nn.Module]
    batch: Callable[[], Tensor]
    scale: str
    head: str | None = None
    owners: Mapping[str, Any] = MappingProxyType({})


class Residual(nn.Module):
    """``inner(x) + skip(x)``."""

    def __init__(self, inner: nn.Module, skip: nn.Module | None = None) -> None:
        super().__init__()
        self.inner, self.skip = inner, skip or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + self.skip(x)


def _convolution(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


def _basic_block(inputs: int, outputs: int, stride: int) -> nn.Module:
    inner = nn.Sequential(_convolution(inputs, outputs, 3, stride), nn.ReLU(), _convolution(outputs, outputs, 3))
    skip = None if stride == 1 else _convolution(inputs, outputs, 1, stride)
    return nn.Sequential(Residual(inner, skip), nn.ReLU())


def resnet18() -> nn.Module:
    """20 convolutions without bias, a batch norm after each, and a linear head."""
    blocks = [_basic_block(4, 4, 1), _basic_block(4, 4, 1)]
    for width in (8, 16, 32):
        blocks += [_basic_block(width // 2, width, 2), _basic_block(width, width, 1)]
    stem = nn.Sequential(_convolution(3, 4, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
    features = nn.Sequential(stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(OrderedDict(features=features, head=nn.Linear(32, 10)))


class Attention(nn.Module):
    """Attention with 12 heads: one linear layer for queries, keys and values, and one for the result."""

    def __init__(self, width: int, causal: bool) -> None:
        super().__init__()
        self.qkv, self.out, self.causal = nn.Linear(width, 3 * width), nn.Linear(width, width), causal

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 12, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(mixed.transpose(1, 2).flatten(2))


def _transformer(embed: nn.Module, causal: bool) -> nn.Module:
    def block() -> nn.Module:
        mlp = nn.Sequential(nn.LayerNorm(48), nn.Linear(48, 192), nn.GELU(), nn.Linear(192, 48))
        return nn.Sequential(Residual(nn.Sequential(nn.LayerNorm(48), Attention(48, causal))), Residual(mlp))

    blocks, head = nn.Sequential(*(block() for _ in range(12))), nn.Linear(48, 64, bias=not causal)
    return nn.Sequential(OrderedDict(embed=embed, blocks=blocks, norm=nn.LayerNorm(48), head=head))


class Tokens(nn.Module):
    """Embeddings of tokens and of their positions."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(64, 48), nn.Embedding(8, 48)

    def forward(self, x: Tensor) -> Tensor:
        return self.token(x) + self.position(torch.arange(x.shape[1], device=x.device))


class Patches(nn.Module):
    """A class token and the patches of an image, which are one convolution; embeddings of their positions."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 48, 4, 4)
        self.first, self.position = nn.Parameter(torch.zeros(1, 1, 48)), nn.Parameter(torch.zeros(1, 5, 48))

    def forward(self, x: Tensor) -> Tensor:
        patches = self.patch(x).flatten(2).transpose(1, 2)
        return torch.cat((self.first.expand(len(x), -1, -1), patches), 1) + self.position


_RESNET = "widths / 16 (64 -> 4), 2 images 32 x 32"
_GPT2 = "widths / 16 (768 -> 48), 12 heads, 1 x 8 tokens of 64 known ones; the head is not tied to the embedding"
_VIT = "widths / 16 (768 -> 48), 12 heads, 1 image 8 x 8 in patches 4 x 4; the head sees every token"
MODELS: Mapping[str, Shape] = MappingProxyType({
    "resnet18": Shape(resnet18, partial(torch.randn, 2, 3, 32, 32), _RESNET, "head"),
    "gpt2-small": Shape(
        lambda: _transformer(Tokens(), True), partial(torch.randint, 64, (1, 8)), _GPT2, "head",
    ),
    "vit-b": Shape(
        lambda: _transformer(Patches(), False), partial(torch.randn, 1, 3, 8, 8), _VIT, "head",
        {"frozen": "embed.first"},
    ),
})  # fmt: skip
