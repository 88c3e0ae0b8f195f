"""What only a GPU can show of the CUDA selection: streams, graphs, and that nothing waits for the device."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from wsn_fast.backends.native import cuda_select
from wsn_fast.backends.native.cuda_select import WarmStart

from .conftest import assert_thresholds

pytestmark = pytest.mark.gpu
SIZES = (1, 1000, 2**16 + 1, 2**20 + 3)


@pytest.fixture(autouse=True)
def _library() -> None:
    obstacle = cuda_select.obstacle(torch.device("cuda", torch.cuda.current_device()))
    if obstacle:
        pytest.skip(obstacle)


@pytest.fixture
def no_waiting() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def random_scores() -> list[torch.Tensor]:
    return [torch.randn(n, device="cuda") for n in SIZES]


RANKS = [n // 2 for n in SIZES]


def test_default_chunk() -> None:
    scores = random_scores()
    assert_thresholds(cuda_select.thresholds(scores, RANKS, "magnitude"), scores, RANKS, "magnitude")


def test_large_tensor() -> None:
    scores = [torch.randn(2**24 + 1, device="cuda")]
    assert_thresholds(cuda_select.thresholds(scores, [2**23], "value"), scores, [2**23], "value")


@pytest.mark.usefixtures("no_waiting")
def test_nothing_waits() -> None:
    scores, state = random_scores(), WarmStart(len(SIZES), "cuda")
    for _ in range(3):
        cuda_select.thresholds(scores, RANKS, "value", state)


def test_on_another_stream() -> None:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        scores = random_scores()
        tau = cuda_select.thresholds(scores, RANKS, "value")
    stream.synchronize()
    assert_thresholds(tau, scores, RANKS, "value")


@pytest.mark.parametrize("warm", [False, True])
def test_graph_follows_the_scores(warm: bool) -> None:
    scores, state = random_scores(), WarmStart(len(SIZES), "cuda") if warm else None
    cuda_select.thresholds(scores, RANKS, "magnitude", state)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tau = cuda_select.thresholds(scores, RANKS, "magnitude", state)
    for factor in (1.001, 1.001, 7.0, 0.5, 1.0, 1.0):
        for tensor in scores:
            tensor.mul_(factor)
        tau.fill_(float("nan"))
        graph.replay()
        assert_thresholds(tau, scores, RANKS, "magnitude")
    if state is not None:
        assert state.statistics()[-1].hits > 0
