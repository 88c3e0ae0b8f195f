"""A lock on the folder of a run, because two processes would overwrite each other's checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from wsn_fast.train.processes import ALONE, Processes
from wsn_fast.train.safe_files import check_no_link

NAME = ".lock"


class RunInUseError(OSError):
    """Another process works in the folder of a run; nothing was changed there."""


class FolderLock:
    """The lock of one folder. The first of the ``processes`` of a run holds it for all of them.

    The operating system releases the lock when the process ends, however it ends. So the file ``.lock`` that a killed
    run leaves behind does not keep another run out.
    """

    def __init__(self, folder: Path, processes: Processes = ALONE) -> None:
        self._folder, self._processes = folder, processes
        self._lock = FileLock(folder / NAME, timeout=0, thread_local=False)

    def acquire(self) -> None:
        """Take the lock, unless it is held already. The folder must exist.

        Raises:
            RunInUseError: another process, or another run in this process, holds it.
            OSError: the folder cannot be written to, or the lock is a symbolic link.
            StoppedError: the first process of the run has one of these errors.
        """
        self._processes.first(self._acquire)

    def _acquire(self) -> None:
        if self._lock.is_locked:
            return
        check_no_link(self._folder / NAME)
        try:
            self._lock.acquire()
        except Timeout:
            raise RunInUseError(
                f"{self._folder} is in use: another process is at work on this run. Wait for it or stop it; the lock "
                f"({NAME}) ends with that process"
            ) from None

    @contextmanager
    def held_unless_failed(self) -> Iterator[None]:
        """Take the lock, and release it only if the block raises. Raises what :meth:`acquire` raises."""
        self.acquire()
        try:
            yield
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """Release the lock, if it is held."""
        self._lock.release(force=True)
