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


def test_an_embedding_and_its_tied_decoder_share_their_scores() -> None:
    model, x = convert(GPT(), 0.3), tokens()
    assert converted(model) == ["wte", "c_fc", "c_proj", "lm_head"]
    assert model.lm_head.weight_score is model.wte.weight_score
    dense = masked_by_hand(GPT(), model)
    with torch.no_grad():
        assert torch.equal(model.wte(x), dense.wte(x))
        assert torch.equal(model.lm_head(dense.wte(x)), dense.lm_head(dense.wte(x)))


def test_a_tie_with_an_excluded_layer_is_refused() -> None:
    match = r"decoder\.weight and encoder\.weight are one tied parameter, and only the first .*exclude decoder\.weight"
    refused(Tied(), match, exclude_modules="encoder")


def test_a_tie_with_a_bare_parameter_is_gated_at_both_places() -> None:
    model = net()
    model.alias = model[2].weight
    convert(model, 0.3)
    assert model.alias_score is model[2].weight_score
    model = net()
    model.alias = model[2].weight
    refused(
        model, r"2\.weight and alias are one tied parameter, and only the first would be masked", target_modules="2"
    )


@pytest.mark.parametrize(
    ("kwargs", "layers"),
    [
        ({"exclude_modules": ["lm_head", "wte"]}, ["c_fc", "c_proj"]),
        ({"heads": "lm_head"}, ["wte", "c_fc", "c_proj"]),
    ],
)
def test_ways_out_of_a_tie(kwargs: dict[str, Any], layers: list[str]) -> None:
    assert converted(convert(GPT(), **kwargs)) == layers


@pytest.mark.parametrize("one", ["lm_head", "wte"])
def test_one_side_of_a_tie_cannot_be_left_out(one: str) -> None:
    refused(GPT(), r"are one tied parameter, and only the first would be masked", exclude_modules=one)


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
    """``dense``, with the weights of ``subnet`` and the masks that its layers have now multiplied into them."""
    dense.load_state_dict(subnet.state_dict(), strict=False)
    done = set()
    with torch.no_grad():
        for name, layer in subnet.named_modules():
            for gate in layer.gated() if isinstance(layer, SubnetLayer) else ():
                param = dense.get_submodule(name).get_parameter(gate.name)
                if id(param) not in done:
                    done.add(id(param))
                    param.mul_(topc_mask(gate.score, layer.density))
    return dense


ATTENTION = ["self_attn", "self_attn.out_proj"]
LINEAR = ["linear1", "linear2"]


@pytest.mark.parametrize(
    ("kwargs", "layers"),
    [
        ({}, [*ATTENTION, *LINEAR]),
        ({"target_modules": "self_attn"}, ATTENTION),
        ({"target_modules": "out_proj"}, ATTENTION[1:]),
        ({"target_modules": "*"}, [*ATTENTION, *LINEAR]),
        ({"exclude_modules": "self_attn"}, LINEAR),
        ({"exclude_modules": "out_proj"}, ["self_attn", *LINEAR]),
        ({"target_modules": "linear?"}, LINEAR),
        ({"filter_fn": lambda module, name: name.startswith("linear")}, LINEAR),
    ],
)
def test_attention_is_gated_or_left_out_by_name(kwargs: dict[str, Any], layers: list[str]) -> None:
    dense = encoder_layer()
    model, x = convert(copy.deepcopy(dense), 0.3, **kwargs), torch.randn(3, 4, 8)
    assert converted(model) == layers
    masked_by_hand(dense, model)
    assert torch.equal(model(x), dense(x))
    with torch.no_grad():
        assert torch.equal(model.eval()(x), dense.eval().requires_grad_(False)(x))


def test_nothing_inside_an_excluded_attention_is_converted() -> None:
    model = encoder_layer()
    model.self_attn.out_proj = nn.Linear(8, 8)
    assert converted(convert(model, exclude_modules="self_attn")) == LINEAR


@pytest.mark.parametrize("reads", ["self.qkv.weight", "getattr(self.qkv, 'weight')"])
def test_attention_that_reads_the_weight_of_its_layer_gets_it_masked(reads: str) -> None:
    # As torchvision's Swin and timm's BEiT, EVA and Swin v2 do.
    forward = f"def forward(self, x):\n    return functional.linear(x, {reads}, self.qkv.bias)"
    space: dict[str, Any] = {"functional": nn.functional}
    exec(forward, space)
    base = type("WindowAttention", (nn.Module,), {"forward": space["forward"]})
    reader = type("Derived", (base,), {})()
    reader.qkv = nn.Linear(4, 12)
    model, x = convert(nn.ModuleDict({"attn": reader}), 0.3), torch.randn(2, 4)
    qkv = reader.qkv
    weight, bias = (getattr(qkv, name) * mask for name, mask in qkv.masks_of_scores().items())
    assert torch.equal(model["attn"](x), nn.functional.linear(x, weight, bias))
    dense = type("Derived", (base,), {})()
    dense.qkv = nn.Linear(4, 12)
    assert converted(convert(nn.ModuleDict({"attn": dense, "fc": nn.Linear(4, 4)}), exclude_modules="attn")) == ["fc"]


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_encoder_layers_apply_masks_in_training_and_inference(norm_first: bool, activation: str) -> None:
    dense = encoder_layer(norm_first=norm_first, activation=activation)
    model, x = convert(copy.deepcopy(dense), 0.3), torch.randn(3, 4, 8)
    trained = model.train()(x)
    with torch.no_grad():
        inferred = model.eval()(x)
    torch.testing.assert_close(inferred, trained)
    assert torch.equal(trained, masked_by_hand(dense, model)(x))
    with torch.no_grad():
        assert torch.equal(inferred, dense.eval().requires_grad_(False)(x))


