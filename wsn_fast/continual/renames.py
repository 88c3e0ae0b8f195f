"""Modules that were renamed: found by what has kept its value or its shape, and new names for what is saved under old
ones."""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from torch import Tensor

from ..nn.task_ids import decode_json, encode_json

Names = Mapping[str, str]
"""New paths of modules by old ones, relative to the model. The empty path is the model itself."""

_MASK = " (mask)"
# Extra states, heads, and counts of batches, which old states lack.
_LEFT_OUT = re.compile(r"_extra_state$|num_batches_tracked$|(^|\.)heads\.(i-?\d+|s[^.]+)\..")


class RenamedError(RuntimeError):
    """Tensors of finished tasks have other names now, and the same values: nothing is forgotten.

    Attributes:
        names: the new path of each module by its old one, for :meth:`WSN.rename`.
    """

    def __init__(self, names: Names) -> None:
        listed = "\n".join(f"  {old or 'the model'} -> {new or 'the model'}" for old, new in names.items())
        super().__init__(
            "these modules have been renamed, moved or wrapped since the finished tasks ended; the tasks compute with "
            f"the same values as then:\n{listed}\nCall wsn.rename({dict(names)!r}) to go on with the new names."
        )
        self.names = dict(names)


def renamed(name: str, names: Names) -> str:
    """The new name of a tensor. Of several old paths that it begins with, the longest counts."""
    for old in sorted(names, key=len, reverse=True):
        if not old or name == old or name.startswith(old + "."):
            rest = name[len(old) :].lstrip(".") if old else name
            return f"{names[old]}.{rest}".strip(".")
    return name


def check_names(names: Names) -> Names:
    """Return ``names``. Raises ``TypeError`` if it is no mapping from strings to strings."""
    if not isinstance(names, Mapping) or not all(isinstance(x, str) for pair in names.items() for x in pair):
        raise TypeError(f"names must be a mapping from old module paths to new ones, got {names!r}")
    return names


def in_json(fields: Any, names: Names) -> Any:
    """The fields of a register with the new names: of the digests of each task, and of those of all tasks together."""

    def digests(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {renamed(name, names): digest for name, digest in value.items()}

    def record(value: Any) -> Any:
        return {**value, "fingerprint": digests(value.get("fingerprint", {}))}

    new = {**fields, "records": list(map(record, fields["records"]))}
    if fields.get("current") is not None:
        new["current"] = record(fields["current"])
    return new | ({"frozen": digests(fields["frozen"])} if "frozen" in fields else {})


def rename_state(state: Mapping[str, Any], names: Names, *, prefix: str = "") -> dict[str, Any]:
    """A saved state for a model whose modules have other names: after a rename, or inside a wrapper.

    Args:
        state: what ``wsn.state_dict()`` returned.
        names: the new path of each module by its old one, both relative to the model. The empty path is the model:
            ``{"": "backbone"}`` is for a model that has the old one as its ``backbone``.
        prefix: what comes before the names of the WSN in ``state``, with its dot; empty for the state of a WSN.

    Returns:
        A new state that shares the tensors of ``state``.

    Raises:
        TypeError: ``names`` is no mapping from strings to strings.
        ValueError: two tensors would get one name, or ``state`` has no register of tasks.
    """
    check_names(names)
    register, model = f"{prefix}_extra_state", f"{prefix}model."
    if register not in state:
        raise ValueError(f"the state has no {register!r}: prefix must be what comes before 'model.' in its names")
    new: dict[str, Any] = {}
    for name, value in state.items():
        to = name if not name.startswith(model) else model + renamed(name[len(model) :], names)
        if to in new:
            raise ValueError(f"names: two tensors would be called {to!r}")
        new[to] = value
    new[register] = encode_json(in_json(decode_json(state[register]), names))
    return new


def find(old: Mapping[str, Hashable], new: Mapping[str, Hashable]) -> dict[str, str] | None:
    """The modules whose renaming turns the names of ``old`` into those of ``new``; None if there are none.

    Args:
        old: of each tensor under its old name, what it has kept: its digest, or its shape.
        new: the same under new names.
    """
    if not old:
        return None
    free: dict[Hashable, list[str]] = {}
    for name, kept in new.items():
        free.setdefault((_leaf(name), kept), []).append(name)
    names: dict[str, str] = {}
    for name, kept in old.items():
        candidates = free.get((_leaf(name), kept))
        if not candidates:
            return None
        # Of equal ones the one whose path ends most alike, and of these the first.
        best = max(candidates, key=lambda other: _common(name, other))
        candidates.remove(best)
        cut = _common(name, best)
        before, after = (".".join(path[: len(path) - cut]) for path in (name.split("."), best.split(".")))
        if names.setdefault(before, after) != after:
            return None
    return names if {renamed(name, names) for name in old} == set(new) else None


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _common(one: str, other: str) -> int:
    """The number of components that two names have in common at their ends."""
    first, second = (name.removesuffix(_MASK).split(".")[::-1] for name in (one, other))
    same = 0
    while same < min(len(first), len(second)) and first[same] == second[same]:
        same += 1
    return same


def of_fingerprints(then: Sequence[Mapping[str, str]], now: Sequence[Mapping[str, str]]) -> dict[str, str] | None:
    """The modules whose renaming turns all fingerprints of ``then`` into those of ``now``; None if there are none."""
    for before, after in zip(then, now, strict=True):
        gone = {name: digest for name, digest in before.items() if name not in after}
        come = {name: digest for name, digest in after.items() if name not in before}
        names = find(gone, come)
        if names is not None:
            moved = [{renamed(name, names): digest for name, digest in prints.items()} for prints in then]
            return names if moved == list(map(dict, now)) else None
    return None


def shapes(state: Mapping[str, Any]) -> dict[str, Hashable]:
    """What a tensor of a saved state keeps when its module is renamed. Rows of tasks may be any number, and so may the
    heads, which are left out."""
    return {
        name: tuple(value.shape[1:] if name.endswith(("_masks", "_tasks")) else value.shape)
        for name, value in state.items()
        if isinstance(value, Tensor) and not _LEFT_OUT.search(name)
    }
