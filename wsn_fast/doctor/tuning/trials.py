"""Candidates are tried until the time is up, and a failure costs one candidate."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..measuring.scrub import scrubbed
from ..measuring.timing import Call

Found = Callable[[str, Any], None]
"""Takes the name of a table, and an entry of it."""
Clock = Callable[[Sequence[Call]], float]
"""Microseconds of a call."""


class Trials:
    """Tries candidates until ``deadline``, of ``time.monotonic``. ``not_measured`` has a line for everything that
    failed or that there was no time for."""

    def __init__(self, device: torch.device, clock: Clock, deadline: float) -> None:
        self.device, self.clock, self.deadline = device, clock, deadline
        self.not_measured: list[str] = []
        self.processors = 1
        if device.type == "cuda":
            self.processors = torch.cuda.get_device_properties(device).multi_processor_count

    def attempt(self, what: str, measure: Callable[[], Any]) -> Any:
        """The result of ``measure``; None, and a line in ``not_measured``, if it failed or there is no time for it."""
        if time.monotonic() > self.deadline:
            self.not_measured.append(f"{what}: no time left")
            return None
        try:
            torch.manual_seed(0)
            return measure()
        except Exception as error:  # one candidate that does not compile or is wrong must not cost the rest
            self.not_measured.append(f"{what}: {scrubbed(f'{type(error).__name__}: {error}')[:220]}")
            return None

    def time(self, calls: Sequence[Call], outputs: Sequence[Tensor], check: Callable[[], object]) -> float:
        """The time of a call. The first one has to write the right ``outputs``: they are poisoned before it."""
        for output in outputs:
            output.fill_(torch.nan)
        calls[0]()
        check()
        return self.clock(calls)

    def best(self, what: str, candidates: Sequence[Any], time_one: Callable[[Any], float]) -> tuple[Any, float] | None:
        """The fastest candidate and its time; None if there is none."""
        times = [(c, self.attempt(f"{what}, {c}", partial(time_one, c))) for c in candidates]
        measured = [(c, us) for c, us in times if us is not None]
        return min(measured, key=lambda pair: pair[1]) if measured else None

    def splits(self, programs: int, steps: int) -> list[int]:
        """Numbers of parts of a sum that keep the device about busy; each part has at least two steps."""
        busy = self.processors / programs
        return sorted({1} | {max(1, min(round(busy * factor), steps // 2, 32)) for factor in (0.5, 1, 2)})
