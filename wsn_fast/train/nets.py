"""The paper's nets as ordinary modules without biases. `convert` turns their layers into subnet layers.

Each maps images [N, C, H, W] to logits: `features` gives [N, F], and `head` is `nn.Linear(F, classes,
bias=False)`, which `convert(..., heads="head")` replaces by a head per task. The gated weights are those of
`features`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Net(nn.Module):
    """A feature extractor and a linear head.

    Attributes:
        features: Maps [N, *input_shape] to [N, F].
        head: Maps [N, F] to logits [N, classes].
        memory_format: The order of the images in memory, in which `features` gets them. Convolutions keep it.
    """

    # It tells wsn_fast.continual.mixed_batch that every row is computed by itself, and that rows keep their order.
    row_wise = True

    def __init__(self, features: nn.Sequential, feature_dim: int, classes: int) -> None:
        super().__init__()
        if isinstance(classes, bool) or not isinstance(classes, int) or classes < 1:
            raise ValueError(f"classes: expected an integer of at least 1, got {classes!r}")
        self.features = features
        self.memory_format = torch.contiguous_format
        self.head = nn.Linear(feature_dim, classes, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, classes] of inputs [N, *input_shape]."""
        logits: Tensor = self.head(self.features(x.contiguous(memory_format=self.memory_format)))
        return logits


def mlp(input_shape: Sequence[int], classes: int = 10, *, hidden: Sequence[int] = (100, 100)) -> Net:
    """Fully connected, for Permuted MNIST: 784-100-100, 88,400 gated weights.

    Args:
        input_shape: Shape of one input, any number of dimensions.
        classes: Size of the head.
        hidden: Widths of the hidden layers.

    Returns:
        The net.

    Raises:
        ValueError: If `input_shape` or `classes` is not made of positive integers.
    """
    sizes = [math.prod(_positive("mlp", input_shape)), *hidden]
    return Net(nn.Sequential(nn.Flatten(), *_dense(sizes)), sizes[-1], classes)


def lenet(
    input_shape: Sequence[int], classes: int = 10, *, widths: tuple[int, int, int, int] = (20, 50, 800, 500)
) -> Net:
    """Two convolutions, two dense layers: 2,986,500 gated weights for 3x32x32 (CIFAR-100 Superclass).

    With widths (64, 128, 2500, 1500) on 1x32x32 (Omniglot Rotation) it has 24,436,400 gated weights, 20,480,000 of them
    in one layer.

    Args:
        input_shape: (C, H, W).
        classes: Size of the head.
        widths: Channels of the convolutions, then widths of the dense layers.

    Returns:
        The net.

    Raises:
        ValueError: If `input_shape` is not three positive integers.
    """
    channels, *size = _image("lenet", input_shape)
    layers: list[nn.Module] = []
    for width in widths[:2]:
        layers += (nn.Conv2d(channels, width, 5, padding=2, bias=False), nn.ReLU())
        layers.append(nn.MaxPool2d(3, 2, padding=1))
        channels, size = width, [_out(side, 3, 2, 1) for side in size]
    dense = _dense([channels * math.prod(size), *widths[2:]])
    return Net(nn.Sequential(*layers, nn.Flatten(), *dense), widths[3], classes)


