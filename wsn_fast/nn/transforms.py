"""Subnet layers under the transforms of ``torch.func`` (grad, vmap, jvp, jacrev, and so on).

With the mask of a finished task, the masked weights are constants, and every transform with respect to inputs works.
The straight-through gate of training has no rules for these transforms.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active as are_active
from torch._C._functorch import is_functorch_wrapped_tensor as is_transformed

from .. import ops

__all__ = ["are_active", "masked_within"]


def masked_within(param: Tensor, packed: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The masked tensor of a finished task under a transform. It is not kept, because the tensors of a transform are of
    no use after it.

    Raises:
        RuntimeError: there is no rule: ``packed`` is None, so a task is in training, or the transform is one with
            respect to ``param``.
    """
    if packed is not None and not is_transformed(param):
        return ops.gate_packed(param.detach(), packed, dtype, "torch")  # kernels do not see through a transform
    raise RuntimeError(
        "the transforms of torch.func (grad, vmap, jvp, jacrev, ...) do not go through a subnet layer in training, nor "
        "with respect to its weights. Use backward() or torch.autograd.grad (functional_call works with both), or take "
        "a finished task, with wsn.use_task(task), and transform with respect to inputs"
    )
