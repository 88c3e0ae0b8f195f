"""The Triton backend against the torch backend, and layers that run on it: on a GPU, or in the interpreter."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from distributions import DISTRIBUTIONS, RULES
from elementwise import assert_same_bits, planted
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from wsn_fast import WSN, FastSubnetConv1d, FastSubnetConv2d, FastSubnetLinear, TaskHeads, ops, topc_mask
from wsn_fast.backends import choose, triton
from wsn_fast.backends import torch as portable
from wsn_fast.nn.gated import SubnetLayer
from wsn_fast.nn.linear import FastSubnetTransposedLinear
from wsn_fast.reference import specification

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
COMPUTE = torch.float16 if INTERPRETED else torch.bfloat16  # the interpreter truncates to bf16

LAYERS: dict[str, tuple[Callable[..., SubnetLayer], tuple[int, ...]]] = {
    "linear": (lambda **k: FastSubnetLinear(17, 9, **k), (5, 17)),
    "linear_3d": (lambda **k: FastSubnetLinear(16, 8, **k), (2, 3, 16)),
    "linear_1d": (lambda **k: FastSubnetLinear(16, 8, **k), (16,)),
    "transposed": (lambda **k: FastSubnetTransposedLinear(16, 9, **k), (5, 16)),
    "conv1d": (lambda **k: FastSubnetConv1d(4, 8, 3, groups=2, dilation=2, **k), (3, 4, 9)),
    "conv2d": (lambda **k: FastSubnetConv2d(4, 8, (3, 2), 2, 1, groups=2, **k), (2, 4, 7, 6)),
    "conv2d_image": (lambda **k: FastSubnetConv2d(3, 4, 3, **k), (3, 6, 5)),
    "reflect": (lambda **k: FastSubnetConv2d(4, 8, 3, 1, 1, padding_mode="reflect", **k), (2, 4, 5, 5)),
    "same": (lambda **k: FastSubnetConv2d(3, 4, (2, 3), padding="same", dilation=2, **k), (2, 3, 6, 5)),
}  # fmt: skip


def make(name: str, device: torch.device, **kwargs: object) -> tuple[SubnetLayer, Tensor]:
    """A layer on the Triton backend and an input."""
    build, shape = LAYERS[name]
    layer = build(density=0.4, device=device, **kwargs)
    nn.init.normal_(layer.bias)  # Conv1D's biases start at 0
    layer.backend = "triton"
    return layer, torch.randn(shape, device=device, dtype=layer.weight.dtype, requires_grad=True)


def results(layer: SubnetLayer, x: Tensor, backend: str, probe: Tensor | None = None) -> tuple[list[Tensor], Tensor]:
    """Output and all gradients of a layer on a backend, for a random direction."""
    layer.backend = backend
    layer.zero_grad()
    out = layer(x)
    probe = torch.randn_like(out) if probe is None else probe
    (dx,) = torch.autograd.grad((out * probe).sum(), x, retain_graph=True)
    (out * probe).sum().backward()
    return [out.detach(), dx, *(p.grad.clone() for p in layer.parameters())], probe


def assert_as_exact(layer: SubnetLayer, x: Tensor) -> None:
    """Errors against float64 at most twice those of the torch backend, beside a rounding of the largest value."""
    torchs, probe = results(layer, x, "torch")
    ours, _ = results(layer, x, "triton", probe)
    wide = type(layer).__new__(type(layer))
    wide.__dict__ = {**layer.__dict__, "_parameters": {n: None for n in layer._parameters}}
    for name, param in layer.named_parameters():
        wide._parameters[name] = nn.Parameter(param.detach().double())
    exact, _ = results(wide, x.detach().double().requires_grad_(), "torch", probe.double())
    for mine, theirs, true in zip(ours, torchs, exact, strict=True):
        assert mine.shape == theirs.shape and mine.dtype is theirs.dtype
        allowed = 2 * (theirs.double() - true).abs().max() + torch.finfo(mine.dtype).eps * true.abs().max()
        assert (mine.double() - true).abs().max() <= allowed


# --- primitives
@pytest.mark.sample(21)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_masks_are_those_of_the_specification(dtype: torch.dtype, rule: str, device: torch.device) -> None:
    for name in DISTRIBUTIONS:
        scores = DISTRIBUTIONS[name](1001, dtype)
        mask = topc_mask(scores.to(device).view(7, 143).t(), 0.3, rule=rule, backend="triton")
        assert torch.equal(mask.cpu().t().reshape(-1), specification.topc_mask(scores, 0.3, rule=rule)), name


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_gate_and_its_gradients_are_those_of_the_torch_backend(rule: str, strided: bool, device: torch.device) -> None:
    weight, scores, grad = (planted(13 * 11, torch.float32).view(11, 13).to(device) for _ in range(3))
    if strided:
        weight, scores, grad = (t.t().contiguous().t() for t in (weight, scores, grad))
    tau = portable.threshold(scores, 60, rule)
    union = portable.pack(torch.rand(11, 13, device=device) < 0.3)
    for dtype in (torch.float32, torch.float16):
        for operation, args in {"gate": (scores, tau, rule, dtype), "gate_packed": (union, dtype)}.items():
            mine, theirs = (getattr(backend, operation)(weight, *args) for backend in (triton, portable))
            assert_same_bits(mine, theirs, operation)
            assert mine.stride() == weight.stride(), "as the registered operator promises to torch.compile"
    for frozen in (union, None):
        for need in ((True, True), (True, False), (False, True), (False, False)):
            args = (grad, weight, scores, tau, frozen, rule, *need)
            for mine, theirs in zip(triton.gate_backward(*args), portable.gate_backward(*args), strict=True):
                assert (mine is None) == (theirs is None)
                if mine is not None:
                    assert_same_bits(mine, theirs, f"gate_backward {need}")


def test_masks_pack_unpack_unite_and_count(device: torch.device) -> None:
    mask = torch.rand(3, 45, device=device) < 0.4
    rows = torch.stack([triton.pack(row) for row in mask])
    assert torch.equal(rows, torch.stack([portable.pack(row) for row in mask]))
    assert torch.equal(triton.unpack(rows[1], 45), mask[1])
    assert torch.equal(triton.union(rows), portable.pack(mask.any(0)))
    assert int(triton.popcount(rows)) == int(mask.sum())


@pytest.mark.parametrize("strided", [False, True])
def test_frozen_values_are_put_back(strided: bool, device: torch.device) -> None:
    param, saved = (torch.randn(6, 7, device=device) for _ in range(2))
    param = param.t().contiguous().t() if strided else param
    frozen = torch.rand(6, 7, device=device) < 0.5
    expected = torch.where(frozen, saved, param)
    triton.restore_frozen(param, saved, portable.pack(frozen))
    assert_same_bits(param, expected, "restore_frozen")


# --- layers
@pytest.mark.sample(17)
@pytest.mark.parametrize("name", LAYERS)
def test_forward_and_gradients_are_as_exact_as_torchs(name: str, device: torch.device) -> None:
    layer, x = make(name, device)
    assert_as_exact(layer, x)


@pytest.mark.sample(9)
@pytest.mark.parametrize("name", ["linear", "transposed", "conv2d"])
def test_a_finished_task_is_computed_with_its_mask_and_passes_gradients_on(name: str, device: torch.device) -> None:
    layer, x = make(name, device, rule="value")
    packed = {gate: ops.pack_mask(mask) for gate, mask in layer.masks_of_scores().items()}
    layer.append_task(0, packed)
    nn.init.normal_(layer.weight_score)
    layer.active_row = 0
    expected, got = [], []
    for backend, found in (("torch", expected), ("triton", got)):
        layer.backend = backend
        out = layer(x)
        assert not layer.weight.requires_grad or torch.autograd.grad(out.sum(), x)[0] is not None
        found += [layer(x), torch.autograd.grad(layer(x).square().sum(), x)[0]]
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_gradients_stay_out_of_what_finished_tasks_use(device: torch.device) -> None:
    layer, x = make("linear", device)
    mask = layer.masks_of_scores()["weight"]
    layer.append_task(0, {name: ops.pack_mask(m) for name, m in layer.masks_of_scores().items()})
    layer(x).sum().backward()
    assert layer.weight.grad[mask].count_nonzero() == 0


@pytest.mark.sample(13)
@pytest.mark.parametrize("name", ["linear", "linear_3d", "conv2d", "reflect"])
def test_autocast_computes_in_its_dtype(name: str, device: torch.device) -> None:
    layer, x = make(name, device)
    outs = []
    for backend in ("triton", "torch"):
        layer.backend = backend
        with torch.autocast(device.type, COMPUTE):
            out = layer(x)
        assert out.dtype is COMPUTE
        out.float().sum().backward()
        assert layer.weight.grad.dtype is torch.float32
        outs.append(out.float())
    torch.testing.assert_close(*outs, rtol=2e-2, atol=2e-2)


@pytest.mark.sample(9)
@pytest.mark.parametrize("name", ["linear", "conv2d"])
def test_compiles_without_a_graph_break(name: str, device: torch.device) -> None:
    layer, x = make(name, device)
    expected, probe = results(layer, x, "triton")
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    layer.zero_grad()
    out = compiled(x)
    (dx,) = torch.autograd.grad((out * probe).sum(), x, retain_graph=True)
    (out * probe).sum().backward()
    for got, wanted in zip([out, dx, *(p.grad for p in layer.parameters())], expected, strict=True):
        torch.testing.assert_close(got, wanted)


def test_unusual_inputs(device: torch.device) -> None:
    layer, _ = make("linear_3d", device)
    for x in (torch.zeros(0, 16), torch.zeros(3, 0, 16), torch.randn(16, 4).t(), torch.randn(1, 16).expand(5, 16)):
        x = x.to(device)
        torch.testing.assert_close(
            layer(x), F.linear(x, layer.masked("weight", x.dtype), layer.masked("bias", x.dtype))
        )
    layer(torch.zeros(0, 16, device=device, requires_grad=True)).sum().backward()
    assert layer.weight.grad.count_nonzero() == 0
    layer.zero_grad()
    layer(torch.randn(5, 16, device=device)).sum().backward()  # an input that needs no gradient; a gradient of stride 0
    assert layer.weight.grad.count_nonzero() > 0
    for wrong in (torch.randn(4, 15), torch.randn(4, 16, dtype=torch.float64)):
        with pytest.raises(RuntimeError):  # as the dense layer does
            layer(wrong.to(device))


def test_used_twice_accumulated_and_checkpointed(device: torch.device) -> None:
    layer = FastSubnetLinear(8, 8, density=0.5, device=device)
    x = torch.randn(4, 8, device=device, requires_grad=True)

    def twice(x: Tensor) -> Tensor:
        return layer(layer(x).relu())

    found = []
    for backend in ("torch", "triton"):
        layer.backend = backend
        for run in (twice, lambda x: checkpoint(twice, x, use_reentrant=False)):
            layer.zero_grad()
            for _ in range(2):
                run(x).square().sum().backward()
            found.append([p.grad.clone() for p in layer.parameters()])
    for other in found[1:]:
        torch.testing.assert_close(other, found[0])


def test_double_backward_is_refused(device: torch.device) -> None:
    layer, x = make("linear", device)
    (dx,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        dx.sum().backward()


def test_rows_of_several_tasks_in_one_pass(device: torch.device) -> None:
    hidden = FastSubnetLinear(10, 16, density=0.4, device=device)
    wsn = WSN(nn.Sequential(nn.Flatten(), hidden, nn.ReLU(), TaskHeads(16, 3, device=device)))
    for task in ("a", "b", "c"):
        wsn.begin_task(task)
        with torch.no_grad():
            hidden.weight_score.normal_()
            hidden.bias_score.normal_()
        wsn.end_task()
    x, ids = torch.randn(9, 2, 5, device=device), list("cabbacabc")
    expected = wsn.forward_tasks(x, ids, one_pass=False)
    hidden.backend = "triton"
    torch.testing.assert_close(wsn.forward_tasks(x, ids, one_pass=True), expected)
    torch.testing.assert_close(wsn.forward_tasks(x, ids), expected)
    assert hidden.row_tasks is None


def test_rows_need_a_batch_and_modules_that_keep_rows_apart(device: torch.device) -> None:
    layer = FastSubnetLinear(8, 8, device=device)
    wsn = WSN(nn.Sequential(nn.Flatten(0, -1), layer))
    wsn.begin_task(0)
    wsn.end_task()
    with pytest.raises(ValueError, match="0 flattens the rows themselves"):
        wsn.forward_tasks(torch.randn(8, 1, device=device), [0] * 8, one_pass=True)
    layer.row_tasks = torch.zeros(8, dtype=torch.int32, device=device)
    with pytest.raises(ValueError, match="x must be"):
        layer(torch.randn(8, device=device))
    with pytest.raises(TypeError, match=r"x must have the dtype of the weight, torch\.float32"):
        layer(torch.randn(8, 8, device=device, dtype=torch.float64))


def test_scores_in_double_precision_are_not_rounded(device: torch.device) -> None:
    layer = FastSubnetLinear(16, 8, density=0.5, device=device)
    layer.weight_score = nn.Parameter(1 + 1e-10 * torch.randn(8, 16, dtype=torch.float64, device=device))
    x = torch.randn(4, 16, device=device)
    expected = layer(x)
    layer.backend = "triton"
    assert_same_bits(layer(x), expected, "output")


def test_the_choice_names_what_runs_it(device: torch.device) -> None:
    assert choose("threshold", device, torch.float32, "triton").name == "triton"
    assert choose("threshold", device, torch.float64, "triton")[1:] == (
        "torch", "backend='triton', but the Triton backend has no threshold for torch.float64",
    )  # fmt: skip
    assert choose("gate", device, torch.float32, "triton,gate=torch").name == "torch"