def test_a_frozen_encoder_layer_applies_masks_without_no_grad() -> None:
    # The fast path is also taken where nothing requires a gradient.
    model, x = convert(encoder_layer(), 0.3), torch.randn(3, 4, 8)
    trained = model.train()(x)
    torch.testing.assert_close(model.eval().requires_grad_(False)(x), trained)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("kwargs", [{}, {"exclude_modules": "self_attn"}, {"target_modules": "linear1"}])
def test_encoders_apply_masks_to_padded_batches(kwargs: dict[str, Any]) -> None:
    dense = nn.TransformerEncoder(encoder_layer(), 2)
    model = convert(copy.deepcopy(dense), 0.3, **kwargs)
    masked_by_hand(dense, model)
    x, padding = torch.randn(3, 4, 8), torch.tensor([[0, 0, 0, 0], [0, 0, 1, 1], [0, 0, 0, 1]]).bool()
    trained = model.train()(x, src_key_padding_mask=padding)
    assert torch.equal(trained, dense(x, src_key_padding_mask=padding))
    with torch.no_grad():
        inferred = model.eval()(x, src_key_padding_mask=padding)
        assert torch.equal(inferred, dense.eval().requires_grad_(False)(x, src_key_padding_mask=padding))
    torch.testing.assert_close(inferred[~padding], trained[~padding])
    assert not inferred[padding].any()  # the fast path fills them with zeros


def test_the_fast_path_has_masks_in_copies_and_stacks() -> None:
    layer = convert(encoder_layer(), 0.3)
    model, x = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), torch.randn(3, 4, 8)
    dense = masked_by_hand(nn.TransformerEncoder(encoder_layer(), 2, enable_nested_tensor=False), model)
    assert torch.equal(model.train()(x), dense.train()(x))
    with torch.no_grad():
        assert torch.equal(model.eval()(x), dense.eval().requires_grad_(False)(x))


@pytest.mark.parametrize("kwargs", [{}, {"target_modules": "1"}])
def test_the_fast_path_stays_on(kwargs: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.ModuleList([nn.TransformerEncoder(encoder_layer(), 1), nn.Linear(3, 3)])
    convert(model, **kwargs)
    assert model[0].use_nested_tensor
    assert model[0].layers[0].activation_relu_or_gelu == 1
    calls, fast = [], torch._transformer_encoder_layer_fwd
    monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", lambda *args: calls.append(1) or fast(*args))
    with torch.no_grad():
        model[0].eval()(torch.randn(3, 4, 8))
    assert calls == [1]


def test_decoder_layers_apply_masks_in_training_and_inference() -> None:
    dense = nn.TransformerDecoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model = convert(copy.deepcopy(dense), 0.3)
    x, memory = torch.randn(3, 4, 8), torch.randn(3, 5, 8)
    trained = model.train()(x, memory)
    with torch.no_grad():
        inferred = model.eval()(x, memory)
    torch.testing.assert_close(inferred, trained)
    assert torch.equal(trained, masked_by_hand(dense, model)(x, memory))


# --- Hugging Face itself ---
@pytest.fixture(scope="module")
def transformers() -> Any:
    return pytest.importorskip("transformers")


def gpt2(transformers: Any) -> nn.Module:
    config = transformers.GPT2Config(
        n_embd=16, n_layer=2, n_head=2, vocab_size=11, n_positions=8, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config).eval()


def test_gpt2_as_it_comes_is_converted_whole(transformers: Any) -> None:
    model, ids = gpt2(transformers), tokens()
    expected = model(ids).logits
    convert(model, 1.0)
    assert len(converted(model)) == 11
    assert model.lm_head.weight_score is model.transformer.wte.weight_score
    assert torch.equal(model(ids).logits, expected)


def test_bert_is_converted_whole(transformers: Any) -> None:
    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, vocab_size=11
    )
    model, ids = transformers.BertModel(config).eval(), tokens()
    expected = model(ids).last_hidden_state
    convert(model, {"pooler.dense": 0.3, "*": 1.0})
    assert len(converted(model)) == 16
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
