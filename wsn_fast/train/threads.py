"""Measures how many CPU threads train a run fastest, before it starts."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping
from dataclasses import replace

import torch

from wsn_fast.train import machine
from wsn_fast.train.config import TrainConfig
from wsn_fast.train.data.loading import Shows, shows_nothing
from wsn_fast.train.experiment import make_experiment
from wsn_fast.train.loop import make_optimizer, train_epoch
from wsn_fast.train.samples import Epoch

_ROUNDS, _STEPS = 3, 3
_CLEARLY = 0.95  # more threads have to take less than this part of the time


def with_fastest_threads(
    settings: TrainConfig, shows: Shows = shows_nothing
) -> tuple[TrainConfig, Mapping[int, float]]:
    """The settings with the number of threads that is fastest in a few training steps now, and what was measured:
    seconds of a step by number of threads. Numbers are tried that double up to the number of cores.

    The steps train a model of their own, which is thrown away, and a run seeds its random numbers when it starts. So it
    computes what it would with that number given by hand. On a GPU nothing is measured.

    Args:
        settings: the settings of the run.
        shows: shows how far the reading of the data is.

    Raises:
        ValueError: see :func:`wsn_fast.train.experiment.make_experiment`.
    """
    stream, wsn, device, _ = make_experiment(settings, shows=shows)
    if device.type != "cpu":
        return settings, {}
    wsn.begin_task(0)
    optimizer = make_optimizer(wsn, settings)
    samples, augment = stream.training(0)[0], settings.augment == "crops"
    loaded = samples.epoch(settings.batch_size, Epoch(settings.seed, 0, 0), augment=augment)
    several = list(itertools.islice(loaded, _STEPS))
    seconds: dict[int, float] = {}
    for _ in range(_ROUNDS):  # in turns, so that all of them meet the same load of the machine
        for threads in _numbers():
            torch.set_num_threads(threads)
            for batches in (several[:1], several):  # the first step of a number starts its threads
                began = time.perf_counter()
                train_epoch(wsn, optimizer, batches, lambda: None)
            taken = (time.perf_counter() - began) / len(several)
            seconds[threads] = min(taken, seconds.get(threads, taken))
    return replace(settings, threads=best(seconds)), seconds


def best(seconds: Mapping[int, float]) -> int:
    """The number of threads that is fastest. More threads have to be clearly faster than fewer."""
    chosen = min(seconds)
    for threads in sorted(seconds):
        if seconds[threads] < _CLEARLY * seconds[chosen]:
            chosen = threads
    return chosen


def _numbers() -> list[int]:
    most = machine.cores()
    return sorted({most, *(2**power for power in range(most.bit_length()) if 2**power <= most)})
