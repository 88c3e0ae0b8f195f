"""One process at a time in the folder of a run: two would overwrite each other's checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

NAME = ".lock"


class RunInUseError(OSError):
    """Another process works in the folder of a run; nothing was changed there."""


class FolderLock:
    """The right to write into a folder.

    The operating system holds it and gives it back when the process ends, however it ends: the file ``.lock`` that a
    killed run leaves behind keeps nobody out.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = FileLock(folder / NAME, timeout=0, thread_local=False)

    def acquire(self) -> None:
        """Take the lock, or keep it. The folder must exist.

        Raises:
            RunInUseError: another process (or another run in this one) has it.
            OSError: the folder cannot be written to.
        """
        if self._lock.is_locked:
            return
        try:
            self._lock.acquire()
        except Timeout:
            raise RunInUseError(
                f"{self._folder} is in use: another process is at work on this run. Wait for it or stop it; the lock "
                f"({NAME}) ends with that process"
            ) from None

    @contextmanager
    def held_unless_failed(self) -> Iterator[None]:
        """Take the lock, and give it back only if the block raises. Raises what :meth:`acquire` does."""
        self.acquire()
        try:
            yield
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """Give the lock back, if it is held."""
        self._lock.release(force=True)
