"""Subnet layers as drop-ins for their dense parents."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from layer_cases import CASES
from torch import Tensor, nn

from wsn_fast import (
    FastSubnetConv2d,
    FastSubnetLinear,
    ops,
)
from wsn_fast.nn.gated import SubnetLayer
from wsn_fast.nn.linear import FastSubnetTransposedLinear
from wsn_fast.nn.registry import LAYERS, product_class
from wsn_fast.reference import specification


def dense(layer: SubnetLayer, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What the dense class computes with another weight and bias."""
    if isinstance(layer, FastSubnetLinear):
        return F.linear(x, weight, bias)
    if isinstance(layer, FastSubnetTransposedLinear):
        return F.linear(x, weight.t(), bias)
    if isinstance(layer, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
        convolve = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}[weight.ndim - 2]
        how = (layer.stride, layer.padding, layer.output_padding, layer.groups, layer.dilation)
        return convolve(x, weight, bias, *how)
    return layer._conv_forward(x, weight, bias)  # type: ignore[operator]


def masked_dense(layer: SubnetLayer, x: Tensor) -> Tensor:
    """What the layer should compute, through its dense parent and the reference's masks."""
    masks = {g.name: specification.topc_mask(g.score, layer.density, rule=layer.rule) for g in layer.gated()}
    weight = specification.select(masks["weight"], layer.weight)
    bias = None if layer.bias is None else specification.select(masks["bias"], layer.bias)
    return dense(layer, x, weight, bias)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rule", ops.RULES)
@pytest.mark.parametrize("name", CASES)
def test_forward_and_gradients(name: str, rule: str, bias: bool) -> None:
    make, _, shape = CASES[name]
    layer = make(density=0.4, rule=rule, bias=bias, dtype=torch.float64)
    nn.init.normal_(layer.weight if layer.bias is None else layer.bias)  # Conv1D's biases start at 0
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    out, expected = layer(x), masked_dense(layer, x)
    assert torch.equal(out, expected)
    probe = torch.randn_like(out)
    (dx,) = torch.autograd.grad((out * probe).sum(), x, retain_graph=True)
    assert torch.equal(dx, torch.autograd.grad((expected * probe).sum(), x)[0])
    (out * probe).sum().backward()
    for gate in layer.gated():
        assert gate.param.grad.count_nonzero() <= specification.topc_mask(gate.score, 0.4, rule=rule).sum()
        assert gate.score.grad.count_nonzero() > 0


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_the_specification(name: str) -> None:
    """Masks bitwise; gradients in float32 with at most twice the error of the dense layer's, against float64."""
    make, _, shape = CASES[name]
    layer = make(density=0.4)
    nn.init.normal_(layer.bias)
    x = torch.randn(shape)
    expected, errors = {}, {}
    for dtype in (torch.float64, torch.float32):
        masked = {}
        for gate in layer.gated():
            mask = specification.topc_mask(gate.score, 0.4)
            assert torch.equal(layer.masks_of_scores()[gate.name], mask)
            masked[gate.name] = specification.select(mask, gate.param.detach().to(dtype)).requires_grad_()
        dense(layer, x.to(dtype), masked["weight"], masked["bias"]).square().sum().backward()
        for gate in layer.gated():
            values = (t.detach().to(dtype) for t in (gate.param, gate.score))
            mask = specification.topc_mask(gate.score, 0.4)
            found = specification.gate_backward(masked[gate.name].grad, *values, mask)
            for kind, gradient in zip(("", "_score"), found, strict=True):
                key = gate.name + kind
                if dtype is torch.float64:
                    expected[key] = gradient
                else:
                    errors[key] = (gradient.double() - expected[key]).abs().max()
    layer(x).square().sum().backward()
    for key, error in errors.items():
        own = (layer.get_parameter(key).grad.double() - expected[key]).abs().max()
        assert own <= 2 * error, key


@pytest.mark.parametrize("name", CASES)
def test_full_density_is_the_dense_layer(name: str) -> None:
    make, _, shape = CASES[name]
    layer = make(density=1.0)
    x = torch.randn(shape)
    assert torch.equal(layer(x), dense(layer, x, layer.weight, layer.bias))


