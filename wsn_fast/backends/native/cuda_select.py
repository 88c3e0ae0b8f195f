"""The optional native CUDA library (``csrc/cuda``), called through ctypes. It finds the thresholds of many tensors in
one call.

If the library is missing, :func:`load` does not raise an error; its result gives the reason. The library is linked with
a CUDA runtime of its own, which shares the device, the context and the streams with PyTorch's. This module checks every
pointer that reaches C for dtype, device, contiguity and size.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .shared_library import INT, POINTER, SIZE, Interface, NativeLibrary, load_installed

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
RULES = {"magnitude": 0, "value": 1}
CHUNKS = (4096, 8192, 16384, 32768, 65536)
"""The numbers of scores per block that :func:`default_chunk` chooses from."""

_RECORD_BYTES = 80

INTERFACE = Interface(
    name="wsn_cuda",
    prefix="wsn_cuda",
    abi_version=1,  # WSN_CUDA_ABI_VERSION of csrc/include/wsn_fast_cuda.h
    signatures={
        "wsn_cuda_select_state_bytes": [SIZE, POINTER],
        "wsn_cuda_select_workspace_bytes": [POINTER, SIZE, INT, SIZE, POINTER],
        "wsn_cuda_select": [
            *(POINTER, POINTER, POINTER, SIZE),
            *(INT, INT, INT, SIZE),
            *(POINTER, POINTER, SIZE, POINTER, POINTER),
        ],
    },
)


class Statistics(NamedTuple):
    """Counts of the calls with a :class:`WarmStart` for one tensor.

    Attributes:
        hits: the calls whose window contained the threshold. They read the scores once.
        misses: the calls whose window did not contain it, and that started again without a window.
        cold_calls: the calls without a window: the first one, and those whose threshold moves too far to be followed.
        inside: the number of keys in all windows together.
    """

    hits: int
    misses: int
    cold_calls: int
    inside: int


class WarmStart:
    """The memory of repeated calls of :func:`thresholds`, on the device. It takes 16 KiB per tensor.

    One call at a time may use it, inside a CUDA graph or outside.

    Attributes:
        count: the number of tensors.
    """

    def __init__(self, count: int, device: torch.device | str) -> None:
        """Make an empty memory for ``count`` >= 1 tensors on ``device``.

        Raises:
            ValueError: ``count`` is less than 1.
            RuntimeError: the library is missing; the message says why.
        """
        if count < 1:
            raise ValueError(f"count must be at least 1, got {count}")
        self.count = count
        self._state = _new_state(_library(), count, torch.device(device))

    def statistics(self) -> list[Statistics]:
        """The statistics of each tensor since this object was made. Waits for the device."""
        records = self._state[: self.count * _RECORD_BYTES].view(torch.int64).view(self.count, -1)
        return [Statistics(*row) for row in records[:, :4].tolist()]


@functools.cache
def load() -> NativeLibrary:
    """The library of this installation; see :func:`wsn_fast.backends.native.shared_library.load_installed`."""
    return load_installed(INTERFACE)


@functools.cache
def obstacle(device: torch.device) -> str:
    """Why :func:`thresholds` does not run on ``device`` (no library, a driver too old, ...); empty if it does.

    Waits for the device, once.
    """
    if device.type != "cuda":
        return f"the native CUDA library runs on NVIDIA GPUs, not on {device.type}"
    if not torch.cuda.is_available() or torch.version.hip is not None:
        return "torch finds no NVIDIA GPU"
    try:
        found = thresholds([torch.ones(1, device=device)], [0], "value").item()
    except RuntimeError as error:
        return str(error)
    return "" if found == 1.0 else f"the native CUDA library found {found} where the threshold is 1"


def thresholds(
    scores: Sequence[Tensor],
    ranks: Sequence[int],
    rule: str,
    state: WarmStart | None = None,
    *,
    chunk: int | None = None,
) -> Tensor:
    """The exact threshold of every tensor, in at most four launches for up to 128 tensors of any sizes.

    Nothing waits for the device and nothing is copied to it, so that a CUDA graph can hold the call. The graph then
    holds the tensors' addresses too.

    Args:
        scores: T >= 1 contiguous, non-empty CUDA tensors of one dtype (float32, bfloat16 or float16) on one device.
        ranks: for each the index of the threshold among its ascending keys, 0 <= rank < numel.
        rule: "magnitude" (the keys are ``|S|``) or "value" (``S``). NaN is the largest key.
        state: a :class:`WarmStart` of T tensors on that device, or None. With it, the call first searches around the
            thresholds of the previous call. If the scores have moved little, they are read once and not twice. The
            result is the same without it.
        chunk: scores per block, a multiple of 1024 up to 1048576; None: :func:`default_chunk`.

    Returns:
        [T] of the scores' dtype, on their device. Zero is +0.0.

    Raises:
        TypeError: a score is no tensor, or of another dtype.
        ValueError: no tensors, another number of ranks, a tensor that is not on the first one's CUDA device, empty or
            not contiguous, a rank out of range, an unknown rule, a state of another size or device, or a bad chunk.
        RuntimeError: the library is missing or CUDA fails; the message says why.
    """
    check(scores, ranks, rule, state)
    device = scores[0].device
    if device.type != "cuda":
        raise ValueError(f"scores must be on a CUDA device, got {device}")
    with torch.cuda.device(device):
        processors = torch.cuda.get_device_properties(device).multi_processor_count
        chunk = default_chunk([tensor.numel() for tensor in scores], processors) if chunk is None else chunk
        return launch(_library(), scores, ranks, rule, state, chunk, torch.cuda.current_stream(device).cuda_stream)


def check(scores: Sequence[Tensor], ranks: Sequence[int], rule: str, state: WarmStart | None) -> None:
    """Raise what :func:`thresholds` says, for all but the kind of device and the chunk."""
    if not scores or len(scores) != len(ranks):
        got = f"{len(scores)} and {len(ranks)}"
        raise ValueError(f"scores and ranks must have the same length, at least 1, got {got}")
    if rule not in RULES:
        raise ValueError(f"rule must be one of {list(RULES)}, got {rule!r}")
    first = scores[0]
    for i, (tensor, rank) in enumerate(zip(scores, ranks, strict=True)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"scores[{i}] must be a tensor, got {type(tensor).__name__}")
        if tensor.dtype not in DTYPES or tensor.dtype != first.dtype:
            expected = first.dtype if first.dtype in DTYPES else list(DTYPES)
            raise TypeError(f"scores[{i}]: expected {expected}, got {tensor.dtype}")
        if tensor.device != first.device or not tensor.is_contiguous():
            got = f"shape {tuple(tensor.shape)}, strides {tensor.stride()} on {tensor.device}"
            raise ValueError(f"scores[{i}]: expected a contiguous tensor on {first.device}, got {got}")
        if not 0 <= rank < tensor.numel():
            raise ValueError(f"ranks[{i}]: expected 0 <= rank < numel, got {rank} for {tensor.numel()} elements")
    if state is not None and (state.count != len(scores) or state._state.device != first.device):
        got = f"{state.count} on {state._state.device}"
        raise ValueError(f"state: expected one of {len(scores)} tensors on {first.device}, got {got}")


def default_chunk(sizes: Sequence[int], processors: int) -> int:
    """The number of scores per block. If every tensor fits into one block, that is the largest block; else it is small
    enough to keep the GPU busy.

    Args:
        sizes: the tensors' numbers of elements.
        processors: multiprocessors of the GPU.
    """
    if max(sizes) <= CHUNKS[-1]:
        return CHUNKS[-1]  # one launch does everything
    return max((chunk for chunk in CHUNKS[:-1] if chunk * 2 * processors <= sum(sizes)), default=CHUNKS[0])


def launch(
    lib: ctypes.CDLL,
    scores: Sequence[Tensor],
    ranks: Sequence[int],
    rule: str,
    state: WarmStart | None,
    chunk: int,
    stream: int,
) -> Tensor:
    """Queue the selection for checked arguments on ``stream`` of the current device. See :func:`thresholds`."""
    count, first = len(scores), scores[0]
    dtype, sizes = DTYPES[first.dtype], (SIZE * count)(*[tensor.numel() for tensor in scores])
    needed = SIZE()
    _call(lib, "wsn_cuda_select_workspace_bytes", sizes, count, dtype, chunk, ctypes.byref(needed))
    workspace = torch.empty(needed.value, dtype=torch.uint8, device=first.device)
    memory = _new_state(lib, count, first.device) if state is None else state._state
    tau = torch.empty(count, dtype=first.dtype, device=first.device)
    _call(
        lib,
        "wsn_cuda_select",
        (POINTER * count)(*[tensor.data_ptr() for tensor in scores]),
        sizes,
        (SIZE * count)(*ranks),
        count,
        dtype,
        RULES[rule],
        state is not None,
        chunk,
        memory.data_ptr(),
        workspace.data_ptr(),
        needed.value,
        tau.data_ptr(),
        stream,
    )
    return tau


def _new_state(lib: ctypes.CDLL, count: int, device: torch.device) -> Tensor:
    needed = SIZE()
    _call(lib, "wsn_cuda_select_state_bytes", count, ctypes.byref(needed))
    return torch.zeros(needed.value, dtype=torch.uint8, device=device)


def _library() -> ctypes.CDLL:
    lib, reason = load()
    if lib is None:
        raise RuntimeError(reason)
    return lib


def _call(lib: ctypes.CDLL, function: str, *args: object) -> None:
    code = getattr(lib, function)(*args)
    if code != 0:
        raise RuntimeError(f"{function}: {lib.wsn_cuda_error_message(code).decode()}")
