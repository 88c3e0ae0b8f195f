"""Finds, opens and checks the shared library of ``csrc/``. If it is missing or has another ABI version, no error is
raised: the result has no library, and gives the reason."""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import NamedTuple

POINTER, SIZE, INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int

ABI_VERSION = 6  # WSN_ABI_VERSION of csrc/include/wsn_fast.h

SIGNATURES = {
    "wsn_threshold": [POINTER, INT, SIZE, SIZE, INT, POINTER, INT],
    "wsn_keep": [POINTER, INT, POINTER, INT, POINTER, POINTER, SIZE, INT],
    "wsn_gate": [POINTER, INT, POINTER, INT, POINTER, INT, POINTER, INT, POINTER, SIZE, INT],
    "wsn_gates": [POINTER, SIZE, INT],
    "wsn_gate_packed": [POINTER, INT, POINTER, POINTER, INT, SIZE, INT],
    "wsn_gate_backward": [POINTER, INT] * 3 + [POINTER, INT, POINTER, POINTER, POINTER, SIZE, INT],
    "wsn_gates_backward": [POINTER, SIZE, INT],
    "wsn_restore_frozen": [POINTER, POINTER, POINTER, INT, SIZE, INT],
    "wsn_restore_frozen_many": [POINTER, SIZE, INT],
    "wsn_adamw_step": [POINTER, SIZE, INT],
    "wsn_sgd_step": [POINTER, SIZE, INT],
    "wsn_gradient_squares": [POINTER, SIZE, POINTER, INT],
    "wsn_pack_bits": [POINTER, SIZE, POINTER, INT],
    "wsn_unpack_bits": [POINTER, SIZE, POINTER, INT],
    "wsn_or_bits": [POINTER, POINTER, SIZE, INT],
    "wsn_union_bits": [POINTER, SIZE, SIZE, POINTER, INT],
    "wsn_popcount_bits": [POINTER, SIZE, POINTER, INT],
}
"""The types of the arguments of every function that returns an error code."""

_INSTRUCTIONS = ("plain instructions", "AVX2", "AVX-512")
_PREFIX, _SUFFIX = {"win32": ("", ".dll"), "darwin": ("lib", ".dylib")}.get(sys.platform, ("lib", ".so"))

FILE = Path("_lib", f"{_PREFIX}wsn_cpu{_SUFFIX}")
"""The path of the library inside the package."""


class NativeLibrary(NamedTuple):
    """The loaded library, or ``None``, and the reason for either.

    Attributes:
        lib: the library.
        reason: where it was found, or why there is none.
        file: the file that was loaded, or could not be; None if there is no file.
    """

    lib: ctypes.CDLL | None
    reason: str
    file: Path | None = None


@functools.cache
def load() -> NativeLibrary:
    """The library of this installation: the first file that loads, else the reason why there is none."""
    found = [open_file(root / FILE) for root in package_roots() if (root / FILE).is_file()]
    for library in found:
        if library.lib is not None:
            return library
    return found[0] if found else NativeLibrary(None, f"no native library: {FILE} is not installed")


def open_file(path: Path) -> NativeLibrary:
    """Load one file, check its ABI version and declare its functions.

    Returns:
        The library; or ``None`` with the reason: the file cannot be loaded on this platform, its ABI version is
        another one, or it lacks a function.
    """
    try:
        lib = ctypes.CDLL(str(path))
        version = lib.wsn_abi_version()
        if version != ABI_VERSION:
            return NativeLibrary(None, f"{path} has ABI version {version}, this package needs {ABI_VERSION}", path)
        lib.wsn_error_message.argtypes, lib.wsn_error_message.restype = [INT], ctypes.c_char_p
        for name, signature in SIGNATURES.items():
            function = getattr(lib, name)
            function.argtypes, function.restype = signature, INT
        lib.wsn_limit_instructions.argtypes = [INT]
        instructions = _INSTRUCTIONS[lib.wsn_limit_instructions(-1)]
    except OSError as error:
        return NativeLibrary(None, f"{path} cannot be loaded: {error}", path)
    except (AttributeError, IndexError) as error:
        return NativeLibrary(None, f"{path} lacks a function, or is another library: {error}", path)
    return NativeLibrary(lib, f"loaded from {path}, using {instructions}", path)


def shares_team() -> bool:
    """Whether the process has the threads of GNU OpenMP, or of one that understands its calls, for large work. PyTorch
    for Linux brings them. ``csrc/cpu/parallel.cpp`` looks for the same name."""
    return sys.platform != "win32" and hasattr(ctypes.CDLL(None), "GOMP_parallel")


def package_roots() -> Iterator[Path]:
    """The folders that may contain ``_lib``: the folder of the sources, and the one of the installed distribution.

    They differ for an editable install, and when a checkout on ``sys.path`` hides the installed package.
    """
    yield Path(__file__).parents[2]
    try:
        yield Path(str(distribution("wsn-fast").locate_file("wsn_fast")))
    except PackageNotFoundError:
        return
