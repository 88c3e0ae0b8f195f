"""Reads the pickles of the CIFAR data sets without Python's unpickler.

Both of Python's unpicklers trust the numbers that stand in a pickle: they size their memo and buffers by them, and they
hash keys that are nested as deeply as the file likes, which overflows the stack. This reader knows the few opcodes and
the few globals that such files have. It runs no code, takes only text as keys, and bounds the memory of what it makes.
"""

from __future__ import annotations

import codecs
import struct
import sys
import warnings
from collections.abc import Callable
from types import MappingProxyType
from typing import Any

ALWAYS = 32 << 20
TIMES = 8
"""What is made from a pickle of n bytes may take ``ALWAYS + TIMES * n`` bytes."""

_OBJECT = 64  # bytes that an object takes beside its content
_ENTRY = 150  # bytes that an entry of the memo takes, with its index
_KEY = 100  # characters
_SHOWN = 200  # characters of a reason


class PickleError(ValueError):
    """A pickle is damaged, or is not one of those that this reader knows."""


class Recorded:
    """Stands in for one of numpy's objects, and keeps its arguments and state.

    numpy's own ``__setstate__`` methods are not memory-safe for hostile bytes, so they are never reached.
    """

    def __init__(self, *args: object) -> None:
        self.args = args
        self.state: object = None


class Array(Recorded):
    """numpy's ``_reconstruct``; the contents come as state (version, shape, dtype, fortran, bytes)."""


class Buffer(Recorded):
    """numpy's ``_frombuffer`` (pickle protocol 5); arguments (bytes, dtype, shape, order)."""


class Dtype(Recorded):
    """numpy's ``dtype``; arguments (type string, align, copy)."""


def _encode(text: object, codec: object) -> bytes:
    if not isinstance(text, str) or codec not in ("latin1", "latin-1"):
        raise PickleError("only latin1 is encoded")
    return text.encode("latin-1")


def _empty(*args: object) -> bytes:
    if args:
        raise PickleError("only empty bytes are made")
    return b""


_GLOBALS = MappingProxyType(
    {
        ("numpy._core.multiarray", "_reconstruct"): Array,
        ("numpy.core.multiarray", "_reconstruct"): Array,  # numpy 1
        ("numpy._core.numeric", "_frombuffer"): Buffer,
        ("numpy.core.numeric", "_frombuffer"): Buffer,
        ("numpy", "dtype"): Dtype,
        ("numpy", "ndarray"): Recorded,
        ("_codecs", "encode"): _encode,  # how Python 3 writes bytes in the old protocols
        ("__builtin__", "bytes"): _empty,  # and how it writes none
        ("builtins", "bytes"): _empty,
    }
)


def loads(data: bytes | bytearray) -> Any:
    """What the pickle ``data`` describes. Strings of Python 2 become bytes.

    Raises:
        PickleError: it is damaged, or has something that no CIFAR file has. The message says what.
    """
    reader = _Reader(data)
    try:
        return reader.run()
    except PickleError:
        raise
    except (ArithmeticError, LookupError, TypeError, ValueError, struct.error) as error:
        reason = f"{type(error).__name__}: {error}"[:_SHOWN]
        raise PickleError(f"damaged at byte {reader.at}: {reason}") from error


