"""What a checkpoint has of an optimizer: its running means by the name of their parameter, and its settings as JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..continual.loading import StateError
from ..continual.wsn import WSN
from ..nn.shards import ShardedGate, is_dtensor, shard_of
from ..optim.stored_means import SCALES
from ..optim.subnet_optimizer import SubnetOptimizer
from . import coded_means
from .entries import STATE, Entry, plain

_TENSOR = "tensor"


def of_optimizer(wsn: WSN, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Entry], dict[str, Any]]:
    """The entries of an optimizer, and all that is no tensor of more than one element, as JSON.

    Raises:
        TypeError: it is no optimizer, or its state or settings have something that JSON cannot hold.
        ValueError: it has a parameter that is not in ``wsn``, or a state of a shard that is not cut as the shard is.
    """
    groups = names_in(wsn, optimizer)
    names, params = [*chain.from_iterable(groups)], dict(wsn.named_parameters())
    saved = optimizer.state_dict()
    entries: dict[str, Entry] = {}
    states: dict[str, dict[str, Any]] = {}
    for index, state in saved["state"].items():
        own = states[names[index]] = {}
        for key, value in state.items():
            what = f"{key} of {names[index]} in the optimizer"
            if isinstance(value, Tensor):
                entries[_name(names[index], key)] = _entry(what, key, value, params[names[index]])
                own[key] = None
            else:
                own[key] = [_in_json(what, value)]
    settings = [
        {key: _in_json(key, value) for key, value in group.items() if key != "params"}
        for group in saved["param_groups"]
    ]
    return entries, {"groups": groups, "settings": settings, "states": states}


def _entry(what: str, key: str, value: Tensor, param: Tensor) -> Entry:
    shard = shard_of(param)
    if shard is not None and key.removesuffix(SCALES) in coded_means.MEANS and key.endswith(SCALES):
        return Entry(coded_means.scales_of_process(value, shard), shard, True)
    if shard is None or value.ndim == 0:
        return Entry(plain(value))
    if not is_dtensor(value) or (value.shape, value.placements) != (param.shape, param.placements):  # type: ignore[attr-defined]
        raise ValueError(
            f"{what} must be cut into shards as its parameter is, {tuple(param.shape)}, or have no dimension, got "
            f"{tuple(value.shape)}"
        )
    return Entry(plain(value), shard)


def names_in(wsn: WSN, optimizer: object) -> list[list[str]]:
    """The names of the parameters of an optimizer, by param group."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    names = {id(param): name for name, param in wsn.named_parameters()}
    groups = [[names.get(id(param), "") for param in group["params"]] for group in optimizer.param_groups]
    if "" in chain.from_iterable(groups):
        raise ValueError(
            "optimizer has a parameter that is not in wsn, or no longer: build it after shard and begin_task, and give "
            "other parameters an optimizer of their own"
        )
    return groups


def lacking(name: str, param: Tensor) -> Entry:
    """The entry of a process that has no rows of a parameter, and so no running means of it."""
    shard = shard_of(param)
    if shard is not None and name.endswith(SCALES):
        return Entry(coded_means.scales_of_process(torch.zeros(0), shard), shard, True)
    return Entry(torch.empty(0), shard)


class Cut(NamedTuple):
    """How a tensor of a checkpoint is read: see :class:`Entry`."""

    gate: ShardedGate | None
    by_process: bool = False


def expected(wsn: WSN, saved: Mapping[str, Any], sizes: Mapping[str, tuple[int, ...]]) -> dict[str, Cut]:
    """The names of all entries of a saved optimizer, and how each is read. ``sizes`` are the shapes of whole tensors in
    the checkpoint.

    Raises:
        StateError: a state of a shard has another shape than the shard.
    """
    params = dict(wsn.named_parameters())
    found: dict[str, Cut] = {}
    for name, state in saved["states"].items():
        for key in [key for key, value in state.items() if value is None]:
            entry, param = _name(name, key), params[name]
            shard, size = shard_of(param), sizes.get(entry)
            if size is None:
                raise StateError(f"the checkpoint lacks {entry}. Nothing has been loaded")
            if key.endswith(SCALES):
                by_process = shard is not None and len(size) == 2 and coded_means.has_same_blocks(size, shard)
                found[entry] = Cut(shard if by_process else None, by_process)
                continue
            if shard is not None and size not in ((), tuple(param.shape)):
                raise StateError(
                    f"{key} of {name} has the shape {size} in the checkpoint, and the parameter {tuple(param.shape)}. "
                    "Nothing has been loaded"
                )
            found[entry] = Cut(shard if size else None)
    return found


