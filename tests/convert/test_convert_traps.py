"""convert where modules or weights are shared, or weights are read without calling their layer."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from lookalikes import GPT, Tied, Twice, converted, net, refused, tokens
from torch import nn

from wsn_fast.convert.to_subnet import convert
from wsn_fast.nn.gated import SubnetLayer
from wsn_fast.nn.linear import FastSubnetLinear
from wsn_fast.ops import topc_mask


# --- shared modules and tied parameters ---
def test_a_module_used_twice_stays_one() -> None:
    model = convert(Twice())
    assert model.first is model.second
    assert type(model.first) is FastSubnetLinear
    assert [n for n, _ in model.first.named_parameters()] == ["weight", "bias", "weight_score", "bias_score"]


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
    match = r"one tied parameter needs one density.*encoder.weight.*0\.1.*decoder.weight.*0\.5"
    refused(Tied(), match, {"encoder": 0.1, "*": 0.5})


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


def test_a_head_that_replaces_a_tied_layer_unties_it() -> None:
    model = convert(Tied(), heads="decoder")
    assert converted(model) == ["encoder", "fc"]


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


# --- modules that read weights without calling their layers ---
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


# --- Hugging Face itself ---
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