class _Reader:
    """One pass through the opcodes of a pickle."""

    def __init__(self, data: bytes | bytearray) -> None:
        self._data = memoryview(data)
        self._room = ALWAYS + TIMES * len(data)
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}
        self.at = 0

    def run(self) -> Any:
        while (code := self._take(1)[0]) != ord("."):
            if code not in _OPCODES:
                raise PickleError(f"opcode 0x{code:02x} at byte {self.at - 1} is refused")
            _OPCODES[code](self)
        return self._stack.pop()

    # --- bytes -------------------------------------------------------------------------------------------------
    def _take(self, count: int) -> memoryview:
        if count > len(self._data) - self.at:
            raise PickleError(f"truncated: {count} bytes are wanted at byte {self.at} of {len(self._data)}")
        self.at += count
        return self._data[self.at - count : self.at]

    def number(self, width: int) -> int:
        return int.from_bytes(self._take(width), "little")

    def signed(self, width: int) -> int:
        return int.from_bytes(self._take(width), "little", signed=True)

    def counted(self, width: int) -> bytes:
        """Bytes after their number, which is an integer of ``width`` bytes."""
        return bytes(self._take(self.number(width)))

    def line(self) -> bytes:
        # A line has a number, a name or a string in it. Without an end, no line is looked for in all of the rest.
        end = self._data.obj.find(b"\n", self.at)  # type: ignore[attr-defined]
        if end < 0:
            raise PickleError(f"truncated: there is no end of the line at byte {self.at}")
        line = bytes(self._take(end - self.at))
        self.at += 1
        return line

    # --- the stack ---------------------------------------------------------------------------------------------
    def spend(self, count: int) -> None:
        """Count memory. Raises ``PickleError`` if there is none left."""
        self._room -= count
        if self._room < 0:
            raise PickleError(f"what it describes takes more than {ALWAYS + TIMES * len(self._data)} bytes")

    def push(self, value: Any) -> None:
        self.spend(_OBJECT + (sys.getsizeof(value) if isinstance(value, str | bytes | int) else 0))
        self._stack.append(value)

    def pop(self) -> Any:
        if len(self._stack) <= (self._marks[-1] if self._marks else 0):
            raise PickleError(f"nothing is on the stack at byte {self.at}")
        return self._stack.pop()

    def top(self, kind: type) -> Any:
        if not self._stack or type(self._stack[-1]) is not kind:
            raise PickleError(f"no {kind.__name__} is on the stack at byte {self.at}")
        return self._stack[-1]

    def mark(self) -> None:
        self.spend(_OBJECT)
        self._marks.append(len(self._stack))

    def pop_mark(self) -> list[Any]:
        start = self._marks.pop()
        items = self._stack[start:]
        del self._stack[start:]
        self.spend(_OBJECT + 8 * len(items))
        return items

    # --- what opcodes do ---------------------------------------------------------------------------------------
    def protocol(self) -> None:
        if self.number(1) > 5:
            raise PickleError("a protocol after 5 is refused")

    def frame(self) -> None:
        self._take(8)

    def integer(self) -> None:
        line = self.line()
        self.push(line == b"01" if line in (b"00", b"01") else int(line))

    def long_line(self) -> None:
        self.push(int(self.line().rstrip(b"L")))

    def string_line(self) -> None:
        line = self.line()
        if len(line) < 2 or line[:1] not in (b"'", b'"') or line[-1:] != line[:1]:
            raise PickleError(f"a string without quotes at byte {self.at}")
        with warnings.catch_warnings():  # of escapes that Python does not know
            warnings.simplefilter("ignore")
            self.push(codecs.escape_decode(line[1:-1])[0])

    def tuple_of(self, count: int) -> None:
        items = [self.pop() for _ in range(count)]
        self.push(tuple(items[::-1]))

    def append(self) -> None:
        value = self.pop()
        self.top(list).append(value)

    def appends(self) -> None:
        items = self.pop_mark()
        self.top(list).extend(items)

    def set_items(self, items: list[Any]) -> None:
        target = self.top(dict)
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, str | bytes) or len(key) > _KEY:
                raise PickleError(f"a key is no name, but a {type(key).__name__}")
            self.spend(_OBJECT)
            target[key] = value

    def set_item(self) -> None:
        value, key = self.pop(), self.pop()
        self.set_items([key, value])

    def dict_of_items(self) -> None:
        items = self.pop_mark()
        self.push({})
        self.set_items(items)

    def get(self, index: int) -> None:
        self.spend(8)
        self._stack.append(self._memo[index])

    def put(self, index: int) -> None:
        self.spend(_ENTRY)
        self._memo[index] = self._stack[-1]

    def global_(self, module: object, name: object) -> None:
        if not isinstance(module, str) or not isinstance(name, str) or (module, name) not in _GLOBALS:
            raise PickleError(f"global {str(module)[:_KEY]}.{str(name)[:_KEY]} is refused")
        self.push(_GLOBALS[module, name])

    def global_lines(self) -> None:
        module = self.line().decode()
        self.global_(module, self.line().decode())

    def stack_global(self) -> None:
        name, module = self.pop(), self.pop()
        self.global_(module, name)

    def reduce(self) -> None:
        args, function = self.pop(), self.pop()
        known = any(function is one for one in _GLOBALS.values())
        if not known or type(args) is not tuple:
            raise PickleError(f"something that is no global is called at byte {self.at}")
        self.push(function(*args))

    def build(self) -> None:
        state, target = self.pop(), self.pop()
        if not isinstance(target, Recorded):
            raise PickleError(f"a {type(target).__name__} gets a state at byte {self.at}")
        target.state = state
        self.push(target)


