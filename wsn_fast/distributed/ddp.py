"""DistributedDataParallel around a WSN: what a module around the WSN has to say to it, and gradients in bfloat16."""

# Without annotations from __future__: PyTorch reads those of a communication hook, and takes no text for a class.
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed import GradBucket, ProcessGroup  # type: ignore[attr-defined]
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from ..backends import collectives
from ..continual.parallel import check_can_be_wrapped
from ..continual.wsn import WSN


def leave_alone(module: nn.Module, *, scores: bool = False) -> None:
    """Tell ``DistributedDataParallel(module)`` what it must neither send nor reduce of each WSN inside of ``module``:
    masks, heads, what tasks have copies of, and the scores of a one-pass optimizer.

    A WSN says this itself where the WSN is wrapped. If another module is wrapped, such as a LightningModule, call this
    before the wrapper is made. What is on PyTorch's list for ``module`` stays there.

    Args:
        module: a module that contains a WSN.
        scores: leave alone all scores. A one-pass optimizer that is built after the wrapper needs that. For any other
            optimizer the WSN then averages their gradients, at the end of backward.

    Raises:
        TypeError: ``module`` is no module.
        ValueError: it contains no WSN, or it is one and ``scores`` is true.
        RuntimeError: a WSN shows a finished task.
    """
    if scores and isinstance(module, WSN):
        raise ValueError(
            "scores=True is for a module around the WSN: build the one-pass optimizer before "
            "DistributedDataParallel(wsn)"
        )
    names: list[str] = list(getattr(module, "_ddp_params_and_buffers_to_ignore", ()))
    for path, wsn in _wsns_of(module):
        check_can_be_wrapped(wsn)
        names += [f"{path}.{name}".lstrip(".") for name in wsn._ddp_params_and_buffers_to_ignore]
        if scores:
            own = {id(gate.score) for _, gate in wsn.gated()}
            names += [f"{path}.{name}".lstrip(".") for name, param in wsn.named_parameters() if id(param) in own]
    if not isinstance(module, WSN):
        module._ddp_params_and_buffers_to_ignore = [*dict.fromkeys(names)]  # type: ignore[assignment]


def level_buffers(wsn: WSN) -> None:
    """Give the live buffers of the task in progress, such as running statistics, the values that they have in the first
    process. All processes have to call this.

    ``end_task`` does it too. Call it before, if the processes are to measure the task in progress together. It does
    nothing if the task was not trained inside of a ``DistributedDataParallel``.

    Args:
        wsn: the model.

    Raises:
        TypeError: ``wsn`` is no ``WSN``.
    """
    if not isinstance(wsn, WSN):
        raise TypeError(f"wsn must be a WSN, got {type(wsn).__name__}")
    wsn._guards.parallel.level(wsn)


def reduce_in_bfloat16(ddp: DistributedDataParallel) -> None:
    """Send the gradients of gated tensors, and of their scores, in bfloat16: half of the bytes.

    They are divided by the number of processes in bfloat16 and added up in it. All other gradients keep their dtype.
    With a one-pass optimizer the scores have no gradient, and each process hands 2 bytes for each gated weight to a
    step's sum, where float32 gradients of weights and scores are 8. PyTorch's own ``bf16_compress_hook`` sends
    everything in bfloat16, and takes no other backend than NCCL.

    Args:
        ddp: the wrapper of a WSN, or of a module with one inside. It gets a communication hook, of which it can have
            one.

    Raises:
        TypeError: ``ddp`` is no ``DistributedDataParallel``.
        ValueError: there is no WSN in it.
        RuntimeError: it has a communication hook already.
    """
    if not isinstance(ddp, DistributedDataParallel):
        raise TypeError(f"ddp must be a DistributedDataParallel, got {type(ddp).__name__}")
    gates = [gate for _, wsn in _wsns_of(ddp.module) for _, gate in wsn.gated()]
    gated = frozenset(id(tensor) for gate in gates for tensor in (gate.param, gate.score))
    ddp.register_comm_hook(_State(ddp.process_group, gated), _average_in_bfloat16)


class _State(NamedTuple):
    """The processes, and the ids of the parameters whose gradients are sent in bfloat16."""

    group: ProcessGroup
    gated: frozenset[int]


def _average_in_bfloat16(state: _State, bucket: GradBucket) -> Future[Tensor]:
    grads, params = bucket.gradients(), bucket.parameters()
    gated = [grad for grad, param in zip(grads, params, strict=True) if id(param) in state.gated]
    others = [grad for grad, param in zip(grads, params, strict=True) if id(param) not in state.gated]
    sums = [_Sum(state.group, gated, torch.bfloat16), _Sum(state.group, others, bucket.buffer().dtype)]
    buffer = bucket.buffer()

    def take(_: object) -> Tensor:
        for one in sums:
            one.take()
        return buffer

    return torch.futures.collect_all([one.future for one in sums if one.future is not None]).then(take)


class _Sum:
    """Gradients that travel together in one dtype."""

    def __init__(self, group: ProcessGroup, grads: Sequence[Tensor], dtype: torch.dtype) -> None:
        self._grads = grads
        self.future: Future[list[Tensor]] | None = None
        if grads:
            joined = torch.cat([grad.reshape(-1).to(dtype) for grad in grads]).div_(collectives.size(group))
            self.future = collectives.start_sum_over(group, joined)

    def take(self) -> None:
        """Store the averages. The future is complete."""
        if self.future is not None:
            parts = self.future.value()[0].split([grad.numel() for grad in self._grads])
            for grad, part in zip(self._grads, parts, strict=True):
                grad.copy_(part.view_as(grad))


def _wsns_of(module: object) -> list[tuple[str, WSN]]:
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
    found = [(name, one) for name, one in module.named_modules() if isinstance(one, WSN)]
    if not found:
        raise ValueError("module must contain a WSN")
    return found
