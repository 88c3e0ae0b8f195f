"""Checks the register of tasks in a saved state, before anything of it is used."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from ..nn.task_ids import TaskId, decode_json, task_of_json

VERSION = 1

_FIELDS = {"task", "fingerprint", "compressed"}


class RegisterState(NamedTuple):
    """What a saved register says.

    Attributes:
        fields: all of its fields, as JSON.
        records: the fields of each finished task, in the order in which they ended.
        current: the fields of the task in progress, or None.
        frozen: the checksums of all that the finished tasks use; empty in a state of an earlier version.
    """

    fields: dict[str, Any]
    records: list[dict[str, Any]]
    current: dict[str, Any] | None
    frozen: dict[str, str]

    @property
    def tasks(self) -> list[TaskId]:
        """The finished tasks."""
        return [record["task"] for record in self.records]


def parse(state: object) -> RegisterState:
    """The register that the extra state of a WSN holds.

    Raises:
        ValueError: it is none, or that of another version.
    """
    if not isinstance(state, Tensor):
        raise ValueError(f"the state of WSN must be a tensor, got {type(state).__name__}")
    fields = decode_json(state)
    if fields.get("version") != VERSION:
        raise ValueError(f"the state of WSN must have version {VERSION}, got {str(fields.get('version'))[:99]}")
    listed, current = fields.get("records"), fields.get("current")
    if not isinstance(listed, list):
        raise ValueError("the state of WSN has no list of records")
    frozen = fields.get("frozen", {})
    if not _are_digests(frozen):
        raise ValueError("the state of WSN has checksums of frozen values that are none")
    records = [_checked(record) for record in listed]
    found = RegisterState(fields, records, None if current is None else _checked(current), frozen)
    tasks = [*found.tasks, *([] if found.current is None else [found.current["task"]])]
    if len(set(tasks)) < len(tasks):
        raise ValueError(f"the state of WSN has a task twice: {str(tasks)[:200]}")
    return found


def _checked(record: Any) -> dict[str, Any]:
    if not isinstance(record, dict) or not {"task"} <= record.keys() <= _FIELDS:
        raise ValueError(f"the state of WSN has a record that is none: {str(record)[:200]}")
    task_of_json(record["task"])
    prints, compressed = record.get("fingerprint", {}), record.get("compressed")
    if not _are_digests(prints):
        raise ValueError(f"the state of WSN has a fingerprint of task {str(record['task'])[:99]} that is none")
    if compressed is not None and (type(compressed) is not int or compressed < 0):
        raise ValueError(f"the masks of task {str(record['task'])[:99]} cannot have {str(compressed)[:99]} bytes")
    return record


def _are_digests(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(digest, str) for digest in value.values())
