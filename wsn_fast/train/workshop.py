"""What a config stands for: its tasks, and the untrained model for them."""

from __future__ import annotations

from typing import NamedTuple

import torch

from wsn_fast import WSN
from wsn_fast.convert import convert
from wsn_fast.train import data, nets, streams
from wsn_fast.train.config import TrainConfig


class Workshop(NamedTuple):
    """The tasks, the untrained model on its device, the data's fingerprint."""

    stream: streams.TaskStream
    wsn: WSN
    device: torch.device
    fingerprint: str


def prepare(settings: TrainConfig) -> Workshop:
    """Load the data, make the stream, and build, convert and place the model, initialised from the seed.

    Sets torch's global seed and its number of threads.

    Raises:
        ValueError: the settings do not fit together, or the data cannot be read (``DataError``).
    """
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: expected one that this machine has, got 'cuda'")
    name = "cuda" if settings.device != "cpu" and torch.cuda.is_available() else "cpu"
    dataset = data.load(settings.data, settings.data_dir)
    stream = streams.make_stream(
        settings.stream, dataset, settings.tasks, settings.seed, val_fraction=settings.val_fraction
    )
    torch.set_num_threads(settings.threads)
    torch.manual_seed(settings.seed)
    net = convert(
        nets.build(settings.net, stream.input_shape, max(stream.classes.values())),
        settings.density,
        rule=settings.rule,
        heads={"head": stream.classes},
        score_init=settings.score_init,
    )
    wsn = WSN(net, reinit_scores=settings.reinit_scores, score_init=settings.score_init)
    return Workshop(stream, wsn.to(name), torch.device(name), dataset.fingerprint)
