"""The machine that a run is on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path


def memory() -> int | None:
    """The bytes of memory that this process may use: those of the machine, or fewer in a container or a job that has
    a limit. None if the system does not tell."""
    return min((*_of_machine(), *_limits(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))), default=None)


def _of_machine() -> Iterator[int]:
    with suppress(AttributeError, OSError, ValueError):
        yield os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _limits(groups: Path, root: Path) -> Iterator[int]:
    """The limits of the control groups that a process is in, by its file ``groups``. A group is a folder below
    ``root``, and the limits of the folders above it hold as well."""
    with suppress(OSError):
        for line in groups.read_text().splitlines():
            _, controllers, group = line.split(":", 2)
            if controllers not in ("", "memory"):
                continue
            top, name = (root, "memory.max") if not controllers else (root / "memory", "memory.limit_in_bytes")
            folder = top / group.lstrip("/")
            for above in (folder, *folder.parents):
                with suppress(OSError, ValueError):  # there is none, or it is "max"
                    yield int((above / name).read_text())


def cores() -> int:
    """The number of CPU cores that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on every system
        return os.cpu_count() or 1
