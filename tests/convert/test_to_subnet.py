"""convert: what becomes a subnet layer, what stays, and what is refused before anything has changed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from lookalikes import MODELS, Conv1D, ResNet, VisionTransformer, converted, images, net, refused, snapshot, vectors
from torch import Tensor, nn

from wsn_fast.convert.to_subnet import convert
from wsn_fast.nn import per_task
from wsn_fast.nn.conv import FastSubnetConv1d, FastSubnetConv2d, FastSubnetConv3d
from wsn_fast.nn.conv_transpose import FastSubnetConvTranspose1d, FastSubnetConvTranspose2d, FastSubnetConvTranspose3d
from wsn_fast.nn.gated import SubnetLayer
from wsn_fast.nn.heads import TaskHeads
from wsn_fast.nn.linear import FastSubnetLinear, FastSubnetTransposedLinear
from wsn_fast.ops import topc_mask


# --- what a conversion keeps ---
@pytest.mark.parametrize(
    ("layer", "subnet"),
    [
        (nn.Linear(4, 3), FastSubnetLinear),
        (nn.Linear(4, 3, bias=False), FastSubnetLinear),
        (nn.Conv1d(4, 6, 3, padding=2, dilation=2, groups=2), FastSubnetConv1d),
        (nn.Conv2d(4, 6, 3, padding="same", padding_mode="reflect"), FastSubnetConv2d),
        (nn.Conv3d(4, 6, 2, stride=2, bias=False), FastSubnetConv3d),
        (nn.ConvTranspose1d(4, 6, 3, dilation=2, groups=2), FastSubnetConvTranspose1d),
        (nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1), FastSubnetConvTranspose2d),
        (nn.ConvTranspose3d(4, 6, 2, bias=False), FastSubnetConvTranspose3d),
        (Conv1D(3, 4), FastSubnetTransposedLinear),
    ],
)
def test_a_single_layer_is_converted_to_its_kind(layer: nn.Module, subnet: type[SubnetLayer]) -> None:
    result = convert(layer, 0.3, rule="value")
    assert result is layer
    assert type(result) is subnet
    assert (result.density, result.rule) == (0.3, "value")
    assert result.weight_score.shape == result.weight.shape
    assert (result.bias_score is None) == (result.bias is None)


@pytest.mark.parametrize("name", MODELS)
def test_at_density_one_the_model_computes_what_it_did(name: str) -> None:
    make, make_input, _ = MODELS[name]
    model, x = make().eval(), make_input()
    expected = model(x)
    assert torch.equal(convert(model, 1.0)(x), expected)


@pytest.mark.parametrize(
    ("name", "layers"),
    [("resnet", 5), ("vit", 10), ("gpt", 4), ("up", 4), ("tied", 3), ("twice", 2)],
)
def test_every_layer_of_common_models_is_converted(name: str, layers: int) -> None:
    assert len(converted(convert(MODELS[name][0]()))) == layers


def test_layers_compute_with_the_masks_of_their_scores() -> None:
    model, x = convert(net(), 0.3), vectors()
    by_hand = x
    for module in model:
        if isinstance(module, SubnetLayer):
            weight = module.weight * topc_mask(module.weight_score, 0.3)
            by_hand = by_hand @ weight.t() + module.bias * topc_mask(module.bias_score, 0.3)
        else:
            by_hand = module(by_hand)
    torch.testing.assert_close(model(x), by_hand)


def test_weights_are_the_same_parameters_and_keep_their_flags() -> None:
    model = net().double().eval()
    model[0].weight.requires_grad_(False)
    model[2].train()
    before = dict(model.named_parameters())
    convert(model)
    after = dict(model.named_parameters())
    assert all(after[name] is param for name, param in before.items())
    assert not model[0].weight.requires_grad
    assert model[0].weight_score.requires_grad
    assert model[0].weight_score.dtype is torch.float64
    assert [m.training for m in model] == [False, False, True, False, False]


def test_a_model_on_meta_stays_there_and_can_be_loaded() -> None:
    real, x = convert(net()), vectors()
    with torch.device("meta"):
        empty = net()
    convert(empty)
    assert {t.device.type for t in empty.parameters()} == {"meta"}
    assert empty[0].weight_masks.is_meta
    empty.to_empty(device="cpu").load_state_dict(real.state_dict())
    assert torch.equal(empty(x), real(x))


def test_hooks_of_a_layer_go_on_working() -> None:
    model, seen = net(), []
    model[0].register_forward_hook(lambda module, args, out: seen.append(type(module)))
    convert(model)(vectors())
    assert seen == [FastSubnetLinear]


def test_references_to_a_layer_stay_valid() -> None:
    model = net()
    listed = [model[0]]
    convert(model)
    assert listed[0] is model[0]


def test_subclasses_and_other_modules_are_converted_too() -> None:
    class Scaled(nn.Linear):
        pass

    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": Scaled(3, 3), "c": nn.LSTM(3, 3), "d": nn.Bilinear(2, 2, 2)})
    convert(model)  # a warning is an error
    assert converted(model) == ["a", "b", "c", "d"]
    assert [isinstance(m, FastSubnetLinear) for m in model.values()] == [True, True, False, False]
    assert [m.DENSE for m in model.values()] == [nn.Linear, Scaled, nn.LSTM, nn.Bilinear]
    assert all(isinstance(m, m.DENSE) for m in model.values())
    assert "weight_hh_l0" in dict(model["c"].named_parameters())


def test_a_class_that_is_only_called_conv1d_is_no_linear_layer() -> None:
    class Conv1D(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.ones(2, 2)), None

        def forward(self, x: Tensor) -> Tensor:
            return x + self.weight

    model, x = convert(nn.Sequential(Conv1D(), nn.Linear(2, 2))), torch.zeros(2, 2)
    assert converted(model) == ["0", "1"]
    assert not isinstance(model[0], FastSubnetTransposedLinear)
    assert torch.equal(model[0](x), model[0].weight * model[0].masks_of_scores()["weight"])


@pytest.mark.parametrize("mode", ["N01", "U01"])
def test_score_init_reaches_the_layers(mode: str) -> None:
    score = convert(nn.Linear(60, 60), score_init=mode).weight_score
    assert (score.min() < 0) == (mode == "N01")
    assert score.max() > 0.5


def test_a_second_call_changes_nothing() -> None:
    model = convert(ResNet(), {"fc": 0.2, "*": 0.4}, exclude_modules="downsample.0")
    before, state = snapshot(model), copy.deepcopy(model.state_dict())
    assert convert(model, {"fc": 0.2, "*": 0.4}, exclude_modules="downsample.0") is model
    assert snapshot(model) == before
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_a_model_may_be_converted_in_parts() -> None:
    model = net()
    convert(model, {"0": 0.1}, target_modules="0")
    convert(model, {"2": 0.2}, target_modules="2")
    convert(model, {"0": 0.9}, target_modules="0")  # is converted already, and left as it is
    assert [model[0].density, model[2].density] == [0.1, 0.2]
    assert type(model[4]) is nn.Linear


# --- which layers, and how dense ---
@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("blocks.1.fc1", ["blocks.1.fc1"]),
        ("fc1", ["blocks.0.fc1", "blocks.1.fc1"]),
        ("blocks.0.*", ["blocks.0.attn.qkv", "blocks.0.attn.proj", "blocks.0.fc1", "blocks.0.fc2"]),
        (["head", "*.fc?"], ["blocks.0.fc1", "blocks.0.fc2", "blocks.1.fc1", "blocks.1.fc2", "head"]),
    ],
)
def test_target_modules(targets: str | list[str], expected: list[str]) -> None:
    assert converted(convert(VisionTransformer(), target_modules=targets)) == expected


def test_exclude_modules_wins_over_target_modules() -> None:
    model = convert(VisionTransformer(), target_modules="blocks.0.*", exclude_modules=["fc1", "*.proj"])
    assert converted(model) == ["blocks.0.attn.qkv", "blocks.0.fc2"]


def test_filter_fn_is_asked_with_layer_and_name() -> None:
    asked = []

    def filter_fn(module: nn.Module, name: str) -> bool:
        asked.append((name, type(module)))
        return name != "2"

    assert converted(convert(net(), filter_fn=filter_fn)) == ["0", "4"]
    assert asked == [("0", nn.Linear), ("2", nn.Linear), ("4", nn.Linear)]


def test_density_by_pattern_takes_the_first_match() -> None:
    model = convert(VisionTransformer(), {"blocks.0.fc1": 0.1, "fc1": 0.2, "blocks.*": 0.3, "*": 0.4})
    names = ["blocks.0.fc1", "blocks.1.fc1", "blocks.1.fc2", "head"]
    assert [model.get_submodule(name).density for name in names] == [0.1, 0.2, 0.3, 0.4]


def test_density_patterns_need_not_cover_heads() -> None:
    assert converted(convert(net(), {"0": 0.1, "2": 0.2}, heads="4")) == ["0", "2"]


def test_a_catch_all_density_may_be_left_over() -> None:
    assert convert(net(), {"?": 0.1, "*": 0.9})[4].density == 0.1


@pytest.mark.parametrize(
    ("kwargs", "error", "match"),
    [
        ({"density": 0.0}, ValueError, "density must be a number in .0, 1., got 0.0"),
        ({"density": {"*": 1.5}}, ValueError, r"density\['\*'\] must be"),
        ({"density": {"0": 0.1}}, ValueError, "density has no pattern for 2"),
        ({"density": {"fc": 0.1, "*": 0.5}}, ValueError, r"density: the patterns \['fc'\] have no effect"),
        ({"density": {"?": 0.5, "0": 0.1}}, ValueError, r"density: the patterns \['0'\] have no effect: .* an earlier"),
        ({"density": {0: 0.1}}, TypeError, "density must be name patterns"),
        ({"rule": "top"}, ValueError, "rule must be one of"),
        ({"score_init": "zeros"}, ValueError, "score_init must be one of"),
        ({"heads": "4", "batch_norm": "frozen"}, ValueError, "batch_norm must be one of"),
        ({"target_modules": "fc1"}, ValueError, "target_modules='fc1' matches nothing .*'0', '2', '4'"),
        ({"target_modules": ["0", "1"]}, ValueError, "target_modules='1' matches nothing"),
        ({"exclude_modules": "head"}, ValueError, "exclude_modules='head' matches nothing"),
        ({"exclude_modules": [0]}, TypeError, "exclude_modules must be name patterns"),
        ({"exclude_modules": "*"}, ValueError, r"no layer to convert.*\['0', '2', '4'\]"),
        ({"target_modules": []}, ValueError, "no layer to convert"),
        ({"filter_fn": lambda m, n: False}, ValueError, "no layer to convert"),
        (
            {"heads": "fc"},
            ValueError,
            r"heads: the model has no module inside it that is named 'fc'; its nn.Linear layers are: \['0', '2', '4'\]",
        ),
        ({"heads": "1"}, ValueError, r"heads\['1'\]: template must have parameters to train, and this ReLU has none"),
        ({"heads": ""}, ValueError, "heads: the model has no module inside it that is named ''"),
        ({"heads": ["4"]}, TypeError, "heads must be a module name or a mapping"),
        ({"heads": {"4": "abc"}}, TypeError, r"heads\['4'\] must be a width"),
        ({"heads": {"4": 0.5}}, TypeError, r"heads\['4'\] must be a width"),
        ({"heads": {"4": 0}}, ValueError, r"heads\['4'\]: the width of a head must be a positive int, got 0"),
        ({"heads": {"4": True}}, ValueError, "must be a positive int, got True"),
        ({"heads": {"4": {1: -2}}}, ValueError, "must be a positive int, got -2"),
        ({"heads": {"4": [1, 2.5]}}, TypeError, "task must be an int or a str"),
    ],
)
def test_bad_arguments(kwargs: dict[str, Any], error: type[Exception], match: str) -> None:
    refused(net(), match, error=error, **kwargs)


def test_a_model_that_is_none() -> None:
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got list"):
        convert([nn.Linear(2, 2)])  # type: ignore[arg-type]


def test_a_model_without_such_layers() -> None:
    refused(nn.Sequential(nn.ReLU(), nn.LayerNorm(3)), "no layer to convert")


def test_lazy_modules_are_refused_until_they_have_run() -> None:
    model = nn.Sequential(nn.LazyLinear(4), nn.ReLU(), nn.Linear(4, 2))
    refused(model, "0 is not initialised yet")
    model(vectors())
    assert converted(convert(model)) == ["0", "2"]


# --- heads ---
@pytest.mark.parametrize(
    ("heads", "width", "widths"),
    [
        ("4", 3, {}),
        ({"4": 7}, 7, {}),
        ({"4": [1, "b"]}, 3, {1: 3, "b": 3}),
        ({"4": {1: 2, "b": 5}}, None, {1: 2, "b": 5}),
    ],
)
def test_heads_replace_the_classifier(heads: Any, width: int | None, widths: dict[int | str, int]) -> None:
    model = convert(net(), heads=heads)
    assert converted(model) == ["0", "2"]
    assert isinstance(model[4], TaskHeads)
    assert (model[4].in_features, model[4].out_features) == (8, width)
    assert {task: model[4].head(task).out_features for task in model[4].tasks} == widths


def test_heads_are_as_the_classifier_was() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3, bias=False)).double().eval()
    head = convert(model, heads={"1": [0]})[1].head(0)
    assert (head.bias, head.weight.dtype, head.training) == (None, torch.float64, False)
    assert model[1].add(1).weight.dtype is torch.float64


def test_heads_appear_wherever_the_classifier_was_used() -> None:
    model = net()
    model.classifier = model[4]
    convert(model, heads="classifier")
    assert isinstance(model[4], TaskHeads)
    assert model.classifier is model[4]


def test_a_pattern_for_the_classifier_is_no_typo() -> None:
    assert converted(convert(net(), heads="4", exclude_modules="4")) == ["0", "2"]


# --- normalisation ---
def test_normalisation_layers_become_per_task() -> None:
    model = convert(ResNet())
    names = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    assert set(per_task.marked(model.layer1[0].bn2)) == set(names)
    assert {f"bn1.{name}_tasks" for name in names} <= model.state_dict().keys()
    assert per_task.marked(convert(VisionTransformer()).blocks[0].attn.q_norm) == ("weight", "bias")


def test_stateless_batch_norm_uses_batch_statistics_only() -> None:
    model, x = convert(ResNet(), batch_norm="stateless").eval(), images()
    hidden = model.conv1(x)
    mean, var = hidden.mean((0, 2, 3), keepdim=True), hidden.var((0, 2, 3), unbiased=False, keepdim=True)
    torch.testing.assert_close(model.bn1(hidden), (hidden - mean) / (var + model.bn1.eps).sqrt())
    assert not any("bn" in name for name in model.state_dict())
    assert (model.bn1.affine, model.bn1.track_running_stats) == (False, False)
    model.train()(x).sum().backward()


def test_stateless_leaves_other_norms_per_task() -> None:
    model = convert(VisionTransformer(), batch_norm="stateless")
    assert per_task.marked(model.blocks[0].norm1) == ("weight", "bias")


def test_stateless_does_not_drop_what_tasks_may_own() -> None:
    refused(convert(ResNet()), "an earlier convert made bn1 per-task", batch_norm="stateless")
