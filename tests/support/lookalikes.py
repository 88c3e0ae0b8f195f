"""What the tests of conversion share: small models shaped as torchvision's, timm's and Hugging Face's, and checks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wsn_fast.convert.to_subnet import convert
from wsn_fast.nn.gated import SubnetLayer


class ResNet(nn.Module):
    """A stem, one block with a downsampling shortcut, and a classifier, named as in torchvision."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.layer1 = nn.Sequential(BasicBlock(4, 8))
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer1(F.relu(self.bn1(self.conv1(x))))
        return self.fc(x.mean((2, 3)))


class BasicBlock(nn.Module):
    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, out, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.downsample = nn.Sequential(nn.Conv2d(width, out, 1, stride=2, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + self.downsample(x))


class Attention(nn.Module):
    """Self-attention from called linear layers, as timm's vision transformer has it."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_norm = nn.LayerNorm(dim // 2)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, dim = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, 2, dim // 2).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(self.q_norm(q), k, v)
        return self.proj(x.transpose(1, 2).reshape(batch, length, dim))


class Block(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, 2 * dim)
        self.fc2 = nn.Linear(2 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class VisionTransformer(nn.Module):
    """Patches, two blocks and a head, named as in timm, without free-standing parameters."""

    def __init__(self, dim: int = 8) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, dim, 4, stride=4)
        self.blocks = nn.Sequential(Block(dim), Block(dim))
        self.head = nn.Linear(dim, 5)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patch_embed(x).flatten(2).transpose(1, 2)
        return self.head(self.blocks(tokens).mean(1))


class Conv1D(nn.Module):
    """The linear layer of GPT-2, whose weight is ``[in, out]``: the same attributes and product as Hugging Face's."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(torch.randn(nx, nf) * 0.3)
        self.bias = nn.Parameter(torch.randn(nf) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.size()[:-1], self.nf)


Conv1D.__module__ = "transformers.pytorch_utils"


class GPT(nn.Module):
    """Token embedding, an MLP of ``Conv1D``, and (if ``tied``) an output layer that shares the embedding's weight."""

    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.wte = nn.Embedding(11, 6)
        self.ln_1 = nn.LayerNorm(6)
        self.c_fc = Conv1D(24, 6)
        self.c_proj = Conv1D(6, 24)
        self.lm_head = nn.Linear(6, 11, bias=False)
        if tied:
            self.lm_head.weight = self.wte.weight

    def forward(self, x: Tensor) -> Tensor:
        h = self.wte(x)
        return self.lm_head(h + self.c_proj(F.gelu(self.c_fc(self.ln_1(h)))))


def images(count: int = 6) -> Tensor:
    return torch.randn(count, 3, 8, 8)


def tokens(count: int = 4) -> Tensor:
    return torch.randint(11, (count, 3))


class Tied(nn.Module):
    """An autoencoder whose decoder shares the weight of its (square) encoder, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder, self.fc = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.decoder.weight = self.encoder.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.decoder(torch.relu(self.encoder(x)))))


class Twice(nn.Module):
    """One layer at two paths."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second, self.fc = self.first, nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.second(torch.relu(self.first(x)))))


class UpAndDown(nn.Module):
    """A convolution, transposed convolutions back to the size of the image, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2)
        self.wide = nn.ConvTranspose1d(6, 4, 3, dilation=2, bias=False)
        self.fc = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        down = F.relu(self.down(x))
        x = F.relu(self.up(down, output_size=x.shape))
        return self.fc(self.wide(x.flatten(2)).mean(2))


def vectors(count: int = 5) -> Tensor:
    return torch.randn(count, 6)


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], str]] = {
    "resnet": (ResNet, images, "fc"),
    "vit": (VisionTransformer, images, "head"),
    "gpt": (lambda: GPT(tied=False), tokens, "lm_head"),
    "up": (UpAndDown, images, "fc"),
    "tied": (Tied, vectors, "fc"),
    "twice": (Twice, vectors, "fc"),
}
"""For each name: how to make the model, how to make an input, and the name of its classifier."""


def converted(model: nn.Module) -> list[str]:
    return [name for name, m in model.named_modules() if isinstance(m, SubnetLayer)]


def snapshot(model: nn.Module) -> list[object]:
    """All that convert could change: modules, their types and attributes, and their tensors by identity."""
    seen: list[object] = [(n, id(m), type(m), sorted(vars(m))) for n, m in model.named_modules()]
    for module in model.modules():
        tensors = {**module._parameters, **module._buffers}
        seen += [(n, id(t), None if t is None else t.requires_grad) for n, t in tensors.items()]
        seen.append(getattr(module, "activation_relu_or_gelu", None))
    return seen


def refused(model: nn.Module, match: str, *args: Any, error: type[Exception] = ValueError, **kwargs: Any) -> None:
    before = snapshot(model)
    with pytest.raises(error, match=match):
        convert(model, *args, **kwargs)
    assert snapshot(model) == before


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
