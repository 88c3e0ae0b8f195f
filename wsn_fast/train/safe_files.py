"""Reads and writes files in a folder that other people may have written to.

Nothing is written through a symbolic link. A file that is written whole replaces a link of its name, and a file that
grows is refused if it is a link. What is read has a bound, and a pipe or a device is not read at all.
"""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path
from typing import Any, BinaryIO, cast

from wsn_fast.nn import json_text

JSON_BYTES = 256 << 20
"""The largest JSON file that is read."""

_NO_LINK = getattr(os, "O_NOFOLLOW", 0)  # Windows has none


def write_atomic(path: Path, *data: bytes | memoryview) -> None:
    """Write a file, whose content may come in several pieces. After a crash at any moment there is either the whole old
    file or the whole new one.

    Raises:
        OSError: the file cannot be written. Nothing was changed, no temporary file is left, and ``filename`` is
            ``path``.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.unlink(missing_ok=True)  # it may be a link
        with open(temporary, "xb") as file:
            file.writelines(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):  # a failed write does not name its file
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    _sync_folder(path.parent)


def open_to_append(path: Path) -> BinaryIO:
    """Open a file to append to it. Raises ``OSError`` if it cannot be opened, or is a symbolic link or no regular
    file."""
    check_no_link(path)
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    return cast(BinaryIO, open(path, "ab", opener=lambda name, flags: os.open(name, flags | _NO_LINK, 0o666)))


def check_no_link(path: Path) -> None:
    """Raise ``OSError`` if ``path`` is a symbolic link."""
    if path.is_symlink():
        raise OSError(errno.ELOOP, "it is a symbolic link, and nothing is written through one", str(path))


def open_to_read(path: Path) -> BinaryIO:
    """Open a regular file. Raises ``OSError`` if it is missing or something else."""
    if not path.is_file():  # the end of a pipe may never come
        kind = "it is no regular file" if path.exists() else os.strerror(errno.ENOENT)
        raise FileNotFoundError(errno.ENOENT, kind, str(path))
    return open(path, "rb")


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        OSError: the file is missing or cannot be read.
        ValueError: it has more than ``JSON_BYTES`` bytes, or :func:`wsn_fast.nn.json_text.parse` refuses it.
    """
    with open_to_read(path) as file:
        text = file.read(min(JSON_BYTES, path.stat().st_size) + 1)
    if len(text) > JSON_BYTES:
        raise ValueError(f"it has more than {JSON_BYTES} bytes")
    return json_text.parse(text)


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
