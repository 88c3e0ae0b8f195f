"""One typed function becomes an eager function, a registered operator and its fake."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from wsn_fast import ops
from wsn_fast.backends.conv_geometry import Geometry
from wsn_fast.backends.mask import Mask
from wsn_fast.ops import products
from wsn_fast.ops.operator import operator

calls: list[Tensor] = []


def _like(a: Any) -> tuple[Tensor, Tensor | None]:
    return torch.empty_like(a.x), a.x.new_empty(()) if a.total else None


@operator(fake=_like)
def scaled_for_test(x: Tensor, mask: Mask, total: bool, factor: float = 2.0) -> tuple[Tensor, Tensor | None]:
    """A product with the union of a mask, and its sum."""
    calls.append(x)
    result = x * factor if mask.union is None else x * mask.union * factor
    return result, result.sum() if total else None


def mask_of(x: Tensor) -> Mask:
    return Mask(x, x.new_tensor(0.5), "value", union=torch.ones_like(x, dtype=torch.uint8))


def test_eager_code_calls_the_function_itself() -> None:
    x = torch.rand(3)
    result, total = scaled_for_test(x, mask_of(x), False)
    assert calls[-1] is x and total is None and torch.equal(result, 2 * x)


def test_a_schema_has_an_argument_for_each_field() -> None:
    schema = torch.ops.wsn_fast.scaled_for_test.default._schema
    assert [argument.name for argument in schema.arguments] == [
        "x", "mask_scores", "mask_tau", "mask_rule", "mask_packed", "mask_union", "total", "factor",
    ]  # fmt: skip


@pytest.mark.parametrize("total", [True, False])
@pytest.mark.parametrize("dynamic", [True, False])
def test_traced_code_calls_the_operator(total: bool, dynamic: bool) -> None:
    def function(x: Tensor) -> Any:
        return scaled_for_test(x, mask_of(x), total, factor=3.0)

    x = torch.rand(5)
    result, found = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=dynamic)(x)
    assert torch.equal(result, 3 * x)
    assert (found is None) is not total


def operands() -> tuple[Tensor, Tensor, Mask, Mask]:
    x, weight = torch.randn(4, 6), torch.randn(5, 6)
    scores = torch.randn(5, 6)
    tau = ops.topc_threshold(scores, 0.4)
    packed = ops.pack_mask(ops.topc_mask(scores, 0.4))
    return x, weight, Mask(scores, tau, "magnitude", union=packed), Mask.of_packed(packed)


@pytest.mark.parametrize("packed", [True, False])
def test_the_linear_products_are_operators(packed: bool) -> None:
    x, weight, mask, of_packed = operands()
    library = torch.ops.wsn_fast
    flat = of_packed if packed else mask
    torch.library.opcheck(library.masked_linear.default, (x, weight, *flat, torch.randn(5), False))
    torch.library.opcheck(library.masked_linear.default, (torch.randn(4, 5), weight, *flat, None, True))


@pytest.mark.parametrize("need", [(True, True), (True, False), (False, True)])
def test_the_gradient_of_a_linear_product_is_an_operator(need: tuple[bool, bool]) -> None:
    x, weight, mask, _ = operands()
    arguments = (torch.randn(4, 5), x, weight, mask, *need)
    dw, ds = products.masked_linear_grad(*arguments)
    assert (dw is not None, ds is not None) == need
    torch.library.opcheck(torch.ops.wsn_fast.masked_linear_grad.default, (*arguments[:3], *mask, *need))


@pytest.mark.parametrize("input_shape", [None, [2, 4, 8, 8]])
def test_the_convolution_is_an_operator(input_shape: list[int] | None) -> None:
    weight, scores = torch.randn(6, 4, 3, 3), torch.randn(6, 4, 3, 3)
    mask = Mask(scores, ops.topc_threshold(scores, 0.4), "magnitude")
    geometry = Geometry([1, 1], [1, 1], [1, 1])
    x = torch.randn(2, 4 if input_shape is None else 6, 8, 8)
    arguments = (x, weight, *mask, None, *geometry, 1, input_shape)
    torch.library.opcheck(torch.ops.wsn_fast.masked_conv.default, arguments)
