"""The Triton backend: the primitives of :mod:`wsn_fast.backends.torch` by the kernels of ``kernels/``.

It allocates results and workspaces and picks tiles from the tuning tables; the kernels do neither. Nothing waits for
the device, and nothing is copied to it, so that a CUDA graph can hold any of these calls. Works on the CPU too, in
Triton's interpreter, which is how it is tested without a GPU.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from triton import knobs

from ..kernels import conv, grad, mask, matmul, matmul_grad, matmul_tasks
from ..kernels import threshold as select
from . import torch as portable
from . import tuning
from .shapes import Geometry, result_shape, tuning_key
from .triton_updates import adamw_step as adamw_step
from .triton_updates import gradient_squares as gradient_squares
from .triton_updates import sgd_step as sgd_step

INTERPRETED: bool = knobs.runtime.interpret
_INTERPRETER = "Triton's interpreter"


def _on_device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, whatever the device of its arguments."""
    if tensor.device.type != "cuda" or tensor.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(tensor.device)


@functools.cache
def _table(device: torch.device) -> tuning.Table:
    return tuning.table(_INTERPRETER if device.type == "cpu" else torch.cuda.get_device_name(device))


@functools.cache
def _gpu(device: torch.device) -> tuning.Gpu:
    if device.type == "cpu":
        return tuning.Gpu(processors=1, shared=sys.maxsize)
    found = torch.cuda.get_device_properties(device)
    return tuning.Gpu(found.multi_processor_count, found.shared_memory_per_block_optin)  # type: ignore[attr-defined]


