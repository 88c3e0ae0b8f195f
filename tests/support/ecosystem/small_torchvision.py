"""Models of torchvision, as small as their classes permit."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

from torch import nn

from .builders import Heads, Inputs, image, normal

CLASSES = 5


def _of(name: str) -> Any:
    """A module of torchvision, imported late."""
    return import_module(f"torchvision.models.{name}")


def alexnet() -> nn.Module:
    model = _of("alexnet").AlexNet(CLASSES, dropout=0.0)
    model.classifier[1], model.classifier[4] = nn.Linear(256 * 36, 16), nn.Linear(16, 16)
    model.classifier[6] = nn.Linear(16, CLASSES)
    return model


def vgg11() -> nn.Module:
    vgg = _of("vgg")
    model = vgg.VGG(vgg.make_layers([8, "M", 16, "M", 16, "M"], batch_norm=True), CLASSES)
    model.classifier[0], model.classifier[3] = nn.Linear(16 * 49, 16), nn.Linear(16, 16)
    model.classifier[6] = nn.Linear(16, CLASSES)
    return model


def resnet(block: str = "BasicBlock", **options: Any) -> nn.Module:
    """A ResNet with one block for each stage, without the last one."""
    module = _of("resnet")
    model = module.ResNet(getattr(module, block), [1, 1, 1, 1], CLASSES, **options)
    model.layer4, model.fc = nn.Identity(), nn.Linear(model.fc.in_features // 2, CLASSES)
    return model


def densenet() -> nn.Module:
    return _of("densenet").DenseNet(4, (2, 2, 2, 2), 8, num_classes=CLASSES)


def googlenet() -> nn.Module:
    model = _of("googlenet").GoogLeNet(CLASSES, aux_logits=False, init_weights=False)
    model.inception5a, model.inception5b = nn.Identity(), nn.Identity()
    model.fc = nn.Linear(832, CLASSES)
    return model


def inception() -> nn.Module:
    model = _of("inception").Inception3(CLASSES, aux_logits=False, init_weights=False)
    for name in ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e", "Mixed_7a", "Mixed_7b", "Mixed_7c"):
        setattr(model, name, nn.Identity())
    model.fc = nn.Linear(768, CLASSES)
    return model


def mobilenet_v2() -> nn.Module:
    return _of("mobilenetv2").MobileNetV2(CLASSES, width_mult=0.25)


def mobilenet_v3() -> nn.Module:
    module = _of("mobilenetv3")
    setting = partial(module.InvertedResidualConfig, width_mult=0.25)
    rows = [
        setting(16, 3, 16, 16, True, "RE", 2, 1),
        setting(16, 3, 72, 24, False, "RE", 2, 1),
        setting(24, 5, 96, 40, True, "HS", 2, 1),
    ]
    return module.MobileNetV3(rows, 32, CLASSES)


def mnasnet() -> nn.Module:
    return _of("mnasnet").MNASNet(0.2, CLASSES)


def shufflenet() -> nn.Module:
    return _of("shufflenetv2").ShuffleNetV2([1, 1, 1], [8, 16, 32, 64, 64], CLASSES)


def squeezenet() -> nn.Module:
    return _of("squeezenet").SqueezeNet("1_1", CLASSES)


def efficientnet() -> nn.Module:
    module = _of("efficientnet")
    rows = [
        module.MBConvConfig(1, 3, 1, 8, 8, 1),
        module.MBConvConfig(4, 3, 2, 8, 16, 2),
        module.FusedMBConvConfig(4, 3, 2, 16, 16, 1),
    ]
    return module.EfficientNet(rows, 0.0, num_classes=CLASSES, last_channel=32)


def regnet() -> nn.Module:
    module = _of("regnet")
    params = module.BlockParams.from_init_params(depth=4, w_0=16, w_a=8.0, w_m=2.0, group_width=8, se_ratio=0.25)
    return module.RegNet(params, CLASSES)


def convnext() -> nn.Module:
    module = _of("convnext")
    return module.ConvNeXt([module.CNBlockConfig(8, 16, 1), module.CNBlockConfig(16, None, 1)], num_classes=CLASSES)


def vit() -> nn.Module:
    return _of("vision_transformer").VisionTransformer(32, 8, 2, 2, 32, 64, num_classes=CLASSES)


def swin(version: int) -> nn.Module:
    module = _of("swin_transformer")
    options = (
        {} if version == 1 else {"block": module.SwinTransformerBlockV2, "downsample_layer": module.PatchMergingV2}
    )
    return module.SwinTransformer([4, 4], 8, [1, 2], [1, 2], [4, 4], num_classes=CLASSES, **options)


def maxvit() -> nn.Module:
    return _of("maxvit").MaxVit((64, 64), 8, 2, [8, 16], [1, 1], 4, 0.0, num_classes=CLASSES)


def video_resnet(*makers: str) -> nn.Module:
    module = _of("video.resnet")
    stem = module.R2Plus1dStem if makers[0] == "Conv2Plus1D" else module.BasicStem
    model = module.VideoResNet(
        module.BasicBlock, [getattr(module, name) for name in makers], [1, 1, 1, 1], stem, num_classes=CLASSES
    )
    model.layer4, model.fc = nn.Identity(), nn.Linear(256, CLASSES)
    return model


def s3d() -> nn.Module:
    model = _of("video.s3d").S3D(CLASSES)
    model.avgpool = nn.AdaptiveAvgPool3d(1)
    for place in range(8, 16):
        model.features[place] = nn.Identity()
    model.classifier[1] = nn.Conv3d(480, CLASSES, 1)
    return model


def swin3d() -> nn.Module:
    module = _of("video.swin_transformer")
    return module.SwinTransformer3d([2, 4, 4], 8, [1, 2], [1, 2], [2, 4, 4], num_classes=CLASSES)


def mvit() -> nn.Module:
    module = _of("video.mvit")
    rows = [
        module.MSBlockConfig(1, 8, 8, [3, 3, 3], [3, 3, 3], [1, 1, 1], [1, 2, 2]),
        module.MSBlockConfig(2, 8, 16, [3, 3, 3], [3, 3, 3], [1, 2, 2], [1, 1, 1]),
    ]
    return module.MViT((32, 32), 4, rows, False, True, True, True, num_classes=CLASSES)


def segmentation(kind: str) -> nn.Module:
    """A segmentation model on a ResNet with one block for each stage."""
    features = import_module("torchvision.models._utils").IntermediateLayerGetter(resnet(), {"layer3": "out"})
    if kind == "FCN":
        return _of("segmentation.fcn").FCN(features, _of("segmentation.fcn").FCNHead(256, CLASSES))
    deeplab = _of("segmentation.deeplabv3")
    return deeplab.DeepLabV3(features, deeplab.DeepLabHead(256, CLASSES, (2, 4, 6)))


def lraspp() -> nn.Module:
    return _of("segmentation.lraspp").lraspp_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=CLASSES
    )


_VIDEO, _SMALL_VIDEO = normal(2, 3, 4, 32, 32), normal(2, 3, 4, 16, 16)
_SIMPLE, _FLAT = "Conv3DSimple", "Conv3DNoTemporal"

MODELS: dict[str, tuple[Callable[[], nn.Module], Inputs, Heads]] = {
    "alexnet": (alexnet, image(96), "classifier.6"),
    "vgg11_bn": (vgg11, image(), "classifier.6"),
    "resnet18": (resnet, image(), "fc"),
    "resnext50_32x4d": (partial(resnet, "Bottleneck", groups=8, width_per_group=4), image(), "fc"),
    "wide_resnet50_2": (partial(resnet, "Bottleneck", width_per_group=8), image(), "fc"),
    "densenet121": (densenet, image(), "classifier"),
    "googlenet": (googlenet, image(64), "fc"),
    "inception_v3": (inception, image(80), "fc"),
    "mobilenet_v2": (mobilenet_v2, image(64), "classifier.1"),
    "mobilenet_v3": (mobilenet_v3, image(), "classifier.3"),
    "mnasnet": (mnasnet, image(64), "classifier.1"),
    "shufflenet_v2": (shufflenet, image(64), "fc"),
    "squeezenet1_1": (squeezenet, image(64), "classifier.1"),
    "efficientnet": (efficientnet, image(), "classifier.1"),
    "regnet_y": (regnet, image(), "fc"),
    "convnext": (convnext, image(), "classifier.2"),
    "vit_b_16": (vit, image(), "heads.head"),
    "swin_t": (partial(swin, 1), image(), "head"),
    "swin_v2_t": (partial(swin, 2), image(), "head"),
    "maxvit_t": (maxvit, image(64), "classifier.5"),
    "r3d_18": (partial(video_resnet, *[_SIMPLE] * 4), _SMALL_VIDEO, "fc"),
    "mc3_18": (partial(video_resnet, _SIMPLE, *[_FLAT] * 3), _SMALL_VIDEO, "fc"),
    "r2plus1d_18": (partial(video_resnet, *["Conv2Plus1D"] * 4), _SMALL_VIDEO, "fc"),
    "s3d": (s3d, normal(2, 3, 8, 32, 32), "classifier.1"),
    "swin3d_t": (swin3d, _VIDEO, "head"),
    "mvit_v1_b": (mvit, _VIDEO, "head.1"),
    "fcn_resnet": (partial(segmentation, "FCN"), image(64), "classifier.4"),
    "deeplabv3_resnet": (partial(segmentation, "DeepLab"), image(64), "classifier.4"),
    "lraspp_mobilenet_v3": (
        lraspp,
        image(64, name="input"),
        ("classifier.low_classifier", "classifier.high_classifier"),
    ),
}
