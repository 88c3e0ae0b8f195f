"""The random numbers that loading draws: those of torch, NumPy and Python."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


class Randomness:
    """Random numbers apart from those of training. What is drawn while they are :meth:`in_use` follows from the seed
    alone, in a resumed run and in each of several processes, and leaves the generators of the training as they were.

    Args:
        seed: decides the numbers.
    """

    def __init__(self, seed: int) -> None:
        outside = _states()
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would also seed the GPUs
        np.random.seed(seed % 2**32)
        random.seed(seed)
        self._inside = _states()
        _restore(outside)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """The block draws these numbers. It goes on where the last one stopped."""
        outside = _states()
        _restore(self._inside)
        try:
            yield
        finally:
            self._inside = _states()
            _restore(outside)


def _states() -> tuple[Any, Any, Any]:
    return torch.get_rng_state(), np.random.get_state(), random.getstate()


def _restore(states: tuple[Any, Any, Any]) -> None:
    torch.set_rng_state(states[0])
    np.random.set_state(states[1])
    random.setstate(states[2])
