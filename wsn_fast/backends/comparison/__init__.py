"""Is what a backend computes right? Its operations are compared with those of the torch backend.

The torch backend is plain PyTorch and knows no mask kernels, so it serves as the measure. Every tensor that an
operation allocates and every one that it writes lies between guards, which have to stay as they were; what it reads
does too, so that a read beyond the ends shows in the result.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from . import masks, products, steps
from .masks import Where
from .tensors import SCORES, Watched

__all__ = ["ALL", "ANY", "FEW", "ON_BITS", "PRODUCTS", "Where", "first_problem"]

ON_BITS = ("pack", "unpack", "union", "popcount")
ANY = torch.float32
"""The dtype to give where it does not matter, which is so for :data:`ON_BITS`."""
PRODUCTS = ("masked_linear", "masked_linear_grad", "masked_linear_tasks", "masked_conv")

FEW = partial(Where, scores=("normal", "two values", "awkward"), sizes=(63, 5003), rules=("magnitude",))
"""Where to compare in milliseconds. The larger size is larger than a sample of the search for a threshold. With one
rule a GPU compiles fewer kernels that the training does not need; the other one differs from it in one instruction."""
ALL = partial(Where, scores=tuple(SCORES), sizes=(1, 63, 1000, 5003))
"""Where to compare with time to spare."""


def first_problem(operation: str, module: Any, where: Where) -> str | None:
    """What is wrong with an operation of a backend, or None if nothing was found.

    Args:
        operation: one of ``PRIMITIVES``.
        module: the backend, or what has its functions.
        where: device, dtype (for :data:`ON_BITS` it does not matter), and what to compare on.
    """
    if getattr(module, "INTERPRETED", False):
        where = where._replace(narrow=torch.float16)  # Triton's interpreter does not round to bfloat16
    watched = Watched(module)
    try:
        # What the caller has switched on must not change the torch backend's result.
        with torch.no_grad(), torch.autocast(where.device.type, enabled=False):
            return next(_problems(operation, watched, where), None) or next(watched.problems(), None)
    except Exception as error:  # a kernel that fails is what a comparison looks for
        return f"{type(error).__name__}: {error}"


def _problems(operation: str, module: Any, where: Where) -> Iterator[str]:
    if operation in ON_BITS:
        return masks.bits(operation, module, where)
    if operation in ("keep_mask", "gate", "gate_packed"):
        return masks.one_gate(operation, module, where)
    if operation in ("gate_backward", "gates_backward"):
        return masks.gradients(operation, module, where)
    if operation.startswith("restore"):
        return masks.restored(operation, module, where)
    if operation.endswith("_step"):
        return steps.step(operation, module, where)
    return {
        "threshold": masks.threshold,
        "gates": masks.gates,
        "gradient_squares": steps.squares,
        "masked_linear": products.linear,
        "masked_linear_grad": products.linear_grad,
        "masked_linear_tasks": products.linear_tasks,
        "masked_conv": products.conv,
    }[operation](module, where)
