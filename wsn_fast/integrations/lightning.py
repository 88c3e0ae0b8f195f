"""A callback for Lightning: with it, each ``Trainer.fit`` trains one task of a :class:`wsn_fast.WSN`."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec
from typing import Any, NoReturn

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from wsn_fast import WSN
from wsn_fast.continual.first_inputs import FirstInputs
from wsn_fast.continual.model_parts import Density
from wsn_fast.distributed import leave_alone
from wsn_fast.nn.task_ids import TaskId, check_task
from wsn_fast.ops import check_bool
from wsn_fast.optim.averages import Averaging, averaging

from .ours_within import one_pass_within, wsn_within

if find_spec("lightning") is None:
    raise ImportError('this needs Lightning: pip install "wsn-fast[lightning]"', name="lightning")

from lightning.pytorch import Callback
from lightning.pytorch.strategies import DDPStrategy


class WSNCallback(Callback):
    """Makes each ``trainer.fit`` train one task.

    The task begins before ``configure_optimizers``. No optimizer changes what finished tasks use. The task ends after
    the last ``on_train_end`` hook, so restore the weights of the best epoch in such a hook. Then the model computes the
    inputs of its first call again, to find code that reads weights outside of the mask (``UnmaskedReadError``), and all
    finished tasks are verified.

    The ``last.ckpt`` of a ``ModelCheckpoint`` with ``save_last`` is written again when the task has ended, so that the
    task is finished in it. A fit that is given such a checkpoint of its task trains nothing.

    Lightning's ``WeightAveraging`` and ``EMAWeightAveraging`` may follow it in the list of callbacks. They average what
    training may move, and nothing else (:func:`wsn_fast.optim.averaging`).

    If an exception ends the fit early, the task stays in progress. Fit again, with ``ckpt_path`` to continue from a
    checkpoint. Masks and the register of tasks are part of the model's state, so every checkpoint contains them.

    Args:
        task: the task to train.
        density, out_features: see :meth:`wsn_fast.WSN.begin_task`.
        wsn: the model to train; None means the one WSN inside the ``LightningModule``.
        verify: whether :meth:`wsn_fast.WSN.verify` checks all finished tasks at the end of the fit.

    Raises:
        TypeError: ``task`` is neither an int nor a str, ``wsn`` not a WSN, or ``verify`` no bool.
    """

    def __init__(
        self,
        task: TaskId,
        *,
        density: Density | None = None,
        out_features: int | None = None,
        wsn: WSN | None = None,
        verify: bool = True,
    ) -> None:
        if wsn is not None and not isinstance(wsn, WSN):
            raise TypeError(f"wsn must be a wsn_fast.WSN or None, got {type(wsn).__name__}")
        self.task = check_task(task)
        self.density = density
        self.out_features = out_features
        self.verify = check_bool("verify", verify)
        self._given = wsn
        self._first: FirstInputs | None = None

    def setup(self, trainer: Any, pl_module: nn.Module, stage: str) -> None:
        """Begin the task, unless it is in progress already. A checkpoint to resume from is loaded after this, and
        replaces the state of the model. Afterwards Lightning may wrap ``pl_module`` for several processes."""
        wsn = self._wsn(pl_module)
        if stage == "fit":
            if wsn.current_task != self.task:
                wsn.begin_task(self.task, density=self.density, out_features=self.out_features)
            if isinstance(trainer.strategy, DDPStrategy) and any(module is wsn for module in pl_module.modules()):
                leave_alone(pl_module, scores=True)  # the optimizer comes later, and may be a one-pass optimizer

    def on_load_checkpoint(self, trainer: Any, pl_module: nn.Module, checkpoint: dict[str, Any]) -> None:
        """Leave out the state of the optimizers if the task is finished in the checkpoint. They hold other parameters
        then, and have nothing to do."""
        if self._is_finished(self._wsn(pl_module)):
            checkpoint["optimizer_states"] = []

    def on_fit_start(self, trainer: Any, pl_module: nn.Module) -> None:
        """Guard the optimizers that hold parameters of the model, and let averages of weights leave alone what finished
        tasks use.

        Raises:
            RuntimeError: in the checkpoint that was loaded, this task is not in progress; or a callback that averages
                weights comes before this one.
        """
        wsn = self._wsn(pl_module)
        if wsn.current_task != self.task and not self._is_finished(wsn):
            self._refuse(wsn)
        guard(wsn, trainer.optimizers)
        clip_with_optimizer(trainer.precision_plugin)
        self._first = FirstInputs(wsn)
        for callback in trainer.callbacks:
            averaged = getattr(callback, "_average_model", None)
            if isinstance(averaged, AveragedModel):
                _average_what_moves(wsn, pl_module, averaged, type(callback).__name__)

    def on_train_start(self, trainer: Any, pl_module: nn.Module) -> None:
        """Lightning calls this if an epoch is left to train.

        Raises:
            RuntimeError: the task is finished in the checkpoint that was loaded.
        """
        if self._is_finished(wsn := self._wsn(pl_module)):
            self._refuse(wsn)

    def on_fit_end(self, trainer: Any, pl_module: nn.Module) -> None:
        """End the task, with the first batch of this fit as the probe of ``end_task``, and verify all finished tasks.
        Write checkpoints called ``last`` again."""
        wsn = self._wsn(pl_module)
        ends = not self._is_finished(wsn)
        if ends:
            end_task(wsn, self._first, trainer)
        elif self._first is not None:
            self._first.stop()
        self._first = None
        if self.verify:
            wsn.verify()
        if ends:
            save_last_again(trainer)

    def _is_finished(self, wsn: WSN) -> bool:
        return wsn.current_task is None and self.task in wsn.tasks

    def _refuse(self, wsn: WSN) -> NoReturn:
        raise RuntimeError(
            f"task {self.task!r} is to be trained, but the checkpoint has {wsn.current_task!r} in progress and these "
            f"finished: {wsn.tasks}"
        )

    def _wsn(self, pl_module: nn.Module) -> WSN:
        if self._given is not None:
            return self._given
        return wsn_within(pl_module, "say which, WSNCallback(wsn=...)")


def _average_what_moves(wsn: WSN, pl_module: nn.Module, averaged: AveragedModel, callback: str) -> None:
    """Let ``averaged``, the average of ``pl_module`` that a callback of the class ``callback`` keeps, leave alone what
    finished tasks use."""
    names, copied = ([name for name, _ in m.named_parameters()] for m in (pl_module, averaged.module))
    if names != copied:
        raise RuntimeError(
            f"{callback} has copied the model before the task began, without its head: put WSNCallback before "
            f"{callback} in the list of callbacks"
        )
    if not isinstance(averaged.multi_avg_fn, Averaging):
        averaged.multi_avg_fn = averaging(wsn, averaged.avg_fn, averaged.multi_avg_fn)
        averaged.avg_fn = None


def end_task(wsn: WSN, first: FirstInputs | None, trainer: Any) -> None:
    """End the task in progress. ``first`` has what the model was called with first in this fit; None if it was not."""
    with trainer.precision_plugin.forward_context():  # the model is called as it was in training
        (first or FirstInputs(wsn)).end_task()


def save_last_again(trainer: Any) -> None:
    """Write the ``last.ckpt`` of every ``ModelCheckpoint`` again: its task was in progress, and has ended since."""
    for callback in trainer.checkpoint_callbacks:
        if getattr(callback, "save_last", None) and getattr(callback, "last_model_path", ""):
            trainer.save_checkpoint(callback.last_model_path, getattr(callback, "save_weights_only", False))


def clip_with_optimizer(plugin: Any) -> None:
    """Let Lightning's ``gradient_clip_val`` clip by the norm that a one-pass optimizer computes. The gradients of its
    weights and scores are not there yet.

    Args:
        plugin: the precision plugin of a trainer.
    """
    if "clip_grad_by_norm" in vars(plugin):
        return  # an earlier fit of this trainer has done it
    by_norm, by_value = plugin.clip_grad_by_norm, plugin.clip_grad_by_value

    def clip_grad_by_norm(optimizer: torch.optim.Optimizer, clip_val: float) -> None:
        ours = one_pass_within(optimizer)
        if ours is None:
            by_norm(optimizer, clip_val)
        else:
            ours.clip_grad_norm_(clip_val)

    def clip_grad_by_value(optimizer: torch.optim.Optimizer, clip_val: float) -> None:
        if one_pass_within(optimizer) is not None:
            raise ValueError(
                'gradient_clip_algorithm must be "norm" with a one-pass optimizer, got "value": the gradients of its '
                "weights and scores are not there yet"
            )
        by_value(optimizer, clip_val)

    plugin.clip_grad_by_norm, plugin.clip_grad_by_value = clip_grad_by_norm, clip_grad_by_value


def guard(wsn: WSN, optimizers: Iterable[torch.optim.Optimizer]) -> list[torch.optim.Optimizer]:
    """Guard those of ``optimizers`` that hold parameters of ``wsn``, and return them."""
    own = {id(param) for param in wsn.parameters()}
    return [
        wsn.guard(optimizer)
        for optimizer in optimizers
        if any(id(param) in own for group in optimizer.param_groups for param in group["params"])
    ]
