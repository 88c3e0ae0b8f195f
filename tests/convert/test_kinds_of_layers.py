"""convert: layers that compute their tensors, and layers whose class derives from one of torch."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lookalikes import net, vectors
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from wsn_fast.continual.ownership import OwnershipError
from wsn_fast.continual.wsn import WSN
from wsn_fast.convert.to_dense import to_dense
from wsn_fast.convert.to_subnet import convert
from wsn_fast.nn.conv import FastSubnetConv2d
from wsn_fast.nn.conv_transpose import FastSubnetConvTranspose1d
from wsn_fast.nn.gated import SubnetLayer
from wsn_fast.nn.linear import FastSubnetLinear
from wsn_fast.ops import topc_mask


# --- layers that compute their tensors, or cannot be converted ---
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
@pytest.mark.parametrize(
    ("wrap", "gated"),
    [
        (weight_norm, ("bias", "weight_v")),
        (parametrizations.weight_norm, ("bias",)),
        (lambda m: parametrizations.spectral_norm(m), ("bias",)),
        (spectral_norm, ("bias", "weight_orig")),
        (lambda m: prune.l1_unstructured(m, "weight", 0.5), ("bias", "weight_orig")),
        (lambda m: prune.l1_unstructured(m, "bias", 0.5), ("weight", "bias_orig")),
    ],
)
def test_a_computed_weight_is_computed_from_masked_tensors(
    wrap: Callable[[nn.Module], nn.Module], gated: tuple[str, ...]
) -> None:
    torch.manual_seed(0)
    model, dense, x = net(), net(), vectors()
    for one in (model, dense):
        torch.manual_seed(1)
        one[2] = wrap(one[2].eval())
    convert(model, 0.4)
    assert gated == model[2].GATED
    with torch.no_grad():
        dense.load_state_dict(model.state_dict(), strict=False)
        for path, layer in model.named_modules():
            for gate in layer.gated() if isinstance(layer, SubnetLayer) else ():
                dense.get_submodule(path)._parameters[gate.name].mul_(topc_mask(gate.score, 0.4))
        assert torch.equal(model.eval()(x), dense.eval().requires_grad_(False)(x))


def test_a_forward_of_the_instance_gets_masked_tensors() -> None:
    model, x = net(), vectors()
    layer = model[0]
    layer.forward = lambda x: x @ layer.weight.t()
    convert(model, 0.3)
    assert not isinstance(layer, FastSubnetLinear)
    assert torch.equal(layer(x), x @ (layer.weight * layer.masks_of_scores()["weight"]).t())
    assert torch.equal(model(x), model[1:](layer(x)))


@pytest.mark.parametrize(
    ("weight", "reason"),
    [
        (torch.zeros(3, 3, dtype=torch.complex64), r"scores cannot have the dtype torch\.complex64"),
        (torch.zeros(3, 0), "it is empty"),
        (torch.zeros(3, 3).to(torch.float8_e4m3fn), r"scores cannot have the dtype torch\.float8_e4m3fn"),
    ],
)
def test_weights_that_no_score_can_gate_are_left_out(
    weight: Tensor, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = net()
    model[2].weight = nn.Parameter(weight, requires_grad=False)
    with caplog.at_level("INFO", "wsn_fast"):
        convert(model)
    assert re.search(rf"left out: 1 x Linear such as 2\.weight \({reason}", caplog.text)
    assert model[2].GATED == ("bias",)
    wsn = WSN(model)
    wsn.begin_task(0)  # it needs no gradient, so it is a constant
    assert "2.weight" not in dict(wsn.gated())
    model[2].weight = nn.Parameter(torch.zeros(3, 3, dtype=torch.complex64))
    with pytest.raises(OwnershipError, match=r"2\.weight"):
        WSN(model).begin_task(0)


# --- layers whose class derives from one of torch ---
class Standardised(nn.Conv2d):
    pass


class Scaled(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


class Twofold(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(Standardised(1, 2, 3), nn.Flatten(), Scaled(8, 4))
        self.up = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.up(self.inner(x))


def test_a_class_without_a_forward_of_its_own_becomes_a_fast_layer() -> None:
    model = convert(Twofold(), 0.4)
    assert isinstance(model.inner[0], FastSubnetConv2d)
    assert isinstance(model.inner[0], Standardised)
    assert not isinstance(model.inner[2], FastSubnetLinear)
    wsn = WSN(model)
    wsn.begin_task(0)
    wsn.end_task(probe=torch.randn(2, 1, 4, 4))
    dense = to_dense(wsn, 0)
    assert [type(m) for m in (dense.inner[0], dense.inner[2])] == [Standardised, Scaled]


def test_a_forward_of_its_own_gets_masked_tensors() -> None:
    model, x = convert(Twofold(), 0.4), torch.randn(2, 8)
    layer = model.inner[2]
    weight, bias = (getattr(layer, name) * mask for name, mask in layer.masks_of_scores().items())
    assert torch.equal(layer(x), 2 * nn.functional.linear(x, weight, bias))


def test_transposed_ones_do_so_too() -> None:
    class Up(nn.ConvTranspose1d):
        pass

    class Twice(nn.ConvTranspose1d):
        def _output_padding(self, *args: Any) -> list[int]:
            return [0]

    model = convert(nn.Sequential(Up(1, 2, 3), Twice(2, 2, 3)))
    assert [isinstance(m, FastSubnetConvTranspose1d) for m in model] == [True, False]
    assert model(torch.randn(1, 1, 4)).shape == (1, 2, 8)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"exclude_modules": ["inner.*"]},
        {"exclude_modules": ["inner.0", "inner.2"]},
        {"target_modules": "up"},
        {"filter_fn": lambda module, name: name == "up"},
    ],
)
def test_layers_that_the_user_leaves_out_stay_as_they_are(kwargs: dict[str, Any]) -> None:
    model = convert(Twofold(), **kwargs)  # a warning is an error
    assert type(model.up) is FastSubnetLinear
    assert [type(m) for m in (model.inner[0], model.inner[2])] == [Standardised, Scaled]
