"""``WSN.check_finite`` names what is not finite."""

from __future__ import annotations

import pytest
import torch
from small_models import mlp

from wsn_fast import WSN


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["weight", "weight_score"])
def test_one_value_that_is_not_finite_is_found(name: str, value: float) -> None:
    wsn = WSN(mlp())
    wsn.check_finite()
    layer, tensor = next((key, getattr(layer, name)) for key, layer in wsn.subnet_layers().items())
    with torch.no_grad():
        tensor.view(-1)[-1] = value
    with pytest.raises(FloatingPointError, match=rf"^{layer}\.{name} has values that are not finite$"):
        wsn.check_finite()
