"""Whether the gradient of a weight is a raw gradient and nothing else.

In the one-pass mode autograd stores G, the gradient of the masked weight, as the gradient of the weight. If a loss
reads the weight past its layer too, autograd adds the gradient of that to G, and the optimizer would take the sum for
G. The sum is another tensor, in other memory. So it is enough to remember where G was when it was handed over, and to
look at the end of the backward pass, before anybody can scale or replace the gradient. Autograd also tells each time
that it has stored a gradient of the weight. One that no layer has handed over is foreign.

What cannot be told apart: gradients of a weight that is used several times in one backward pass, that a hook may have
replaced, or that processes reduce; and those of code that ``torch.compile`` has compiled together with the layer.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Variable

from .same_bits import same_bits

queue_callback: Callable[[Callable[[], None]], None] = Variable._execution_engine.queue_callback
_KEY = -1  # of a hook; PyTorch itself counts from 0


class RawGradient:
    """What is known about the gradient of one weight.

    Attributes:
        arrived: the weight, once for each gradient that autograd has stored since the last look.
        is_foreign: whether a gradient came past the layer and was not dropped since.
        open: the number of backward passes that have handed over a gradient and have not ended.
        unsure: whether nothing can be said about the passes that are open.
        address, storage: where the gradient is that was handed over, and its memory.
        is_sum_right: whether autograd has added this gradient, and nothing else, to an earlier one; None if there was
            no earlier one.
        untouched: if the layer had no gradient to hand over, the gradient of the weight at that moment and its version.
        adds_in_bfloat16: whether gradients in bfloat16 are added up in bfloat16, and not in the dtype of the weight.
    """

    __slots__ = (
        "_handle", "address", "adds_in_bfloat16", "arrived", "is_foreign", "is_sum_right", "open", "storage", "unsure",
        "untouched",
    )  # fmt: skip

    def __init__(self) -> None:
        self.arrived: deque[Tensor] = deque(maxlen=2)
        self.is_foreign = self.unsure = False
        self.open = 0
        self.address = 0
        self.storage: Any = None
        self.is_sum_right: bool | None = None
        self.untouched: tuple[Tensor | None, int] | None = None
        self.adds_in_bfloat16 = False
        self._handle: Any = None

    def __reduce__(self) -> tuple[type[RawGradient], tuple[()]]:
        return RawGradient, ()  # a copy of a weight has no hooks

    def watch(self, weight: Tensor | None, adds_in_bfloat16: bool = False) -> None:
        """From now on look at the gradients of ``weight``, or at none (None)."""
        self.adds_in_bfloat16 = adds_in_bfloat16
        if self._handle is not None:
            self._handle.remove()
        self._handle = None
        self.reset()
        if weight is not None:
            # A method of a deque, because a function in Python takes several times as long.
            self._handle = weight.register_post_accumulate_grad_hook(self.arrived.append)

    def reset(self) -> None:
        """Nothing is known about gradients before this call."""
        self.arrived.clear()
        self.is_foreign = self.unsure = False
        self.open, self.storage, self.untouched = 0, None, None

    def came_past(self) -> bool:
        """Whether the present gradient of the weight contains something that no layer has handed over. Ask this between
        backward passes."""
        if self.open:  # a backward pass that failed
            foreign = self.is_foreign
            self.reset()
            self.is_foreign = foreign
        if self.arrived:
            self.is_foreign = True
            self.arrived.clear()
        return self.is_foreign


def is_watched(weight: Tensor) -> bool:
    """Whether the weight has hooks of somebody else."""
    hooks = weight._backward_hooks
    return hooks is not None and bool(hooks.keys() - {_KEY})


def hand_over(
    ones: Sequence[RawGradient], weights: Sequence[Tensor], raws: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Note that these raw gradients of ``weights`` are handed over to autograd in the backward pass that runs. None
    stands for a weight that the loss does not depend on through its layer. Returns the tensors to hand over."""
    # With a graph of the gradients autograd copies them, and processes that reduce gradients replace them.
    unsure = torch.is_grad_enabled() or (torch.distributed.is_available() and torch.distributed.is_initialized())
    results = []
    for one, weight, raw in zip(ones, weights, raws, strict=True):
        one.open += 1
        if one.open > 1 or unsure:  # used several times in a pass: autograd adds the gradients up
            one.unsure, one.storage = True, None
        else:
            if one.arrived or one.is_foreign:
                _forget_dropped(one, weight)
            one.untouched = None if raw is not None else (weight.grad, _version(weight.grad))
            raw = None if raw is None else _hand_over(one, weight, raw)
        results.append(raw)
    queue_callback(partial(_settle, ones, weights))
    return results


def _forget_dropped(one: RawGradient, weight: Tensor) -> None:
    """Forget gradients that came earlier and that somebody has dropped or zeroed since."""
    one.arrived.clear()
    one.is_foreign = weight.grad is not None and bool(weight.grad.any())


def _version(gradient: Tensor | None) -> int:
    return 0 if gradient is None else gradient._version


def _hand_over(one: RawGradient, weight: Tensor, raw: Tensor) -> Tensor:
    before, hooks = weight.grad, weight._backward_hooks
    if is_watched(weight):
        one.unsure = True  # they may return another gradient
        return raw
    if not (raw.is_contiguous() and weight.is_contiguous()) and raw.stride() != weight.stride():
        raw = torch.empty_like(weight, dtype=raw.dtype).copy_(raw)  # as autograd would
    one.address, one.is_sum_right = raw.data_ptr(), None
    # While somebody else holds the memory, autograd does not add to it in place.
    one.storage = raw.untyped_storage()
    if before is not None or hooks:
        _watch_sum(one, weight)
    return raw


def _watch_sum(one: RawGradient, weight: Tensor) -> None:
    """The gradient is about to be added to an earlier one, which leaves no trace of it: look at it before that."""

    def see(gradient: Tensor) -> None:
        one.is_sum_right = gradient.data_ptr() == one.address

    if weight._backward_hooks is None:
        weight.register_hook(see).remove()  # makes the dictionary
    assert weight._backward_hooks is not None
    weight._backward_hooks[_KEY] = see


def _settle(ones: Sequence[RawGradient], weights: Sequence[Tensor]) -> None:
    """The backward pass has ended: look at what autograd has stored."""
    for one, weight in zip(ones, weights, strict=True):
        if one.open == 0:
            continue  # it was given up meanwhile
        one.open -= 1
        if one.arrived:
            one.arrived.clear()
            if not one.unsure and not _is_alone(one, weight):
                one.is_foreign = True
        if weight._backward_hooks:
            weight._backward_hooks.pop(_KEY, None)
        one.storage = one.untouched = None
        if one.open == 0:
            one.unsure = False


def _is_alone(one: RawGradient, weight: Tensor) -> bool:
    """Whether autograd has stored, or added, what was handed over and nothing else."""
    if one.untouched is not None:  # autograd also tells of a gradient that is nothing
        before, version = one.untouched
        return weight.grad is before and _version(before) == version
    if one.is_sum_right is not None:
        return one.is_sum_right
    stored = weight.grad
    if stored is None or stored.data_ptr() == one.address:
        return True
    # Autograd copies a gradient that somebody else refers to, as two layers of one output do.
    if stored.is_cuda and torch.cuda.is_current_stream_capturing():
        return True  # values cannot be read now
    offset = (one.address - one.storage.data_ptr()) // stored.element_size()
    handed = stored.new_empty(0).set_(one.storage, offset, weight.shape, weight.stride())
    return same_bits(stored, handed)
