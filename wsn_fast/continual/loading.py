"""Checks a saved state before anything of it is loaded, so that a state is loaded whole or not at all.

PyTorch copies what fits and complains afterwards, and with ``strict=False`` it does not complain. Then a model can
have masks of tasks that it does not know, or compute with the mask of another task.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin

from ..nn import per_task, rows
from ..nn.gated import SubnetLayer
from ..nn.heads import TaskHeads
from ..nn.task_ids import TaskId, task_from_key
from . import loaded_heads, register_state, renames, trainable_state

if TYPE_CHECKING:
    from .wsn import WSN

_SHOWN = 10  # names in a message


class StateError(RuntimeError, ValueError):
    """A saved state does not fit the model, or does not fit together. Nothing of it has been loaded."""


class Tie(NamedTuple):
    """The places of one Parameter that several modules share: each module with the name of its attribute."""

    places: list[tuple[nn.Module, str]]

    def tie(self) -> None:
        """Make all places hold the Parameter of the first again, after a load with ``assign=True``."""
        module, name = self.places[0]
        for other, attribute in self.places[1:]:
            other._parameters[attribute] = module._parameters[name]


def check(wsn: WSN, state: dict[str, Any], prefix: str, strict: bool, assign: bool) -> None:
    """Check the state that ``wsn`` is about to load.

    Args:
        wsn: the model. Nothing of it is changed.
        state: the state; names of this model begin with ``prefix``. Masks without elements are added where a program
            has dropped them.
        prefix: as torch passes it to hooks.
        strict: whether every name must be there. It is False if a parent module is loaded, because torch does not tell
            its modules; then torch itself complains about names, after it has loaded the others.
        assign: as in ``load_state_dict``.

    Raises:
        StateError: it does not fit.
    """
    with contextlib.suppress(ValueError):  # what is loaded may put right what is wrong with the model
        wsn._parts.refresh(wsn.model)
    try:
        saved = state.get(f"{prefix}_extra_state")
        register = None if saved is None else register_state.parse(saved)
        if register is not None and not register.records:
            _add_empty(wsn, state, prefix)
        own = dict(_own(wsn, prefix))
        _check_names(wsn, own, state, prefix, _How(strict, assign))
        tasks = _check_tasks(wsn, state, prefix, register)
        if register is not None and tasks:
            _check_complete(wsn, own, state, prefix)
        _check_values(wsn, own, state, assign, bool(tasks))
        if register is None and tasks:
            _check_nothing_moves(wsn, state, prefix)
    except StateError:
        raise
    except (ValueError, TypeError) as error:
        raise StateError(f"the state does not fit together: {error}. Nothing has been loaded") from error


def ties(wsn: WSN) -> list[Tie]:
    """The Parameters of ``wsn`` that have several places."""
    places: dict[int, Tie] = {}
    for module in wsn.modules():
        for name, param in module._parameters.items():
            if param is not None:
                places.setdefault(id(param), Tie([])).places.append((module, name))
    return [tie for tie in places.values() if len(tie.places) > 1]


class _How(NamedTuple):
    """The options of a load, as in ``load_state_dict``."""

    strict: bool
    assign: bool


# --- names and shapes ------------------------------------------------------------------------------------------------
class _Own(NamedTuple):
    """A tensor that the model would save. ``shape`` is None for an extra state, and its first length is None for the
    rows of tasks."""

    tensor: Tensor | None
    shape: tuple[int | None, ...] | None


def _own(wsn: WSN, prefix: str) -> Iterator[tuple[str, _Own]]:
    """What the model itself would save, by name, without what modules of unknown kinds load in their own way."""
    for path, module in _known_modules(wsn, prefix):
        grows = {f"{name}_tasks" for name in per_task.marked(module)}
        if isinstance(module, SubnetLayer):
            grows |= {f"{name}_masks" for name in module.GATED}
        persistent = ((k, b) for k, b in module._buffers.items() if k not in module._non_persistent_buffers_set)
        for name, tensor in (*module._parameters.items(), *persistent):
            if tensor is not None:
                shape = (None, *tensor.shape[1:]) if name in grows else tuple(tensor.shape)
                yield f"{path}{name}", _Own(tensor, shape)
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            yield f"{path}_extra_state", _Own(None, None)


def _known_modules(wsn: WSN, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    """The modules that load their tensors as torch does, each with the beginning of its names in a state."""
    left: list[str] = []
    for name, module in wsn.named_modules(remove_duplicate=False):
        path = f"{prefix}{name}." if name else prefix
        if _loads_in_its_own_way(module):
            left.append(path)
        if not any(path.startswith(other) for other in left):
            yield path, module


def _loads_in_its_own_way(module: nn.Module) -> bool:
    """Whether a module has code of its own for loading. Batch norms have, which only lets old states lack a count."""
    hooks = [getattr(hook, "hook", hook) for hook in module._load_state_dict_pre_hooks.values()]
    origins = [str(getattr(code, "__module__", "")) for code in (type(module)._load_from_state_dict, *hooks)]
    known = ("torch.nn.modules.module", "torch.nn.modules.batchnorm", "wsn_fast.")
    return isinstance(module, LazyModuleMixin) or not all(origin.startswith(known) for origin in origins)


def _check_names(wsn: WSN, own: dict[str, _Own], state: Mapping[str, Any], prefix: str, how: _How) -> None:
    """Raise ``StateError`` if names are missing or unknown and the load is strict, or if a value cannot be loaded."""
    strict, assign = how
    modules = wsn.named_modules(remove_duplicate=False)
    foreign = tuple(f"{prefix}{name}." for name, module in modules if _loads_in_its_own_way(module))
    _expect_heads(wsn, own, state, prefix, foreign)
    given = {name for name in state if name.startswith(prefix) and not name.startswith(foreign)}
    missing = [name for name in own if name not in given and not name.endswith(".num_batches_tracked")]
    unknown = [name for name in state if name in given and name not in own]
    found = ((name, _wrong(own[name], state[name], assign)) for name in own if name in given)
    wrong = [f"{problem[0]} for {name}: {problem[1]}" for name, problem in found if problem is not None]
    if wrong or (strict and (missing or unknown)):
        parts = [("Missing key(s)", missing if strict else []), ("Unexpected key(s)", unknown if strict else [])]
        lines = [f"{what} in state_dict: {_list(names)}" for what, names in parts if names]
        lines += wrong[:_SHOWN]
        hint = _renamed(own, state, missing, unknown, prefix)
        raise StateError(
            "\n\t".join([f"Error(s) in loading state_dict for {type(wsn).__name__}, nothing has been loaded:", *lines])
            + (hint or _other_model(missing, unknown, wrong))
        )


def _wrong(own: _Own, value: Any, assign: bool) -> tuple[str, str] | None:
    """What keeps ``value`` from being loaded, in short and in full; None if nothing does."""
    if own.shape is None:
        return None
    if not isinstance(value, Tensor):
        return "no tensor", f"the state has a {type(value).__name__}"
    if not _fits(tuple(value.shape), own.shape):
        wanted = str(own.shape).replace("None", "T")
        return "size mismatch", f"the state has {tuple(value.shape)}, the model {wanted}"
    if own.tensor is not None and not _same_kind(own.tensor.dtype, value.dtype):
        return "dtype mismatch", f"the state has {value.dtype}, the model {own.tensor.dtype}"
    if value.layout is not torch.strided or (
        value.is_meta and not assign and not (own.tensor is None or own.tensor.is_meta)
    ):
        return "no values", f"the state has a tensor on {value.device} with the layout {value.layout}"
    return None


def _same_kind(one: torch.dtype, other: torch.dtype) -> bool:
    """Whether both are for floats, for complex numbers, or for integers. Packed masks and flags have one dtype."""
    if torch.uint8 in (one, other) or torch.bool in (one, other):
        return one == other
    return (one.is_floating_point, one.is_complex) == (other.is_floating_point, other.is_complex)


def _fits(shape: tuple[int, ...], own: tuple[int | None, ...]) -> bool:
    if own == () and shape == (1,):  # torch takes a number in a vector too
        return True
    return len(shape) == len(own) and all(b in (None, a) for a, b in zip(shape, own, strict=True))


def _expect_heads(
    wsn: WSN, own: dict[str, _Own], state: Mapping[str, Any], prefix: str, foreign: tuple[str, ...]
) -> None:
    """Replace the heads of the model in ``own`` by those that the state brings, except for heads in modules that load
    in their own way: the names of these begin with ``foreign``."""
    for name, heads in wsn.named_modules(remove_duplicate=False):
        start = f"{prefix}{name}.heads."
        if not isinstance(heads, TaskHeads) or start.startswith(foreign):
            continue
        given = [key for key in state if key.startswith(start) and key.endswith(".weight")]
        if not given:
            continue
        for key in [key for key in own if key.startswith(start)]:
            del own[key]
        for key in given:
            task, weight = key[len(start) : -len(".weight")], state[key]
            try:
                task_from_key(task)
            except ValueError:
                continue  # it is reported as unexpected
            own[key] = _Own(None, (None, heads.in_features))
            if heads.use_bias:
                width = weight.shape[0] if isinstance(weight, Tensor) and weight.ndim else None
                own[f"{start}{task}.bias"] = _Own(None, (width,))


def _renamed(
    own: Mapping[str, _Own], state: Mapping[str, Any], missing: list[str], unknown: list[str], prefix: str
) -> str:
    """A hint how to load the state, if only modules have other names; else empty."""
    model = f"{prefix}model."
    tensors = {name: own[name].tensor for name in missing}
    wanted = renames.shapes({name.removeprefix(model): tensor for name, tensor in tensors.items()})
    there = renames.shapes({name.removeprefix(model): state[name] for name in unknown})
    names = renames.find(there, wanted)
    if names is None:
        return ""
    return (
        "\nThe modules of this model have other names than those of the state: they were renamed, moved or wrapped. "
        f"wsn_fast.rename_state(state, {names!r}) is the state with the names of this model."
    )


def _other_model(missing: list[str], unknown: list[str], wrong: list[str]) -> str:
    if wrong:
        return "\nThe state is of another architecture."
    if missing and unknown:
        return "\nThe state is of another architecture, or modules were both renamed and changed."
    return "\nThe model has modules that the state lacks." if missing else "\nThe model lacks modules of the state."


def _list(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(f'"{name[:200]}"' for name in names[:_SHOWN]) + more


# --- tasks -----------------------------------------------------------------------------------------------------------
def _add_empty(wsn: WSN, state: dict[str, Any], prefix: str) -> None:
    """Add rows of no task where a program has dropped tensors without elements."""
    for path, module in _known_modules(wsn, prefix):
        if isinstance(module, SubnetLayer):
            rows.add_empty_masks(module, state, path)
        for name in per_task.marked(module):
            if f"{path}{name}" in state:
                own = getattr(module, f"{name}_tasks")
                state.setdefault(f"{path}{name}_tasks", own.new_zeros(0, *own.shape[1:]))


def _check_tasks(
    wsn: WSN, state: Mapping[str, Any], prefix: str, register: register_state.RegisterState | None
) -> list[TaskId]:
    """The finished tasks that the model would have. Raises ``ValueError`` or ``StateError`` if its parts would
    disagree."""
    tasks = wsn.tasks if register is None else register.tasks
    current = wsn.current_task if register is None else (register.current or {}).get("task")
    source = "the model" if register is None else "the state"
    for name, module in wsn.named_modules(remove_duplicate=False):
        path, shown = f"{prefix}{name}.", name.removeprefix("model.")
        if isinstance(module, SubnetLayer) and (found := rows.check_layer(module, state, path)) != tasks:
            raise StateError(
                f"{shown} would have masks of the tasks {_some(found)}, and {source} has the tasks {_some(tasks)}. "
                + ("" if f"{path}_extra_state" in state else "The state has nothing about this layer: was it renamed? ")
                + "Nothing has been loaded"
            )
        for attribute in per_task.marked(module):
            values = state.get(f"{path}{attribute}_tasks", getattr(module, f"{attribute}_tasks"))
            if len(values) != len(tasks):
                raise StateError(
                    f"{shown}.{attribute} would have the values of {len(values)} tasks, and {source} has "
                    f"{len(tasks)} tasks. Nothing has been loaded"
                )
        if isinstance(module, TaskHeads):
            expected = [*tasks, *([] if current is None else [current])]
            records = [] if register is None else register.records
            loaded_heads.check(name[len("model.") :], module, state, path, expected, records)
    if register is not None:
        _check_fingerprints(wsn, register)
    return tasks


def _check_fingerprints(wsn: WSN, register: register_state.RegisterState) -> None:
    """Raise ``StateError`` if the finished tasks of the state compute with other tensors than this model has."""
    parts = wsn._parts
    expected = {name for name, _ in parts.gated()}
    expected |= {item.name for item in parts.owned if item.kind in ("per_task", "frozen")}
    heads = tuple(f"{name}." for name in parts.heads)
    for record in register.records:
        found = {name for name in record.get("fingerprint", {}) if not name.endswith(" (mask)")}
        if not found:
            continue
        found = {name for name in found if name in expected or not name.startswith(heads)} if heads else found
        if found != expected:
            raise StateError(
                f"task {record['task']!r} of the state computes with other tensors than this model: only one of "
                f"the two has {_list(sorted(found ^ expected))}. Are the layers those of then, and per_task= and "
                "frozen= as they were? wsn_fast.rename_state changes names. Nothing has been loaded"
            )


def _check_complete(wsn: WSN, own: Mapping[str, _Own], state: Mapping[str, Any], prefix: str) -> None:
    """Raise ``StateError`` if a state with finished tasks lacks a tensor that they compute with. Of tied tensors one is
    enough."""
    parts = wsn._parts
    used = {id(tensor) for _, gate in parts.gated() for tensor in (gate.param, gate.masks)}
    used |= {id(item.tensor) for item in parts.owned if item.kind == "frozen"}
    there = {id(item.tensor) for name, item in own.items() if name in state}
    missing = [name for name, item in own.items() if id(item.tensor) in used - there]
    kept = (f"{prefix}model.{item.name}_tasks" for item in parts.owned if item.kind == "per_task")
    missing += [name for name in kept if name in own and name not in state]
    if missing:
        raise StateError(
            f"the state has finished tasks and lacks what they compute with: {_list(missing)}"
            + (_renamed(own, state, missing, [name for name in state if name not in own], prefix) or "")
            + ". Nothing has been loaded"
        )
    lost = [name for name in state if name not in own and name.removesuffix("_tasks") in own]
    if lost:
        raise StateError(
            f"the state has a value for each task of what has one value in this model: {_list(lost)}. Is per_task= as "
            "it was? Nothing has been loaded"
        )


def _some(tasks: list[TaskId]) -> str:
    text = str(tasks)
    return text if len(text) <= 100 else f"{text[:100]}... ({len(tasks)})"


# --- values ----------------------------------------------------------------------------------------------------------
@torch.no_grad()
def _check_values(wsn: WSN, own: Mapping[str, _Own], state: Mapping[str, Any], assign: bool, finished: bool) -> None:
    """Raise ``StateError`` if tied tensors have different values, or if values of finished tasks would be rounded."""
    first: dict[int, str] = {}
    gated = {id(gate.param) for _, gate in wsn._parts.gated()}
    for name, (tensor, _) in own.items():
        value = state.get(name)
        if not isinstance(tensor, nn.Parameter) or not isinstance(value, Tensor):
            continue
        other = first.setdefault(id(tensor), name)
        if other != name and not _same(state[other], value):
            raise StateError(
                f"{other} and {name} are one tied parameter of this model, and the state has different values for "
                "them. Nothing has been loaded"
            )
        if finished and not assign and id(tensor) in gated and value.dtype != tensor.dtype:
            raise StateError(
                f"{name} is {value.dtype} in the state and {tensor.dtype} in the model, so the finished tasks would "
                f"not be what they were: convert the model first. Nothing has been loaded"
            )


def _same(one: Tensor, other: Tensor) -> bool:
    if one.is_meta or other.is_meta or (one.data_ptr() == other.data_ptr() and one.stride() == other.stride()):
        return True
    return one.dtype == other.dtype and torch.equal(one.to(other.device).nan_to_num(), other.nan_to_num())


def _check_nothing_moves(wsn: WSN, state: Mapping[str, Any], prefix: str) -> None:
    """Raise ``StateError`` if a state without a register of tasks would change what the finished tasks use."""
    start = f"{prefix}model."
    given = {name[len(start) :]: value for name, value in state.items() if name.startswith(start)}
    own = {name: t for name, t in trainable_state.trainable(wsn._parts) if isinstance(given.get(name), Tensor)}
    moved = trainable_state.moved(wsn._parts, own, given, wsn.fixed())
    for path, module in wsn.model.named_modules():
        kept = [f"{name}_tasks" for name in per_task.marked(module)]
        kept += [f"{gate.name}_masks" for gate in module.gated()] if isinstance(module, SubnetLayer) else []
        for name in kept:
            value = given.get(f"{path}.{name}".lstrip("."))
            if isinstance(value, Tensor) and not _same(value, getattr(module, name)):
                moved.append(f"{path}.{name}".lstrip("."))
    if moved:
        raise StateError(
            f"the state has no register of tasks (_extra_state), and it would change what the finished tasks of this "
            f"model use: {_list(moved)}. Nothing has been loaded"
        )
