"""The register of tasks: which ones have ended, which one is in progress, and the fingerprints of the finished ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from ..nn.task_ids import TaskId, decode_json, encode_json
from . import fingerprints, register_state, renames, statistics
from .frozen_values import changed, frozen_values
from .model_parts import ModelParts

_SMALL = 256 << 10  # bytes of masks, whose compression takes up to a tenth of a second


@dataclass
class Record:
    """A task that was begun; once it has ended, also the fingerprint of what it computes with, and how small its masks
    become. While it is in progress, the fingerprint is that of the frozen buffers when it began."""

    task: TaskId
    fingerprint: dict[str, str] = field(default_factory=dict)
    compressed: int | None = None  # bytes of its masks after compression, if they are known


def _as_json(record: Record) -> dict[str, Any]:
    return {name: value for name, value in asdict(record).items() if value is not None}


class TaskRegister:
    """The tasks of one WSN.

    Args:
        finished: tasks that have ended already, in the order in which they ended.

    Attributes:
        records: the finished tasks. The number of a record is the row of its masks.
        current: the task in progress, or None.
        frozen: the checksums of all that the finished tasks use together (:func:`frozen_values`), from when the last
            of them ended; empty before that.
    """

    def __init__(self, finished: Iterable[TaskId] = ()) -> None:
        self.records = [Record(task) for task in finished]
        self.current: Record | None = None
        self.frozen: dict[str, str] = {}
        self._saves_frozen = True

    @property
    def tasks(self) -> list[TaskId]:
        """The finished tasks, in the order in which they ended."""
        return [record.task for record in self.records]

    @property
    def current_task(self) -> TaskId | None:
        """The task in progress, or None."""
        return None if self.current is None else self.current.task

    def check_can_begin(self, task: TaskId) -> None:
        """Raise ``ValueError`` if ``task`` has ended, and ``RuntimeError`` if a task is in progress."""
        if task in self.tasks:
            raise ValueError(f"task {task!r} has been trained already; finished tasks: {self.tasks}")
        if self.current is not None:
            raise RuntimeError(f"task {self.current.task!r} is in progress: end_task() before begin_task({task!r})")

    def end_current(self, fingerprint: dict[str, str], frozen: dict[str, str], compressed: int | None = None) -> None:
        """Record the task in progress as finished, with its fingerprint, the checksums of all finished tasks, and what
        :meth:`measured` gave."""
        assert self.current is not None
        self.records.append(Record(self.current.task, fingerprint, compressed=compressed))
        self.current, self.frozen, self._saves_frozen = None, frozen, True

    def remove(self, task: TaskId, parts: ModelParts) -> None:
        """Forget a finished task, which has been removed from the model. After an error it is not forgotten."""
        frozen = frozen_values(parts)
        del self.records[self.tasks.index(task)]
        self.frozen, self._saves_frozen = frozen, True

    def rename(self, names: renames.Names) -> None:
        """Give the tensors in all fingerprints the names that they have after modules were renamed."""
        self.decode(encode_json(renames.in_json(decode_json(self.encode()), names)))

    def compressed(self, masks: Sequence[Tensor]) -> int:
        """The bytes of all ``masks`` ([T, bytes] each) after compression. What was measured before is not measured
        again."""
        for row, record in enumerate(self.records):
            if record.compressed is None:
                record.compressed = statistics.compressed_bytes(rows[row] for rows in masks)
        return sum(record.compressed or 0 for record in self.records)

    def measured(self, masks: Sequence[Tensor]) -> int | None:
        """The bytes of the last rows of ``masks`` after compression. None if there are none or they are large: then
        this waits until it is asked for."""
        small = 0 < sum(rows.shape[1] for rows in masks) <= _SMALL
        return statistics.compressed_bytes(rows[-1] for rows in masks) if small else None

    @contextmanager
    def as_ended(self, fingerprint: dict[str, str], frozen: dict[str, str]) -> Iterator[None]:
        """Count the task in progress as finished until the context is left."""
        before = self.current, self.frozen, self._saves_frozen
        self.end_current(fingerprint, frozen)
        try:
            yield
        finally:
            self.records.pop()
            self.current, self.frozen, self._saves_frozen = before

    def trust(self, parts: ModelParts) -> None:
        """Take the fingerprints of all finished tasks from the model as it is now."""
        for row, record in enumerate(self.records):
            record.fingerprint = fingerprints.fingerprint(parts, record.task, row)
        self.frozen = frozen_values(parts)

    def trust_frozen(self, parts: ModelParts) -> None:
        """If the loaded state has no checksums, because an earlier version saved it, take them from the model as it is
        now. They are not saved, so that a state that is loaded and saved stays the same. The same holds for the frozen
        buffers of a task in progress, which are saved."""
        if self.current is not None and not self.current.fingerprint:
            self.current.fingerprint = fingerprints.frozen_buffers(parts)
        if self.records and not self.frozen:
            self.frozen, self._saves_frozen = frozen_values(parts), False

    def check_frozen(self, parts: ModelParts, advice: str) -> None:
        """Compare the checksums of all that the finished tasks use with those of when the last of them ended. Unlike
        :meth:`verify`, this reads each value once, however many tasks use it, and no masks.

        Raises:
            ForgottenError: a tensor has changed. ``advice`` is the last part of its message.
            RenamedError: only names have changed.
        """
        names = parts.agree(changed(self.frozen, frozen_values(parts))) if self.frozen else ()
        if names:
            drifts, _ = self._drifts(parts)  # slower, and knows which tasks
            drifts = drifts or [fingerprints.Drift(self.records[-1].task, name) for name in names]
            raise self._renamed(parts) or fingerprints.ForgottenError(drifts, advice)

    def verify(
        self, parts: ModelParts, progress: Callable[[int, int], object] | None = None
    ) -> fingerprints.VerifyReport:
        """Compare what the finished tasks compute with now with what they computed with when they ended.

        Calls ``progress`` after each task with the number of tasks compared and of all.

        Raises:
            ForgottenError: a tensor has changed.
            RenamedError: only names have changed.
        """
        drifts, tensors = self._drifts(parts, progress)
        others = parts.agree(drift.name for drift in drifts)
        drifts = drifts or [fingerprints.Drift(self.records[-1].task, name, "(in another process)") for name in others]
        if drifts:
            raise self._renamed(parts) or fingerprints.ForgottenError(drifts)
        unions = parts.agree(fingerprints.wrong_unions(parts))
        if unions:
            last = self.records[-1].task
            raise fingerprints.ForgottenError([fingerprints.Drift(last, name, "(union of masks)") for name in unions])
        shared = [item.name for item in parts.owned if item.kind == "shared"]
        return fingerprints.VerifyReport(self.tasks, tensors, shared)

    def _drifts(
        self, parts: ModelParts, progress: Callable[[int, int], object] | None = None
    ) -> tuple[list[fingerprints.Drift], int]:
        """What has changed of each finished task, and the number of tensors compared."""
        drifts: list[fingerprints.Drift] = []
        tensors = 0
        for row, record in enumerate(self.records):
            now = fingerprints.fingerprint(parts, record.task, row)
            tensors += len(now)
            drifts += fingerprints.compare(record.task, record.fingerprint, now)
            if progress is not None:
                progress(row + 1, len(self.records))
        return drifts, tensors

    def _renamed(self, parts: ModelParts) -> renames.RenamedError | None:
        """The error that says that only names have changed, if so."""
        now = [fingerprints.fingerprint(parts, record.task, row) for row, record in enumerate(self.records)]
        names = renames.of_fingerprints([record.fingerprint for record in self.records], now)
        return None if names is None else renames.RenamedError(names)

    def encode(self) -> Tensor:
        """The register as JSON bytes, a 1-d ``uint8`` tensor."""
        current = None if self.current is None else _as_json(self.current)
        state = {"version": register_state.VERSION, "records": list(map(_as_json, self.records)), "current": current}
        return encode_json({**state, "frozen": self.frozen} if self.frozen and self._saves_frozen else state)

    def decode(self, state: Tensor) -> None:
        """Become the register that :meth:`encode` encoded. Raises ``ValueError`` for the state of another version, or
        for anything else; then nothing has changed."""
        saved = register_state.parse(state)
        self.records = [Record(**record) for record in saved.records]
        self.current = None if saved.current is None else Record(**saved.current)
        self.frozen, self._saves_frozen = saved.frozen, True
