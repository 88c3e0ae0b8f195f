"""The captured step, with a graph that replays Python instead of kernels: the same training as the loop that it stands
for. The real one needs a GPU (tests/test_gpu.py)."""

from __future__ import annotations

import re
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from replayed import Replayed
from torch import Tensor, nn

import wsn_fast.optim.capture as capture
from wsn_fast import WSN, CapturedStep, capture_step, convert, ops
from wsn_fast.optim.optimizers import SubnetAdamW, SubnetSGD

Make = Callable[[WSN], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Make] = {
    "one pass": lambda wsn: SubnetAdamW(wsn, 0.01, weight_decay=0.1, one_pass=True),
    "standard": lambda wsn: SubnetAdamW(wsn, 0.01, weight_decay=0.1),
    "one pass sgd": lambda wsn: SubnetSGD(wsn, 0.05, momentum=0.9, one_pass=True),
    "guarded": lambda wsn: wsn.guard(torch.optim.SGD(wsn.parameters(), 0.05, momentum=0.9)),
}


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Replayed]]:
    """The graphs that were captured; the CPU counts as a device that can."""
    found: list[Replayed] = []
    monkeypatch.setattr(capture, "obstacle_of", lambda device: "")
    yield found


def make_wsn() -> WSN:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(9, 14), nn.ReLU(), nn.Linear(14, 7), nn.ReLU(), nn.Linear(7, 3)).double()
    return WSN(convert(net, density=0.4, heads="4"))