_Do = Callable[[_Reader], None]


def _opcodes() -> dict[int, _Do]:
    def text(width: int) -> _Do:
        return lambda reader: reader.push(reader.counted(width).decode("utf-8", "surrogatepass"))

    def raw(width: int) -> _Do:
        return lambda reader: reader.push(reader.counted(width))

    def constant(value: Any) -> _Do:
        return lambda reader: reader.push(value)

    table: dict[bytes, _Do] = {
        b"\x80": _Reader.protocol, b"\x95": _Reader.frame, b"(": _Reader.mark,
        b"I": _Reader.integer, b"L": _Reader.long_line,
        b"J": lambda r: r.push(r.signed(4)), b"K": lambda r: r.push(r.number(1)), b"M": lambda r: r.push(r.number(2)),
        b"\x8a": lambda r: r.push(int.from_bytes(r.counted(1), "little", signed=True)),
        b"\x8b": lambda r: r.push(int.from_bytes(r.counted(4), "little", signed=True)),
        b"F": lambda r: r.push(float(r.line())), b"G": lambda r: r.push(struct.unpack(">d", r._take(8))[0]),
        b"N": constant(None), b"\x88": constant(True), b"\x89": constant(False), b")": constant(()),
        b"S": _Reader.string_line, b"T": raw(4), b"U": raw(1), b"B": raw(4), b"C": raw(1), b"\x8e": raw(8),
        b"\x96": raw(8),  # a bytearray, which nobody changes here
        b"V": lambda r: r.push(r.line().decode("raw-unicode-escape")),
        b"X": text(4), b"\x8c": text(1), b"\x8d": text(8),
        b"]": lambda r: r.push([]), b"}": lambda r: r.push({}),
        b"l": lambda r: r.push(r.pop_mark()), b"t": lambda r: r.push(tuple(r.pop_mark())),
        b"d": _Reader.dict_of_items, b"a": _Reader.append, b"e": _Reader.appends,
        b"s": _Reader.set_item, b"u": lambda r: r.set_items(r.pop_mark()),
        b"\x85": lambda r: r.tuple_of(1), b"\x86": lambda r: r.tuple_of(2), b"\x87": lambda r: r.tuple_of(3),
        b"p": lambda r: r.put(int(r.line())), b"q": lambda r: r.put(r.number(1)), b"r": lambda r: r.put(r.number(4)),
        b"\x94": lambda r: r.put(len(r._memo)),
        b"g": lambda r: r.get(int(r.line())), b"h": lambda r: r.get(r.number(1)), b"j": lambda r: r.get(r.number(4)),
        b"c": _Reader.global_lines, b"\x93": _Reader.stack_global, b"R": _Reader.reduce, b"b": _Reader.build,
    }  # fmt: skip
    return {code[0]: do for code, do in table.items()}


_OPCODES = MappingProxyType(_opcodes())
