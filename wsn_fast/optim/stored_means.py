"""How an optimizer stores the running means of gated tensors and scores, and how its state gets another form.

In the state of a parameter, a mean that is stored in 8 bits has its codes under its name, and the scales of its blocks
under that name and :data:`SCALES`. In any other form it is one tensor, as PyTorch's optimizers have it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends import moments
from ..backends.moments import STORAGES, Stored
from ..nn.shards import local, shard_of

SCALES = "_scales"

State = dict[str, Any]


class Storage(NamedTuple):
    """How running means are stored, each one of :data:`wsn_fast.backends.moments.STORAGES`.

    Attributes:
        weights: those of the gated tensors.
        scores: those of their scores.
    """

    weights: str
    scores: str

    @property
    def is_coded(self) -> bool:
        """Whether some are stored in fewer bytes."""
        return self != PLAIN

    def __str__(self) -> str:
        return self.weights if self.weights == self.scores else f"{self.weights}, {self.scores} for scores"


PLAIN = Storage("float32", "float32")


def check_storage(moments: object, score_moments: object) -> Storage:
    """The storage that these arguments ask for. Raises ``ValueError`` if one of them is unknown."""
    for name, value in (("moments", moments), ("score_moments", score_moments)):
        if value not in STORAGES and not (value is None and name == "score_moments"):
            raise ValueError(f"{name} must be one of {STORAGES}, got {value!r}")
    return Storage(str(moments), str(moments if score_moments is None else score_moments))


def mean_in(state: State, key: str) -> Stored | None:
    """The mean of this name in a state; None if there is none."""
    values = state.get(key)
    return Stored(values, state.get(key + SCALES)) if isinstance(values, Tensor) else None


def local_mean(state: State, key: str) -> Stored | None:
    """What this process has of the mean of this name in a state."""
    mean = mean_in(state, key)
    return None if mean is None else mean._replace(values=local(mean.values))


def is_coded(mean: Stored, param: Tensor) -> bool:
    """Whether a mean of ``param`` is stored in fewer bytes than PyTorch stores it in."""
    return mean.scales is not None or (mean.storage == "bfloat16" and param.dtype is not torch.bfloat16)


def zeros(param: Tensor, storage: str, signed: bool) -> Stored:
    """Zeros for a running mean of a parameter. If other processes hold the rest of it, the blocks of 8-bit codes begin
    with the rows of this process, and the scales are those of these rows."""
    return _placed(moments.zeros(local(param).detach(), storage, signed), param)


def _placed(mean: Stored, param: Tensor) -> Stored:
    """A mean of what this process has of a parameter, as it is in a state: cut as the parameter is."""
    shard = shard_of(param)
    return mean if shard is None else mean._replace(values=shard.placed(mean.values))


def put(state: State, key: str, mean: Stored) -> None:
    """Put a mean into a state."""
    state[key] = mean.values
    if mean.scales is None:
        state.pop(key + SCALES, None)
    else:
        state[key + SCALES] = mean.scales


def convert(state: State, param: Tensor, means: Mapping[str, bool], storage: str) -> None:
    """Bring those of the ``means``, by name and with whether they have a sign, that are in a state into a form."""
    own = local(param).detach()
    for key, signed in means.items():
        mean = local_mean(state, key)
        if mean is not None and not _has_form(mean, own, storage):
            converted = moments.zeros(own, storage, signed)
            moments.encode(moments.decode(mean, own, signed), converted, signed)
            put(state, key, _placed(converted, param))


def _has_form(mean: Stored, param: Tensor, storage: str) -> bool:
    return not is_coded(mean, param) if storage == "float32" else mean.storage == storage


def take_coded(states: Mapping[Any, Any], params: Mapping[Any, Tensor], means: Mapping[str, bool]) -> _Taken:
    """Split loaded ``states`` by parameter id: what PyTorch may load, and the coded means, which it would cast.

    Raises:
        ValueError: a coded mean does not fit its parameter.
    """
    rest: dict[Any, Any] = {}
    coded: dict[Any, State] = {}
    for index, state in states.items():
        rest[index] = state
        if not isinstance(state, dict) or index not in params:
            continue
        for key in means:
            mean = mean_in(state, key)
            if mean is not None and (is_coded(mean, params[index]) or mean.values.dtype is torch.uint8):
                _check(mean, key, params[index])
                put(coded.setdefault(index, {}), key, Stored(mean.values.clone(), _copy(mean.scales)))
        if index in coded:
            rest[index] = {key: value for key, value in state.items() if key not in coded[index]}
    return _Taken(rest, coded)


class _Taken(NamedTuple):
    rest: dict[Any, Any]
    coded: dict[Any, State]


def _copy(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.clone()


def _check(mean: Stored, key: str, param: Tensor) -> None:
    values, scales = mean
    if values.shape != param.shape:
        raise ValueError(f"{key} must have the shape {tuple(param.shape)} of its parameter, got {tuple(values.shape)}")
    if values.dtype is torch.bfloat16 and scales is None:
        return
    blocks = (moments.blocks_of(local(param)),)
    if values.dtype is not torch.uint8 or not isinstance(scales, Tensor) or scales.dtype is not torch.float32:
        kind = getattr(scales, "dtype", type(scales).__name__)
        raise ValueError(f"{key} must be uint8 with float32 {key}{SCALES}, got {values.dtype} with {kind}")
    if scales.shape != blocks:
        raise ValueError(f"{key}{SCALES} must have the shape {blocks}, got {tuple(scales.shape)}")
