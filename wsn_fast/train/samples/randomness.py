"""The random numbers that loading draws: those of torch, on the CPU and on the GPU of the run, NumPy and Python."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor


class Randomness:
    """Random numbers apart from those of training. What is drawn while they are :meth:`in_use` follows from the seed
    alone, in a resumed run and in each of several processes, and leaves the generators of the training as they were.

    Args:
        seed: decides the numbers.
    """

    def __init__(self, seed: int) -> None:
        outside = _states()
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would also seed all other GPUs
        if torch.cuda.is_initialized():
            torch.cuda.manual_seed(seed)
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


class _States(NamedTuple):
    torch: Tensor
    numpy: Any
    python: Any
    cuda: Tensor | None


def _states() -> _States:
    # torch.manual_seed in code of the user would also seed the GPU that trains.
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
    return _States(torch.get_rng_state(), np.random.get_state(), random.getstate(), cuda)


def _restore(states: _States) -> None:
    torch.set_rng_state(states.torch)
    np.random.set_state(states.numpy)
    random.setstate(states.python)
    if states.cuda is not None:
        torch.cuda.set_rng_state(states.cuda)
