"""Shows the runs of a sweep: one line per run that is redrawn on a terminal, and a line for each change elsewhere."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

from wsn_fast.nn import json_text
from wsn_fast.train.report import Console

_UP, _CLEAR = "\x1b[{}A", "\x1b[J"


class Log:
    """What ``metrics.jsonl`` of a run has said so far. Call :meth:`read` again and again while it grows."""

    def __init__(self, folder: Path, tasks: int, epochs: int) -> None:
        self._path, self._tasks, self._epochs = folder / "metrics.jsonl", tasks, epochs
        self._at = 0
        self.says = ""

    def read(self) -> list[str]:
        """Read the new lines. Returns a sentence for each task that they end. ``says`` is where the run is now."""
        ended = []
        for line in self._new_lines():
            try:
                entry = json_text.parse(line)
                where = f"task {entry['task'] + 1}/{self._tasks or '?'}"
                if entry["kind"] == "epoch":
                    self.says = f"{where}, epoch {entry['epoch']}/{self._epochs}, validation {entry['val_acc']:.1f} %"
                elif entry["kind"] == "task":
                    self.says = f"{where} has ended, test accuracy {entry['test_acc'][-1]:.2f} %"
                    ended.append(self.says)
            except (ValueError, TypeError, LookupError):  # `report` says what is wrong with the line
                continue
        return ended

    def _new_lines(self) -> list[bytes]:
        try:
            if self._path.stat().st_size < self._at:  # a resumed run cuts off what it repeats
                self._at = 0
            with open(self._path, "rb") as file:
                file.seek(self._at)
                whole, feed, _ = file.read().rpartition(b"\n")
        except OSError:  # it is not there yet
            return []
        self._at += len(whole) + len(feed)
        return whole.split(b"\n") if feed else []


class Display:
    """Shows the state of each run by its name, in one place on a terminal and line by line elsewhere.

    Args:
        names: the names of the runs.
        quiet: whether nothing is shown.
    """

    def __init__(self, names: list[str], *, quiet: bool = False) -> None:
        self._console = Console(quiet=quiet)
        self._states = dict.fromkeys(names, "waits")
        self._terminal = not quiet and sys.stdout.isatty()
        self._drawn = 0

    def changed(self, name: str, state: str) -> None:
        """A run has begun, ended a task, or ended."""
        self._states[name] = state
        if not self._terminal:
            self._console.say(f"{name}: {state}")

    def draw(self, now: Mapping[str, str]) -> None:
        """Draw all lines anew, on a terminal. ``now`` has the states of the runs that are at work."""
        if not self._terminal:
            return
        self._states |= now
        columns, rows = shutil.get_terminal_size()
        lines = [f"{name}: {state}" for name, state in self._states.items()]
        if len(lines) > rows - 2:  # what is at work comes first, and the end of a long list is not shown
            lines.sort(key=lambda line: line.partition(":")[0] not in now)
            lines = [*lines[: max(1, rows - 3)], f"... and {len(lines) - max(1, rows - 3)} more"]
        back = _UP.format(self._drawn) if self._drawn else ""
        self._console.say(back + _CLEAR + "\n".join(line[: columns - 1] for line in lines))
        self._drawn = len(lines)
