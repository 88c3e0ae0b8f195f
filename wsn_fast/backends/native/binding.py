"""The optional native CPU library (``csrc/cpu``): its functions, the checks of their arguments, and the call.

If the library is missing, :func:`~wsn_fast.backends.native.load` does not raise an error; its result gives the reason.
This module checks every pointer that reaches C for dtype, device, contiguity and size. A call uses up to
``torch.get_num_threads()`` threads: those of PyTorch's OpenMP team, or of a pool that belongs to the library and sleeps
between calls.

The checks raise ``TypeError`` or ``ValueError`` when a tensor has another kind, device or shape than the operation
needs, and name the argument. :func:`call` raises ``RuntimeError`` if the library is missing, and says why.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .shared_library import load

DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_RULES = {"magnitude": 0, "value": 1}


# --- checks, and the call ---------------------------------------------------------------------------------------------


def contiguous(name: str, tensor: Tensor, like: Tensor | None = None) -> Tensor:
    """Check that ``tensor`` is on the CPU and has the shape of ``like``. Return it, or a contiguous copy."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if not tensor.is_cpu:
        raise ValueError(f"{name} must be on the CPU, got {tensor.device}")
    if like is not None and tensor.shape != like.shape:
        raise ValueError(f"{name} must have shape {tuple(like.shape)}, got {tuple(tensor.shape)}")
    return tensor if tensor.is_contiguous() else tensor.contiguous()


def packed_mask(name: str, packed: Tensor, n: int | None = None) -> Tensor:
    """Check that ``packed`` is on the CPU and has the bytes of ``n`` bits. Return it, or a contiguous copy."""
    dense = contiguous(name, packed)
    if dense.dtype is not torch.uint8:
        raise TypeError(f"{name} must be a torch.uint8 tensor, got {dense.dtype}")
    if n is not None and dense.numel() != (n + 7) // 8:
        raise ValueError(f"{name} must have {(n + 7) // 8} bytes for {n} elements, got {dense.numel()}")
    return dense


def pointer(tensor: Tensor | None) -> int | None:
    """The address of the first element of ``tensor``; None for None."""
    return None if tensor is None else tensor.data_ptr()


def threshold_pointer(tau: Tensor, scores: Tensor) -> int:
    """Check that ``tau`` is one element of the dtype of ``scores`` on the CPU. Return its address."""
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


def call(function: str, *args: object) -> None:
    """Call ``function`` with PyTorch's number of threads, and raise on an error code."""
    lib, reason, _ = load()
    if lib is None:
        raise RuntimeError(reason)
    code = getattr(lib, function)(*args, torch.get_num_threads())
    if code != 0:
        raise RuntimeError(f"{function}: {lib.wsn_error_message(code).decode()}")
