"""convert: what becomes a subnet layer, what stays, and what is refused before anything has changed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lookalikes import GPT, MODELS, Conv1D, ResNet, Tied, Twice, VisionTransformer, images, tokens, vectors
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, spectral_norm

from wsn_fast import per_task
from wsn_fast.convert import convert
from wsn_fast.heads import TaskHeads
from wsn_fast.layers import (
    FastSubnetConv1d,
    FastSubnetConv2d,
    FastSubnetConv3d,
    FastSubnetLinear,
    FastSubnetTransposedLinear,
    SubnetLayer,
)
from wsn_fast.ops import topc_mask


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


# --- what a conversion keeps
# --------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("layer", "subnet"),
    [
        (nn.Linear(4, 3), FastSubnetLinear),
        (nn.Linear(4, 3, bias=False), FastSubnetLinear),
        (nn.Conv1d(4, 6, 3, padding=2, dilation=2, groups=2), FastSubnetConv1d),
        (nn.Conv2d(4, 6, 3, padding="same", padding_mode="reflect"), FastSubnetConv2d),
        (nn.Conv3d(4, 6, 2, stride=2, bias=False), FastSubnetConv3d),
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
    [("resnet", 5), ("vit", 10), ("gpt", 3), ("tied", 3), ("twice", 2)],
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


def test_subclasses_and_other_modules_are_left_alone() -> None:
    class Scaled(nn.Linear):
        pass

    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": Scaled(3, 3), "c": nn.LSTM(3, 3), "d": nn.Bilinear(2, 2, 2)})
    convert(model)
    assert [type(m) for m in model.values()] == [FastSubnetLinear, Scaled, nn.LSTM, nn.Bilinear]
    assert "weight_hh_l0" in dict(model["c"].named_parameters())


def test_a_class_that_is_only_called_conv1d_is_left_alone() -> None:
    class Conv1D(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.ones(2, 2)), None

    model = convert(nn.Sequential(Conv1D(), nn.Linear(2, 2)))
    assert converted(model) == ["1"]


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
    assert [model[0].density, model[2].density] == [0.1, 0.2]
    assert type(model[4]) is nn.Linear


# --- which layers, and how dense
# ----------------------------------------------------------------------------------------
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


def test_a_catch_all_density_may_be_left_over() -> None:
    assert convert(net(), {"?": 0.1, "*": 0.9})[4].density == 0.1


@pytest.mark.parametrize(
    ("kwargs", "error", "match"),
    [
        ({"density": 0.0}, ValueError, "density must be a number in .0, 1., got 0.0"),
        ({"density": {"*": 1.5}}, ValueError, r"density\['\*'\] must be"),
        ({"density": {"0": 0.1}}, ValueError, "density has no pattern for 2"),
        ({"density": {"fc": 0.1, "*": 0.5}}, ValueError, r"density: \['fc'\] match no layer"),
        ({"density": {"?": 0.5, "0": 0.1}}, ValueError, r"density: \['0'\] match no layer .* earlier"),
        ({"density": {0: 0.1}}, TypeError, "density must be name patterns"),
        ({"rule": "top"}, ValueError, "rule must be one of"),
        ({"score_init": "zeros"}, ValueError, "score_init must be one of"),
        ({"batch_norm": "frozen"}, ValueError, "batch_norm must be one of"),
        ({"target_modules": "fc1"}, ValueError, "target_modules='fc1' matches no layer .*'0', '2', '4'"),
        ({"target_modules": ["0", "1"]}, ValueError, "target_modules='1' matches no layer"),
        ({"exclude_modules": "head"}, ValueError, "exclude_modules='head' matches no layer"),
        ({"exclude_modules": [0]}, TypeError, "exclude_modules must be name patterns"),
        ({"exclude_modules": "*"}, ValueError, r"no layer to convert.*\['0', '2', '4'\]"),
        ({"target_modules": []}, ValueError, "no layer to convert"),
        ({"filter_fn": lambda m, n: False}, ValueError, "no layer to convert"),
        (
            {"heads": "fc"},
            ValueError,
            r"heads: 'fc' is no nn.Linear of the model; these are: \['0', '2', '4'\]",
        ),
        ({"heads": "1"}, ValueError, "heads: '1' is no nn.Linear"),
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
    with pytest.raises(TypeError, match="model must be an nn.Module, got list"):
        convert([nn.Linear(2, 2)])  # type: ignore[arg-type]


def test_a_model_without_such_layers() -> None:
    refused(nn.Sequential(nn.ReLU(), nn.LayerNorm(3)), "no layer to convert")


# --- layers that cannot be converted
# ------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("wrap", "tensor"),
    [
        (parametrizations.weight_norm, "weight"),
        (lambda m: parametrizations.spectral_norm(m), "weight"),
        (spectral_norm, "weight"),
        (lambda m: prune.l1_unstructured(m, "weight", 0.5), "weight"),
        (lambda m: prune.l1_unstructured(m, "bias", 0.5), "bias"),
    ],
)
def test_a_computed_weight_is_refused(wrap: Callable[[nn.Module], nn.Module], tensor: str) -> None:
    model = net()
    model[2] = wrap(model[2])
    refused(model, f"2.{tensor} is computed")
    assert converted(convert(model, exclude_modules="2")) == ["0", "4"]


def test_lazy_modules_are_refused_until_they_have_run() -> None:
    model = nn.Sequential(nn.LazyLinear(4), nn.ReLU(), nn.Linear(4, 2))
    refused(model, "0 is not initialised yet")
    model(vectors())
    assert converted(convert(model)) == ["0", "2"]


def test_a_forward_of_the_instance_is_refused() -> None:
    model = net()
    model[0].forward = lambda x: x
    refused(model, "0.forward was replaced on the instance")


@pytest.mark.parametrize(
    "weight",
    [torch.zeros(3, 3, dtype=torch.complex64), torch.zeros(3, 0), torch.zeros(3, 3).to(torch.float8_e4m3fn)],
)
def test_weights_that_no_score_can_gate_are_refused(weight: Tensor) -> None:
    model = net()
    model[2].weight = nn.Parameter(weight, requires_grad=False)
    refused(model, "2.weight must be non-empty and of a dtype")


# --- shared modules and tied parameters
# ---------------------------------------------------------------------------------
def test_a_module_used_twice_stays_one() -> None:
    model = convert(Twice())
    assert model.first is model.second
    assert type(model.first) is FastSubnetLinear
    assert [n for n, _ in model.named_parameters() if "score" in n and "fc" not in n] == [
        "first.weight_score", "first.bias_score",
    ]  # fmt: skip


def test_patterns_know_all_names_of_a_module() -> None:
    assert converted(convert(Twice(), exclude_modules="second")) == ["fc"]


def test_tied_layers_share_their_scores() -> None:
    model = convert(Tied(), 0.3)
    assert model.decoder.weight is model.encoder.weight
    assert model.decoder.weight_score is model.encoder.weight_score
    assert model.decoder.bias_score is not model.encoder.bias_score


def test_a_layer_converted_later_joins_the_scores_of_its_tie() -> None:
    model = Tied()
    convert(model, target_modules="fc")
    model.extra = nn.Linear(6, 3)
    model.extra.weight = model.fc.weight
    convert(model, target_modules="extra")
    assert model.extra.weight_score is model.fc.weight_score


def test_tied_layers_need_one_density() -> None:
    refused(Tied(), r"one tied parameter needs one density.*encoder.weight.*0\.1.*decoder.weight.*0\.5", {
        "encoder": 0.1, "*": 0.5,
    })  # fmt: skip


def test_a_later_layer_must_agree_with_its_tie() -> None:
    model = Tied()
    model.extra = nn.Linear(6, 3)
    convert(model, target_modules="fc", rule="value")
    model.extra.weight = model.fc.weight
    refused(model, "one tied parameter needs one density and rule", target_modules="extra")


def test_a_tie_with_an_embedding_is_refused() -> None:
    refused(GPT(), "lm_head.weight is tied to wte.weight, which is not converted.*exclude_modules")


def test_a_tie_with_an_excluded_layer_is_refused() -> None:
    refused(Tied(), "decoder.weight is tied to encoder.weight, which is not", exclude_modules="encoder")


def test_a_tie_with_a_bare_parameter_is_refused() -> None:
    model = net()
    model.alias = model[2].weight
    refused(model, "2.weight is tied to alias")


@pytest.mark.parametrize("kwargs", [{"exclude_modules": "lm_head"}, {"heads": "lm_head"}])
def test_ways_out_of_a_tie(kwargs: dict[str, Any]) -> None:
    assert converted(convert(GPT(), **kwargs)) == ["c_fc", "c_proj"]


def test_parameters_that_only_share_memory_are_refused() -> None:
    model = Tied()
    model.decoder.weight = nn.Parameter(model.encoder.weight.t())
    refused(model, "encoder.weight and decoder.weight share memory but are not one Parameter")


def test_ties_are_seen_on_meta() -> None:
    with torch.device("meta"):
        model = Tied()
        model.decoder.weight = model.encoder.weight
    convert(model)
    assert model.decoder.weight_score is model.encoder.weight_score
    assert model.fc.weight_score is not model.encoder.weight_score


# --- modules that read weights without calling their layers
# ---------------------------------------------------------------
def encoder_layer(**kwargs: Any) -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, **kwargs)


def masked_by_hand(dense: nn.Module, subnet: nn.Module) -> nn.Module:
    """``dense`` with the masks that the layers of ``subnet`` have now multiplied into its weights."""
    with torch.no_grad():
        for name, layer in subnet.named_modules():
            if isinstance(layer, SubnetLayer):
                for gate in layer.gated():
                    param = dense.get_submodule(name).get_parameter(gate.name)
                    param.mul_(topc_mask(gate.score, layer.density))
    return dense


def test_multihead_attention_is_refused_by_name() -> None:
    refused(encoder_layer(), "self_attn .MultiheadAttention. .* dropped silently.*exclude_modules='self_attn'")


@pytest.mark.parametrize("targets", ["self_attn", "out_proj", "*"])
def test_multihead_attention_is_refused_as_a_target(targets: str) -> None:
    refused(encoder_layer(), "self_attn .MultiheadAttention.", target_modules=targets)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"exclude_modules": "self_attn"},
        {"exclude_modules": "out_proj"},
        {"target_modules": "linear?"},
        {"filter_fn": lambda module, name: name.startswith("linear")},
    ],
)
def test_multihead_attention_may_be_left_out(kwargs: dict[str, Any]) -> None:
    assert converted(convert(encoder_layer(), **kwargs)) == ["linear1", "linear2"]


def test_nothing_inside_an_excluded_attention_is_converted() -> None:
    model = encoder_layer()
    model.self_attn.out_proj = nn.Linear(8, 8)
    assert converted(convert(model, exclude_modules="self_attn")) == ["linear1", "linear2"]


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("torchvision.models.swin_transformer", "ShiftedWindowAttention"),
        ("timm.models.beit", "Attention"),
        ("timm.models.eva", "EvaAttention"),
        ("timm.models.swin_transformer_v2", "WindowAttention"),
    ],
)
def test_known_readers_and_their_subclasses_are_refused(module: str, name: str) -> None:
    base = type(name, (nn.Module,), {"__module__": module})
    reader = type("Derived", (base,), {})()
    reader.qkv = nn.Linear(4, 12)
    model = nn.ModuleDict({"attn": reader, "fc": nn.Linear(4, 4)})
    refused(model, "attn .Derived. computes with bare weights")
    assert converted(convert(model, exclude_modules="attn")) == ["fc"]


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_encoder_layers_apply_masks_in_training_and_inference(norm_first: bool, activation: str) -> None:
    dense = encoder_layer(norm_first=norm_first, activation=activation)
    model, x = convert(copy.deepcopy(dense), 0.3, exclude_modules="self_attn"), torch.randn(3, 4, 8)
    trained = model.train()(x)
    with torch.no_grad():
        inferred = model.eval()(x)
    torch.testing.assert_close(inferred, trained)
    torch.testing.assert_close(trained, masked_by_hand(dense, model)(x))


def test_a_frozen_encoder_layer_applies_masks_without_no_grad() -> None:
    # The fast path is also taken where nothing requires a gradient.
    model, x = convert(encoder_layer(), 0.3, exclude_modules="self_attn"), torch.randn(3, 4, 8)
    trained = model.train()(x)
    torch.testing.assert_close(model.eval().requires_grad_(False)(x), trained)


def test_encoders_apply_masks_to_padded_batches() -> None:
    dense = nn.TransformerEncoder(encoder_layer(), 2)
    model = convert(copy.deepcopy(dense), 0.3, exclude_modules="self_attn")
    x, padding = torch.randn(3, 4, 8), torch.tensor([[0, 0, 0, 0], [0, 0, 1, 1], [0, 0, 0, 1]]).bool()
    trained = model.train()(x, src_key_padding_mask=padding)
    with torch.no_grad():
        inferred = model.eval()(x, src_key_padding_mask=padding)
    torch.testing.assert_close(inferred, trained)
    torch.testing.assert_close(trained, masked_by_hand(dense, model)(x, src_key_padding_mask=padding))


def test_the_fast_path_stays_off_in_copies_and_stacks() -> None:
    layer = convert(encoder_layer(), 0.3, exclude_modules="self_attn")
    model, x = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), torch.randn(3, 4, 8)
    trained = model.train()(x)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), trained)


def test_the_fast_path_stays_on_where_nothing_is_converted() -> None:
    model = nn.ModuleList([nn.TransformerEncoder(encoder_layer(), 1), nn.Linear(3, 3)])
    convert(model, target_modules="1")
    assert model[0].use_nested_tensor
    assert model[0].layers[0].activation_relu_or_gelu == 1


def test_decoder_layers_apply_masks_in_training_and_inference() -> None:
    dense = nn.TransformerDecoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model = convert(copy.deepcopy(dense), 0.3, exclude_modules=["self_attn", "multihead_attn"])
    x, memory = torch.randn(3, 4, 8), torch.randn(3, 5, 8)
    trained = model.train()(x, memory)
    with torch.no_grad():
        inferred = model.eval()(x, memory)
    torch.testing.assert_close(inferred, trained)
    torch.testing.assert_close(trained, masked_by_hand(dense, model)(x, memory))


# --- heads
# --------------------------------------------------------------------------------------------------------------
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


# --- normalisation
# ------------------------------------------------------------------------------------------------------
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
    assert "affine=False" in repr(model.bn1)
    model.train()(x).sum().backward()


def test_stateless_leaves_other_norms_per_task() -> None:
    model = convert(VisionTransformer(), batch_norm="stateless")
    assert per_task.marked(model.blocks[0].norm1) == ("weight", "bias")


def test_stateless_does_not_drop_what_tasks_may_own() -> None:
    refused(convert(ResNet()), "an earlier convert made bn1 per-task", batch_norm="stateless")


# --- Hugging Face itself
# ------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def transformers() -> Any:
    return pytest.importorskip("transformers")


def gpt2(transformers: Any) -> nn.Module:
    config = transformers.GPT2Config(
        n_embd=16, n_layer=2, n_head=2, vocab_size=11, n_positions=8, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config).eval()


def test_gpt2_as_it_comes_is_refused(transformers: Any) -> None:
    refused(gpt2(transformers), "lm_head.weight is tied to transformer.wte.weight")


def test_gpt2_computes_the_same_at_density_one(transformers: Any) -> None:
    model, ids = gpt2(transformers), tokens()
    expected = model(ids).logits
    convert(model, 1.0, exclude_modules="lm_head")
    assert len(converted(model)) == 8
    assert torch.equal(model(ids).logits, expected)


def test_bert_is_converted_whole(transformers: Any) -> None:
    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, vocab_size=11
    )
    model, ids = transformers.BertModel(config).eval(), tokens()
    expected = model(ids).last_hidden_state
    convert(model, {"pooler.dense": 0.3, "*": 1.0})
    assert len(converted(model)) == 13
    assert torch.equal(model(ids).last_hidden_state, expected)


def test_bert_applies_masks_in_inference(transformers: Any) -> None:
    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, vocab_size=11
    )
    dense, ids = transformers.BertModel(config).eval(), tokens()
    model = convert(copy.deepcopy(dense), 0.3)
    with torch.no_grad():
        inferred = model(ids).last_hidden_state
        torch.testing.assert_close(inferred, masked_by_hand(dense, model)(ids).last_hidden_state)
