"""Finds, opens and checks a shared library of ``csrc/``. If a library is missing or has another ABI version, no error
is raised: the result has no library, and gives the reason."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any, NamedTuple

POINTER, SIZE, INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int

_PREFIX, _SUFFIX = {"win32": ("", ".dll"), "darwin": ("lib", ".dylib")}.get(sys.platform, ("lib", ".so"))


class NativeLibrary(NamedTuple):
    """The loaded library, or ``None``, and the reason for either."""

    lib: ctypes.CDLL | None
    reason: str


class Interface(NamedTuple):
    """What a shared library has to offer.

    Attributes:
        name: the name of the library, without the prefix and the suffix of the platform.
        prefix: the prefix of its functions. ``<prefix>_abi_version`` and ``<prefix>_error_message`` must be among them.
        abi_version: the version that ``<prefix>_abi_version`` must return.
        signatures: the types of the arguments of every function that returns an error code.
        describe: called with the library, it declares whatever else is needed, and returns what to add to the reason.
    """

    name: str
    prefix: str
    abi_version: int
    signatures: Mapping[str, list[Any]]
    describe: Callable[[ctypes.CDLL], str] = lambda lib: ""

    @property
    def file(self) -> Path:
        """The path of the library inside the package."""
        return Path("_lib", f"{_PREFIX}{self.name}{_SUFFIX}")


def load_installed(interface: Interface) -> NativeLibrary:
    """The library of this installation: the first file that loads, else the reason why there is none."""
    files = [root / interface.file for root in package_roots() if (root / interface.file).is_file()]
    found = [open_file(path, interface) for path in files]
    for library in found:
        if library.lib is not None:
            return library
    return found[0] if found else NativeLibrary(None, f"no native library: {interface.file} is not installed")


def open_file(path: Path, interface: Interface) -> NativeLibrary:
    """Load one file, check its ABI version and declare its functions. This needs no GPU.

    Returns:
        The library; or ``None`` with the reason: the file cannot be loaded on this platform, its ABI version is
        another one, or it lacks a function.
    """
    try:
        lib = ctypes.CDLL(str(path))
        version = getattr(lib, f"{interface.prefix}_abi_version")()
        if version != interface.abi_version:
            return NativeLibrary(None, f"{path} has ABI version {version}, this package needs {interface.abi_version}")
        message = getattr(lib, f"{interface.prefix}_error_message")
        message.argtypes, message.restype = [INT], ctypes.c_char_p
        for name, signature in interface.signatures.items():
            function = getattr(lib, name)
            function.argtypes, function.restype = signature, INT
        details = interface.describe(lib)
    except OSError as error:
        return NativeLibrary(None, f"{path} cannot be loaded: {error}")
    except (AttributeError, IndexError) as error:
        return NativeLibrary(None, f"{path} lacks a function, or is another library: {error}")
    return NativeLibrary(lib, f"loaded from {path}{details}")


def package_roots() -> Iterator[Path]:
    """The folders that may contain ``_lib``: the folder of the sources, and the one of the installed distribution.

    They differ for an editable install, and when a checkout on ``sys.path`` hides the installed package.
    """
    yield Path(__file__).parents[2]
    try:
        yield Path(str(distribution("wsn-fast").locate_file("wsn_fast")))
    except PackageNotFoundError:
        return