def state_for(
    wsn: WSN,
    optimizer: torch.optim.Optimizer,
    saved: Mapping[str, Any],
    entries: Mapping[str, Entry],
    sizes: Mapping[str, tuple[int, ...]],
) -> dict[str, Any]:
    """The state that ``optimizer.load_state_dict`` takes.

    Raises:
        StateError: the optimizer has other parameters or settings than the saved one.
    """
    groups, params = check(wsn, optimizer, saved), dict(wsn.named_parameters())
    places = {name: i for i, name in enumerate(chain.from_iterable(groups))}
    states: dict[int, dict[str, Any]] = {}
    for name, state in saved["states"].items():
        own = states[places[name]] = {}
        for key, value in state.items():
            own[key] = entries[_name(name, key)].for_dcp() if value is None else _of_json(value[0], None)
        for key in [key for key in state if key.endswith(SCALES)]:
            scales, codes, param = entries[_name(name, key)], key.removesuffix(SCALES), params[name]
            rows, shard = entries[_name(name, codes)].rows, shard_of(param)
            if not coded_means.has_same_blocks(sizes[_name(name, key)], shard):
                values = coded_means.decoded(rows, scales.rows, codes, param, shard)
            elif isinstance(optimizer, SubnetOptimizer):  # it knows the codes
                own[key] = coded_means.own_scales(scales.rows, param)
                continue
            else:
                values = coded_means.decoded_here(rows, scales.rows, codes, param)
            del own[key]
            own[codes] = Entry(values, shard).for_dcp()
    numbers = iter(range(len(places)))
    param_groups = [
        {
            **{key: _of_json(value, own.get(key)) for key, value in settings.items()},
            "params": [next(numbers) for _ in own["params"]],
        }
        for settings, own in zip(saved["settings"], optimizer.param_groups, strict=True)
    ]
    return {"state": states, "param_groups": param_groups}


def check(wsn: WSN, optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> list[list[str]]:
    """Raise ``StateError`` if the optimizer has other parameters or settings than the saved one. The result is
    :func:`names_in`."""
    groups = names_in(wsn, optimizer)
    if groups != saved["groups"]:
        own, other = (sorted(chain.from_iterable(one)) for one in (groups, saved["groups"]))
        only = sorted({*own} ^ {*other})
        how = f"only one of them has {only[:10]}" if only else "they are in other groups or another order"
        raise StateError(f"optimizer has other parameters than the saved one: {how}. Nothing has been loaded")
    for settings, group in zip(saved["settings"], optimizer.param_groups, strict=True):
        missing = sorted(group.keys() - settings.keys() - {"params"})
        if missing:
            raise StateError(
                f"optimizer is a {type(optimizer).__name__}, and the saved one has no {', '.join(missing)}. Nothing "
                "has been loaded"
            )
    return groups


def _name(param: str, key: str) -> str:
    return f"{STATE}{param}.{key}"


def _in_json(what: str, value: object) -> Any:
    if isinstance(value, Tensor) and value.numel() == 1:
        return {_TENSOR: _in_json(what, value.item())}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_in_json(what, one) for one in value]
    if value is None or isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value)):
        return value
    raise TypeError(f"{what} must be a finite number, a bool, a str or None to be in a checkpoint, got {value!r}")


def _of_json(value: Any, own: object) -> Any:
    """A setting, in the form of the present one, ``own``."""
    if isinstance(value, dict):
        value = value[_TENSOR]
    if isinstance(value, list):
        others = own if isinstance(own, Sequence) and len(own) == len(value) else [None] * len(value)
        return tuple(_of_json(one, other) for one, other in zip(value, others, strict=True))
    return torch.full_like(own, value) if isinstance(own, Tensor) else value
