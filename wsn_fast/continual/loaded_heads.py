"""Checks the heads that a model would have after a state has been loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..nn.heads import TaskHeads
from ..nn.task_ids import TaskId, task_key
from .fingerprints import head_digests

_SHOWN = 10  # tasks in a message


def check(
    name: str,
    heads: TaskHeads,
    state: Mapping[str, Any],
    prefix: str,
    tasks: list[TaskId],
    records: list[dict[str, Any]],
) -> None:
    """Check the heads that ``heads`` would have after a load.

    Args:
        name: the name of the module in the model.
        heads: the module. Nothing of it is changed.
        state: the state. If it has no head, ``heads`` keeps its own.
        prefix: the beginning of the names of the module in the state.
        tasks: the tasks that need a head.
        records: the finished tasks of the state, as its register describes them; empty if it has no register.

    Raises:
        ValueError: a task would have no head, or one with which it did not end.
    """
    given = heads.saved(state, prefix)
    there = given.keys() or set(heads.heads)
    lacking = [task for task in tasks if task_key(task) not in there]
    if lacking:
        more = f" and {len(lacking) - _SHOWN} more" if len(lacking) > _SHOWN else ""
        raise ValueError(f"{prefix}heads would have no head for the tasks {lacking[:_SHOWN]}{more}")
    for record in [] if given else records:
        then = record.get("fingerprint", {})
        now = head_digests(name, heads, record["task"])
        changed = [tensor for tensor, digest in now.items() if then.get(tensor) != digest]
        if then and changed:
            raise ValueError(f"it has no head, and {changed[0]} is not what task {record['task']!r} ended with")
