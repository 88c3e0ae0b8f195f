"""The settings of a run. They are resolved and checked before any work is done."""

from __future__ import annotations

import numbers
import re
import shlex
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from types import MappingProxyType
from typing import Any

from wsn_fast.choices import RULES, SCORE_INITS, STORAGES
from wsn_fast.train.choices import (
    AUGMENT,
    CUDA_GRAPH,
    DATASETS,
    DEVICES,
    FIVE_DATASETS,
    MEMORY_FORMATS,
    NETS,
    OPTIMIZERS,
    ORDERED,
    STREAMS,
    default_net,
)

PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "paper": MappingProxyType({"rule": "magnitude", "reinit_scores": False}),
        "clarena": MappingProxyType({"rule": "value", "reinit_scores": True}),
    }
)

# The paper's settings by (stream, data).
PAPER: Mapping[tuple[str, str], Mapping[str, Any]] = MappingProxyType(
    {
        ("permuted", "mnist"): MappingProxyType(
            {"tasks": 10, "epochs": 5, "batch_size": 10, "val_fraction": 0.1, "net": "mlp"}
        ),
        ("split", "cifar100"): MappingProxyType(
            {"tasks": 10, "epochs": 200, "batch_size": 64, "val_fraction": 0.05, "net": "alexnet"}
        ),
        ("superclass", "cifar100"): MappingProxyType(
            {"tasks": 20, "epochs": 50, "batch_size": 64, "val_fraction": 0.05, "net": "lenet", "lr_min": 1e-5}
        ),
        ("split", "omniglot"): MappingProxyType(  # Omniglot Rotation
            {
                "tasks": 100,
                "epochs": 100,
                "batch_size": 64,
                "val_fraction": 0.05,
                "net": "lenet_large",
                "class_order": "given",
                "classes_per_task": 12,
            }
        ),
        ("datasets", FIVE_DATASETS): MappingProxyType(
            {"epochs": 100, "batch_size": 64, "val_fraction": 0.05, "net": "resnet18", "lr_min": 1e-5}
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
        "class_order": "random",
        "classes_per_task": 0,
        "epochs": 20,
        "batch_size": 64,
        "density": 0.3,
        "score_init": "default",
        "optimizer": "adam",
        "lr": 1e-3,
        "weight_decay": 0.0,
        "one_pass": True,
        "moments": "float32",
        "cuda_graph": "auto",
        "memory_format": "contiguous",
        "lr_patience": 6,
        "lr_factor": 2.0,
        "lr_min": 1e-6,
        "val_fraction": 0.05,
        "augment": "none",
        "seed": 0,
        "device": "auto",
        "data_dir": None,
        "workers": 0,
        "checkpoint_seconds": "auto",
    }
)

_CHOICES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "stream": STREAMS,
        "rule": RULES,
        "score_init": SCORE_INITS,
        "net": NETS,
        "optimizer": OPTIMIZERS,
        "moments": STORAGES,
        "device": DEVICES,
        "cuda_graph": CUDA_GRAPH,
        "memory_format": MEMORY_FORMATS,
        "augment": AUGMENT,
        "preset": tuple(PRESETS),
    }
)
MOST_TASKS = 10_000
_MOST = 10**18  # torch takes integers of 64 bits
_COUNT = ("an integer from 1 to 10**18", lambda x: 1 <= x <= _MOST)
_POSITIVE = ("a positive number up to 1e38", lambda x: 0 < x <= 1e38)
_NOT_NEGATIVE = ("a number from 0 to 1e38", lambda x: 0 <= x <= 1e38)
_RANGES: Mapping[str, tuple[str, Callable[[Any], bool]]] = MappingProxyType(
    {
        "tasks": (f"an integer from 0 to {MOST_TASKS}", lambda x: 0 <= x <= MOST_TASKS),
        "classes_per_task": ("an integer from 0 to 10**18", lambda x: 0 <= x <= _MOST),
        "epochs": _COUNT,
        "batch_size": _COUNT,
        "lr_patience": _COUNT,
        "workers": ("an integer from 0 to 1024", lambda x: 0 <= x <= 1024),
        "threads": ("an integer from 1 to 1024", lambda x: 1 <= x <= 1024),
        "seed": ("an integer from 0 to 2**63 - 1", lambda x: 0 <= x < 2**63),
        "density": ("a number in (0, 1]", lambda x: 0 < x <= 1),
        "val_fraction": ("a number between 0 and 1, both excluded", lambda x: 0 < x < 1),
        "lr": _POSITIVE,
        "lr_min": _POSITIVE,
        "lr_factor": ("a number above 1, up to 1e38", lambda x: 1 < x <= 1e38),
        "weight_decay": _NOT_NEGATIVE,
    }
)

