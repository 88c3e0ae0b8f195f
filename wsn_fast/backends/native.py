"""The optional native library (``csrc/``), through ctypes.

Its absence is a reason in :func:`load`'s answer, never an error. :data:`OPERATIONS` names the primitives that
it has, with the conventions of :mod:`wsn_fast.backends.torch`, for CPU tensors. Every pointer that reaches C
is checked here for dtype, device, contiguity and size.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

# "union" is left to the torch backend, whose one `|=` per mask is as fast as or_ here.
OPERATIONS = frozenset({"pack", "unpack", "popcount"})
ABI_VERSION = 1
"""``WSN_ABI_VERSION`` of ``csrc/include/wsn_fast.h``."""

_PREFIX, _SUFFIX = {"win32": ("", ".dll"), "darwin": ("lib", ".dylib")}.get(sys.platform, ("lib", ".so"))
_FILE = Path("_lib", f"{_PREFIX}wsn_cpu{_SUFFIX}")
_POINTER, _SIZE, _THREADS = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
_SIGNATURES = {
    "wsn_pack_bits": [_POINTER, _SIZE, _POINTER, _THREADS],
    "wsn_unpack_bits": [_POINTER, _SIZE, _POINTER, _THREADS],
    "wsn_or_bits": [_POINTER, _POINTER, _SIZE, _THREADS],
    "wsn_popcount_bits": [_POINTER, _SIZE, _POINTER, _THREADS],
}


class NativeLibrary(NamedTuple):
    """The loaded library, or ``None``, and the reason for either."""

    lib: ctypes.CDLL | None
    reason: str


@functools.cache
def load() -> NativeLibrary:
    """The library of this installation: the first that loads, else why there is none. Never raises."""
    files = [root / _FILE for root in _package_roots() if (root / _FILE).is_file()]
    found = [open_library(path) for path in files]
    for library in found:
        if library.lib is not None:
            return library
    return found[0] if found else NativeLibrary(None, f"no native library: {_FILE} is not installed")


def open_library(path: Path) -> NativeLibrary:
    """Load one file, check its ABI version and declare its functions. Never raises.

    Args:
        path: the shared library.

    Returns:
        The library, or ``None`` with the reason: not loadable on this platform, another ABI version, or a
        function missing.
    """
    try:
        lib = ctypes.CDLL(str(path))
        version = lib.wsn_abi_version()
        if version != ABI_VERSION:
            return NativeLibrary(None, f"{path} has ABI version {version}, this package needs {ABI_VERSION}")
        lib.wsn_error_message.argtypes = [ctypes.c_int]
        lib.wsn_error_message.restype = ctypes.c_char_p
        for name, signature in _SIGNATURES.items():
            function = getattr(lib, name)
            function.argtypes = signature
            function.restype = ctypes.c_int
    except OSError as error:
        return NativeLibrary(None, f"{path} cannot be loaded: {error}")
    except AttributeError as error:
        return NativeLibrary(None, f"{path} lacks a function: {error}")
    return NativeLibrary(lib, f"loaded from {path}")


def pack(mask: Tensor) -> Tensor:
    """Pack a mask at one bit per element.

    Args:
        mask: boolean CPU tensor of any shape; a strided one is copied first.

    Returns:
        ``uint8`` [ceil(n / 8)]; element ``i`` of the row-major flattened mask is bit ``i % 8`` (least
        significant first) of byte ``i // 8``. Padding bits are zero.

    Raises:
        TypeError: ``mask`` is not a boolean tensor.
        ValueError: ``mask`` is not on the CPU.
        RuntimeError: the native library is missing; the message says why.
    """
    mask = _checked("mask", mask, torch.bool).contiguous()
    packed = torch.empty((mask.numel() + 7) // 8, dtype=torch.uint8, device="cpu")
    _call("wsn_pack_bits", mask.data_ptr(), mask.numel(), packed.data_ptr())
    return packed


def unpack(packed: Tensor, n: int) -> Tensor:
    """Undo :func:`pack`.

    Args:
        packed: ``uint8`` CPU tensor of ``ceil(n / 8)`` bytes; a strided one is copied first.
        n: the number of elements of the mask.

    Returns:
        bool [n].

    Raises:
        TypeError: ``packed`` is not a ``uint8`` tensor.
        ValueError: ``packed`` is not on the CPU or not of ``ceil(n / 8)`` bytes, or ``n`` is negative.
        RuntimeError: the native library is missing; the message says why.
    """
    packed = _checked("packed", packed, torch.uint8).contiguous()
    if n < 0:
        raise ValueError(f"n must not be negative, got {n}")
    if packed.numel() != (n + 7) // 8:
        raise ValueError(f"packed must have {(n + 7) // 8} bytes for {n} elements, got {packed.numel()}")
    mask = torch.empty(n, dtype=torch.bool, device="cpu")
    _call("wsn_unpack_bits", packed.data_ptr(), n, mask.data_ptr())
    return mask


def popcount(packed: Tensor) -> Tensor:
    """Count the set bits of a packed mask.

    Args:
        packed: ``uint8`` CPU tensor of any shape; a strided one is copied first.

    Returns:
        0-d int64 tensor.

    Raises:
        TypeError: ``packed`` is not a ``uint8`` tensor.
        ValueError: ``packed`` is not on the CPU.
        RuntimeError: the native library is missing; the message says why.
    """
    packed = _checked("packed", packed, torch.uint8).contiguous()
    count = torch.empty((), dtype=torch.int64, device="cpu")
    _call("wsn_popcount_bits", packed.data_ptr(), packed.numel(), count.data_ptr())
    return count


def or_(dst: Tensor, src: Tensor) -> None:
    """``dst |= src``, in place.

    Args:
        dst: contiguous ``uint8`` CPU tensor.
        src: ``uint8`` CPU tensor of the shape of ``dst``; a strided one is copied first. It is ``dst`` itself
            or does not overlap it.

    Raises:
        TypeError: one of them is not a ``uint8`` tensor.
        ValueError: one of them is not on the CPU, ``dst`` is not contiguous, or the shapes differ.
        RuntimeError: the native library is missing; the message says why.
    """
    dst, src = _checked("dst", dst, torch.uint8), _checked("src", src, torch.uint8).contiguous()
    if not dst.is_contiguous():
        raise ValueError(f"dst must be contiguous, got strides {dst.stride()}")
    if dst.shape != src.shape:
        raise ValueError(f"src must have the shape {tuple(dst.shape)} of dst, got {tuple(src.shape)}")
    _call("wsn_or_bits", dst.data_ptr(), src.data_ptr(), dst.numel())


def _package_roots() -> Iterator[Path]:
    """Where ``_lib`` may be: beside the sources, or where the distribution is installed.

    They differ for an editable install, and when a checkout on ``sys.path`` hides the installed package.
    """
    yield Path(__file__).parents[1]
    try:
        yield Path(str(distribution("wsn-fast").locate_file("wsn_fast")))
    except PackageNotFoundError:
        return


def _checked(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if not isinstance(tensor, Tensor) or tensor.dtype != dtype:
        got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise TypeError(f"{name} must be a {dtype} tensor, got {got}")
    if tensor.device.type != "cpu":
        raise ValueError(f"{name} must be on the CPU, got {tensor.device}")
    return tensor


def _call(function: str, *args: int) -> None:
    """Call ``function`` with PyTorch's number of threads, and raise on an error code."""
    lib, reason = load()
    if lib is None:
        raise RuntimeError(reason)
    code = getattr(lib, function)(*args, torch.get_num_threads())
    if code != 0:
        raise RuntimeError(f"{function}: {lib.wsn_error_message(code).decode()}")
