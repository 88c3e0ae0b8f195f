"""Models of timm, torchvision and torch itself: one line each."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from . import small_timm, small_torch, small_torchvision
from .builders import Heads, Inputs, Model, both, created, image, normal, tokens


def _timm(name: str, size: int = 32, heads: Heads = "head", exception: str = "", **options: Any) -> Model:
    return Model("timm", name, created(name, num_classes=5, **options), image(size), heads, exception=exception)


_STAGED = {"depths": (1, 1, 1, 1), "dims": (8, 16, 16, 16)}
_VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
_SWIN = {"img_size": 64, "embed_dim": 8, "depths": (1, 1), "num_heads": (1, 2), "window_size": 4}

TIMM = [
    _timm("resnet18", heads="fc", channels=(8, 16, 16, 16)),
    _timm("resnet26", heads="fc", channels=(4, 4, 4, 4)),
    _timm("seresnet50", heads="fc", channels=(4, 4, 4, 4), layers=(1, 1, 1, 1)),
    _timm("resnest14d", heads="fc", channels=(8, 8, 8, 8)),
    Model("timm", "resnetv2_50x1_bit", small_timm.bit, image(64), "head.fc"),
    _timm("resnetv2_50", 64, heads="head.fc", channels=(32, 32, 64, 64), layers=(1, 1, 1, 1), stem_chs=16),
    _timm("nf_resnet26", heads="head.fc", width_factor=0.25),
    _timm("nfnet_l0", 64, heads="head.fc", channels=(16, 32, 32, 32), depths=(1, 1, 1, 1), group_size=8),
    Model("timm", "regnety", small_timm.regnet, image(), "head.fc"),
    _timm("res2net50_26w_4s", heads="fc", layers=(1, 1, 1, 1), channels=(8, 8, 16, 16)),
    _timm("convnext_atto", heads="head.fc", **_STAGED),
    _timm("convnextv2_atto", heads="head.fc", **_STAGED),
    Model("timm", "efficientnet_b0", small_timm.efficientnet, image(64), "classifier"),
    _timm("mobilenetv3_small_050", 64, heads="classifier"),
    _timm("mobilenetv2_050", 64, heads="classifier"),
    _timm("mnasnet_small", 64, heads="classifier"),
    _timm("ghostnet_050", 64, heads="classifier"),
    _timm("rexnet_100", 64, heads="head.fc", width_mult=0.25),
    _timm("densenet121", 64, heads="classifier", growth_rate=4, block_config=(2, 2, 2, 2)),
    _timm("dpn48b", 64, heads="classifier", k_r=8, groups=4, k_sec=(1, 1, 1, 1), inc_sec=(4, 4, 4, 4),
          num_init_features=8),
    Model("timm", "hrnet_w18", small_timm.hrnet, image(64)),
    _timm("dla34", 64, heads="fc", levels=(1, 1, 1, 1, 1, 1), channels=(4, 4, 8, 8, 16, 16)),
    Model("timm", "repvgg", small_timm.repvgg, image(), "head.fc"),
    Model("timm", "vgg11_bn", small_timm.vgg, image(), "head.fc"),
    _timm("vit_tiny_patch16_224", **_VIT),
    _timm("vit_relpos_small_patch16_224", **_VIT),
    _timm("deit_tiny_patch16_224", **_VIT),
    _timm("deit_tiny_distilled_patch16_224", heads=("head", "head_dist"), **_VIT),
    _timm("deit3_small_patch16_224", **_VIT),
    _timm("beit_base_patch16_224", **_VIT),
    _timm("beitv2_base_patch16_224", **_VIT),
    _timm("eva02_tiny_patch14_224", **_VIT),
    _timm("cait_xxs24_224", **_VIT),
    _timm("xcit_nano_12_p8_224", **_VIT),
    _timm("swin_tiny_patch4_window7_224", 64, heads="head.fc", **_SWIN),
    _timm("swinv2_tiny_window8_256", 64, heads="head.fc", **_SWIN),
    _timm("swinv2_cr_tiny_224", 64, heads="head.fc", **_SWIN),
    _timm("twins_pcpvt_small", 64, img_size=64, depths=(1, 1, 1, 1), embed_dims=(8, 16, 16, 16),
          num_heads=(1, 2, 2, 2)),
    _timm("pvt_v2_b0", 64, depths=(1, 1, 1, 1), embed_dims=(8, 16, 16, 16), num_heads=(1, 2, 2, 2)),
    _timm("davit_tiny", 64, heads="head.fc", depths=(1, 1), embed_dims=(8, 16), num_heads=(1, 2), window_size=4),
    _timm("coatnet_nano_rw_224", 64, heads="head.fc", img_size=64, embed_dim=(32, 32, 32, 32), depths=(1, 1, 1, 1),
          stem_width=(8, 8)),
    _timm("maxvit_nano_rw_256", 64, heads="head.fc", img_size=64, embed_dim=(32, 32, 32, 32), depths=(1, 1, 1, 1),
          stem_width=(8, 8)),
    Model("timm", "focalnet", small_timm.focalnet, image(64), "head.fc"),
    Model("timm", "mixer", partial(small_timm.mixer, "MixerBlock", "Mlp"), image(), "head"),
    Model("timm", "resmlp", partial(small_timm.mixer, "ResBlock", "Mlp", "Affine"), image(), "head"),
    Model("timm", "gmlp", partial(small_timm.mixer, "SpatialGatingBlock", "GatedMlp"), image(), "head"),
    Model("timm", "convmixer", small_timm.convmixer, image(), "head"),
    Model("timm", "poolformer", small_timm.poolformer, image(64), "head.fc"),
    _timm("levit_128s", 64, heads=("head.linear", "head_dist.linear"), img_size=64, embed_dim=(16, 16, 16),
          key_dim=4, num_heads=(2, 2, 2), depth=(1, 1, 1)),
    _timm("visformer_tiny", 64, img_size=64, embed_dim=16, num_heads=2, depth=(1, 1, 1), init_channels=8),
    _timm("edgenext_xx_small", 64, heads="head.fc", dims=(8, 16, 32, 32), depths=(1, 1, 1, 1)),
    _timm("efficientformer_l1", 224, heads=("head", "head_dist"), depths=(1, 1, 1, 2), embed_dims=(8, 16, 16, 16)),
    _timm("efficientformerv2_s0", 64, heads=("head", "head_dist"), img_size=64, depths=(1, 1, 1, 2),
          embed_dims=(8, 16, 16, 16)),
    _timm("efficientvit_m0", 64, heads="head.linear", img_size=64, embed_dim=(16, 32, 32), key_dim=(4, 4, 4),
          depth=(1, 1, 1), num_heads=(2, 2, 2)),
    _timm("mobilevit_xxs", 64, heads="head.fc"),
    _timm("mobilevitv2_050", 64, heads="head.fc"),
    _timm("tinynet_e", 64, heads="classifier"),
    _timm("fastvit_t8", 64, heads="head.fc", layers=(1, 1, 1, 1), embed_dims=(8, 16, 16, 16)),
    _timm("repvit_m0_9", 64, heads=("head.head.l", "head.head_dist.l"), embed_dim=(8, 16, 16, 16),
          depth=(1, 1, 1, 1)),
    _timm("inception_next_atto", 64, heads="head.fc2", depths=(1, 1, 1, 1), dims=(8, 16, 16, 16)),
    _timm("sequencer2d_s", 64, layers=(1, 1), embed_dims=(16, 16), hidden_sizes=(4, 4), patch_sizes=(8, 2),
          mlp_ratios=(2.0, 2.0)),
    Model("timm", "volo", small_timm.volo, image(64), ("head", "aux_head")),
    _timm("tnt_s_legacy_patch16_224", img_size=32, embed_dim=16, inner_dim=8, depth=1, num_heads_inner=2,
          num_heads_outer=2),
    _timm("starnet_s1", 64, base_dim=8, depths=(1, 1, 1, 1)),
    _timm("ese_vovnet19b_slim_dw", 64, heads="head.fc"),
]  # fmt: skip


def _vision(kind: str, build: Any, inputs: Inputs, heads: Heads = None, exception: str = "") -> Model:
    return Model("torchvision", kind, build, inputs, heads, exception=exception)


TORCHVISION = [_vision(kind, build, inputs, heads) for kind, (build, inputs, heads) in small_torchvision.MODELS.items()]


def _torch(kind: str, build: Any, inputs: Inputs, heads: Heads = "head", **how: Any) -> Model:
    return Model("torch", kind, build, inputs, heads, **how)


_SEQUENCE = normal(2, 6, 16)

TORCH = [
    _torch("nn.Transformer", small_torch.transformer, both(normal(2, 6, 16, name="src"), normal(2, 5, 16, name="tgt")),
           None),
    _torch("nn.TransformerEncoder", small_torch.encoder, tokens(name="x")),
    _torch("nn.MultiheadAttention", partial(small_torch.Reader, small_torch.attention), _SEQUENCE),
    _torch("nn.MultiheadAttention(kdim)", partial(small_torch.Reader, small_torch.cross_attention), _SEQUENCE),
    *(
        _torch(f"nn.{kind.__name__}", partial(small_torch.Reader, partial(small_torch.recurrent, kind)), _SEQUENCE)
        for kind in (nn.LSTM, nn.GRU, nn.RNN)
    ),
    *(
        _torch(f"nn.{kind.__name__}", partial(small_torch.Cells, kind), _SEQUENCE)
        for kind in (nn.LSTMCell, nn.GRUCell, nn.RNNCell)
    ),
    _torch("nn.EmbeddingBag", small_torch.bag, tokens(name="input")),
    _torch("nn.Bilinear", small_torch.Pairs, both(normal(2, 16), normal(2, 12, name="y"))),
    *(
        _torch(name, partial(small_torch.wrapped, wrap), image(8, name="input"), "5",
               owners=small_torch.OWNERS.get(name, {}))
        for name, wrap in small_torch.WRAPPERS.items()
    ),
    _torch("nn.Conv2d and a table", small_torch.WithTable, image(8)),
]  # fmt: skip
