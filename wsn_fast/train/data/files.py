"""Opens data files, plain or compressed, and bounds the memory that their content may take.

A few kilobytes of gzip can stand for gigabytes. So a compressed file may expand to ``EXPANDS`` times its own size and
``ALWAYS`` bytes more. The files of the known data sets expand to less than a quarter of that.
"""

from __future__ import annotations

import bz2
import gzip
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, NamedTuple, cast

EXPANDS = 32
ALWAYS = 16 << 20
CHUNK = 1 << 20

_OPENERS: Mapping[bytes, Any] = MappingProxyType({b"\x1f\x8b": gzip.open, b"BZ": bz2.open})


class DataError(ValueError):
    """A data file is missing, damaged or not what it claims to be; the message names file and fault."""


class DataFile(NamedTuple):
    """An open file.

    Attributes:
        path: its path, for messages.
        file: reads its content, decompressed.
        compressed: whether the file is compressed.
        most: the number of bytes that its content may have: its size, or the bound if it is compressed.
    """

    path: Path
    file: BinaryIO
    compressed: bool
    most: int

    def check_room(self, wanted: int, what: str) -> None:
        """Raise ``DataError`` if ``what`` takes ``wanted`` bytes, more than a compressed file may expand to."""
        if self.compressed and wanted > self.most:
            raise DataError(
                f"{self.path}: {what} takes {wanted} bytes, and a compressed file of this size may expand to "
                f"{self.most} at most; if the file is what it should be, decompress it before use"
            )

    def read(self, count: int) -> bytearray:
        """Up to ``count`` bytes; fewer only at the end. Memory is taken as they come."""
        content = bytearray()
        while len(content) < count and (piece := self.file.read(min(CHUNK, count - len(content)))):
            content += piece
        return content


@contextmanager
def open_data(path: Path) -> Iterator[DataFile]:
    """Open a data file. What the block reads is decompressed if the file begins as gzip or bzip2 do, whatever its name.

    Raises:
        DataError: the file is missing, no regular file, or damaged, also while the block reads it.
    """
    try:
        if not path.is_file():  # the end of a pipe may never come
            raise FileNotFoundError("there is no such file")
        with open(path, "rb") as plain:
            magic, size = plain.read(2), path.stat().st_size
            plain.seek(0)
            if magic not in _OPENERS:
                yield DataFile(path, plain, False, size)
                return
            with _OPENERS[magic](plain, "rb") as file:
                yield DataFile(path, cast(BinaryIO, file), True, ALWAYS + EXPANDS * size)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read, perhaps truncated or damaged ({error})") from error


def read_bytes(path: Path) -> bytearray:
    """The content of a file, decompressed. Raises ``DataError`` as :func:`open_data` does, and if it is too long."""
    with open_data(path) as data:
        content = data.read(data.most + data.compressed)
        data.check_room(len(content), "its content")
        return content
