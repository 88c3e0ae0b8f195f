"""What a run is: every setting, resolved and checked before any work is done."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from types import MappingProxyType
from typing import Any

import torch

from wsn_fast.ops import RULES
from wsn_fast.subnet import SCORE_INITS
from wsn_fast.train.data import DATASETS
from wsn_fast.train.nets import NETS, default_net
from wsn_fast.train.streams import KINDS

OPTIMIZERS = ("adam", "adamw", "sgd")
DEVICES = ("auto", "cpu", "cuda")
CUDA_GRAPH = ("auto", "off")

PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "paper": MappingProxyType({"rule": "magnitude", "reinit_scores": False}),
        "clarena": MappingProxyType({"rule": "value", "reinit_scores": True}),
    }
)

# The paper's settings, by (stream, data); lr_min is that of FALLBACK in all of them.
PAPER: Mapping[tuple[str, str], Mapping[str, Any]] = MappingProxyType(
    {
        ("permuted", "mnist"): MappingProxyType(
            {"tasks": 10, "epochs": 5, "batch_size": 10, "val_fraction": 0.1, "net": "mlp"}
        ),
        ("split", "cifar100"): MappingProxyType(
            {"tasks": 10, "epochs": 200, "batch_size": 64, "val_fraction": 0.05, "net": "alexnet"}
        ),
        ("split", "folder"): MappingProxyType(  # TinyImageNet
            {"tasks": 40, "epochs": 10, "batch_size": 10, "val_fraction": 0.1, "net": "convnet4"}
        ),
    }
)
DIGITS: Mapping[str, Any] = MappingProxyType({"tasks": 5, "epochs": 40, "batch_size": 32, "val_fraction": 0.1})
FALLBACK: Mapping[str, Any] = MappingProxyType(
    {
        "tasks": 5,
        "epochs": 20,
        "batch_size": 64,
        "density": 0.3,
        "score_init": "default",
        "optimizer": "adam",
        "lr": 1e-3,
        "weight_decay": 0.0,
        "one_pass": True,
        "cuda_graph": "auto",
        "lr_patience": 6,
        "lr_factor": 2.0,
        "lr_min": 1e-6,
        "val_fraction": 0.05,
        "seed": 0,
        "device": "auto",
        "data_dir": None,
        "checkpoint_seconds": 0.0,
    }
)

_CHOICES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "stream": KINDS,
        "data": DATASETS,
        "rule": RULES,
        "score_init": SCORE_INITS,
        "net": tuple(NETS),
        "optimizer": OPTIMIZERS,
        "device": DEVICES,
        "cuda_graph": CUDA_GRAPH,
        "preset": tuple(PRESETS),
    }
)
_COUNT = ("an integer of at least 1", lambda x: x >= 1)
_POSITIVE = ("a positive number", lambda x: 0 < x < math.inf)
_NOT_NEGATIVE = ("a number of at least 0", lambda x: 0 <= x < math.inf)
_RANGES: Mapping[str, tuple[str, Callable[[Any], bool]]] = MappingProxyType(
    {
        "tasks": _COUNT,
        "epochs": _COUNT,
        "batch_size": _COUNT,
        "lr_patience": _COUNT,
        "threads": _COUNT,
        "seed": ("an integer from 0 to 2**63 - 1", lambda x: 0 <= x < 2**63),
        "density": ("a number in (0, 1]", lambda x: 0 < x <= 1),
        "val_fraction": ("a number between 0 and 1, both excluded", lambda x: 0 < x < 1),
        "lr": _POSITIVE,
        "lr_min": _POSITIVE,
        "lr_factor": ("a number above 1", lambda x: 1 < x < math.inf),
        "weight_decay": _NOT_NEGATIVE,
        "checkpoint_seconds": _NOT_NEGATIVE,
    }
)

# Where things lie on one machine: not part of what a run computes.
PLACES = ("data_dir", "out")


@dataclass(frozen=True)
class TrainConfig:
    """All settings of a run. Make one with :func:`resolve`, which knows the defaults.

    Attributes:
        stream: ``permuted``, ``split`` or ``rotated``.
        data: name of the dataset.
        data_dir: folder of its files; None for ``digits``.
        tasks: number of tasks.
        epochs: at most so many per task.
        batch_size: samples per step.
        density: the fraction of weights each task keeps, in (0, 1].
        rule: the gate, ``magnitude`` or ``value``.
        reinit_scores: new scores for every task, rather than those of the task before.
        score_init: ``default``, ``N01`` or ``U01``.
        net: name of the network.
        optimizer: ``adam``, ``adamw`` or ``sgd`` (momentum 0.9); a fresh one per task.
        lr: learning rate at the start of each task.
        weight_decay: as the optimizer understands it, of weights and scores.
        one_pass: the library's optimizers (:mod:`wsn_fast.optim`) in their one-pass mode; False means torch's under the
            guard, which are slower and round differently.
        cuda_graph: ``auto`` captures the training step where that is possible, ``off`` does not.
        lr_patience: epochs without a better validation loss before lr is divided.
        lr_factor: what it is divided by.
        lr_min: a task's training stops when lr falls below.
        val_fraction: fraction of the training samples held out for validation.
        seed: decides initialisation, stream, validation split and order of samples.
        device: ``auto``, ``cpu`` or ``cuda``.
        threads: CPU threads of torch: sums are rounded differently for another number.
        checkpoint_seconds: least time between two checkpoints inside a task; 0 writes one after every epoch.
        preset: the preset the settings started from.
        out: folder of the run.

    Raises:
        ValueError: an argument is of the wrong kind or out of range; it is named with its value.
    """

    stream: str
    data: str
    data_dir: str | None
    tasks: int
    epochs: int
    batch_size: int
    density: float
    rule: str
    reinit_scores: bool
    score_init: str
    net: str
    optimizer: str
    lr: float
    weight_decay: float
    one_pass: bool
    cuda_graph: str
    lr_patience: int
    lr_factor: float
    lr_min: float
    val_fraction: float
    seed: int
    device: str
    threads: int
    checkpoint_seconds: float
    preset: str
    out: str

    def __post_init__(self) -> None:
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                raise self._error(name, f"one of {', '.join(known)}")
        for name, (expected, accept) in _RANGES.items():
            value = getattr(self, name)
            kind = numbers.Integral if expected.startswith("an integer") else numbers.Real
            if isinstance(value, bool) or not isinstance(value, kind) or not accept(value):
                raise self._error(name, expected)
        if self.lr < self.lr_min:
            raise self._error("lr_min", f"at most lr, {self.lr!r}")
        for name in ("reinit_scores", "one_pass"):
            if not isinstance(getattr(self, name), bool):
                raise self._error(name, "True or False")
        if not isinstance(self.out, str) or not self.out:
            raise self._error("out", "the name of a folder")
        if self.data_dir is not None and not isinstance(self.data_dir, str):
            raise self._error("data_dir", "the name of a folder or None")

    def _error(self, name: str, expected: str) -> ValueError:
        return ValueError(f"{name}: expected {expected}, got {getattr(self, name)!r}")


def resolve(
    *, stream: str | None = None, data: str | None = None, preset: str | None = None, **given: Any
) -> TrainConfig:
    """The settings of a run: what is given, over the preset, over the defaults for this stream and data.

    Args:
        stream: kind of the stream; None means ``permuted``.
        data: name of the dataset; None means ``digits``.
        preset: a key of ``PRESETS``; None means ``paper``.
        given: other fields of :class:`TrainConfig`; None means not given.

    Raises:
        ValueError: a setting is unknown, of the wrong kind or out of range.
    """
    stream, data, preset = stream or "permuted", data or "digits", preset or "paper"
    if preset not in PRESETS:
        raise ValueError(f"preset: expected one of {', '.join(PRESETS)}, got {preset!r}")
    table = DIGITS if data == "digits" else PAPER.get((stream, data), {})
    explicit = {name: value for name, value in given.items() if value is not None}
    settings: dict[str, Any] = {"stream": stream, "data": data, "preset": preset}
    settings["net"] = default_net(data, stream)
    settings |= {**FALLBACK, **table, **PRESETS[preset], **explicit}
    # A second thread makes the MLP no faster, and many times slower when the cores are busy.
    settings.setdefault("threads", 1 if settings["net"] == "mlp" else torch.get_num_threads())
    settings.setdefault("out", f"runs/{stream}-{data}-{preset}-seed{settings['seed']}")
    return from_dict(settings)


def from_dict(settings: Mapping[str, Any]) -> TrainConfig:
    """The inverse of ``dataclasses.asdict``. Raises ``ValueError`` for missing, unknown or wrong settings."""
    settings = {"one_pass": False, "cuda_graph": "off", **settings}  # which the first runs did not have
    names = {field.name for field in fields(TrainConfig)}
    for problem, wrong in (("missing", names - settings.keys()), ("unknown", settings.keys() - names)):
        if wrong:
            raise ValueError(f"{problem} settings: {', '.join(sorted(wrong))}")
    return TrainConfig(**settings)


def portable(config: TrainConfig) -> dict[str, Any]:
    """The settings without ``data_dir`` and ``out``, which only say where things lie on one machine."""
    return {name: value for name, value in asdict(config).items() if name not in PLACES}


def command_line(config: TrainConfig) -> str:
    """The ``wsn-fast train`` command for a config, less its places and what is default anyway."""
    default = resolve(stream=config.stream, data=config.data, preset=config.preset)
    words = ["wsn-fast", "train", config.stream, "--data", config.data, "--preset", config.preset]
    for name, value in portable(config).items():
        if value == getattr(default, name):
            continue
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            words.append(flag if value else f"--no-{flag[2:]}")
        else:
            words += [flag, str(value)]
    return " ".join(words)
