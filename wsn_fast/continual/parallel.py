"""What DistributedDataParallel would do to a WSN in silence is refused before a step is taken."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..nn.model_gates import in_parallel
from .frozen_values import checksums

if TYPE_CHECKING:
    from .wsn import WSN


class Parallel:
    """Checks the forward passes of one WSN inside of DistributedDataParallel."""

    def __init__(self) -> None:
        self._compared: int | None = None

    def check_forward(self, wsn: WSN) -> None:
        """Check a forward pass that is about to run.

        Raises:
            RuntimeError: a finished task is in use; the active head, or another parameter, is not reduced; batch norms
                have statistics of one process; or, at the first pass of a task, the processes have other values. Then
                it is raised in all of them.
        """
        ddp = DistributedDataParallel._get_active_ddp_module() if in_parallel() else None
        if ddp is None:
            return
        if wsn._view.task is not None:
            raise RuntimeError(
                f"task {wsn._view.task!r} is finished and in use inside of DistributedDataParallel, which sends the "
                "buffers of one process to all others: call the WSN itself, wsn(x), to evaluate"
            )
        reduced = {id(param) for param in ddp._module_parameters}
        trained = [(name, p) for name, p in wsn.named_parameters() if p.requires_grad]
        heads = [head for heads in wsn._parts.heads.values() if (head := heads.__dict__["_active_head"]) is not None]
        active = {id(p) for head in heads for p in head.parameters()}
        for name, param in trained:
            if id(param) in active and id(param) not in reduced:
                raise RuntimeError(
                    f"{name} was made after DistributedDataParallel(...), which does not reduce its gradients: the "
                    "processes would train different heads. Wrap the WSN again after each begin_task"
                )
        for item in wsn._parts.owned:
            if item.attribute == "running_mean" and not isinstance(item.module, nn.SyncBatchNorm):
                raise RuntimeError(
                    f"{item.name} differs between the processes of DistributedDataParallel: each would freeze its own. "
                    "Use nn.SyncBatchNorm.convert_sync_batchnorm(model) before WSN(model), or another norm"
                )
        if self._compared != wsn._generation:
            _compare([(name, param) for name, param in wsn.named_parameters()])
            self._compared = wsn._generation


@torch.no_grad()
def _compare(tensors: list[tuple[str, Tensor]]) -> None:
    sums = checksums([tensor for _, tensor in tensors])
    least, most = sums.clone(), sums.clone()
    torch.distributed.all_reduce(least, torch.distributed.ReduceOp.MIN)
    torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
    differ = [name for (name, _), one in zip(tensors, (least != most).tolist(), strict=True) if one]
    if differ:
        raise RuntimeError(
            f"the processes of DistributedDataParallel have different values of {', '.join(differ[:10])}: their masks "
            "would differ. Use one seed before begin_task (with reinit_scores too), or load one state, in all of them"
        )
