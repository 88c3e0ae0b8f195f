"""The optional native CPU library (``csrc/cpu``): found, loaded by ctypes, and called.

Its absence is a reason in :func:`load`'s answer, never an error. Every pointer that reaches C is checked here for
dtype, device, contiguity and size. Calls use up to ``torch.get_num_threads()`` threads, from a pool of the library's
own that sleeps between calls.

The checks raise ``TypeError`` or ``ValueError`` for a tensor of another kind, device or shape than an operation needs,
naming the argument, and :func:`call` raises ``RuntimeError`` where the library is missing; the message says why.
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

ABI_VERSION = 3
"""``WSN_ABI_VERSION`` of ``csrc/include/wsn_fast.h``."""

PREFIX, SUFFIX = {"win32": ("", ".dll"), "darwin": ("lib", ".dylib")}.get(sys.platform, ("lib", ".so"))
_FILE = Path("_lib", f"{PREFIX}wsn_cpu{SUFFIX}")
POINTER, SIZE, INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
_SIGNATURES = {
    "wsn_threshold": [POINTER, INT, SIZE, SIZE, INT, POINTER, INT],
    "wsn_keep": [POINTER, INT, POINTER, INT, POINTER, POINTER, SIZE, INT],
    "wsn_gate": [POINTER, INT, POINTER, INT, POINTER, INT, POINTER, INT, POINTER, SIZE, INT],
    "wsn_gate_packed": [POINTER, INT, POINTER, POINTER, INT, SIZE, INT],
    "wsn_gate_backward": [POINTER, INT] * 3 + [POINTER, INT, POINTER, POINTER, POINTER, SIZE, INT],
    "wsn_restore_frozen": [POINTER, POINTER, POINTER, INT, SIZE, INT],
    "wsn_adamw_step": [POINTER, SIZE, INT],
    "wsn_sgd_step": [POINTER, SIZE, INT],
    "wsn_gradient_squares": [POINTER, SIZE, POINTER, INT],
    "wsn_pack_bits": [POINTER, SIZE, POINTER, INT],
    "wsn_unpack_bits": [POINTER, SIZE, POINTER, INT],
    "wsn_or_bits": [POINTER, POINTER, SIZE, INT],
    "wsn_union_bits": [POINTER, SIZE, SIZE, POINTER, INT],
    "wsn_popcount_bits": [POINTER, SIZE, POINTER, INT],
}
DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_RULES = {"magnitude": 0, "value": 1}
_INSTRUCTIONS = ("plain instructions", "AVX2", "AVX-512")


class NativeLibrary(NamedTuple):
    """The loaded library, or ``None``, and the reason for either."""

    lib: ctypes.CDLL | None
    reason: str


@functools.cache
def load() -> NativeLibrary:
    """The library of this installation: the first that loads, else why there is none. Never raises."""
    files = [root / _FILE for root in package_roots() if (root / _FILE).is_file()]
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
        lib.wsn_error_message.argtypes = [INT]
        lib.wsn_error_message.restype = ctypes.c_char_p
        for name, signature in _SIGNATURES.items():
            function = getattr(lib, name)
            function.argtypes = signature
            function.restype = INT
        lib.wsn_limit_instructions.argtypes = [INT]
        instructions = _INSTRUCTIONS[lib.wsn_limit_instructions(-1)]
    except OSError as error:
        return NativeLibrary(None, f"{path} cannot be loaded: {error}")
    except (AttributeError, IndexError) as error:
        return NativeLibrary(None, f"{path} lacks a function, or is another library: {error}")
    return NativeLibrary(lib, f"loaded from {path}, using {instructions}")


# --- checks, and the call ---------------------------------------------------------------------------------------------


def contiguous(name: str, tensor: Tensor, like: Tensor | None = None) -> Tensor:
    """``tensor``, or a contiguous copy; it is a CPU tensor of the shape of ``like``."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if not tensor.is_cpu:
        raise ValueError(f"{name} must be on the CPU, got {tensor.device}")
    if like is not None and tensor.shape != like.shape:
        raise ValueError(f"{name} must have shape {tuple(like.shape)}, got {tuple(tensor.shape)}")
    return tensor if tensor.is_contiguous() else tensor.contiguous()


def packed_mask(name: str, packed: Tensor, n: int | None = None) -> Tensor:
    """``packed``, or a contiguous copy; it is a CPU tensor with the bytes of ``n`` bits."""
    dense = contiguous(name, packed)
    if dense.dtype is not torch.uint8:
        raise TypeError(f"{name} must be a torch.uint8 tensor, got {dense.dtype}")
    if n is not None and dense.numel() != (n + 7) // 8:
        raise ValueError(f"{name} must have {(n + 7) // 8} bytes for {n} elements, got {dense.numel()}")
    return dense


def pointer(tensor: Tensor | None) -> int | None:
    """The address of its first element, or None."""
    return None if tensor is None else tensor.data_ptr()


def threshold_pointer(tau: Tensor, scores: Tensor) -> int:
    """The address of ``tau``, which is one element as ``scores`` has them."""
    if tau.dtype is not scores.dtype or tau.numel() != 1 or not tau.is_cpu:
        raise ValueError(
            f"tau must be one element of {scores.dtype} on the CPU, got {tau.numel()} of {tau.dtype} on {tau.device}"
        )
    return tau.data_ptr()


def dtype_code(name: str, dtype: torch.dtype) -> int:
    """The ``wsn_dtype`` of a dtype."""
    code = DTYPES.get(dtype)
    if code is None:
        raise TypeError(f"{name} must be float32, float64, bfloat16 or float16, got {dtype}")
    return code


def rule_code(rule: str) -> int:
    """The ``wsn_rule`` of a rule."""
    code = _RULES.get(rule)
    if code is None:
        raise ValueError(f"rule must be one of {tuple(_RULES)}, got {rule!r}")
    return code


def strided_like(like: Tensor, dense: Tensor) -> Tensor:
    """``dense``, with the strides that PyTorch's elementwise operations give to results of ``like``."""
    return dense if like.is_contiguous() else torch.empty_like(like, dtype=dense.dtype).copy_(dense)


def package_roots() -> Iterator[Path]:
    """Where ``_lib`` may be: beside the sources, or where the distribution is installed.

    They differ for an editable install, and when a checkout on ``sys.path`` hides the installed package.
    """
    yield Path(__file__).parents[1]
    try:
        yield Path(str(distribution("wsn-fast").locate_file("wsn_fast")))
    except PackageNotFoundError:
        return


def call(function: str, *args: object) -> None:
    """Call ``function`` with PyTorch's number of threads, and raise on an error code."""
    lib, reason = load()
    if lib is None:
        raise RuntimeError(reason)
    code = getattr(lib, function)(*args, torch.get_num_threads())
    if code != 0:
        raise RuntimeError(f"{function}: {lib.wsn_error_message(code).decode()}")
