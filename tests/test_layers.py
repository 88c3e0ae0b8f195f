"""Subnet layers as drop-ins for their dense parents."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wsn_fast import FastSubnetConv1d, FastSubnetConv2d, FastSubnetConv3d, FastSubnetLinear, ops, reference
from wsn_fast.layers import FastSubnetTransposedLinear
from wsn_fast.subnet import SubnetLayer

CASES: dict[str, tuple[Callable[..., SubnetLayer], type[nn.Module], tuple[int, ...]]] = {
    "linear": (lambda **k: FastSubnetLinear(6, 8, **k), nn.Linear, (5, 6)),
    "linear_3d": (lambda **k: FastSubnetLinear(6, 8, **k), nn.Linear, (5, 3, 6)),
    "linear_1d": (lambda **k: FastSubnetLinear(6, 8, **k), nn.Linear, (6,)),
    "transposed": (lambda **k: FastSubnetTransposedLinear(6, 8, **k), nn.Linear, (5, 6)),
    "conv1d": (lambda **k: FastSubnetConv1d(4, 8, 3, groups=2, dilation=2, **k), nn.Conv1d, (5, 4, 9)),
    "conv2d": (lambda **k: FastSubnetConv2d(4, 8, (3, 2), 2, "valid", groups=4, **k), nn.Conv2d, (5, 4, 9, 8)),
    "reflect": (lambda **k: FastSubnetConv2d(4, 8, 3, 1, 1, padding_mode="reflect", **k), nn.Conv2d, (2, 4, 6, 6)),
    "conv3d": (lambda **k: FastSubnetConv3d(2, 4, 3, padding="same", **k), nn.Conv3d, (2, 2, 5, 4, 6)),
}  # fmt: skip


def masked_dense(layer: SubnetLayer, x: Tensor) -> Tensor:
    """What the layer should compute, through its dense parent and the reference's masks."""
    masks = {g.name: reference.topc_mask(g.score, layer.density, rule=layer.rule) for g in layer.gated()}
    weight = reference.select(masks["weight"], layer.weight)
    bias = None if layer.bias is None else reference.select(masks["bias"], layer.bias)
    if isinstance(layer, FastSubnetLinear):
        return F.linear(x, weight, bias)
    if isinstance(layer, FastSubnetTransposedLinear):
        return F.linear(x, weight.t(), bias)
    return layer._conv_forward(x, weight, bias)  # type: ignore[operator]


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
        assert gate.param.grad.count_nonzero() <= reference.topc_mask(gate.score, 0.4, rule=rule).sum()
        assert gate.score.grad.count_nonzero() > 0


@pytest.mark.parametrize("name", CASES)
def test_full_density_is_the_dense_layer(name: str) -> None:
    make, _, shape = CASES[name]
    layer = make(density=1.0)
    x = torch.randn(shape)
    weight = layer.weight
    if isinstance(layer, nn.Linear):
        assert torch.equal(layer(x), F.linear(x, weight, layer.bias))
    elif isinstance(layer, FastSubnetTransposedLinear):
        assert torch.equal(layer(x), F.linear(x, weight.t(), layer.bias))
    else:
        assert torch.equal(layer(x), layer._conv_forward(x, weight, layer.bias))  # type: ignore[operator]


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
            gate.param[~reference.topc_mask(gate.score, 0.5)] = value
    assert torch.equal(layer(x), before)
    masked = layer.masked("weight", torch.float32)
    assert (masked[~reference.topc_mask(layer.weight_score, 0.5)].view(torch.int32) == 0).all(), "+0.0 and not -0.0"


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


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.compiler)])
@pytest.mark.parametrize("name", ["linear", "transposed", "conv2d"])
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
def test_copies_are_equal_and_independent(copier: Callable[[SubnetLayer], SubnetLayer]) -> None:
    layer = FastSubnetLinear(6, 8, density=0.4, rule="value")
    layer.append_task("a", {n: ops.pack_mask(m) for n, m in layer.masks_of_scores().items()})
    layer(torch.randn(4, 6)).sum().backward()
    twin = copier(layer)
    x = torch.randn(4, 6)
    assert torch.equal(twin(x), layer(x))
    assert twin.tasks == ["a"]
    layer.reset_scores()
    assert not torch.equal(twin.weight_score, layer.weight_score)


def test_state_dict_brings_finished_tasks_into_a_fresh_layer() -> None:
    layer = FastSubnetLinear(6, 8, density=0.4)
    for task in (3, "x"):
        layer.append_task(task, {n: ops.pack_mask(m) for n, m in layer.masks_of_scores().items()})
        layer.reset_scores()
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    fresh = FastSubnetLinear(6, 8, density=0.4)
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
