"""A model that computes as a mixture of finished tasks, in one forward pass (SupSup, Wortsman et al., NeurIPS 2020,
section 3.3): each weight is ``W * (alpha_1 m_1 + ... + alpha_T m_T)``, and autograd leads back to the coefficients.

Heads, and modules with values for each task, have no masks to add up. They compute as each task, and their outputs are
mixed. For a linear head this is the head with the mixed weights.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .. import ops
from ..nn import per_task
from ..nn.gate_state import Given
from ..nn.task_ids import TaskId
from .model_parts import ModelParts

_ELEMENTS = 1 << 22
"""So many elements of masks are unpacked at a time, or those of one mask."""


class _Mixed(torch.autograd.Function):
    """``alpha, W, masks -> W * sum_t alpha_t m_t``, with the gradient of alpha. W is a constant. ``masks`` are packed
    rows, ``uint8`` [T, bytes]."""

    @staticmethod
    def forward(ctx: Any, alpha: Tensor, weight: Tensor, masks: Tensor) -> Tensor:
        ctx.save_for_backward(weight, masks)
        ctx.dtype = alpha.dtype
        total = weight.new_zeros(weight.numel(), dtype=torch.promote_types(weight.dtype, torch.float32))
        with torch.autocast(weight.device.type, enabled=False):
            for rows, part in _unpacked(masks, weight.numel()):
                total += alpha[rows].to(total) @ part.to(total.dtype)
        return weight * total.view(weight.shape).to(weight.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        weight, masks = ctx.saved_tensors
        dtype = torch.promote_types(weight.dtype, torch.float32)
        of_elements = grads[0].to(dtype).mul(weight).flatten()
        with torch.autocast(weight.device.type, enabled=False):
            sums = [part.to(dtype) @ of_elements for _, part in _unpacked(masks, weight.numel())]
        return torch.cat(sums).to(ctx.dtype), None, None


def _unpacked(masks: Tensor, elements: int) -> Iterator[tuple[slice, Tensor]]:
    """The masks of a few tasks at a time: which rows they are, and bool [rows, elements]."""
    bits = 8 * masks.shape[1]
    count = max(_ELEMENTS // bits, 1)
    for start in range(0, len(masks), count):
        some = masks[start : start + count]
        yield slice(start, start + count), ops.unpack_mask(some.reshape(-1), (len(some), bits))[:, :elements]


def check_mixable(parts: ModelParts) -> None:
    """Raise ``ValueError``, naming a tensor, if a model has values for each task in a module that others are part of:
    its outputs as one task cannot be mixed with those as another, because all tasks compute what is inside together."""
    for item in parts.owned:
        if item.kind == "per_task" and next(item.module.children(), None) is not None:
            raise ValueError(
                f"the tasks cannot be superposed: {item.name} has other values in each task, and its module "
                f'({type(item.module).__name__}) has modules in it. Use method="entropy"'
            )


@contextmanager
def superposed(parts: ModelParts, tasks: Sequence[TaskId], alpha: Tensor) -> Iterator[None]:
    """In a ``with`` block a forward pass of the model computes as the mixture of ``tasks``, and runs eagerly. One of
    these tasks has to be in use. When it is left, the layers forget the mixed weights.

    Args:
        parts: the parts of the model.
        tasks: finished tasks.
        alpha: their coefficients, floating [len(tasks)].

    Raises:
        ValueError: see :func:`check_mixable`; or, when the block ends, the pass has read the values of a task without
            calling their module.
    """
    finished = parts.tasks_of_layers()
    rows = [finished.index(task) for task in tasks]
    called: set[nn.Module] = set()
    with ExitStack() as undo:
        if "torch._dynamo" in sys.modules:  # otherwise nothing is compiled, and this import takes seconds
            undo.enter_context(torch.compiler.set_stance("force_eager"))
        for layer in parts.layers.values():
            for gate in layer.gated():
                mixed = _Mixed.apply(alpha.to(gate.param.device), gate.param.detach(), gate.masks[rows])
                given = Given(mixed.to(layer.dtype_of_pass(gate.param)), gate.param, version=gate.param._version)
                layer.gate_state.given[gate.name] = given
        for heads in parts.heads.values():
            undo.callback(_mix_outputs(heads, [heads.head(task) for task in tasks], alpha, called).remove)
        for module in parts.copied:
            undo.callback(_mix_outputs(module, [partial(_as_row, module, r) for r in rows], alpha, called).remove)
        yield
        unused = next((item.name for item in parts.owned if item.kind == "per_task" and item.module not in called), "")
        if unused:
            raise ValueError(
                f"the tasks cannot be superposed: {unused} has other values in each task, and the forward pass does "
                'not call its module. Use method="entropy"'
            )


def _mix_outputs(
    module: nn.Module, as_task: Sequence[Callable[..., Any]], alpha: Tensor, called: set[nn.Module]
) -> RemovableHandle:
    """Make the outputs of ``module`` the mixture of those that ``as_task`` computes. The result is a handle."""

    def mix(_: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        called.add(module)
        outputs = [compute(*args, **kwargs) for compute in as_task]
        shapes = {tuple(one.shape) if isinstance(one, Tensor) else type(one).__name__ for one in outputs}
        if len(shapes) > 1 or not all(isinstance(one, Tensor) for one in outputs):
            raise ValueError(
                f"the tasks cannot be superposed: their outputs of a {type(module).__name__} must be tensors of one "
                f"shape, got {sorted(map(str, shapes))}"
            )
        return torch.tensordot(alpha.to(outputs[0]), torch.stack(outputs), 1)

    return module.register_forward_hook(mix, with_kwargs=True)


def _as_row(module: nn.Module, row: int, *args: Any, **kwargs: Any) -> Any:
    """Compute with the values that the tensors of ``module`` have in the finished task number ``row``. They are copies,
    which the module may write to in training mode."""
    names = per_task.marked(module)
    places: list[dict[str, Any]] = [module._parameters if n in module._parameters else module._buffers for n in names]
    live = [place[name] for place, name in zip(places, names, strict=True)]
    try:
        for place, name in zip(places, names, strict=True):
            place[name] = per_task.value(module, name, row).clone()
        return module.forward(*args, **kwargs)
    finally:
        for place, name, tensor in zip(places, names, live, strict=True):
            place[name] = tensor
