"""What only a GPU can show: the same masks as on the CPU, no host synchronisation, the promise on the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from distributions import DENSITIES, DISTRIBUTIONS, DTYPES, RULES, assert_same_mask
from host_waits import no_sync
from small_models import batches, convnet
from torch import nn

from wsn_fast import WSN, FastSubnetConv2d, FastSubnetLinear, TaskHeads, explain, topc_mask
from wsn_fast.nn.gated import SubnetLayer
from wsn_fast.optim import SubnetAdamW, SubnetSGD
from wsn_fast.reference import specification

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_masks_are_those_of_the_specification(name: str, dtype: torch.dtype, rule: str) -> None:
    for n in (1, 31, 33, 1000, 2**20 + 1):
        scores = DISTRIBUTIONS[name](n, dtype)
        on_gpu = scores.cuda()
        for density in DENSITIES:
            expected = specification.topc_mask(scores, density, rule=rule)
            assert_same_mask(topc_mask(on_gpu, density, rule=rule).cpu(), expected, f"{name} n={n} c={density}")


def test_a_training_step_does_not_wait_for_the_device() -> None:
    wsn = WSN(convnet()).cuda()
    wsn.begin_task(0)
    wsn.end_task()
    wsn.begin_task(1)
    optimizer = wsn.guard(torch.optim.AdamW(wsn.parameters(), 0.01, fused=True))
    data = [(x.cuda(), y.cuda()) for x, y in batches(1, 4)]

    def step(x: torch.Tensor, y: torch.Tensor) -> None:
        optimizer.zero_grad(set_to_none=False)
        F.cross_entropy(wsn(x), y).backward()
        optimizer.step()

    step(*data[0])  # the first may set things up
    with no_sync():
        for batch in data[1:]:
            step(*batch)


@pytest.mark.parametrize("storage", ["bfloat16", "8bit"])
@pytest.mark.parametrize("kind", [SubnetAdamW, SubnetSGD])
def test_a_step_with_means_in_fewer_bytes_does_not_wait_for_the_device(kind: Any, storage: str) -> None:
    wsn = WSN(convnet()).cuda()
    how = {"momentum": 0.9} if kind is SubnetSGD else {}
    for task in range(2):
        wsn.begin_task(task)
        optimizer = kind(wsn, 0.01, one_pass=True, moments=storage, **how)
        first, *others = ((x.cuda(), y.cuda()) for x, y in batches(task, 4))
        train_on(wsn, optimizer, [first])  # it may set things up
        with no_sync():
            train_on(wsn, optimizer, others)
        wsn.end_task()
    wsn.verify()


def train_on(wsn: WSN, optimizer: Any, data: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    for x, y in data:
        optimizer.zero_grad()
        F.cross_entropy(wsn(x), y).backward()
        optimizer.step()


def test_the_gate_does_not_wait_for_the_device() -> None:
    scores = torch.randn(10_000, device="cuda")
    with no_sync():
        topc_mask(scores, 0.3)


@pytest.mark.parametrize("backend", [None, "triton", "torch"])
def test_finished_tasks_stay_the_same_to_the_bit(backend: str | None) -> None:
    wsn = WSN(convnet()).cuda()
    for module in wsn.modules():
        if isinstance(module, SubnetLayer):
            module.backend = backend
    known: dict[int, torch.Tensor] = {}
    x = batches(99, 1)[0][0].cuda()
    for task in range(3):
        wsn.begin_task(task)
        optimizer = wsn.guard(torch.optim.AdamW(wsn.parameters(), 0.01, weight_decay=0.1))
        wsn.train()
        for inputs, labels in batches(task, 5):
            optimizer.zero_grad(set_to_none=False)
            with torch.autocast("cuda", torch.bfloat16):
                loss = F.cross_entropy(wsn(inputs.cuda()), labels.cuda())
            loss.backward()
            optimizer.step()
        wsn.end_task()
        wsn.eval()
        with torch.no_grad():
            for old in wsn.tasks:
                with wsn.use_task(old):
                    now = wsn(x)
                assert torch.equal(known.setdefault(int(old), now), now)
    wsn.verify()


LAYERS: dict[str, tuple[Callable[..., SubnetLayer], tuple[int, ...]]] = {
    "linear": (lambda: FastSubnetLinear(64, 32, density=0.3, device="cuda"), (16, 64)),
    "linear_odd": (lambda: FastSubnetLinear(65, 33, density=0.3, device="cuda"), (7, 65)),
    "conv": (lambda: FastSubnetConv2d(8, 16, 3, padding=1, density=0.3, device="cuda"), (4, 8, 9, 9)),
    "grouped": (lambda: FastSubnetConv2d(8, 16, 3, 2, 1, 2, groups=4, density=0.3, device="cuda"), (4, 8, 9, 9)),
}


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["full", "autocast"])
@pytest.mark.parametrize("backend", [None, "triton", "torch"])
@pytest.mark.parametrize("name", LAYERS)
def test_forward_and_backward_of_a_layer_replay_from_a_cuda_graph(
    name: str, backend: str | None, dtype: torch.dtype | None
) -> None:
    layer, x = LAYERS[name][0](), torch.randn(LAYERS[name][1], device="cuda", requires_grad=True)
    layer.backend = backend
    tensors = (x, *layer.parameters())

    def run() -> torch.Tensor:
        with torch.autocast("cuda", dtype, enabled=dtype is not None):
            out = layer(x)
        out.float().square().sum().backward()
        return out

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    for tensor in tensors:
        tensor.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    with torch.no_grad():
        x.normal_()
        layer.weight_score.normal_()
    for tensor in tensors:
        assert tensor.grad is not None
        tensor.grad.zero_()
    graph.replay()
    replayed = [out.detach().clone(), *(t.grad.clone() for t in tensors)]  # type: ignore[union-attr]
    for tensor in tensors:
        tensor.grad = None
    eager = run()
    for a, b in zip(replayed, [eager.detach(), *(t.grad for t in tensors)], strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", LAYERS)
def test_layers_on_triton_are_as_exact_as_on_torch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn.conv, "fp32_precision", "ieee")  # it is "tf32" unless somebody says so
    layer, x = LAYERS[name][0](), torch.randn(LAYERS[name][1], device="cuda")
    found = {}
    for backend in ("torch", "triton"):
        layer.backend = backend
        layer.zero_grad()
        inputs = x.clone().requires_grad_()
        out = layer(inputs)
        out.square().sum().backward()
        found[backend] = [out.detach(), inputs.grad, *(p.grad.clone() for p in layer.parameters())]
    for mine, theirs in zip(found["triton"], found["torch"], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_every_primitive_of_a_step_is_a_triton_kernel() -> None:
    routes = [route for route in explain(LAYERS["linear"][0]()) if not route.operation.startswith("product")]
    assert {route.backend for route in routes} == {"triton"}, "\n" + str(routes)


def test_a_fused_layer_does_not_wait_for_the_device() -> None:
    layer, x = LAYERS["linear"][0](), torch.randn(16, 64, device="cuda", requires_grad=True)
    layer.backend = "triton"
    layer(x).sum().backward()  # the first builds the kernels
    with no_sync():
        layer(x).sum().backward()


@pytest.mark.compiler
@pytest.mark.parametrize("backend", [None, "triton"])
def test_inductor_compiles_a_layer_without_a_graph_break(backend: str | None) -> None:
    layer, x = LAYERS["linear"][0](), torch.randn(16, 64, device="cuda")
    layer.backend = backend
    torch.testing.assert_close(torch.compile(layer, fullgraph=True)(x), layer(x), rtol=1e-4, atol=1e-5)


def test_rows_of_several_tasks_share_a_pass() -> None:
    hidden = FastSubnetLinear(40, 64, density=0.4, device="cuda")
    wsn = WSN(nn.Sequential(hidden, nn.ReLU(), TaskHeads(64, 5, device="cuda")))
    for task in range(5):
        wsn.begin_task(task)
        with torch.no_grad():
            hidden.weight_score.normal_()
        wsn.end_task()
    x, ids = torch.randn(50, 40, device="cuda"), torch.randint(5, (50,))
    expected = wsn.forward_tasks(x, ids, one_pass=False)
    hidden.backend = "triton"
    torch.testing.assert_close(wsn.forward_tasks(x, ids, one_pass=True), expected, rtol=1e-4, atol=1e-5)
