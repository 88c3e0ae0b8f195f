"""Reads members of a tar archive.

The module ``tarfile`` reads extended headers into memory, whatever length they claim. Only the base name, the size and
the kind of each member are needed here, and every format of tar has these three in the same 512 bytes.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path, PurePosixPath

from wsn_fast.train.data.files import CHUNK, DataError, DataFile, open_data

_BLOCK = 512
_REGULAR = b"\x0007"  # the kinds of a regular file
_EMPTY = b"123456"  # links, devices, folders and pipes have no content, whatever size they give


def read_members(archive: Path, wanted: Collection[str]) -> dict[str, tuple[str, bytearray]]:
    """Read those regular files of an archive whose base names are ``wanted``.

    Returns:
        By base name: the place, for messages, and the content.

    Raises:
        DataError: the archive cannot be read, is damaged or is too long.
    """
    found: dict[str, tuple[str, bytearray]] = {}
    with open_data(archive) as data:
        header, position = data.read(_BLOCK), _BLOCK
        while header and any(header):
            name, size, kind = _parse(archive, header)
            position += -(-size // _BLOCK) * _BLOCK + _BLOCK
            data.check_room(position, f"the archive up to the end of {name!r}")
            member = PurePosixPath(name).name
            if kind in _REGULAR and member in wanted:
                found[member] = (f"{archive}:{name}", data.read(size))
                if len(found[member][1]) < size:
                    raise DataError(f"{archive}: damaged archive (it ends inside {name!r})")
                _skip(data, -size % _BLOCK)
            else:
                _skip(data, position - _BLOCK - data.file.tell())
            header = data.read(_BLOCK)
        if not header and position == _BLOCK:
            raise DataError(f"{archive}: damaged archive (it is empty)")
    return found


def _skip(data: DataFile, count: int) -> None:
    while count > 0 and (piece := data.file.read(min(CHUNK, count))):
        count -= len(piece)


def _parse(archive: Path, header: bytearray) -> tuple[str, int, int]:
    """The name, the size of the content in bytes, and the kind (an ASCII code) of a member."""
    try:
        sums = sum(header[:148]) + 8 * ord(" ") + sum(header[156:])
        if len(header) != _BLOCK or _number(header[148:156]) != sums:
            raise ValueError("a header does not match its checksum")
        kind, size = header[156], _number(header[124:136])
    except ValueError as error:
        raise DataError(f"{archive}: damaged archive ({error})") from error
    name = bytes(header[:100]).split(b"\0")[0].decode("utf-8", "backslashreplace")
    return name, 0 if kind in _EMPTY else size, kind


def _number(field: bytearray) -> int:
    """A number of a header: octal digits, or (first bit set) the other bits in binary, which GNU tar writes for 8 GiB
    and more."""
    if field[0] & 0x80:
        return int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
    return int(field.strip(b" \0") or b"0", 8)
