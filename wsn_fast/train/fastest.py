"""Measures how many CPU threads, and which order of images in memory, train a run fastest, before it starts."""

from __future__ import annotations

import itertools
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from wsn_fast.train import machine
from wsn_fast.train.choices import MEMORY_FORMATS
from wsn_fast.train.config import TrainConfig
from wsn_fast.train.data.loading import Shows, shows_nothing
from wsn_fast.train.experiment import make_experiment, torch_memory_format
from wsn_fast.train.loop import make_optimizer, train_epoch
from wsn_fast.train.samples import Batch, Epoch

MEASURED = ("threads", "memory_format")
"""The settings that may be ``auto``."""
_ROUNDS, _STEPS = 3, 3
_CLEARLY = 0.95  # a later way has to take less than this part of the time


class Way(NamedTuple):
    """A way to train.

    Attributes:
        threads: the number of CPU threads.
        memory_format: one of ``MEMORY_FORMATS``.
    """

    threads: int
    memory_format: str


def with_fastest(
    settings: TrainConfig, names: Collection[str], shows: Shows = shows_nothing
) -> tuple[TrainConfig, Mapping[Way, float]]:
    """The settings with what is fastest in a few training steps now, and what was measured: seconds of a step by way.
    Numbers of threads are tried that double up to the number of cores.

    The steps train a model of their own, which is thrown away, and a run seeds its random numbers when it starts. So it
    computes what it would with these settings given by hand. On a GPU nothing is measured.

    Args:
        settings: the settings of the run.
        names: which of ``MEASURED`` are chosen; the others are as in ``settings``.
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
    # Nothing refers to the epoch after this line, so processes that load end before anything is measured.
    epoch = Epoch(settings.seed, 0, 0)
    several = list(itertools.islice(samples.epoch(settings.batch_size, epoch, augment=augment), _STEPS))
    net: Any = wsn.model
    seconds: dict[Way, float] = {}
    for _ in range(_ROUNDS):  # in turns, so that all of them meet the same load of the machine
        for way in ways(settings, names):
            torch.set_num_threads(way.threads)
            net.memory_format = torch_memory_format(way.memory_format)
            train: Sequence[Batch]
            for train in (several[:1], several):  # the first step starts the threads
                began = time.perf_counter()
                train_epoch(wsn, optimizer, train, lambda: None)
            taken = (time.perf_counter() - began) / len(several)
            seconds[way] = min(taken, seconds.get(way, taken))
    return replace(settings, **best(seconds)._asdict()), seconds


def best(seconds: Mapping[Way, float]) -> Way:
    """The way that is fastest. One that is later in the order of :func:`ways` has to be clearly faster."""
    chosen = next(iter(seconds))
    for way in seconds:
        if seconds[way] < _CLEARLY * seconds[chosen]:
            chosen = way
    return chosen


def ways(settings: TrainConfig, names: Collection[str]) -> list[Way]:
    """The ways that are tried: fewer threads first, and contiguous images before others."""
    threads = _numbers() if "threads" in names else [settings.threads]
    formats = MEMORY_FORMATS if "memory_format" in names else [settings.memory_format]
    return [Way(number, memory_format) for number in threads for memory_format in formats]


def _numbers() -> list[int]:
    most = machine.cores()
    return sorted({most, *(2**power for power in range(most.bit_length()) if 2**power <= most)})