def alexnet(input_shape: Sequence[int], classes: int = 10) -> Net:
    """Three convolutions, two dense layers, dropout: 6,499,328 gated weights for 3x32x32 (CIFAR-100 Split).

    Args:
        input_shape: (C, H, W).
        classes: Size of the head.

    Returns:
        The net.

    Raises:
        ValueError: If `input_shape` is not three positive integers, or too small for the poolings.
    """
    channels, *size = _image("alexnet", input_shape)
    layers: list[nn.Module] = []
    for width, kernel, dropout in ((64, 4, 0.2), (128, 3, 0.2), (256, 2, 0.5)):
        layers += (nn.Conv2d(channels, width, kernel, bias=False), nn.ReLU())
        layers += (nn.Dropout(dropout), nn.MaxPool2d(2))
        channels, size = width, [_out(side, kernel, 1, 0) // 2 for side in size]
    _require_room("alexnet", input_shape, size)
    dense = _dense([channels * math.prod(size), 2048, 2048], dropout=0.5)
    return Net(nn.Sequential(*layers, nn.Flatten(), *dense), 2048, classes)


def resnet18(input_shape: Sequence[int], classes: int = 10, *, width: int = 20, batch_norm: str = "per_task") -> Net:
    """ResNet-18 with a 3x3 stem: 1,090,140 gated weights for 3x32x32 and width 20 (5-Datasets).

    Args:
        input_shape: (C, H, W).
        classes: Size of the head.
        width: Channels of the first stage. The four stages have 1, 2, 4 and 8 times as many.
        batch_norm: `per_task`: ordinary `nn.BatchNorm2d`, which WSN keeps per task. `stateless`: as in the paper, the
            batch norms have neither affine parameters nor running statistics, so predictions depend on the batch.

    Returns:
        The net.

    Raises:
        ValueError: If `batch_norm` is unknown, or `input_shape` is not three positive integers or too small.
    """
    if batch_norm not in ("per_task", "stateless"):
        raise ValueError(f"batch_norm: expected per_task or stateless, got {batch_norm!r}")
    norm: Callable[[int], nn.Module] = nn.BatchNorm2d
    if batch_norm == "stateless":
        norm = partial(nn.BatchNorm2d, affine=False, track_running_stats=False)
    channels, *size = _image("resnet18", input_shape)
    layers: list[nn.Module] = [nn.Conv2d(channels, width, 3, padding=1, bias=False), norm(width), nn.ReLU()]
    channels = width
    for stage in range(4):
        for block in range(2):
            stride = 2 if stage and not block else 1
            layers.append(_BasicBlock(channels, width << stage, stride, norm))
            channels, size = width << stage, [_out(side, 3, stride, 1) for side in size]
    size = [side // 2 for side in size]
    _require_room("resnet18", input_shape, size)
    features = nn.Sequential(*layers, nn.AvgPool2d(2), nn.Flatten())
    return Net(features, channels * math.prod(size), classes)


def convnet4(
    input_shape: Sequence[int], classes: int = 10, *, width: int = 160, hidden: Sequence[int] = (640, 640)
) -> Net:
    """Four strided convolutions, two dense layers: 2,743,520 gated weights for 3x64x64 (TinyImageNet).

    Args:
        input_shape: (C, H, W).
        classes: Size of the head.
        width: Channels of every convolution.
        hidden: Widths of the dense layers.

    Returns:
        The net.

    Raises:
        ValueError: If `input_shape` is not three positive integers.
    """
    channels, *size = _image("convnet4", input_shape)
    layers: list[nn.Module] = []
    for _ in range(4):
        layers += (nn.Conv2d(channels, width, 3, stride=2, padding=1, bias=False), nn.ReLU())
        channels, size = width, [_out(side, 3, 2, 1) for side in size]
    sizes = [channels * math.prod(size), *hidden]
    return Net(nn.Sequential(*layers, nn.Flatten(), *_dense(sizes)), sizes[-1], classes)


NETS: Mapping[str, Callable[[Sequence[int], int], Net]] = MappingProxyType(
    {
        "mlp": mlp,
        "lenet": lenet,
        "lenet_large": partial(lenet, widths=(64, 128, 2500, 1500)),
        "alexnet": alexnet,
        "resnet18": resnet18,
        "resnet18_stateless": partial(resnet18, batch_norm="stateless"),
        "convnet4": convnet4,
    }
)


def build(name: str, input_shape: Sequence[int], classes: int) -> Net:
    """Build a net by name.

    Args:
        name: A key of `NETS`.
        input_shape: Shape of one input, (C, H, W); for `mlp` any.
        classes: Size of the head.

    Returns:
        The net, freshly initialised from torch's global generator.

    Raises:
        ValueError: If the name is unknown, or the net cannot take that shape.
    """
    if name not in NETS:
        raise ValueError(f"net: expected one of {', '.join(NETS)}, got {name!r}")
    return NETS[name](input_shape, classes)


class _BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut. The shortcut is a 1x1 convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False),
            norm(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            norm(outputs),
        )
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            projection = nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)
            self.shortcut = nn.Sequential(projection, norm(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.shortcut(x))


def _dense(sizes: Sequence[int], dropout: float = 0.0) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += (nn.Linear(inputs, outputs, bias=False), nn.ReLU())
        if dropout:
            layers.append(nn.Dropout(dropout))
    return layers


def _out(side: int, kernel: int, stride: int, padding: int) -> int:
    """Output side of a convolution or pooling (0 where the input is smaller than the kernel)."""
    return max(0, (side + 2 * padding - kernel) // stride + 1)


def _positive(net: str, input_shape: Sequence[int]) -> list[int]:
    if not input_shape or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in input_shape):
        raise ValueError(f"net {net!r}: input_shape: expected positive integers, got {tuple(input_shape)}")
    return list(input_shape)


def _image(net: str, input_shape: Sequence[int]) -> list[int]:
    if len(input_shape) != 3:
        raise ValueError(f"net {net!r}: input_shape: expected images (C, H, W), got {tuple(input_shape)}")
    return _positive(net, input_shape)


def _require_room(net: str, input_shape: Sequence[int], size: Sequence[int]) -> None:
    if min(size) < 1:
        raise ValueError(f"net {net!r}: input_shape: images of {tuple(input_shape)} are too small for this net")
