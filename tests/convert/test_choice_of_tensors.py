"""Which tensors of which modules convert gates, and what it says about the others."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from any_modules import CASES, DENSITY, DIM, VECTORS, Bare, LowBare, TiedDecoder, gates
from lookalikes import refused
from torch import Tensor, nn

from wsn_fast import WSN, convert, to_dense
from wsn_fast.continual.ownership import OwnershipError
from wsn_fast.nn.gated import SubnetLayer
from wsn_fast.nn.linear import FastSubnetLinear


def names(model: nn.Module) -> list[str]:
    return [f"{module}.{tensor}".lstrip(".") for module, _, tensor in gates(model)]


def attention() -> nn.Module:
    """Attention, and a linear layer."""
    return nn.ModuleDict({"attn": nn.MultiheadAttention(DIM, 2), "fc": nn.Linear(DIM, DIM)})


IN, OUT, FC = ["attn.in_proj_weight", "attn.in_proj_bias"], ["attn.out_proj.weight", "attn.out_proj.bias"], "fc.weight"


@pytest.mark.parametrize(
    ("kwargs", "expected"),
    [
        ({}, [*IN, *OUT, FC, "fc.bias"]),
        ({"exclude_modules": "bias"}, [*IN, OUT[0], FC]),
        ({"exclude_modules": "*bias"}, [IN[0], OUT[0], FC]),
        ({"exclude_modules": "attn.in_proj_weight"}, [IN[1], *OUT, FC, "fc.bias"]),
        ({"exclude_modules": "in_proj_weight"}, [IN[1], *OUT, FC, "fc.bias"]),
        ({"exclude_modules": "attn"}, [FC, "fc.bias"]),
        ({"exclude_modules": "out_proj"}, [*IN, FC, "fc.bias"]),
        ({"exclude_modules": ["attn.out_proj.bias", "fc"]}, [*IN, OUT[0]]),
        ({"target_modules": "weight"}, [OUT[0], FC]),
        ({"target_modules": ["in_proj_weight", "fc"]}, [IN[0], FC, "fc.bias"]),
        ({"target_modules": "attn"}, [*IN, *OUT]),
        ({"target_modules": "attn", "exclude_modules": "*bias"}, [IN[0], OUT[0]]),
        ({"filter_fn": lambda module, name: name == "attn"}, IN),
    ],
)
def test_patterns_name_modules_and_tensors(kwargs: dict[str, Any], expected: list[str]) -> None:
    model = convert(attention(), DENSITY, **kwargs)
    assert names(model) == expected
    linear_is_whole = {"fc.weight", "fc.bias"} <= {*expected}
    assert isinstance(model["fc"], FastSubnetLinear) == linear_is_whole


def test_the_bias_that_is_left_out_trains_as_it_is() -> None:
    x = torch.randn(4, DIM)
    model = convert(nn.Sequential(nn.Linear(DIM, DIM), nn.Linear(DIM, 2)), DENSITY, exclude_modules="bias")
    weight = torch.where(model[0].masks_of_scores()["weight"], model[0].weight, 0.0)
    assert torch.equal(model[0](x), nn.functional.linear(x, weight, model[0].bias))
    with pytest.raises(OwnershipError, match=r"0\.bias \[8\] .*\n  1\.bias \[2\]"):
        WSN(model).begin_task(0)
    wsn = WSN(model, per_task="bias")
    wsn.begin_task(0)
    wsn.end_task(probe=x)
    dense = to_dense(wsn, 0)
    assert type(dense[0]) is nn.Linear
    with wsn.use_task(0):
        assert torch.equal(dense(x), wsn(x))


def test_a_vector_is_gated_if_it_is_named() -> None:
    assert "token" not in names(convert(Bare(), DENSITY))
    assert names(convert(Bare(), DENSITY, target_modules="token")) == ["token"]
    assert "token" in names(convert(Bare(), DENSITY, target_modules=["token", "*"]))


def test_constants_are_not_gated() -> None:
    model = Bare()
    model.positions.requires_grad_(False)
    assert "positions" not in names(convert(model, DENSITY))


@pytest.mark.parametrize(
    ("density", "expected"),
    [
        ({"attn": 0.1, "fc": 0.2}, {"attn": 0.1, "attn.out_proj": 0.1, "fc": 0.2}),
        ({"attn.out_proj": 0.3, "*": 0.4}, {"attn": 0.4, "attn.out_proj": 0.3, "fc": 0.4}),
        ({"attn.in_proj_*": 0.5, "weight": 0.6, "bias": 0.6}, {"attn": 0.5, "attn.out_proj": 0.6, "fc": 0.6}),
    ],
)
def test_densities_by_name_of_tensor(density: dict[str, float], expected: dict[str, float]) -> None:
    model = convert(attention(), density)
    assert {n: m.density for n, m in model.named_modules() if isinstance(m, SubnetLayer)} == expected


def test_tensors_of_one_module_may_have_densities_of_their_own() -> None:
    model = convert(attention(), {"in_proj_bias": 0.1, "*": 0.5})
    layer = model["attn"]
    assert layer.density == {"in_proj_weight": 0.5, "in_proj_bias": 0.1}
    kept = {name: mask.float().mean().item() for name, mask in layer.masks_of_scores().items()}
    assert kept["in_proj_weight"] == pytest.approx(0.5, abs=0.01)
    assert kept["in_proj_bias"] == pytest.approx(0.1, abs=0.05)
    with pytest.raises(ValueError, match=r"density.*attn\.in_proj_bias|density\['in_proj_bias'\]"):
        convert(attention(), {"in_proj_bias": 0.0, "*": 0.5})


def test_all_problems_are_in_one_error() -> None:
    model = nn.ModuleDict({"a": nn.Embedding(5, 4, max_norm=1.0), "b": nn.EmbeddingBag(5, 4, sparse=True)})
    model["c"] = nn.Linear(4, 5)
    model["c"].weight = model["a"].weight
    match = (
        r"^4 things keep this model from being converted:\n"
        r"  1\. exclude_modules='nothing' matches nothing that can be gated; there is: \['a', 'b', 'c'\]\n"
        r"  2\. a \(Embedding\) has max_norm=1\.0.*\n"
        r"  3\. b \(EmbeddingBag\) has sparse=True.*\n"
        r"  4\. one tied parameter needs one density and rule: \{'a\.weight'.*'c\.weight'.*\}$"
    )
    refused(model, match, {"a": 0.1, "*": 0.2}, exclude_modules="nothing")


# --- what is left out for a reason ---
class Made(nn.Linear):
    """A masked linear layer as autoregressive models have it."""

    def __init__(self) -> None:
        super().__init__(DIM, DIM)
        self.register_buffer("mask", torch.tril(torch.ones(DIM, DIM)))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight * self.mask, self.bias)


class Tagged(nn.Linear):
    """Computes what nn.Linear computes, and has an attribute called as one of ours."""

    def __init__(self) -> None:
        super().__init__(DIM, DIM)
        self.tasks = ["mine"]


class Scored(nn.Module):
    """Has a Parameter that is called as the scores of another one would be."""

    def __init__(self) -> None:
        super().__init__()
        self.key, self.key_score = nn.Parameter(torch.randn(DIM, DIM)), nn.Parameter(torch.randn(DIM, DIM))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.key + x @ self.key_score


class Positive(nn.Module):
    """What its attribute returns is not the Parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(DIM, DIM))

    def __getattr__(self, name: str) -> Any:
        found = super().__getattr__(name)
        return found.abs() if name == "matrix" else found

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.matrix


