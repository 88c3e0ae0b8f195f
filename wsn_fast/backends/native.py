"""The optional native CPU library (``csrc/cpu``), through ctypes.

Its absence is a reason in :func:`load`'s answer, never an error. :data:`OPERATIONS` names the primitives that
it has, with the conventions and, to the bit, the results of :mod:`wsn_fast.backends.torch`, for CPU tensors; only which
NaN a NaN becomes may differ. Every pointer that reaches C is checked here for dtype, device, contiguity and size.
Strided inputs are copied first, and then the result has their strides, as PyTorch's would. Calls use
up to ``torch.get_num_threads()`` threads, from a pool of the library's own that sleeps between calls.

Every function raises ``TypeError`` or ``ValueError`` for a tensor of another kind, device or shape than it needs,
naming the argument, and ``RuntimeError`` where the library is missing; the message says why.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from .torch import SGD, AdamW, Moments

OPERATIONS = frozenset(
    {
        "threshold",
        "keep_mask",
        "gate",
        "gate_packed",
        "gate_backward",
        "adamw_step",
        "sgd_step",
        "pack",
        "unpack",
        "union",
        "popcount",
        "restore_frozen",
    }
)
ABI_VERSION = 2
"""``WSN_ABI_VERSION`` of ``csrc/include/wsn_fast.h``."""

_PREFIX, _SUFFIX = {"win32": ("", ".dll"), "darwin": ("lib", ".dylib")}.get(sys.platform, ("lib", ".so"))
_FILE = Path("_lib", f"{_PREFIX}wsn_cpu{_SUFFIX}")
_POINTER, _SIZE, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
_SIGNATURES = {
    "wsn_threshold": [_POINTER, _INT, _SIZE, _SIZE, _INT, _POINTER, _INT],
    "wsn_keep": [_POINTER, _INT, _POINTER, _INT, _POINTER, _POINTER, _SIZE, _INT],
    "wsn_gate": [_POINTER, _INT, _POINTER, _INT, _POINTER, _INT, _POINTER, _INT, _POINTER, _SIZE, _INT],
    "wsn_gate_packed": [_POINTER, _INT, _POINTER, _POINTER, _INT, _SIZE, _INT],
    "wsn_gate_backward": [_POINTER, _INT] * 3 + [_POINTER, _INT, _POINTER, _POINTER, _POINTER, _SIZE, _INT],
    "wsn_restore_frozen": [_POINTER, _POINTER, _POINTER, _INT, _SIZE, _INT],
    "wsn_adamw_step": [_POINTER] * 7 + [_INT],
    "wsn_sgd_step": [_POINTER] * 5 + [_INT],
    "wsn_pack_bits": [_POINTER, _SIZE, _POINTER, _INT],
    "wsn_unpack_bits": [_POINTER, _SIZE, _POINTER, _INT],
    "wsn_or_bits": [_POINTER, _POINTER, _SIZE, _INT],
    "wsn_union_bits": [_POINTER, _SIZE, _SIZE, _POINTER, _INT],
    "wsn_popcount_bits": [_POINTER, _SIZE, _POINTER, _INT],
}
_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_RULES = {"magnitude": 0, "value": 1}
_INSTRUCTIONS = ("plain instructions", "AVX2", "AVX-512")


class NativeLibrary(NamedTuple):
    """The loaded library, or ``None``, and the reason for either."""

    lib: ctypes.CDLL | None
    reason: str


def supports(operation: str, dtype: torch.dtype | None = None) -> str | None:
    """None if the library would run ``operation``, else the reason why it cannot.

    Args:
        operation: a primitive of :mod:`wsn_fast.backends.torch`.
        dtype: that of the weights or scores, or of the parameter for "restore_frozen"; None leaves it out of account.
            Weights, scores, gradients and results may each have a dtype of their own.
    """
    if operation not in OPERATIONS:
        return f"the native library has no {operation}"
    if dtype is not None:
        if operation in ("adamw_step", "sgd_step"):
            able = dtype in (torch.float32, torch.float64)
        elif operation == "restore_frozen":
            able = dtype.itemsize <= 8
        else:
            able = operation in ("pack", "unpack", "union", "popcount") or dtype in _DTYPES
        if not able:
            return f"the native {operation} has no {dtype}"
    return load().reason if load().lib is None else None


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
        lib.wsn_error_message.argtypes = [_INT]
        lib.wsn_error_message.restype = ctypes.c_char_p
        for name, signature in _SIGNATURES.items():
            function = getattr(lib, name)
            function.argtypes = signature
            function.restype = _INT
        lib.wsn_limit_instructions.argtypes = [_INT]
        instructions = _INSTRUCTIONS[lib.wsn_limit_instructions(-1)]
    except OSError as error:
        return NativeLibrary(None, f"{path} cannot be loaded: {error}")
    except (AttributeError, IndexError) as error:
        return NativeLibrary(None, f"{path} lacks a function, or is another library: {error}")
    return NativeLibrary(lib, f"loaded from {path}, using {instructions}")


# --- the gate ---------------------------------------------------------------------------------------------------------


def threshold(scores: Tensor, rank: int, rule: str) -> Tensor:
    """The ``rank``-th (from 0) of the ascending keys, NaN last: a 0-d tensor in the dtype of ``scores``.

    The result is the same for any number of threads. Either zero is given as +0.0.
    """
    scores = _dense("scores", scores)
    code, n = _dtype_code("scores", scores.dtype), scores.numel()
    if not 0 <= rank < n:
        raise ValueError(f"rank must be in [0, {n}), got {rank}")
    tau = torch.empty((), dtype=scores.dtype, device="cpu")
    _call("wsn_threshold", scores.data_ptr(), code, n, rank, _rule_code(rule), tau.data_ptr())
    return tau


def keep_mask(scores: Tensor, tau: Tensor, rule: str) -> Tensor:
    """``not (key < tau)``, boolean, in the shape of ``scores``."""
    dense = _dense("scores", scores)
    mask = torch.empty_like(dense, dtype=torch.bool)
    args = dense.data_ptr(), _dtype_code("scores", dense.dtype), _tau(tau, dense), _rule_code(rule)
    _call("wsn_keep", *args, mask.data_ptr(), None, dense.numel())
    return _strided_like(scores, mask)


def gate(weight: Tensor, scores: Tensor, tau: Tensor, rule: str, dtype: torch.dtype) -> Tensor:
    """``m ? W : +0.0`` in ``dtype``."""
    return _gate(weight, scores, tau, rule, dtype, None)


def gate_and_pack(weight: Tensor, scores: Tensor, tau: Tensor, rule: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """:func:`gate` and the packed mask, ``uint8`` [ceil(n / 8)], in one pass."""
    packed = torch.empty((weight.numel() + 7) // 8, dtype=torch.uint8, device="cpu")
    return _gate(weight, scores, tau, rule, dtype, packed.data_ptr()), packed


def _gate(weight: Tensor, scores: Tensor, tau: Tensor, rule: str, dtype: torch.dtype, packed: int | None) -> Tensor:
    w, s = _dense("weight", weight), _dense("scores", scores, weight)
    out = torch.empty_like(w, dtype=dtype)
    args = w.data_ptr(), _dtype_code("weight", w.dtype), s.data_ptr(), _dtype_code("scores", s.dtype), _tau(tau, s)
    _call("wsn_gate", *args, _rule_code(rule), out.data_ptr(), _dtype_code("dtype", dtype), packed, w.numel())
    return _strided_like(weight, out)


def gate_packed(weight: Tensor, packed: Tensor, dtype: torch.dtype) -> Tensor:
    """As :func:`gate`, with the mask read from its packed form, ``uint8`` of ``ceil(n / 8)`` bytes."""
    w, n = _dense("weight", weight), weight.numel()
    bits = _packed("packed", packed, n)
    out = torch.empty_like(w, dtype=dtype)
    args = w.data_ptr(), _dtype_code("weight", w.dtype), bits.data_ptr(), out.data_ptr(), _dtype_code("dtype", dtype)
    _call("wsn_gate_packed", *args, n)
    return _strided_like(weight, out)


def gate_backward(
    grad: Tensor,
    weight: Tensor,
    scores: Tensor,
    tau: Tensor,
    union: Tensor | None,
    rule: str,
    need_weight: bool,
    need_scores: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """``dW``: G inside the mask and outside the packed union, else +0.0 (Eq. 4). ``dS``: ``G * W``, times ``sign(S)``
    for "magnitude" (Eq. 5). One that is not needed is None."""
    w, g, s = _dense("weight", weight), _dense("grad", grad, weight), _dense("scores", scores, weight)
    bits = None if union is None else _packed("union", union, w.numel())
    dw = torch.empty_like(w) if need_weight else None
    ds = torch.empty_like(s) if need_scores else None
    inputs = g.data_ptr(), _dtype_code("grad", g.dtype), w.data_ptr(), _dtype_code("weight", w.dtype)
    gate = s.data_ptr(), _dtype_code("scores", s.dtype), _tau(tau, s), _rule_code(rule)
    _call("wsn_gate_backward", *inputs, *gate, _pointer(bits), _pointer(dw), _pointer(ds), w.numel())
    return (dw if dw is None else _strided_like(grad, dw)), (ds if ds is None else _strided_like(grad, ds))


def restore_frozen(param: Tensor, saved: Tensor, union: Tensor) -> None:
    """In place: ``param = union ? saved : param``, bit for bit. ``union`` is packed."""
    if not isinstance(param, Tensor):
        raise TypeError(f"param must be a tensor, got {type(param).__name__}")
    saved = _dense("saved", saved, param)
    if saved.dtype is not param.dtype:
        raise TypeError(f"saved must have the dtype {param.dtype} of param, got {saved.dtype}")
    n = param.numel()
    bits, dense = _packed("union", union, n), _dense("param", param)
    _call("wsn_restore_frozen", dense.data_ptr(), saved.data_ptr(), bits.data_ptr(), param.element_size(), n)
    if dense is not param:
        param.copy_(dense)


# --- optimizer steps --------------------------------------------------------------------------------------------------


class _AdamW(ctypes.Structure):
    _fields_: ClassVar = [
        *((name, ctypes.c_double) for name in ("lr", "beta1", "beta2", "eps", "weight_decay")),
        ("step", ctypes.c_int64),
        ("decoupled", ctypes.c_int32),
    ]


class _SGD(ctypes.Structure):
    _fields_: ClassVar = [
        *((name, ctypes.c_double) for name in ("lr", "momentum", "dampening", "weight_decay")),
        ("nesterov", ctypes.c_int32),
        ("first", ctypes.c_int32),
    ]


class _Gated(ctypes.Structure):
    _fields_: ClassVar = [
        *((name, _POINTER) for name in ("grad", "weight", "scores", "tau", "union_mask")),
        ("n", _SIZE),
        ("dtype", ctypes.c_int32),
        ("rule", ctypes.c_int32),
    ]


def adamw_step(
    grad: Tensor,
    weight: Tensor,
    scores: Tensor,
    tau: Tensor,
    union: Tensor | None,
    rule: str,
    weight_state: Moments,
    scores_state: Moments,
    for_weight: AdamW,
    for_scores: AdamW,
) -> None:
    """One update of ``weight`` and ``scores`` in place and in one pass, from ``grad``, the gradient of the masked
    weight. The states are ``(exp_avg, exp_avg_sq)``. Weights in the packed union keep every bit. All but ``grad`` are
    float32, or all float64."""
    settings = [
        _AdamW(float(s.lr), s.beta1, s.beta2, s.eps, s.weight_decay, int(s.step), s.decoupled)
        for s in (for_weight, for_scores)
    ]
    states = [*(("weight_state", x) for x in weight_state), *(("scores_state", x) for x in scores_state)]
    _step("wsn_adamw_step", grad, weight, scores, tau, union, rule, states, settings)


def sgd_step(
    grad: Tensor,
    weight: Tensor,
    scores: Tensor,
    tau: Tensor,
    union: Tensor | None,
    rule: str,
    weight_momentum: Tensor | None,
    scores_momentum: Tensor | None,
    for_weight: SGD,
    for_scores: SGD,
) -> None:
    """As :func:`adamw_step`, for SGD. A momentum buffer may be None where its momentum is 0."""
    states = [("weight_momentum", weight_momentum), ("scores_momentum", scores_momentum)]
    settings = []
    for (name, buffer), s in zip(states, (for_weight, for_scores), strict=True):
        if buffer is None and s.momentum != 0:
            raise ValueError(f"{name} must be a tensor for a momentum of {s.momentum}, got None")
        settings.append(_SGD(float(s.lr), s.momentum, s.dampening, s.weight_decay, s.nesterov, s.first))
    _step("wsn_sgd_step", grad, weight, scores, tau, union, rule, states, settings)


def _step(
    function: str,
    grad: Tensor,
    weight: Tensor,
    scores: Tensor,
    tau: Tensor,
    union: Tensor | None,
    rule: str,
    states: Sequence[tuple[str, Tensor | None]],
    settings: Sequence[ctypes.Structure],
) -> None:
    if not isinstance(weight, Tensor) or weight.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"weight must be a float32 or float64 tensor, got {getattr(weight, 'dtype', type(weight))}")
    changed = [("weight", weight), ("scores", scores), *((name, state) for name, state in states if state is not None)]
    dense = {id(tensor): _dense(name, tensor, weight) for name, tensor in changed}
    for name, tensor in changed:
        if tensor.dtype is not weight.dtype:
            raise TypeError(f"{name} must be a {weight.dtype} tensor, got {tensor.dtype}")
    g, n = _dense("grad", grad, weight).to(weight.dtype), weight.numel()
    bits = None if union is None else _packed("union", union, n)
    inputs = g.data_ptr(), dense[id(weight)].data_ptr(), dense[id(scores)].data_ptr(), _tau(tau, scores), _pointer(bits)
    gated = _Gated(*inputs, n, _DTYPES[weight.dtype], _rule_code(rule))
    pointers = [None if state is None else dense[id(state)].data_ptr() for _, state in states]
    _call(function, ctypes.byref(gated), *pointers, *(ctypes.byref(s) for s in settings))
    for _, tensor in changed:
        if dense[id(tensor)] is not tensor:
            tensor.copy_(dense[id(tensor)])


# --- packed masks -----------------------------------------------------------------------------------------------------


def pack(mask: Tensor) -> Tensor:
    """Boolean mask of any shape to its packed form, ``uint8`` [ceil(n / 8)]; padding bits are zero."""
    mask = _dense("mask", mask)
    if mask.dtype is not torch.bool:
        raise TypeError(f"mask must be a torch.bool tensor, got {mask.dtype}")
    packed = torch.empty((mask.numel() + 7) // 8, dtype=torch.uint8, device="cpu")
    _call("wsn_pack_bits", mask.data_ptr(), mask.numel(), packed.data_ptr())
    return packed


def unpack(packed: Tensor, n: int) -> Tensor:
    """Packed mask to a 1-d boolean tensor of ``n`` elements."""
    if n < 0:
        raise ValueError(f"n must not be negative, got {n}")
    packed = _packed("packed", packed, n)
    mask = torch.empty(n, dtype=torch.bool, device="cpu")
    _call("wsn_unpack_bits", packed.data_ptr(), n, mask.data_ptr())
    return mask


def union(packed: Tensor) -> Tensor:
    """Bitwise OR over the rows of ``packed`` [T, bytes], T >= 1."""
    dense = _packed("packed", packed)
    if dense.ndim != 2 or dense.shape[0] == 0:
        raise ValueError(f"packed must have shape [T, bytes] with T >= 1, got {tuple(dense.shape)}")
    rows, size = dense.shape
    out = torch.empty(size, dtype=torch.uint8, device="cpu")
    _call("wsn_union_bits", dense.data_ptr(), rows, size, out.data_ptr())
    return out


def popcount(packed: Tensor) -> Tensor:
    """The number of set bits, a 0-d int64 tensor."""
    packed = _packed("packed", packed)
    count = torch.empty((), dtype=torch.int64, device="cpu")
    _call("wsn_popcount_bits", packed.data_ptr(), packed.numel(), count.data_ptr())
    return count


# --- checks, and the call ---------------------------------------------------------------------------------------------


def _dense(name: str, tensor: Tensor, like: Tensor | None = None) -> Tensor:
    """``tensor``, or a contiguous copy; it is a CPU tensor of the shape of ``like``."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if not tensor.is_cpu:
        raise ValueError(f"{name} must be on the CPU, got {tensor.device}")
    if like is not None and tensor.shape != like.shape:
        raise ValueError(f"{name} must have shape {tuple(like.shape)}, got {tuple(tensor.shape)}")
    return tensor if tensor.is_contiguous() else tensor.contiguous()


