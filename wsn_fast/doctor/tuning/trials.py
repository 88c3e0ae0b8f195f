"""Candidates for a table: each is checked before it is timed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..measuring.attempts import Attempts
from ..measuring.timing import Call

Found = Callable[[str, Any], None]
"""Takes the name of a table, and an entry of it."""
Clock = Callable[[Sequence[Call]], float]
"""Microseconds of a call."""


class Trials(Attempts):
    """Tries candidates on a device until the time is up.

    Args:
        device: where they run.
        clock: times calls.
        deadline: of ``time.monotonic``.
    """

    def __init__(self, device: torch.device, clock: Clock, deadline: float) -> None:
        super().__init__(deadline)
        self.device, self.clock = device, clock
        self.processors = 1
        if device.type == "cuda":
            self.processors = torch.cuda.get_device_properties(device).multi_processor_count

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
