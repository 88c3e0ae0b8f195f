"""The stream of tasks and the untrained model that a config describes."""

from __future__ import annotations

from typing import NamedTuple

import torch

from wsn_fast import WSN
from wsn_fast.convert.to_subnet import convert
from wsn_fast.train import data, machine, nets, streams
from wsn_fast.train.config import TrainConfig
from wsn_fast.train.data.loading import Shows, shows_nothing
from wsn_fast.train.streams import own_code


class Experiment(NamedTuple):
    """What a run works on.

    Attributes:
        stream: the tasks.
        wsn: the model, before any training.
        device: the device of the model.
        fingerprint: identifies the data; see :class:`wsn_fast.train.data.Dataset`.
    """

    stream: streams.Stream
    wsn: WSN
    device: torch.device
    fingerprint: str


def make_experiment(settings: TrainConfig, gpu: int | None = None, shows: Shows = shows_nothing) -> Experiment:
    """Load the data, make the stream, and build, convert and place the model, initialised from the seed.

    Sets torch's global seed and its number of threads.

    Args:
        settings: the config.
        gpu: the number of the GPU, if there is to be one; None leaves it to PyTorch.
        shows: shows how far the reading of the data is.

    Raises:
        ValueError: the settings do not fit together, or the data cannot be read (``DataError``).
    """
    device = _device(settings.device, gpu)
    stream = _own_stream(settings, shows) if settings.stream == "own" else _stream_of_datasets(settings, shows)
    _check_size(settings, stream)
    torch.set_num_threads(settings.threads)
    torch.manual_seed(settings.seed)
    dense = nets.build(settings.net, stream.input_shape, max(stream.classes.values()))
    dense.memory_format = torch_memory_format(settings.memory_format)
    net = convert(
        dense,
        settings.density,
        rule=settings.rule,
        heads={"head": stream.classes},
        score_init=settings.score_init,
    )
    wsn = WSN(net, reinit_scores=settings.reinit_scores, score_init=settings.score_init, gates_ahead=True)
    return Experiment(stream, wsn.to(device), device, stream.fingerprint)


def torch_memory_format(name: str) -> torch.memory_format:
    """PyTorch's memory format for one of ``MEMORY_FORMATS``."""
    return torch.channels_last if name == "channels_last" else torch.contiguous_format


def _stream_of_datasets(settings: TrainConfig, shows: Shows) -> streams.TaskStream:
    order = settings.class_order
    return streams.TaskStream(
        settings.stream,
        data.load_several(settings.data, settings.data_dir, shows),
        settings.tasks,
        settings.seed,
        val_fraction=settings.val_fraction,
        class_order=order if order in ("random", "given") else [int(number) for number in order.split(",")],
        classes_per_task=settings.classes_per_task or None,
    )


def _own_stream(settings: TrainConfig, shows: Shows) -> streams.OwnStream:
    made = streams.OwnStream(
        own_code.call(settings.data, settings.data_dir, settings.seed),
        settings.seed,
        tasks=settings.tasks or None,
        val_fraction=settings.val_fraction,
        workers=settings.workers,
        name=settings.data,
        shows=shows,
    )
    if settings.augment != "none" and len(made.input_shape) != 3:
        raise ValueError(f"augment: expected none for inputs of the shape {made.input_shape}, got {settings.augment!r}")
    return made


def _device(wished: str, gpu: int | None) -> torch.device:
    if wished == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: expected one that this machine has, got 'cuda'")
    if wished == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if gpu is None:
        return torch.device("cuda")
    if gpu >= torch.cuda.device_count():
        raise ValueError(
            f"device: expected a GPU for each process on this machine, got {torch.cuda.device_count()} of them for "
            f"LOCAL_RANK {gpu}: start fewer processes, or use --device cpu"
        )
    torch.cuda.set_device(gpu)
    return torch.device("cuda", gpu)


def _check_size(settings: TrainConfig, stream: streams.Stream) -> None:
    """Raise ``ValueError`` if the weights, scores, heads and masks would not fit into the memory of this machine."""
    memory = machine.memory()
    with torch.device("meta"):
        net = nets.build(settings.net, stream.input_shape, max(stream.classes.values()))
    gated = sum(parameter.numel() for parameter in net.features.parameters())
    head = sum(parameter.numel() for parameter in net.head.parameters())
    wanted = 8 * gated + len(stream) * (4 * head + gated // 8)
    if memory is not None and wanted > memory:
        raise ValueError(
            f"net: {settings.net} for inputs {stream.input_shape} and {len(stream)} tasks takes "
            f"{wanted / 2**30:.1f} GiB, this machine has {memory / 2**30:.1f} GiB"
        )
