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
    return module.ResNetV2([1, 1, 1, 1], channels=(128, 128, 128, 128), **options)


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


def regnet() -> nn.Module:
    """A RegNetY with eight blocks."""
    module = _of("regnet")
    config = module.RegNetCfg(depth=8, w0=16, wa=16.0, wm=2.0, group_size=8, se_ratio=0.25)
    return module.RegNet(config, num_classes=CLASSES)


def repvgg() -> nn.Module:
    """A RepVGG with two stages."""
    module = _of("byobnet")
    blocks = tuple(module.ByoBlockCfg(type="rep", d=2, c=width, s=2, gs=0) for width in (8, 16))
    return module.ByobNet(module.ByoModelCfg(blocks=blocks, stem_type="rep", stem_chs=8), num_classes=CLASSES)


def mixer(block: str, mlp: str, norm: str = "") -> nn.Module:
    """A model of the family of MLP-Mixer, by the names of its parts."""
    module = _of("mlp_mixer")
    options = {"norm_layer": getattr(module, norm)} if norm else {}
    return module.MlpMixer(
        CLASSES,
        img_size=32,
        patch_size=8,
        num_blocks=2,
        embed_dim=16,
        mlp_ratio=(0.5, 4.0) if block == "MixerBlock" else 4,
        block_layer=getattr(module, block),
        mlp_layer=getattr(module, mlp),
        **options,
    )


def convmixer() -> nn.Module:
    return _of("convmixer").ConvMixer(16, 2, kernel_size=3, patch_size=4, num_classes=CLASSES)


def focalnet() -> nn.Module:
    return _of("focalnet").FocalNet(
        depths=(1, 1), embed_dim=8, focal_levels=(2, 2), focal_windows=(3, 3), num_classes=CLASSES
    )


def poolformer() -> nn.Module:
    module = _of("metaformer")
    return module.MetaFormer(
        depths=(1, 1, 1, 1),
        dims=(8, 16, 16, 16),
        downsample_norm=None,
        mlp_act=nn.GELU,
        mlp_bias=True,
        norm_layers=module.GroupNorm1,
        layer_scale_init_values=1e-5,
        res_scale_init_values=None,
        use_mlp_head=False,
        num_classes=CLASSES,
    )


def volo() -> nn.Module:
    return _of("volo").VOLO(
        [1, 1, 1, 1],
        img_size=64,
        num_classes=CLASSES,
        stem_hidden_dim=8,
        embed_dims=[16, 32, 32, 32],
        num_heads=[2, 2, 2, 2],
    )