def test_parameters_and_buffers_have_their_documented_names_and_shapes() -> None:
    layer = FastSubnetConv2d(3, 5, 3)
    assert {n: tuple(p.shape) for n, p in layer.named_parameters()} == {
        "weight": (5, 3, 3, 3), "bias": (5,), "weight_score": (5, 3, 3, 3), "bias_score": (5,),
    }  # fmt: skip
    assert tuple(layer.weight_masks.shape) == (0, 17)
    assert list(FastSubnetLinear(3, 2, bias=False).state_dict()) == [
        "weight",
        "weight_score",
        "weight_masks",
        "_extra_state",
    ]


def test_same_seed_same_dense_half() -> None:
    torch.manual_seed(7)
    dense = nn.Linear(6, 8)
    torch.manual_seed(7)
    assert torch.equal(FastSubnetLinear(6, 8).weight, dense.weight)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_what_is_outside_the_mask_never_reaches_the_output(value: float) -> None:
    layer = FastSubnetLinear(6, 8, density=0.5)
    x = torch.randn(4, 6)
    before = layer(x)
    with torch.no_grad():
        for gate in layer.gated():
            gate.param[~specification.topc_mask(gate.score, 0.5)] = value
    assert torch.equal(layer(x), before)
    masked = layer.masked("weight", torch.float32)
    assert (masked[~specification.topc_mask(layer.weight_score, 0.5)].view(torch.int32) == 0).all(), "+0.0 and not -0.0"


@pytest.mark.parametrize("name", CASES)
def test_empty_batch(name: str) -> None:
    make, _, shape = CASES[name]
    if len(shape) == 1:
        shape = (1, *shape)
    layer = make()
    x = torch.randn((0, *shape[1:]), requires_grad=True)
    layer(x).sum().backward()
    assert layer.weight.grad.count_nonzero() == 0