def _packed(name: str, packed: Tensor, n: int | None = None) -> Tensor:
    """``packed``, or a contiguous copy; it is a CPU tensor with the bytes of ``n`` bits."""
    dense = _dense(name, packed)
    if dense.dtype is not torch.uint8:
        raise TypeError(f"{name} must be a torch.uint8 tensor, got {dense.dtype}")
    if n is not None and dense.numel() != (n + 7) // 8:
        raise ValueError(f"{name} must have {(n + 7) // 8} bytes for {n} elements, got {dense.numel()}")
    return dense


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _tau(tau: Tensor, scores: Tensor) -> int:
    """The address of ``tau``, which is one element as ``scores`` has them."""
    if tau.dtype is not scores.dtype or tau.numel() != 1 or not tau.is_cpu:
        raise ValueError(
            f"tau must be one element of {scores.dtype} on the CPU, got {tau.numel()} of {tau.dtype} on {tau.device}"
        )
    return tau.data_ptr()


def _dtype_code(name: str, dtype: torch.dtype) -> int:
    code = _DTYPES.get(dtype)
    if code is None:
        raise TypeError(f"{name} must be float32, float64, bfloat16 or float16, got {dtype}")
    return code


def _rule_code(rule: str) -> int:
    code = _RULES.get(rule)
    if code is None:
        raise ValueError(f"rule must be one of {tuple(_RULES)}, got {rule!r}")
    return code


def _strided_like(like: Tensor, dense: Tensor) -> Tensor:
    """``dense``, with the strides that PyTorch's elementwise operations give to results of ``like``."""
    return dense if like.is_contiguous() else torch.empty_like(like, dtype=dense.dtype).copy_(dense)


def _package_roots() -> Iterator[Path]:
    """Where ``_lib`` may be: beside the sources, or where the distribution is installed.

    They differ for an editable install, and when a checkout on ``sys.path`` hides the installed package.
    """
    yield Path(__file__).parents[1]
    try:
        yield Path(str(distribution("wsn-fast").locate_file("wsn_fast")))
    except PackageNotFoundError:
        return


def _call(function: str, *args: object) -> None:
    """Call ``function`` with PyTorch's number of threads, and raise on an error code."""
    lib, reason = load()
    if lib is None:
        raise RuntimeError(reason)
    code = getattr(lib, function)(*args, torch.get_num_threads())
    if code != 0:
        raise RuntimeError(f"{function}: {lib.wsn_error_message(code).decode()}")
