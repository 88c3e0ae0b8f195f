"""The captured step on a GPU: a real CUDA graph trains as the loop does that it stands for."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from host_waits import no_sync
from small_models import batches, convnet
from torch import Tensor

from wsn_fast import WSN, CapturedStep, capture_step
from wsn_fast.optim import SubnetAdamW, SubnetSGD
from wsn_fast.optim.capture import WARM_UP

pytestmark = pytest.mark.gpu
DEVICE = "cuda"

EPS = 1e-3  # with less, Adam makes steps of noise where a gradient is 0 but for rounding
OPTIMIZERS: dict[str, Callable[[WSN], torch.optim.Optimizer]] = {
    "one-pass AdamW": lambda wsn: SubnetAdamW(wsn, 1e-3, eps=EPS, weight_decay=0.1, one_pass=True),
    "AdamW": lambda wsn: SubnetAdamW(wsn, 1e-3, eps=EPS, weight_decay=0.1),
    "one-pass SGD": lambda wsn: SubnetSGD(wsn, 1e-2, momentum=0.9, one_pass=True),
    "guarded AdamW": lambda wsn: wsn.guard(
        torch.optim.AdamW(wsn.parameters(), 1e-3, eps=EPS, fused=True, capturable=True)
    ),
    "guarded SGD": lambda wsn: wsn.guard(torch.optim.SGD(wsn.parameters(), 1e-2, momentum=0.9)),
}
STEPS = WARM_UP + 5


@pytest.fixture(autouse=True)
def _one_algorithm(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Convolutions that are captured and eager ones are computed in the same way."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    yield


def make_wsn(**options: bool) -> WSN:
    torch.manual_seed(0)
    return WSN(convnet().to(DEVICE), **options)


def data(task: int, many: int = STEPS) -> list[tuple[Tensor, Tensor]]:
    return [(x.to(DEVICE), y.to(DEVICE)) for x, y in batches(task, many)]


def begin(wsn: WSN, task: int, kind: str, max_norm: float | None = None) -> tuple[torch.optim.Optimizer, CapturedStep]:
    torch.manual_seed(task)
    wsn.begin_task(task)
    optimizer = OPTIMIZERS[kind](wsn)
    step = capture_step(wsn, optimizer, lambda x, y: F.cross_entropy(wsn(x), y), max_norm=max_norm)
    return optimizer, step


@pytest.mark.parametrize("max_norm", [None, 0.5])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_graph_trains_as_the_loop_does(kind: str, max_norm: float | None) -> None:
    captured, eager = make_wsn(), make_wsn()
    for task in (0, 1):
        _, step = begin(captured, task, kind, max_norm)
        _, other = begin(eager, task, kind, max_norm)
        other._obstacle = "this one runs eagerly"
        for x, y in data(task):
            torch.testing.assert_close(step(x, y), other(x, y), rtol=1e-4, atol=1e-5)
        assert step.captured and step.replays == STEPS - WARM_UP, step.reason
        for wsn in (captured, eager):
            wsn.end_task()
    for (name, mine), theirs in zip(captured.named_parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4, msg=name)


@torch.no_grad()
def logits(wsn: WSN, task: int, x: Tensor) -> Tensor:
    wsn.eval()
    with wsn.use_task(task):
        y: Tensor = wsn(x).clone()
    wsn.train()
    return y


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_graph_forgets_nothing(kind: str) -> None:
    wsn, kept = make_wsn(), {}
    x = data(9, 1)[0][0]
    for task in range(3):
        _, step = begin(wsn, task, kind)
        for batch in data(task):
            step(*batch)
        assert step.captured, step.reason
        wsn.end_task()
        kept[task] = logits(wsn, task, x)
        assert all(torch.equal(logits(wsn, old, x), kept[old]) for old in kept)
    wsn.verify(probe=x)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_replay_does_not_wait_for_the_device(kind: str) -> None:
    wsn = make_wsn()
    _, step = begin(wsn, 0, kind)
    all_batches = data(0)
    for batch in all_batches[: WARM_UP + 1]:
        step(*batch)
    with no_sync():
        for batch in all_batches[WARM_UP + 1 :]:
            step(*batch)
    assert step.captured, step.reason


def test_a_graph_follows_the_learning_rate() -> None:
    wsn = make_wsn()
    optimizer, step = begin(wsn, 0, "one-pass AdamW")
    for batch in data(0):
        step(*batch)
    optimizer.param_groups[0]["lr"] = 0.0
    before = [p.detach().clone() for p in wsn.parameters()]
    step(*data(0, 1)[0])
    assert step.captured, step.reason
    held = {id(p) for p in optimizer.param_groups[0]["params"]}
    assert all(torch.equal(p, old) for p, old in zip(wsn.parameters(), before, strict=True) if id(p) in held)


@pytest.mark.parametrize("gates_ahead", [False, True])
def test_evaluation_between_replays_changes_nothing(gates_ahead: bool) -> None:
    results = []
    for evaluates in (False, True):
        wsn = make_wsn(gates_ahead=gates_ahead)
        for task in (0, 1):
            _, step = begin(wsn, task, "one-pass AdamW")
            for x, y in data(task):
                step(x, y)
                if evaluates and wsn.tasks:
                    with torch.no_grad(), wsn.use_task(0):
                        wsn(x)
            assert step.captured, step.reason
            wsn.end_task()
        results.append([p.detach().clone() for p in wsn.parameters()])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


def test_a_capture_that_fails_leaves_the_device_as_it_was() -> None:
    wsn, stream, waits = make_wsn(), torch.cuda.current_stream(), True

    def loss_of(x: Tensor, y: Tensor) -> Tensor:
        loss = F.cross_entropy(wsn(x), y)
        return loss * float(loss.item() > -1) if waits else loss

    wsn.begin_task(0)
    step = capture_step(wsn, OPTIMIZERS["one-pass AdamW"](wsn), loss_of)
    with pytest.warns(RuntimeWarning, match=r"not permitted when stream is capturing.* \(in loss_of, "):
        for batch in data(0, WARM_UP + 1):
            step(*batch)
    assert not step.captured
    assert torch.cuda.current_stream() == stream
    assert torch.rand(9, device=DEVICE).isfinite().all()  # the generator counts for no graph any more
    wsn.end_task()
    waits = False
    wsn.begin_task(1)
    step = capture_step(wsn, OPTIMIZERS["one-pass AdamW"](wsn), loss_of)
    for batch in data(1):
        step(*batch)
    assert step.captured, step.reason


@pytest.mark.parametrize("kind", ["one-pass AdamW", "AdamW", "guarded AdamW"])
def test_a_graph_of_the_user_holds_steps_with_gates_made_ahead(kind: str) -> None:
    """The steps before ran on the default stream, which no graph can wait for."""
    wsn = make_wsn(gates_ahead=True)
    wsn.begin_task(0)
    optimizer = OPTIMIZERS[kind](wsn)
    for group in optimizer.param_groups:
        group["capturable"] = True
    x, y = data(0, 1)[0]

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(wsn(x), y).backward()
        optimizer.step()

    def two_steps() -> None:
        step(), step()

    two_steps()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        two_steps()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        two_steps()
    before = [p.detach().clone() for p in wsn.parameters()]
    graph.replay()
    torch.cuda.synchronize()
    assert all(p.isfinite().all() for p in wsn.parameters())
    assert any(not torch.equal(p, old) for p, old in zip(wsn.parameters(), before, strict=True))