@pytest.mark.parametrize("name", CASES)
def test_strided_input(name: str) -> None:
    make, _, shape = CASES[name]
    layer = make()
    x = torch.randn((*shape[:-1], 2 * shape[-1]))[..., ::2]
    torch.testing.assert_close(layer(x), layer(x.contiguous()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CASES)
def test_autocast_computes_in_its_dtype_and_learns_in_fp32(name: str, dtype: torch.dtype) -> None:
    make, _, shape = CASES[name]
    layer = make(density=0.4)
    x = torch.randn(shape)
    with torch.autocast("cpu", dtype):
        out = layer(x)
        expected = masked_dense(layer, x)
    assert out.dtype is dtype
    assert torch.equal(out, expected)
    out.float().sum().backward()
    assert layer.weight.grad.dtype is layer.weight_score.grad.dtype is torch.float32


def test_autocast_leaves_float64_alone() -> None:
    layer = FastSubnetLinear(3, 2, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(4, 3, dtype=torch.float64)).dtype is torch.float64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_weight_dtypes(dtype: torch.dtype) -> None:
    layer = FastSubnetLinear(6, 8, dtype=dtype, density=0.4)
    layer(torch.randn(4, 6, dtype=dtype)).sum().backward()
    assert layer.weight.grad.dtype is layer.weight_score.grad.dtype is dtype


def compiled_cases() -> list[Any]:
    """Every kind of layer once in the ordinary run, inductor for one of them; in ``.ci/run`` all of both."""
    ordinary = {"aot_eager": ("linear", "transposed", "conv2d", "up2d"), "inductor": ("linear",)}
    cases = []
    for backend, names in ordinary.items():
        for name in ("linear", "transposed", "conv2d", "up1d", "up2d", "up3d"):
            marks = [] if name in names else [pytest.mark.ci]
            marks += [pytest.mark.compiler] if backend == "inductor" else []
            cases.append(pytest.param(name, backend, marks=marks))
    return cases


@pytest.mark.parametrize(("name", "backend"), compiled_cases())
def test_compiles_without_a_graph_break(name: str, backend: str) -> None:
    make, _, shape = CASES[name]
    layer = make(density=0.4)
    compiled = torch.compile(layer, fullgraph=True, dynamic=False, backend=backend)
    x = torch.randn(shape, requires_grad=True)
    grads = []
    for run in (layer, compiled):
        out = run(x)
        out.square().sum().backward()
        grads.append([out.detach(), x.grad, *(p.grad for p in layer.parameters())])
        x.grad = None
        layer.zero_grad()
    for eager, traced in zip(*grads, strict=True):
        torch.testing.assert_close(eager, traced)


def test_compiled_layer_follows_its_density_and_a_finished_task() -> None:
    layer = FastSubnetLinear(6, 8, density=0.4)
    compiled = torch.compile(layer, fullgraph=True, dynamic=False, backend="aot_eager")
    x = torch.randn(4, 6)
    compiled(x)
    layer.density = 0.9
    torch.testing.assert_close(compiled(x), layer(x))
    layer.append_task(0, {n: ops.pack_mask(m) for n, m in layer.masks_of_scores().items()})
    torch.testing.assert_close(compiled(x), layer(x))
    layer.reset_scores()
    layer.active_row = 0
    torch.testing.assert_close(compiled(x), layer(x))


def test_a_layer_used_twice_in_one_forward_and_accumulated_gradients() -> None:
    layer = FastSubnetLinear(6, 6, density=0.4, dtype=torch.float64)
    x = torch.randn(4, 6, dtype=torch.float64)
    layer(layer(x)).sum().backward()
    once = layer.weight.grad.clone()
    layer(layer(x)).sum().backward()
    assert torch.equal(layer.weight.grad, 2 * once)


def test_checkpointed_forward_gives_the_same_gradients() -> None:
    from torch.utils.checkpoint import checkpoint

    layer = FastSubnetLinear(6, 8, density=0.4)
    x = torch.randn(4, 6, requires_grad=True)
    layer(x).square().sum().backward()
    plain = [p.grad.clone() for p in layer.parameters()]
    layer.zero_grad()
    checkpoint(layer, x, use_reentrant=False).square().sum().backward()
    assert all(torch.equal(a, p.grad) for a, p in zip(plain, layer.parameters(), strict=True))


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("name", CASES)
def test_copies_are_equal_and_independent(name: str, copier: Callable[[SubnetLayer], SubnetLayer]) -> None:
    make, _, shape = CASES[name]
    layer = make(density=0.4, rule="value")
    layer.append_task("a", {n: ops.pack_mask(m) for n, m in layer.masks_of_scores().items()})
    layer(torch.randn(shape)).sum().backward()
    twin = copier(layer)
    x = torch.randn(shape)
    assert torch.equal(twin(x), layer(x))
    assert twin.tasks == ["a"]
    layer.reset_scores()
    assert not torch.equal(twin.weight_score, layer.weight_score)


@pytest.mark.parametrize("name", CASES)
def test_state_dict_brings_finished_tasks_into_a_fresh_layer(name: str) -> None:
    make = CASES[name][0]
    layer = make(density=0.4)
    for task in (3, "x"):
        layer.append_task(task, {n: ops.pack_mask(m) for n, m in layer.masks_of_scores().items()})
        layer.reset_scores()
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    fresh = make(density=0.4)
    fresh.load_state_dict(torch.load(buffer, weights_only=True), strict=True)
    assert fresh.tasks == [3, "x"]
    assert torch.equal(fresh.weight_union, layer.weight_union)
    assert torch.equal(fresh.mask("weight", 1), layer.mask("weight", 1))


def test_masks_of_another_shape_are_refused_on_loading() -> None:
    state = FastSubnetLinear(60, 8).state_dict()
    with pytest.raises(RuntimeError, match="size mismatch for weight_masks"):
        FastSubnetLinear(6, 8).load_state_dict(state)


def test_masks_move_with_the_module() -> None:
    layer = FastSubnetLinear(6, 8)
    layer.append_task(0, {n: ops.pack_mask(m) for n, m in layer.masks_of_scores().items()})
    assert layer.to("meta").weight_union.is_meta
    assert layer.weight_masks.is_meta


def test_using_a_finished_task_gives_no_gradient_to_its_weights() -> None:
    layer = FastSubnetLinear(6, 8)
    layer.append_task(0, {n: ops.pack_mask(m) for n, m in layer.masks_of_scores().items()})
    layer.active_row = 0
    x = torch.randn(4, 6, requires_grad=True)
    layer(x).sum().backward()
    assert layer.weight.grad is None
    assert x.grad.count_nonzero() > 0


@pytest.mark.parametrize(("mode", "low", "high"), [("default", -0.25, 0.25), ("U01", 0.0, 1.0), ("N01", -9.0, 9.0)])
def test_score_initialisation(mode: str, low: float, high: float) -> None:
    layer = FastSubnetLinear(16, 4000)
    layer.reset_scores(mode)
    for score in (layer.weight_score, layer.bias_score):
        assert low <= score.min() < score.max() <= high
        spread = {"default": 0.25 / 3**0.5, "U01": 1 / 12**0.5, "N01": 1.0}[mode]
        assert score.std().item() == pytest.approx(spread, rel=0.05)


@pytest.mark.parametrize("name", CASES)
def test_default_scores_keep_within_the_bound_of_torch(name: str) -> None:
    make, parent, _ = CASES[name]
    layer = make()
    # Conv1D stores its weight the other way round.
    weight = layer.weight.t() if isinstance(layer, FastSubnetTransposedLinear) else layer.weight
    fan_in, _ = nn.init._calculate_fan_in_and_fan_out(weight)
    assert layer.fan_in("weight") == fan_in
    for gate in layer.gated():
        assert 0 < gate.score.abs().max() <= fan_in**-0.5
    if isinstance(layer, parent):
        assert layer.weight.abs().max() <= fan_in**-0.5


@pytest.mark.parametrize("name", CASES)
def test_a_layer_says_what_it_is(name: str) -> None:
    make, parent, _ = CASES[name]
    layer = make()
    assert type(layer) in LAYERS
    assert layer.DENSE is parent
    assert tuple(n for n in layer.OWN if n in vars(layer)) == layer.OWN
    if isinstance(layer, parent):
        dense = copy.deepcopy(layer)
        dense.become_dense({gate.name: gate.param for gate in dense.gated()})
        assert product_class(dense) is type(layer)


def test_unknown_score_initialisation() -> None:
    with pytest.raises(ValueError, match=r"score_init must be one of .* got 'N02'"):
        FastSubnetLinear(3, 2).reset_scores("N02")


@pytest.mark.parametrize("make", [c[0] for c in CASES.values()], ids=CASES)
def test_bad_density_and_rule(make: Callable[..., SubnetLayer]) -> None:
    with pytest.raises(ValueError, match=r"density must be a number in \(0, 1\], got 30"):
        make(density=30)
    with pytest.raises(ValueError, match="rule must be one of"):
        make(rule="topk")


def test_density_set_later_is_checked_too() -> None:
    layer = FastSubnetLinear(3, 2)
    with pytest.raises(ValueError, match="got 0"):
        layer.density = 0
    assert layer.density == 0.5


def test_rows_of_several_tasks_are_checked() -> None:
    rows = torch.zeros(4, dtype=torch.int32)
    layer, transposed = FastSubnetLinear(6, 8), FastSubnetTransposedLinear(6, 8)
    layer.row_tasks = transposed.row_tasks = rows
    with pytest.raises(ValueError, match=r"x must be \[4, \.\.\., 6\] for 4 rows, got \(4, 5\)"):
        layer(torch.zeros(4, 5))
    with pytest.raises(TypeError, match=r"x must have the dtype of the weight, torch\.float32, got torch\.float64"):
        layer(torch.zeros(4, 6, dtype=torch.float64))
    with pytest.raises(ValueError, match="FastSubnetTransposedLinear cannot compute rows of several tasks in one pass"):
        transposed(torch.zeros(4, 6))


TAKEN = (
    # Peft asks a layer for these. They belong to layers of bitsandbytes, GPTQ, HQQ, AQLM, Megatron and to its own.
    "compute_dtype", "quant_state", "qweight", "W_q", "codes", "weight_quantized", "weight_int8", "base_layer",
    "get_base_layer", "active_adapter", "active_adapters", "merged", "merge", "unmerge", "update_layer",
    "parallel_mode", "input_size_per_partition", "embedding_dim", "hf_quantizer", "tp_plan",
)  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_no_attribute_means_something_else_to_other_libraries(case: str) -> None:
    layer = CASES[case][0]()
    assert [name for name in TAKEN if hasattr(layer, name)] == []
