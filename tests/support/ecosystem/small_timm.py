"""Models of timm whose functions take no sizes: they are made from their classes."""

from __future__ import annotations

from functools import partial
from importlib import import_module
from typing import Any

from torch import nn

CLASSES = 5


def _of(name: str) -> Any:
    """A module of timm, imported late."""
    return import_module(f"timm.models.{name}")


def bit() -> nn.Module:
    """What ``resnetv2_50x1_bit`` is, with one block for each stage."""
    module = _of("resnetv2")
    conv = partial(import_module("timm.layers").StdConv2d, eps=1e-8)
    options = {"stem_chs": 32, "stem_type": "fixed", "conv_layer": conv, "num_classes": CLASSES}
    return module.ResNetV2([1, 1, 1, 1], channels=(32, 32, 64, 64), **options)


def efficientnet() -> nn.Module:
    """What ``efficientnet_b0`` is, with fewer channels."""
    return _of("efficientnet")._gen_efficientnet("efficientnet_b0", channel_multiplier=0.25, num_classes=CLASSES)


def hrnet() -> nn.Module:
    """The feature maps of an HRNet with one block for each branch."""

    def stage(branches: int, block: str = "BASIC") -> dict[str, Any]:
        return {
            "num_modules": 1,
            "num_branches": branches,
            "block_type": block,
            "num_blocks": (1,) * branches,
            "num_channels": (8, 16, 16, 16)[:branches],
            "fuse_method": "SUM",
        }

    stages = {"stage1": stage(1, "BOTTLENECK"), **{f"stage{n}": stage(n) for n in (2, 3, 4)}}
    return _of("hrnet").HighResolutionNetFeatures({"stem_width": 16, **stages})


def vgg() -> nn.Module:
    """A VGG with three convolutions."""
    module = _of("vgg")
    model = module.VGG([8, "M", 16, "M", 16, "M"], num_classes=CLASSES, norm_layer=nn.BatchNorm2d)
    model.pre_logits = module.ConvMlp(16, 32, 4)
    model.head.fc = nn.Linear(32, CLASSES)
    return model
