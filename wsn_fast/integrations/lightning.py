"""A callback with which a Lightning ``Trainer`` trains one task of a :class:`wsn_fast.WSN` per ``fit``."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from wsn_fast import WSN
from wsn_fast.parts import Density
from wsn_fast.tasks import TaskId, check_task

if find_spec("lightning") is None:
    raise ImportError('this needs Lightning: pip install "wsn-fast[lightning]"', name="lightning")

from lightning.pytorch import Callback


class WSNCallback(Callback):
    """Makes one ``trainer.fit`` the training of one task: the task begins before ``configure_optimizers``, all
    optimizers keep the finished tasks to the bit, and the task ends after the last ``on_train_end`` hook (the place to
    restore the weights of the best epoch).

    A fit that an exception cuts short leaves the task in progress: fit again, with ``ckpt_path`` to go on where a
    checkpoint was. Masks and the register of tasks are part of the model's state, so every checkpoint has them.

    Args:
        task: the task to train.
        density, out_features: see :meth:`wsn_fast.WSN.begin_task`.
        wsn: the model to train; None means the one WSN inside the ``LightningModule``.

    Raises:
        TypeError: ``task`` is neither an int nor a str, or ``wsn`` not a WSN.
    """

    def __init__(
        self,
        task: TaskId,
        *,
        density: Density | None = None,
        out_features: int | None = None,
        wsn: WSN | None = None,
    ) -> None:
        if wsn is not None and not isinstance(wsn, WSN):
            raise TypeError(f"wsn must be a wsn_fast.WSN or None, got {type(wsn).__name__}")
        self.task = check_task(task)
        self.density = density
        self.out_features = out_features
        self._given = wsn

    def setup(self, trainer: Any, pl_module: nn.Module, stage: str) -> None:
        """Begin the task, unless it is in progress already. A checkpoint to resume from is loaded after this, and takes
        its place."""
        wsn = self._wsn(pl_module)
        if stage == "fit" and wsn.current_task != self.task:
            wsn.begin_task(self.task, density=self.density, out_features=self.out_features)

    def on_fit_start(self, trainer: Any, pl_module: nn.Module) -> None:
        """Guard the optimizers that hold parameters of the model.

        Raises:
            RuntimeError: the checkpoint that was loaded is not one of this task in progress.
        """
        wsn = self._wsn(pl_module)
        if wsn.current_task != self.task:
            raise RuntimeError(
                f"task {self.task!r} is to be trained, but the checkpoint has {wsn.current_task!r} in progress and "
                f"these finished: {wsn.tasks}"
            )
        guard(wsn, trainer.optimizers)

    def on_fit_end(self, trainer: Any, pl_module: nn.Module) -> None:
        """End the task."""
        self._wsn(pl_module).end_task()

    def _wsn(self, pl_module: nn.Module) -> WSN:
        if self._given is not None:
            return self._given
        found = [module for module in pl_module.modules() if isinstance(module, WSN)]
        if len(found) != 1:
            raise ValueError(
                f"{type(pl_module).__name__} must contain one WSN, found {len(found)}: say which, WSNCallback(wsn=...)"
            )
        return found[0]


def guard(wsn: WSN, optimizers: Iterable[torch.optim.Optimizer]) -> list[torch.optim.Optimizer]:
    """Guard those of ``optimizers`` that hold parameters of ``wsn``, and return them."""
    own = {id(param) for param in wsn.parameters()}
    return [
        wsn.guard(optimizer)
        for optimizer in optimizers
        if any(id(param) in own for group in optimizer.param_groups for param in group["params"])
    ]