class Detached(Positive):
    """What its attribute returns needs no gradient, and the Parameter does."""

    def __getattr__(self, name: str) -> Any:
        found = super().__getattr__(name)
        return found.detach() if name == "matrix" else found


class Directed(nn.Linear):
    """The weight is a property."""

    def __init__(self) -> None:
        super().__init__(DIM, DIM)
        self.direction = nn.Parameter(torch.randn(DIM, DIM))

    @property
    def weight(self) -> Tensor:
        return nn.functional.normalize(self.direction)


class Computed(nn.Module):
    """A tensor that is no Parameter stands among the Parameters, as fastai's weight dropout puts it there."""

    def __init__(self) -> None:
        super().__init__()
        self.raw = nn.Parameter(torch.randn(DIM, DIM))
        self._parameters["matrix"] = self.raw * 2

    def forward(self, x: Tensor) -> Tensor:
        self._parameters["matrix"] = self.raw * 2
        return x @ self.matrix


def scripted() -> nn.Module:
    return torch.jit.script(nn.Sequential(nn.Linear(DIM, DIM), nn.ReLU()))


LEFT_OUT = [
    (Made, "m.weight (the attribute 'mask' of its module has a name that subnet layers use"),
    (Tagged, "m.weight (the attribute 'tasks' of its module has a name that subnet layers use"),
    (Scored, "m.key (the attribute 'key_score' of its module has a name that subnet layers use"),
    (Positive, "m.matrix (its attribute returns something else than the Parameter"),
    (Detached, "m.matrix (its attribute returns something else than the Parameter"),
    (Directed, "m.weight (its attribute returns something else than the Parameter"),
    (Computed, "m.matrix (it is no nn.Parameter: something computes it"),
    (scripted, "m.0.weight (TorchScript has compiled its module"),
]