def batch(step: int, size: int = 16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(size, 9, generator=generator, dtype=torch.float64), torch.randint(
        3, (size,), generator=generator
    )


def begin(
    wsn: WSN, task: int, make: Make, graphs: list[Replayed], monkeypatch: pytest.MonkeyPatch, **options: Any
) -> tuple[torch.optim.Optimizer, CapturedStep]:
    torch.manual_seed(task)
    wsn.begin_task(task)
    optimizer = make(wsn)

    def new() -> Replayed:
        graphs.append(Replayed(wsn, optimizer))
        return graphs[-1]

    monkeypatch.setattr(capture, "new_graph", new)
    return optimizer, capture_step(wsn, optimizer, lambda x, y: F.cross_entropy(wsn(x), y), **options)


def loop_step(
    wsn: WSN, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, max_norm: float | None = None
) -> Tensor:
    optimizer.zero_grad()
    loss = F.cross_entropy(wsn(x), y)
    loss.backward()
    if max_norm is not None:
        capture.clip_gradients(optimizer, max_norm)
    optimizer.step()
    return loss.detach()


def assert_same(one: WSN, other: WSN) -> None:
    for (name, mine), theirs in zip(one.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12, msg=name)


@pytest.mark.parametrize("max_norm", [None, 0.05])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_two_tasks_are_those_of_the_loop(
    kind: str, max_norm: float | None, graphs: list[Replayed], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a ragged last batch, another learning rate by assignment, and evaluation in between."""
    captured, plain = make_wsn(), make_wsn()
    for task in (0, 1):
        optimizer, step = begin(captured, task, OPTIMIZERS[kind], graphs, monkeypatch, max_norm=max_norm)
        torch.manual_seed(task)
        plain.begin_task(task)
        other = OPTIMIZERS[kind](plain)
        replays = 0
        for i in range(24):
            x, y = batch(100 * task + i, 5 if i % 8 == 7 else 16)
            if i == 12:
                for groups in (optimizer.param_groups, other.param_groups):
                    for group in groups:
                        group["lr"] = 0.002
            torch.testing.assert_close(step(x, y), loop_step(plain, other, x, y, max_norm), rtol=1e-6, atol=1e-9)
            replays += step.captured
            captured.eval()
            with torch.no_grad():
                captured(x)
            captured.train()
        # Its learning rates are float32 on the device, and 0.01 is not one.
        for (name, mine), theirs in zip(captured.named_parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6, msg=name)
        assert replays == 24 - capture.WARM_UP - 3 and len(graphs) == task + 1
        assert [group["lr"] for group in optimizer.param_groups] == [0.002] * len(optimizer.param_groups)
        captured.end_task(), plain.end_task()
    captured.verify()


def test_a_scheduler_with_a_tensor_is_followed(graphs: list[Replayed], monkeypatch: pytest.MonkeyPatch) -> None:
    wsn = make_wsn()
    rate = torch.tensor(0.01)
    optimizer, step = begin(wsn, 0, lambda w: SubnetAdamW(w, rate, one_pass=True), graphs, monkeypatch)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 6, gamma=0.0)
    for i in range(6):
        step(*batch(i))
        schedule.step()
    before = [p.detach().clone() for p in wsn.parameters()]
    assert step(*batch(9)).isfinite() and step.captured
    assert all(torch.equal(p, b) for p, b in zip(wsn.parameters(), before, strict=True))


@pytest.mark.parametrize(
    "change",
    [
        lambda wsn, kept: wsn.subnet_layers()["0"].weight.detach().mul_(0.5),
        lambda wsn, kept: wsn.subnet_layers()["0"].reset_scores(),
        lambda wsn, kept: wsn.load_trainable_state(kept),
    ],
    ids=["an edit", "new scores", "the best epoch"],
)
def test_what_changed_from_outside_is_seen(
    change: Callable[[WSN, Any], object], graphs: list[Replayed], monkeypatch: pytest.MonkeyPatch
) -> None:
    captured, plain = make_wsn(), make_wsn()
    optimizer, step = begin(captured, 0, OPTIMIZERS["one pass"], graphs, monkeypatch)
    torch.manual_seed(0)
    plain.begin_task(0)
    other = OPTIMIZERS["one pass"](plain)
    for group in (*optimizer.param_groups, *other.param_groups):
        group["lr"] = 0.0078125  # a float32
    kept = [wsn.trainable_state() for wsn in (captured, plain)]
    for i in range(12):
        if i == 8:
            for wsn, state in zip((captured, plain), kept, strict=True):
                torch.manual_seed(5)
                change(wsn, state)
        x, y = batch(i)
        step(x, y)
        loop_step(plain, other, x, y)
        assert step.captured is (i >= capture.WARM_UP and i != 8), i
    assert_same(captured, plain)


def test_a_shape_that_stays_is_captured(graphs: list[Replayed], monkeypatch: pytest.MonkeyPatch) -> None:
    _, step = begin(make_wsn(), 0, OPTIMIZERS["one pass"], graphs, monkeypatch)
    for size in (5, 5, 5, 5, *[16] * 8):
        step(*batch(size, size))
    assert step.captured and len(graphs) == 2


def test_other_settings_lead_to_another_capture(graphs: list[Replayed], monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer, step = begin(make_wsn(), 0, OPTIMIZERS["one pass"], graphs, monkeypatch)
    for i in range(5):
        step(*batch(i))
    optimizer.param_groups[0]["weight_decay"] = 0.5
    for i in range(5):
        step(*batch(i))
    assert step.captured and len(graphs) == 2


def test_another_state_of_the_optimizer_leads_to_another_capture(
    graphs: list[Replayed], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A graph updates the running means where they were."""
    optimizer, step = begin(make_wsn(), 0, OPTIMIZERS["one pass"], graphs, monkeypatch)
    for i in range(5):
        step(*batch(i))
    optimizer.load_state_dict(optimizer.state_dict())
    for i in range(5):
        step(*batch(i))
    assert step.captured and len(graphs) == 2


class State(defaultdict[Tensor, dict[str, Any]]):
    """The state of an optimizer, with weak references."""


def test_no_other_state_can_take_the_place_of_the_captured_one(
    graphs: list[Replayed], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two loads between steps made a new state where the old one had been, now and then: with its ``id``."""
    optimizer, step = begin(make_wsn(), 0, OPTIMIZERS["one pass"], graphs, monkeypatch)
    optimizer.state = State(dict)
    for i in range(5):
        step(*batch(i))
    captured = weakref.ref(optimizer.state)
    for _ in range(2):
        optimizer.load_state_dict(optimizer.state_dict())
    assert captured() is not None
    step(*batch(5))
    assert captured() is None and not step.captured


def test_an_eager_step_uses_the_gates_of_the_replay_before_it(
    graphs: list[Replayed], monkeypatch: pytest.MonkeyPatch
) -> None:
    wsn = make_wsn()
    _, step = begin(wsn, 0, OPTIMIZERS["one pass"], graphs, monkeypatch)
    for i in range(5):
        step(*batch(i))
    assert step.captured
    made: list[Tensor] = []
    monkeypatch.setattr(ops, "gate", lambda weight, *rest: made.append(weight))
    step(*batch(5, 3))
    assert not step.captured and made == []


def test_a_finished_task_in_use_is_refused(graphs: list[Replayed], monkeypatch: pytest.MonkeyPatch) -> None:
    wsn = make_wsn()
    _, step = begin(wsn, 0, OPTIMIZERS["one pass"], graphs, monkeypatch)
    step(*batch(0))
    wsn.end_task()
    _, step = begin(wsn, 1, OPTIMIZERS["one pass"], graphs, monkeypatch)
    for i in range(5):
        step(*batch(i))
    with wsn.use_task(0), pytest.raises(RuntimeError, match="leave use_task before a training step"):
        step(*batch(9))
    assert step(*batch(10)).isfinite()


def test_what_cannot_be_captured_runs_as_it_is(graphs: list[Replayed], monkeypatch: pytest.MonkeyPatch) -> None:
    wsn = make_wsn()
    _, step = begin(wsn, 0, OPTIMIZERS["one pass"], graphs, monkeypatch)

    class Fails:
        def record(self, work: Callable[[], Tensor]) -> Tensor:
            raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(capture, "new_graph", Fails)
    reason = (
        "the step cannot be captured: operation not permitted when stream is capturing (in record, test_capture.py)"
    )
    for i in range(6):
        before = wsn.subnet_layers()["0"].weight.detach().clone()
        if i == capture.WARM_UP:
            with pytest.warns(RuntimeWarning, match=f"{re.escape(reason)}. It runs eagerly until the next task begins"):
                step(*batch(i))
        else:
            step(*batch(i))
        assert not torch.equal(before, wsn.subnet_layers()["0"].weight)
    assert not step.captured and step.reason == reason


def test_the_reason_is_the_first_error(graphs: list[Replayed], monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch ends a capture after an error in it, and this end raises an error too."""

    class Broken(Replayed):
        def record(self, work: Callable[[], Tensor]) -> Tensor:
            try:
                raise RuntimeError("the operation\nwith details")
            finally:
                raise RuntimeError("a previous error")

    wsn = make_wsn()
    optimizer, step = begin(wsn, 0, OPTIMIZERS["one pass"], graphs, monkeypatch)
    monkeypatch.setattr(capture, "new_graph", lambda: Broken(wsn, optimizer))
    with pytest.warns(RuntimeWarning, match="cannot be captured"):
        for i in range(capture.WARM_UP + 1):
            step(*batch(i))
    assert step.reason == "the step cannot be captured: the operation (in record, test_capture.py)"


@pytest.mark.parametrize("foreach", [None, True])
@pytest.mark.parametrize("kind", ["SGD", "SubnetSGD"])
def test_sgd_reads_no_rate_on_the_host(
    kind: str, foreach: bool | None, graphs: list[Replayed], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its other forms ask for the value of a tensor, which a graph refuses."""
    seen = []

    def make(wsn: WSN) -> torch.optim.Optimizer:
        if kind == "SubnetSGD":
            return SubnetSGD(wsn, 0.05, one_pass=True)
        return wsn.guard(torch.optim.SGD(wsn.parameters(), 0.05, foreach=foreach))

    optimizer, step = begin(make_wsn(), 0, make, graphs, monkeypatch)
    before = {name: optimizer.param_groups[0][name] for name in ("fused", "foreach")}
    optimizer.register_step_pre_hook(lambda *_: seen.append((group["fused"], group["foreach"])))
    group = optimizer.param_groups[0]
    for i in range(capture.WARM_UP + 1):
        step(*batch(i))
    assert step.captured and set(seen) == {(True, False)}
    assert before == {name: group[name] for name in before}


def test_a_capture_that_failed_is_tried_again_in_the_next_task(
    graphs: list[Replayed], monkeypatch: pytest.MonkeyPatch
) -> None:
    wsn = make_wsn()
    _, step = begin(wsn, 0, OPTIMIZERS["one pass"], graphs, monkeypatch)
    with monkeypatch.context() as patched, pytest.warns(RuntimeWarning, match="cannot be captured"):
        patched.setattr(Replayed, "record", lambda self, work: (_ for _ in ()).throw(RuntimeError("out of luck")))
        for i in range(6):
            step(*batch(i))
    assert (
        not step.captured and step.reason == "the step cannot be captured: out of luck (in <genexpr>, test_capture.py)"
    )
    wsn.end_task()
    wsn.begin_task(1)
    step._optimizer = SubnetAdamW(wsn, 0.01, one_pass=True)
    graphs_before = len(graphs)
    monkeypatch.setattr(capture, "new_graph", lambda: graphs.append(Replayed(wsn, step._optimizer)) or graphs[-1])
    for i in range(6):
        step(*batch(i))
    assert step.captured and len(graphs) == graphs_before + 1


def test_the_steps_before_a_capture_take_its_arguments(graphs: list[Replayed], monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a kernel would be compiled inside the capture for a learning rate that is a tensor."""
    wsn = make_wsn()
    optimizer, step = begin(wsn, 0, OPTIMIZERS["one pass"], graphs, monkeypatch)
    rates: list[object] = []
    optimizer.register_step_pre_hook(lambda opt, *_: rates.append(opt.param_groups[0]["lr"]))
    step(*batch(0))
    optimizer.param_groups[0]["lr"] = 0.5
    step(*batch(1))
    assert rates[0] is rates[1] and torch.equal(rates[1], torch.tensor(0.5))  # type: ignore[arg-type]
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_a_cpu_runs_as_it_is_and_says_why() -> None:
    wsn = make_wsn()
    wsn.begin_task(0)
    step = capture_step(wsn, SubnetAdamW(wsn, one_pass=True), lambda x, y: F.cross_entropy(wsn(x), y))
    for i in range(5):
        step(*batch(i))
    assert not step.captured and step.reason == "CUDA graphs are for NVIDIA GPUs, and the model is on cpu"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"wsn": nn.Linear(1, 1)}, TypeError, r"wsn must be a wsn_fast\.WSN, got Linear"),
        ({"loss_fn": 3}, TypeError, "loss_fn must be callable, got int"),
        ({"max_norm": 0.0}, ValueError, r"max_norm must be positive or None, got 0\.0"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    wsn = make_wsn()
    wsn.begin_task(0)
    given = {"wsn": wsn, "optimizer": SubnetAdamW(wsn), "loss_fn": F.mse_loss, **arguments}
    with pytest.raises(error, match=message):
        capture_step(**given)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_another_task_leads_to_another_capture(
    kind: str, graphs: list[Replayed], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it brings no head: more is frozen, and a graph has no mask of it."""
    torch.manual_seed(0)
    wsn = WSN(convert(nn.Sequential(nn.Linear(9, 14), nn.ReLU(), nn.Linear(14, 3)).double(), density=0.4))
    _, step = begin(wsn, 0, OPTIMIZERS[kind], graphs, monkeypatch)
    for task in (0, 1):
        if task:
            wsn.end_task()
            wsn.begin_task(task)
        for i in range(capture.WARM_UP + 2):
            step(*batch(i))
        assert step.captured and len(graphs) == task + 1
    wsn.end_task()
    wsn.verify()
