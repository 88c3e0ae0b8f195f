"""What the processes of a driver test are given before they run: other nets, faults, a record of what they train on."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import torch
from dying_run import die_at
from torch import Tensor, nn

from wsn_fast.backends import collectives
from wsn_fast.continual.wsn import WSN
from wsn_fast.train import data, loop, nets
from wsn_fast.train.processes import Processes
from wsn_fast.train.report import Console
from wsn_fast.train.run import PROBE, Run
from wsn_fast.train.samples import Samples, memory


class Small(nn.Module):
    """A net in a dtype of its own, which may have batch norm and dropout."""

    def __init__(self, inputs: int, classes: int, dtype: torch.dtype, *more: nn.Module) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Flatten(), nn.Linear(inputs, 40), *more, nn.ReLU()).to(dtype)
        self.head = nn.Linear(40, classes, dtype=dtype)
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.features(x.to(self.dtype)))
        return out


def in_float64(rank: int, record: str) -> None:
    """A net in float64. Each process writes into ``record`` the images that it trains on, by their sums, and how many
    it measures."""
    plain(rank)
    seen: dict[str, list[Any]] = {"trained": [], "measured": []}
    forward = Small.forward

    def recorded(self: Small, x: Tensor) -> Tensor:
        if self.training and torch.is_grad_enabled():
            seen["trained"].append(x.double().square().flatten(1).sum(1).tolist())
        elif len(x) != PROBE:
            seen["measured"].append(len(x))
        return forward(self, x)

    Small.forward = recorded  # type: ignore[method-assign]
    finish = Run.finish

    def finished(self: Run) -> dict[str, Any]:
        try:
            return finish(self)
        finally:
            Path(f"{record}.{rank}").write_text(json.dumps(seen))

    Run.finish = finished  # type: ignore[method-assign]


def plain(rank: int, eval_batch: int = 100) -> None:
    """A net in float64."""
    nets.build = lambda name, shape, classes: Small(64, classes, torch.float64)  # type: ignore[assignment]
    memory.EVAL_BATCH = eval_batch


def own(rank: int) -> None:
    """A net in float64 for images of 24 pixels."""
    nets.build = lambda name, shape, classes: Small(24, classes, torch.float64)  # type: ignore[assignment]


def stateful(rank: int) -> None:
    """A net with batch norm and dropout. All processes have to measure with the same statistics. The validation loss
    has its sign changed, so that an early epoch is the best and the learning rate falls."""
    from wsn_fast.train import run

    def evaluate(wsn: WSN, samples: Samples, processes: Processes, *rest: Any) -> tuple[float, float]:
        mean = wsn.model.features[2].running_mean
        assert len({*collectives.texts_of(processes.group, str(mean.tolist()))}) == 1, "they have other statistics"
        loss, accuracy = loop.evaluate(wsn, samples, processes, *rest)
        return -loss, accuracy

    run.evaluate = evaluate
    more = (nn.BatchNorm1d(40), nn.Dropout(0.2))
    nets.build = lambda name, shape, classes: Small(64, classes, torch.float32, *more)  # type: ignore[assignment]


def killed(rank: int, net: str, which: int, steps: int) -> None:
    """A net, and SIGKILL for one process after so many steps of its own."""
    if net == "stateful":
        stateful(rank)
    else:
        plain(rank)

    def step(self: Console) -> None:
        nonlocal steps
        steps -= 1
        if rank == which and steps == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    Console.step = step  # type: ignore[method-assign]


def terminated(rank: int, which: int, steps: int) -> None:
    """SIGTERM for one process after so many steps of its own."""

    def step(self: Console) -> None:
        nonlocal steps
        steps -= 1
        if rank == which and steps == 0:
            os.kill(os.getpid(), signal.SIGTERM)

    Console.step = step  # type: ignore[method-assign]


def dying(rank: int, which: int, place: str, moment: int, counts: str) -> None:
    """SIGKILL for one process at a moment of a place: see ``dying_run``. With moment 0, each process writes into
    ``counts`` how many moments each place has until the run is finished."""
    if rank != which and moment:
        return
    counted, finish = die_at(place, moment), Run.finish

    def finished(self: Run) -> dict[str, Any]:
        results = finish(self)
        Path(f"{counts}.{rank}").write_text(json.dumps(counted))
        return results

    Run.finish = finished  # type: ignore[method-assign]


def without_data(rank: int, which: int) -> None:
    """One process cannot read the data."""

    def load(*_: object) -> None:
        raise data.DataError("data: there are none")

    if rank == which:
        data.load = load  # type: ignore[assignment]


def hurried(rank: int, which: int) -> None:
    """One process cannot read the data, and gets SIGTERM before it says so. The others get it before they stop."""
    without_data(rank, which)
    give_up = Processes.give_up

    def hurry(self: Processes) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        give_up(self)
        os.kill(os.getpid(), signal.SIGTERM)

    Processes.give_up = hurry  # type: ignore[method-assign]


def without_memory(rank: int, which: int, steps: int) -> None:
    """The memory of one process does not suffice for one of its steps."""

    def step(self: Console) -> None:
        nonlocal steps
        steps -= 1
        if rank == which and steps == 0:
            raise torch.OutOfMemoryError("no memory")

    Console.step = step  # type: ignore[method-assign]


def not_finite_in_one(rank: int, which: int) -> None:
    """One process finds a score that is not finite when it ends a task."""

    def changed(self: WSN, record: object) -> None:
        raise FloatingPointError("a score is infinite")

    if rank == which:
        WSN._check_can_end = changed  # type: ignore[method-assign]


def not_finite(rank: int) -> None:
    """A score becomes infinite in all processes."""
    check = Run._check_finite

    def checked(self: Run, *losses: float) -> None:
        with torch.no_grad():
            next(gate for _, gate in self.wsn.gated()).score[0, 0] = float("inf")
        check(self, *losses)

    Run._check_finite = checked  # type: ignore[method-assign]