# What the first runs did, whose configs do not have these settings.
_FIRST: Mapping[str, Any] = MappingProxyType(
    {
        "one_pass": False,
        "cuda_graph": "off",
        "moments": "float32",
        "class_order": "random",
        "classes_per_task": 0,
        "augment": "none",
        "memory_format": "contiguous",
        "workers": 0,
    }
)

_SHOWN = 500  # characters of a message

_NAME = re.compile(r"\w[\w.+-]{0,99}")
_CODE = re.compile(r".{1,999}:[A-Za-z_]\w{0,99}")
_NUMBERS = re.compile(r"[0-9]{1,9}(,[0-9]{1,9})*")

# The settings that only say where files are on one machine. They do not change what a run computes.
PLACES = ("data_dir", "out")


@dataclass(frozen=True)
class TrainConfig:
    """All settings of a run. :func:`resolve` makes one and knows the defaults.

    Attributes:
        stream: ``permuted``, ``split``, ``rotated``, ``superclass``, ``datasets`` or ``own``.
        data: name of the dataset. For the stream ``datasets`` there are several, with commas between them; one that is
            not in ``DATASETS`` is a folder of images in ``data_dir``. For ``own`` it is the code that makes the tasks,
            ``FILE.py:FUNCTION`` or ``MODULE:FUNCTION``, which is called with ``data_dir``.
        data_dir: folder of its files; None for ``digits``.
        workers: number of processes that load data of a stream ``own``; 0 loads them in the process of the run.
        tasks: number of tasks; 0 for all tasks of a stream ``own``.
        class_order: the order in which the tasks of a ``split`` or ``superclass`` stream take classes or superclasses:
            ``random``, ``given``, or numbers with commas between them.
        classes_per_task: the number of classes of each task of a ``split`` stream; 0 deals all classes evenly.
        epochs: the largest number of epochs per task.
        batch_size: samples per step.
        density: the fraction of weights each task keeps, in (0, 1].
        rule: the gate, ``magnitude`` or ``value``.
        reinit_scores: whether every task gets new scores; False means that it starts with the scores of the task
            before.
        score_init: ``default``, ``N01`` or ``U01``.
        net: name of the network.
        optimizer: ``adam``, ``adamw`` or ``sgd`` (momentum 0.9). Every task gets a new one.
        lr: the learning rate at the start of each task.
        weight_decay: the weight decay of weights and scores, in the sense of the optimizer.
        one_pass: True takes the optimizers of :mod:`wsn_fast.optim` in their one-pass mode. False takes torch's
            optimizers under the guard, which are slower and round differently.
        moments: how the optimizer stores the running means of weights and scores: ``float32``, ``bfloat16`` or
            ``8bit``. The last two need ``one_pass``.
        cuda_graph: ``auto`` captures the training step in a CUDA graph where that is possible, ``off`` never does.
        memory_format: how the net gets images, ``contiguous`` or ``channels_last``, which makes convolutions faster on
            a CPU. The results differ by rounding.
        lr_patience: the number of epochs without a better validation loss after which lr is divided.
        lr_factor: the number that lr is divided by.
        lr_min: the training of a task stops when lr falls below this.
        val_fraction: fraction of the training samples held out for validation.
        augment: ``crops`` crops and mirrors training images at random
            (:class:`wsn_fast.train.samples.augmentation.Augmentation`), ``none`` leaves them as they are.
        seed: decides the initialisation, the stream, the validation split and the order of the samples.
        device: ``auto``, ``cpu`` or ``cuda``.
        threads: the number of CPU threads of torch. Another number rounds sums differently.
        checkpoint_seconds: the least time between two checkpoints inside a task: 0 writes one after every epoch, and
            ``auto`` so many that they take a few percent of the time.
        preset: the preset that the settings started from.
        out: folder of the run.

    Raises:
        ValueError: an argument is of the wrong kind or out of range; it is named with its value.
    """

    stream: str
    data: str
    data_dir: str | None
    workers: int
    tasks: int
    class_order: str
    classes_per_task: int
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
    moments: str
    cuda_graph: str
    memory_format: str
    lr_patience: int
    lr_factor: float
    lr_min: float
    val_fraction: float
    augment: str
    seed: int
    device: str
    threads: int
    checkpoint_seconds: float | str
    preset: str
    out: str

    def __post_init__(self) -> None:
        self._check_data()
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                raise self._error(name, f"one of {', '.join(known)}")
        for name, (expected, accept) in _RANGES.items():
            self._check_number(name, expected, accept)
        if self.checkpoint_seconds != "auto":
            self._check_number("checkpoint_seconds", f"auto or {_NOT_NEGATIVE[0]}", _NOT_NEGATIVE[1])
        if self.lr < self.lr_min:
            raise self._error("lr_min", f"at most lr, {self.lr!r}")
        for name in ("reinit_scores", "one_pass"):
            if not isinstance(getattr(self, name), bool):
                raise self._error(name, "True or False")
        if self.moments != "float32" and not self.one_pass:
            raise self._error("moments", "float32 without one_pass, because torch's optimizers know nothing else")
        if not isinstance(self.out, str) or not self.out:
            raise self._error("out", "the name of a folder")
        if self.data_dir is not None and not isinstance(self.data_dir, str):
            raise self._error("data_dir", "the name of a folder or None")

    def _check_number(self, name: str, expected: str, accept: Callable[[Any], bool]) -> None:
        value = getattr(self, name)
        kind = numbers.Integral if expected.startswith("an integer") else numbers.Real
        too_large = isinstance(value, int) and value >= 2**63
        if isinstance(value, bool) or not isinstance(value, kind) or too_large or not accept(value):
            raise self._error(name, expected)

    def _check_data(self) -> None:
        known = f"one of {', '.join(DATASETS)}"
        if self.stream == "own":
            if not isinstance(self.data, str) or not self.data.isprintable() or not _CODE.fullmatch(self.data):
                raise self._error("data", "FILE.py:FUNCTION or MODULE:FUNCTION, the code that makes the tasks")
        elif self.stream == "datasets":
            known += ", or folders of images, with commas between them"
            if not isinstance(self.data, str) or not all(_NAME.fullmatch(name) for name in self.data.split(",")):
                raise self._error("data", known)
        elif self.data not in DATASETS:
            raise self._error("data", known)
        order = self.class_order
        if not isinstance(order, str) or not (order in ("random", "given") or _NUMBERS.fullmatch(order)):
            raise self._error("class_order", "random, given, or numbers with commas between them")
        if order != "random" and self.stream not in ORDERED:
            raise self._error("class_order", f"random for the stream {self.stream}, which has no such order")
        if self.classes_per_task != 0 and self.stream != "split":
            raise self._error("classes_per_task", f"0 for the stream {self.stream}")
        if self.tasks == 0 and self.stream != "own":
            raise self._error("tasks", f"an integer from 1 to {MOST_TASKS}")
        if self.workers != 0 and self.stream != "own":
            raise self._error("workers", f"0 for the stream {self.stream}, whose data are in memory")

    def _error(self, name: str, expected: str) -> ValueError:
        return ValueError(f"{name}: expected {expected}, got {_short(getattr(self, name))}")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def resolve(
    *, stream: str | None = None, data: str | None = None, preset: str | None = None, **given: Any
) -> TrainConfig:
    """Make the settings of a run. What is given goes before the preset, and the preset before the defaults for this
    stream and data.

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
    settings |= {**FALLBACK, **_of_stream(stream, data), **table, **PRESETS[preset], **explicit}
    if "threads" not in settings:
        settings["threads"] = _default_threads(settings["net"])
    settings.setdefault("out", f"runs/{stream}-{short_name(str(data))}-{preset}-seed{settings['seed']}")
    return from_dict(settings)


def short_name(data: str) -> str:
    """The name of data in names of folders."""
    return re.sub(r"[^\w.+-]+", "+", data.replace("\\", "/").rpartition("/")[2])


def _of_stream(stream: str, data: str) -> dict[str, Any]:
    """The defaults that come with the kind of the stream."""
    if stream == "datasets":
        return {"tasks": str(data).count(",") + 1}
    if stream == "own":
        return {"tasks": 0}
    return {"class_order": "given"} if stream == "superclass" else {}


def _default_threads(net: str) -> int:
    if net == "mlp":  # a second thread does not make it faster, and many times slower when the cores are busy
        return 1
    import torch  # here, so that the command line can say what the settings are without PyTorch

    return torch.get_num_threads()


def from_dict(settings: Mapping[str, Any]) -> TrainConfig:
    """The inverse of ``dataclasses.asdict``. Raises ``ValueError`` for missing, unknown or wrong settings."""
    if not isinstance(settings, Mapping):
        raise ValueError(f"settings: expected a mapping, got {type(settings).__name__}")
    settings = {**_FIRST, **settings}
    names = {field.name for field in fields(TrainConfig)}
    for problem, wrong in (("missing", names - settings.keys()), ("unknown", settings.keys() - names)):
        if wrong:
            raise ValueError(f"{problem} settings: {', '.join(sorted(map(str, wrong)))[:_SHOWN]}")
    return TrainConfig(**settings)


def portable(config: TrainConfig) -> dict[str, Any]:
    """The settings without ``data_dir`` and ``out``, which only say where things lie on one machine."""
    return {name: value for name, value in asdict(config).items() if name not in PLACES}


def command_line(config: TrainConfig) -> str:
    """The ``wsn-fast train`` command for a config, without ``PLACES`` and without what is the default anyway."""
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
    return shlex.join(words)
