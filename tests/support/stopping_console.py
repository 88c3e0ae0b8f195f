"""A console that stops a run at one of its steps."""

from __future__ import annotations

from wsn_fast.train.report import Console


class Stop(Exception):
    pass


class StoppingConsole(Console):
    """Stops the run at its n-th step, as a kill would: nothing is saved or tidied."""

    def __init__(self, steps: int) -> None:
        super().__init__(quiet=True)
        self.left = steps

    def step(self) -> None:
        self.left -= 1
        if not self.left:
            raise Stop
