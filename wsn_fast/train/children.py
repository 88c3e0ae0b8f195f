"""The runs of a sweep as processes: so many at a time, each with a log, and none outlives the sweep."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

_PATIENCE = 10.0  # seconds that a process has to end after SIGTERM
_LOG_END = 1 << 16  # bytes of a log in which its last line is looked for


@dataclass
class Job:
    """A run of a sweep.

    Attributes:
        name: the name of its folder.
        folder: its folder.
        words: what ``wsn-fast`` is called with.
        log: the file that the process writes to; it grows each time the run is started.
        process: the process, once it was started.
    """

    name: str
    folder: Path
    words: Sequence[str]
    log: Path
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    @property
    def code(self) -> int | None:
        """The exit code; None while the process runs, and before."""
        return None if self.process is None else self.process.poll()

    def last_line(self) -> str:
        """The last line that the process has written; its exit code if there is none."""
        with open(self.log, "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _LOG_END))
            lines = file.read().decode(errors="replace").split("\n")
        said = [line.strip() for line in lines if line.strip()]
        return said[-1].removeprefix("wsn-fast: error: ") if said else f"exit code {self.code}"


class Pool:
    """Starts jobs in their order, at most ``size`` at a time. Leaving the ``with`` block stops those that run.

    Args:
        jobs: the jobs.
        size: how many may run at the same time.
        environments: what each of these processes gets beside the environment of this one. The places of the pool take
            them in turn.
    """

    def __init__(self, jobs: Sequence[Job], size: int, environments: Sequence[Mapping[str, str]] = ({},)) -> None:
        self._waiting = list(jobs)
        self._places: list[Job | None] = [None] * size
        self._environments = environments

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def running(self) -> list[Job]:
        """The jobs whose processes were running at the last :meth:`advance`."""
        return [job for job in self._places if job is not None]

    def advance(self) -> tuple[list[Job], list[Job]]:
        """Start what there is room for. Returns the jobs that have ended since the last call, and those that began."""
        ended, begun = [], []
        for place, job in enumerate(self._places):
            if job is not None and job.code is not None:
                _close(job)
                ended.append(job)
                job = self._places[place] = None
            if job is None and self._waiting:
                self._places[place] = begun_job = self._waiting.pop(0)
                self._start(begun_job, self._environments[place % len(self._environments)])
                begun.append(begun_job)
        return ended, begun

    @staticmethod
    def _start(job: Job, environment: Mapping[str, str]) -> None:
        # A session of its own, so that Ctrl-C reaches the sweep alone, which then stops its processes itself.
        with open(job.log, "ab") as log:
            job.process = subprocess.Popen(
                [sys.executable, "-m", "wsn_fast.train.child", *job.words],
                stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, **environment},
                start_new_session=True,
            )  # fmt: skip

    def stop(self) -> None:
        """End all processes, and wait until they have ended. What waits is not started any more."""
        self._waiting = []
        running = [(job, job.process) for job in self.running if job.process is not None]
        for _, process in running:
            process.terminate()
        for job, process in running:
            try:
                process.wait(_PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            _close(job)
        self._places = [None] * len(self._places)


def _close(job: Job) -> None:
    """Close the pipe to a process that has ended."""
    if job.process is not None and job.process.stdin is not None:
        job.process.stdin.close()
