"""The nets: the paper's sizes to the weight, their shape for conversion, and clear refusals."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from wsn_fast.train import choices
from wsn_fast.train.choices import DATASETS, KINDS, default_net
from wsn_fast.train.nets import NETS, alexnet, build, convnet4, lenet, mlp, resnet18

SHAPES = {name: (3, 32, 32) for name in NETS} | {
    "mlp": (1, 28, 28),
    "lenet_large": (1, 32, 32),
    "convnet4": (3, 64, 64),
}
# Smaller images where a forward pass is run.
SMALL = SHAPES | dict.fromkeys(("resnet18", "resnet18_stateless"), (3, 16, 16)) | {"convnet4": (3, 16, 16)}
RUNNABLE = [name for name in NETS if name != "lenet_large"]


@pytest.mark.parametrize(
    ("name", "gated"),
    [
        ("mlp", 784 * 100 + 100 * 100),
        ("lenet", 20 * 3 * 25 + 50 * 20 * 25 + 3200 * 800 + 800 * 500),
        ("lenet_large", 64 * 25 + 128 * 64 * 25 + 20_480_000 + 2500 * 1500),
        ("alexnet", 64 * 3 * 16 + 128 * 64 * 9 + 256 * 128 * 4 + 1024 * 2048 + 2048 * 2048),
        ("resnet18", 1_090_140),
        ("resnet18_stateless", 1_090_140),
        ("convnet4", 160 * 3 * 9 + 3 * 160 * 160 * 9 + 2560 * 640 + 640 * 640),
    ],
)
def test_gated_weights_are_the_papers(name: str, gated: int) -> None:
    with torch.device("meta"):
        net = build(name, SHAPES[name], 10)
    layers = [m for m in net.features.modules() if type(m) in (nn.Linear, nn.Conv2d)]
    assert sum(layer.weight.numel() for layer in layers) == gated


def test_the_large_lenet_has_its_layer_of_20_480_000_weights() -> None:
    with torch.device("meta"):
        net = build("lenet_large", (1, 32, 32), 10)
    assert max(weight.numel() for weight in net.parameters()) == 20_480_000


@pytest.mark.parametrize("name", NETS)
def test_no_layer_has_a_bias(name: str) -> None:
    with torch.device("meta"):
        net = build(name, SHAPES[name], 10)
    norms = {id(p) for m in net.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()}
    assert not [key for key, p in net.named_parameters() if id(p) not in norms and not key.endswith("weight")]


@pytest.mark.parametrize("name", RUNNABLE)
def test_logits_come_from_flat_features_through_the_head(name: str) -> None:
    net = build(name, SMALL[name], 7).eval()
    x = torch.randn(2, *SMALL[name])
    assert type(net.head) is nn.Linear and net.head.out_features == 7 and net.head.bias is None
    features = net.features(x)
    assert features.shape == (2, net.head.in_features)
    assert torch.equal(net(x), features @ net.head.weight.t())


@pytest.mark.parametrize("name", RUNNABLE)
def test_every_parameter_gets_a_gradient(name: str) -> None:
    torch.manual_seed(0)
    net = build(name, SMALL[name], 3)
    net(torch.randn(8, *SMALL[name])).square().sum().backward()
    assert not [key for key, p in net.named_parameters() if p.grad is None or not p.grad.any()]


@pytest.mark.parametrize("name", ["mlp", "lenet", "convnet4"])
@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 1, 1), (3, 7, 11)])
def test_small_and_oblong_images(name: str, shape: tuple[int, ...]) -> None:
    assert build(name, shape, 10)(torch.randn(2, *shape)).shape == (2, 10)


@pytest.mark.parametrize(("name", "shape"), [("alexnet", (1, 19, 22)), ("resnet18", (1, 9, 14))])
def test_the_smallest_images_work(name: str, shape: tuple[int, ...]) -> None:
    assert build(name, shape, 10)(torch.randn(2, *shape)).shape == (2, 10)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("alexnet", (1, 8, 8)),
        ("alexnet", (1, 32, 18)),
        ("alexnet", (3, 2, 2)),
        ("resnet18", (1, 8, 8)),
        ("resnet18", (1, 9, 8)),
    ],
)
def test_too_small_images_are_refused_by_net_and_shape(name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError) as caught:
        build(name, shape, 10)
    assert f"net '{name}'" in str(caught.value) and f"{shape} are too small" in str(caught.value)


@pytest.mark.parametrize("net", [lenet, alexnet, resnet18, convnet4])
def test_flat_inputs_are_refused_by_convolutional_nets(net: object) -> None:
    with pytest.raises(ValueError, match=rf"net '{net.__name__}': .* expected images \(C, H, W\), got \(784,\)"):
        net((784,))


@pytest.mark.parametrize("shape", [(), (0,), (1, -2), (1.0, 2), (True, 3)])
def test_shapes_that_are_not_positive_integers_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="net 'mlp': input_shape: expected positive integers"):
        mlp(shape)


@pytest.mark.parametrize("classes", [0, True, 2.0])
def test_bad_classes_are_refused(classes: object) -> None:
    with pytest.raises(ValueError, match=f"classes: expected an integer of at least 1, got {classes}"):
        build("mlp", (4,), classes)


def test_mlp_takes_flat_inputs_and_any_depth() -> None:
    net = mlp((40,), 5, hidden=(8, 7, 6))
    widths = [m.weight.shape for m in net.modules() if isinstance(m, nn.Linear)]
    assert widths == [(8, 40), (7, 8), (6, 7), (5, 6)]


def test_alexnet_drops_as_the_papers_does() -> None:
    assert [m.p for m in alexnet((3, 32, 32)).modules() if isinstance(m, nn.Dropout)] == [
        0.2,
        0.2,
        0.5,
        0.5,
        0.5,
    ]


def test_default_batch_norm_is_an_ordinary_one() -> None:
    norms = [m for m in resnet18((3, 32, 32)).modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 20 and all(type(m) is nn.BatchNorm2d for m in norms)
    assert all(m.affine and m.track_running_stats for m in norms)


def test_stateless_batch_norm_has_neither_parameters_nor_buffers() -> None:
    norms = [m for m in build("resnet18_stateless", (3, 32, 32), 10).modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 20 and not any([*m.parameters(), *m.buffers()] for m in norms)


def test_unknown_batch_norm_is_refused() -> None:
    with pytest.raises(ValueError, match="batch_norm: expected per_task or stateless, got 'none'"):
        resnet18((3, 32, 32), batch_norm="none")


def test_unknown_net_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=f"net: expected one of {', '.join(NETS)}, got 'vgg'"):
        build("vgg", (3, 32, 32), 10)


@pytest.mark.parametrize(
    ("dataset", "kind", "net"),
    [
        ("digits", "split", "mlp"),
        ("mnist", "permuted", "mlp"),
        ("mnist", "rotated", "lenet"),
        ("cifar10", "permuted", "mlp"),
        ("cifar100", "split", "alexnet"),
        ("folder", "split", "convnet4"),
    ],
)
def test_default_nets(dataset: str, kind: str, net: str) -> None:
    assert default_net(dataset, kind) == net


def test_every_net_can_be_chosen() -> None:
    assert tuple(NETS) == choices.NETS


def test_every_default_net_exists() -> None:
    assert {default_net(dataset, kind) for dataset in DATASETS for kind in KINDS} <= set(NETS)