@pytest.mark.parametrize(("make", "reason"), LEFT_OUT)
def test_what_cannot_be_gated_computes_as_before_and_is_named(
    make: Any, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = nn.ModuleDict({"m": make(), "fc": nn.Linear(4 * DIM, 4 * DIM)})
    before = {n: (m, sorted(vars(m))) for n, m in model["m"].named_modules()}
    expected = model["m"](VECTORS)
    with caplog.at_level(logging.INFO, "wsn_fast"):
        convert(model, 1.0)
    assert reason in caplog.text
    assert torch.equal(model["m"](VECTORS), expected)
    assert all(one is before[n][0] for n, one in model["m"].named_modules())
    left = reason[2:].partition(" ")[0]
    assert f"m.{left}" not in names(model)
    with pytest.raises(OwnershipError, match=rf"m\.{left}"):
        WSN(model).begin_task(0)


def test_a_model_of_which_nothing_can_be_gated_says_why() -> None:
    refused(Made(), r"no layer to convert: left out are weight \(the attribute 'mask'.*\), bias \(the attribute 'mask'")


# --- what is said ---
def test_the_log_counts_what_is_gated(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "wsn_fast"):
        convert(Bare(), DENSITY)
    assert caplog.messages == [
        "240 of 248 parameters outside of heads and norms are gated (96.8%); left out: 1 x Bare such as token (it is a "
        "vector and no bias; 8)"
    ]


def test_the_log_names_what_the_user_left_out(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "wsn_fast"):
        convert(attention(), DENSITY, exclude_modules="attn")  # more than half, and no warning
    assert "72 of 360 parameters outside of heads and norms are gated (20.0%)" in caplog.text
    assert "1 x NonDynamicallyQuantizableLinear such as" not in caplog.text
    assert "2 x MultiheadAttention such as attn.in_proj_weight (exclude_modules leaves it out; 216)" in caplog.text


def test_a_model_of_which_less_than_half_is_gated_is_warned_of() -> None:
    model = nn.Sequential(Made(), nn.Linear(DIM, 2))
    with pytest.warns(
        UserWarning, match=r"18 of 90 .* are gated \(20\.0%\); left out: 2 x Made such as 0\.weight .*owner"
    ):
        convert(model, DENSITY)


def test_every_case_is_gated_but_for_vectors(caplog: pytest.LogCaptureFixture) -> None:
    for name, case in CASES.items():
        caplog.clear()
        with caplog.at_level(logging.INFO, "wsn_fast"):
            convert(case.make(), DENSITY)
        share = float(caplog.messages[0].partition("gated (")[2].partition("%")[0])
        assert share > (80 if "norm" in name else 95), name


# --- in several calls ---
def test_a_child_and_then_its_parent() -> None:
    model = nn.ModuleDict({"a": TiedDecoder(), "b": LowBare()})
    convert(model["a"], 0.1)
    scores = {n: p for n, p in model.named_parameters() if n.endswith("_score")}
    convert(model, 0.2)
    assert (model["a"].embed.density, model["b"].density) == (0.1, 0.2)
    after = dict(model.named_parameters())
    assert all(after[n] is score for n, score in scores.items())


def test_some_tensors_of_a_module_cannot_be_gated_later() -> None:
    model = convert(attention(), DENSITY, exclude_modules="in_proj_bias")
    assert names(convert(model, DENSITY)) == [IN[0], *OUT, FC, "fc.bias"]
    with pytest.raises(OwnershipError, match=r"attn\.in_proj_bias"):
        WSN(model).begin_task(0)
