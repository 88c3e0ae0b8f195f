"""The Triton backend: the primitives of :mod:`wsn_fast.backends.torch` by the kernels of ``kernels/``.

It allocates results and workspaces and picks tiles from the tuning tables; the kernels do neither. No call waits for
the device, and none copies from the host, so a CUDA graph can hold any of them. The exceptions are ``gates`` and
``restore_frozen_many``, which copy the tables of tensors that are new to their plan. Triton's interpreter runs this
backend on the CPU: so it is tested without a GPU.
"""

from .device import INTERPRETED
from .frozen_values import restore_frozen_many
from .gate import (
    gate,
    gate_backward,
    gate_packed,
    pack,
    popcount,
    restore_frozen,
    threshold,
    union,
    unpack,
)
from .many import gates, gates_backward
from .optimizer_steps import adamw_coded_step, adamw_step, gradient_squares, sgd_coded_step, sgd_step
from .products import conv_wins, fused_rows, masked_conv, masked_linear, masked_linear_grad, masked_linear_tasks

__all__ = [
    "INTERPRETED",
    "adamw_coded_step",
    "adamw_step",
    "conv_wins",
    "fused_rows",
    "gate",
    "gate_backward",
    "gate_packed",
    "gates",
    "gates_backward",
    "gradient_squares",
    "masked_conv",
    "masked_linear",
    "masked_linear_grad",
    "masked_linear_tasks",
    "pack",
    "popcount",
    "restore_frozen",
    "restore_frozen_many",
    "sgd_coded_step",
    "sgd_step",
    "threshold",
    "union",
    "unpack",
]