def _flat_like(tensor: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """An uninitialised result with the strides of ``tensor``, and the contiguous tensor that a kernel writes for it:
    the same one where it can be."""
    result = torch.empty_like(tensor, dtype=dtype)
    return result, result if result.is_contiguous() else torch.empty(tensor.shape, dtype=dtype, device=tensor.device)


def _settle(result: Tensor, written: Tensor) -> Tensor:
    return result if result is written else result.copy_(written)


# --- selection and the gate
def threshold(scores: Tensor, rank: int, rule: str) -> Tensor:
    """The ``rank``-th (from 0) of the ascending keys, NaN last: a 0-d tensor."""
    scores = scores.detach().contiguous()
    with _on_device_of(scores):
        config = _table(scores.device).threshold()
        describe = {
            "tensors": torch.empty(1, 6, dtype=torch.int64, device=scores.device),
            "programs": torch.empty(
                select.programs_of(scores.numel(), config), 2, dtype=torch.int64, device=scores.device
            ),
        }
        table = select.describe(scores, rank, **describe, config=config)
        workspace = torch.empty(select.workspace_size(table), dtype=torch.int64, device=scores.device)
        tau = torch.empty(1, dtype=scores.dtype, device=scores.device)
        select.select(table=table, tau=tau, workspace=workspace, rule=rule)
    return tau[0]


def gate(weight: Tensor, scores: Tensor, tau: Tensor, rule: str, dtype: torch.dtype) -> Tensor:
    """``m ? W : +0.0`` in ``dtype``."""
    result, out = _flat_like(weight, dtype)
    with _on_device_of(weight):
        config = _table(weight.device).gate()
        mask.gate(weight.detach().contiguous(), scores.detach().contiguous(), tau, out, None, rule=rule, config=config)
    return _settle(result, out)


def gate_packed(weight: Tensor, packed: Tensor, dtype: torch.dtype) -> Tensor:
    """As :func:`gate`, with the mask read from its packed form."""
    result, out = _flat_like(weight, dtype)
    with _on_device_of(weight):
        mask.gate_packed(weight.detach().contiguous(), packed.contiguous(), out, config=_table(weight.device).gate())
    return _settle(result, out)


def gate_backward(
    grad_masked: Tensor,
    weight: Tensor,
    scores: Tensor,
    tau: Tensor,
    union: Tensor | None,
    rule: str,
    need_weight: bool,
    need_scores: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """``dW`` and ``dS`` of the torch backend, in one pass."""
    if not (need_weight or need_scores):
        return None, None
    dw, flat_dw = _flat_like(grad_masked, weight.dtype) if need_weight else (None, None)
    ds, flat_ds = _flat_like(grad_masked, scores.dtype) if need_scores else (None, None)
    with _on_device_of(weight):
        grad.gate_backward(
            grad_masked.detach().contiguous(),
            weight.detach().contiguous(),
            scores.detach().contiguous(),
            tau,
            union,
            flat_dw,
            flat_ds,
            rule=rule,
            config=_table(weight.device).gate_backward(),
        )
    for result, written in ((dw, flat_dw), (ds, flat_ds)):
        if result is not None and written is not None:
            _settle(result, written)
    return dw, ds


def restore_frozen(param: Tensor, saved: Tensor, union: Tensor) -> None:
    """In place: ``param = union ? saved : param``, bit for bit."""
    with _on_device_of(param):
        if param.is_contiguous():
            mask.restore_frozen(param, saved.contiguous(), union)
        else:
            flat = param.contiguous()
            mask.restore_frozen(flat, saved.contiguous(), union)
            param.copy_(flat)


# --- packed masks
def pack(mask_: Tensor) -> Tensor:
    """Boolean mask of any shape to its packed form."""
    packed = torch.empty((mask_.numel() + 7) // 8, dtype=torch.uint8, device=mask_.device)
    with _on_device_of(mask_):
        mask.pack(mask_.contiguous(), packed)
    return packed


def unpack(packed: Tensor, n: int) -> Tensor:
    """Packed mask to a 1-d boolean tensor of ``n`` elements."""
    result = torch.empty(n, dtype=torch.bool, device=packed.device)
    with _on_device_of(packed):
        mask.unpack(packed.contiguous(), result)
    return result


def union(packed: Tensor) -> Tensor:
    """Bitwise OR over the rows of ``packed`` [T, bytes], T >= 1."""
    result = torch.empty(packed.shape[1], dtype=torch.uint8, device=packed.device)
    with _on_device_of(packed):
        mask.union(packed.contiguous(), result)
    return result


def popcount(packed: Tensor) -> Tensor:
    """The number of set bits, a 0-d int64 tensor."""
    count = torch.empty((), dtype=torch.int64, device=packed.device)
    with _on_device_of(packed):
        mask.popcount(packed.contiguous(), count)
    return count


# --- products with the mask applied while the weight is loaded
def precision_of(dtype: torch.dtype, setting: Any) -> str:
    """How a product in ``dtype`` multiplies: "ieee" for float32 unless torch's own setting says "tf32".

    Args:
        dtype: the compute dtype; 16-bit ones have no choice, and their tables say "tf32".
        setting: ``torch.backends.cuda.matmul`` or ``torch.backends.cudnn.conv``, whose ``fp32_precision`` decides.
    """
    return "ieee" if dtype is torch.float32 and setting.fp32_precision != "tf32" else "tf32"


def linear_product(operation: str, dtype: torch.dtype, source: str, backward: bool = False) -> tuning.Product:
    """The key of a linear layer's product in the tuning tables, under torch's precision setting of now."""
    return tuning.Product(operation, dtype, precision_of(dtype, torch.backends.cuda.matmul), source, backward)


def fused_rows(
    operation: str, device: torch.device, dtype: torch.dtype, source: str, n: int, k: int
) -> tuple[int, str]:
    """Up to how many rows the fused product was measured to be faster, and how that is known. Where the mask comes from
    the scores, backward repeats the choice, so both directions have to win."""
    both = source == "scores" and operation == "masked_linear"
    directions = (False, True) if both else (False,)
    answers = [
        _table(device).fused_rows(linear_product(operation, dtype, source, backward), n, k) for backward in directions
    ]
    return min(answers, key=lambda answer: answer[0])


def conv_wins(device: torch.device, dtype: torch.dtype, source: str, shape: dict[str, int]) -> tuple[bool, str]:
    """Whether the implicit convolution was measured to win at this shape, in both directions, and how that is known."""
    precision = precision_of(dtype, torch.backends.cudnn.conv)  # type: ignore[attr-defined]
    answers = [
        _table(device).conv_wins(tuning.Product("masked_conv", dtype, precision, source, backward), shape)
        for backward in (False, True)
    ]
    return min(answers, key=lambda answer: answer[0])


def masked_linear(
    x: Tensor,
    weight: Tensor,
    packed: Tensor | None,
    scores: Tensor | None,
    tau: Tensor | None,
    rule: str,
    bias: Tensor | None,
    backward: bool,
) -> Tensor:
    """``x (W*m)^T + b``, or ``x (W*m)`` for ``backward``, without a masked weight in memory."""
    (n, k), rows = weight.shape, x.shape[0]
    outputs = k if backward else n
    y = torch.empty(rows, outputs, dtype=x.dtype, device=x.device)
    product = linear_product("masked_linear", x.dtype, "scores" if packed is None else "packed", backward)
    if rows == 0:
        return y
    with _on_device_of(x):
        config, splits = _table(x.device).tile(product, rows, n, k, _gpu(x.device))
        matmul.masked_matmul(
            _rows(x),
            weight.detach().contiguous(),
            y,
            packed=None if packed is None else packed.contiguous(),
            scores=None if scores is None else scores.detach().contiguous(),
            tau=tau,
            rule=rule,
            bias=None if bias is None else bias.contiguous(),
            backward=backward,
            config=config,
            splits=splits,
            workspace=_workspace(x, rows, outputs, splits),
            precision=product.precision,
        )
    return y


def masked_linear_grad(
    grad_output: Tensor,
    x: Tensor,
    weight: Tensor,
    scores: Tensor,
    tau: Tensor,
    union: Tensor | None,
    rule: str,
    need_weight: bool,
    need_scores: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of weight and scores out of the product itself: G is never written, nor rounded."""
    if not (need_weight or need_scores):
        return None, None
    n, k = weight.shape
    dw = torch.empty(n, k, dtype=weight.dtype, device=x.device) if need_weight else None
    ds = torch.empty(n, k, dtype=scores.dtype, device=x.device) if need_scores else None
    product = linear_product("masked_linear_grad", x.dtype, "scores")
    with _on_device_of(x):
        config, splits = _table(x.device).tile(product, x.shape[0], n, k, _gpu(x.device))
        matmul_grad.masked_matmul_grad(
            _rows(grad_output),
            _rows(x),
            weight.detach().contiguous(),
            dw,
            ds,
            scores=scores.detach().contiguous(),
            tau=tau,
            union=union,
            rule=rule,
            config=config,
            splits=splits,
            workspace=_workspace(x, n, k, splits),
            precision=product.precision,
        )
    return dw, ds


def masked_linear_tasks(
    x: Tensor, weight: Tensor, packed: Tensor, tasks: Tensor, bias: Tensor | None, packed_bias: Tensor | None
) -> Tensor:
    """``x[i] (W*m[tasks[i]])^T + b*m_b[tasks[i]]``, the weight read once for all tasks of a tile."""
    rows, (n, k) = x.shape[0], weight.shape
    y = torch.empty(rows, n, dtype=x.dtype, device=x.device)
    product = linear_product("masked_linear_tasks", x.dtype, "packed")
    if rows == 0:
        return y
    with _on_device_of(x):
        config, splits = _table(x.device).tile(product, rows, n, k, _gpu(x.device))
        matmul_tasks.masked_matmul_tasks(
            _rows(x),
            weight.detach().contiguous(),
            y,
            packed=packed.contiguous(),
            tasks=tasks.to(torch.int32).contiguous(),
            order=tasks.argsort().to(torch.int32),  # neighbours of one task share a tile
            bias=None if bias is None else bias.detach().contiguous(),
            packed_bias=None if packed_bias is None else packed_bias.contiguous(),
            config=config,
            splits=splits,
            workspace=_workspace(x, rows, n, splits),
            precision=product.precision,
        )
    return y


def _rows(x: Tensor) -> Tensor:
    """The kernels take any distance between rows, but the elements of one side by side."""
    return x if x.stride(1) == 1 else x.contiguous()


def _workspace(x: Tensor, rows: int, outputs: int, splits: int) -> Tensor | None:
    size = matmul.workspace_numel(rows, outputs, splits)
    return torch.empty(size, dtype=torch.float32, device=x.device) if size else None


def masked_conv(
    x: Tensor,
    weight: Tensor,
    packed: Tensor | None,
    scores: Tensor | None,
    tau: Tensor | None,
    rule: str,
    bias: Tensor | None,
    geometry: Geometry,
    groups: int,
    input_shape: Sequence[int] | None,
) -> Tensor:
    """The convolution, or for an ``input_shape`` the gradient of its input, as an implicit masked product."""
    stride, padding, dilation = geometry
    backward = input_shape is not None
    shape = list(input_shape) if input_shape is not None else result_shape(x.shape, weight.shape, geometry)
    if min(shape) < 0 or 0 in shape[2:]:
        raise RuntimeError(f"the kernel {tuple(weight.shape[2:])} is larger than the padded input {tuple(x.shape[2:])}")
    y = torch.empty(shape, dtype=x.dtype, device=x.device)
    precision = precision_of(x.dtype, torch.backends.cudnn.conv)  # type: ignore[attr-defined]
    product = tuning.Product("masked_conv", x.dtype, precision, "scores" if packed is None else "packed", backward)
    if y.numel() == 0 or x.numel() == 0:
        return y.zero_()
    if backward and weight[0].numel() > conv.MOST_PER_CHANNEL:
        return portable.masked_conv(x, weight, packed, scores, tau, rule, bias, geometry, groups, input_shape)
    positions = y.numel() // y.shape[1]
    key = tuning_key(shape if backward else x.shape, weight.shape, geometry, groups)
    with _on_device_of(x):
        conv.masked_conv(
            x,
            weight.detach().contiguous(),
            y,
            packed=None if packed is None else packed.contiguous(),
            scores=None if scores is None else scores.detach().contiguous(),
            tau=tau,
            rule=rule,
            bias=None if bias is None else bias.contiguous(),
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=groups,
            backward=backward,
            config=_table(x.device).conv_config(product, key, positions, _gpu(x.device)),
            precision=product.precision,
        )
    return y
