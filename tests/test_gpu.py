"""What only a GPU can show: the same masks as on the CPU, no host synchronisation, the promise on the device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from distributions import DENSITIES, DISTRIBUTIONS, DTYPES, RULES, assert_same_mask
from small_models import batches, convnet

from wsn_fast import WSN, FastSubnetLinear, reference, topc_mask

pytestmark = pytest.mark.gpu


@contextmanager
def no_sync() -> Iterator[None]:
    """Any host synchronisation inside the block is an error."""
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_masks_are_those_of_the_specification(name: str, dtype: torch.dtype, rule: str) -> None:
    for n in (1, 31, 33, 1000, 2**20 + 1):
        scores = DISTRIBUTIONS[name](n, dtype)
        on_gpu = scores.cuda()
        for density in DENSITIES:
            expected = reference.topc_mask(scores, density, rule=rule)
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


def test_the_gate_does_not_wait_for_the_device() -> None:
    scores = torch.randn(10_000, device="cuda")
    with no_sync():
        topc_mask(scores, 0.3)


def test_finished_tasks_stay_the_same_to_the_bit() -> None:
    wsn = WSN(convnet()).cuda()
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


def test_forward_and_backward_of_a_layer_replay_from_a_cuda_graph() -> None:
    layer = FastSubnetLinear(64, 32, density=0.3, device="cuda")
    x = torch.randn(16, 64, device="cuda", requires_grad=True)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            layer(x).square().sum().backward()
    torch.cuda.current_stream().wait_stream(side)
    layer.zero_grad(set_to_none=True)
    x.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = layer(x)
        out.square().sum().backward()
    with torch.no_grad():
        x.normal_()
        layer.weight_score.normal_()
    for tensor in (x, *layer.parameters()):
        assert tensor.grad is not None
        tensor.grad.zero_()
    graph.replay()
    replayed = [out.clone(), *(p.grad.clone() for p in layer.parameters())]  # type: ignore[union-attr]
    layer.zero_grad(set_to_none=True)
    eager = layer(x)
    eager.square().sum().backward()
    for a, b in zip(replayed, [eager, *(p.grad for p in layer.parameters())], strict=True):
        torch.testing.assert_close(a, b)
