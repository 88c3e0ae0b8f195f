"""WSN as an algorithm of CLArena, trained by Lightning."""

from __future__ import annotations

import re
from typing import Any, NoReturn

from clarena import heads as clarena_heads
from clarena.cl_algorithms import CLAlgorithm
from torch import Tensor, nn

from wsn_fast import ops
from wsn_fast.continual.first_inputs import FirstInputs
from wsn_fast.integrations.lightning import end_task, save_last_again
from wsn_fast.nn.scores import check_score_init

from .backbone import FastSubnetBackbone


class FastWSN(CLAlgorithm):
    """WSN as an algorithm of CLArena, for a :class:`FastSubnetBackbone`. It replaces ``clarena.cl_algorithms.WSN``.

    It uses Lightning's automatic optimization. So learning-rate schedulers are stepped, and gradient clipping,
    accumulation and bf16-mixed precision work. Every checkpoint contains the masks, the heads and the register of
    tasks. To continue a fit that was cut short, call the same ``setup_task_id`` in a new process, and then
    ``trainer.fit(..., ckpt_path=...)``. Task ids may be any numbers. Each task can be trained once.

    With ``HeadsTIL`` each task has a head. The one head of ``HeadDIL``, which CLArena has after version 1.1.0, is
    trained in the first task and then fixed, because the finished tasks need it as it is.

    Args:
        backbone: the backbone.
        heads: CLArena's heads for task-incremental learning (``HeadsTIL``), or its head for domain-incremental learning
            (``HeadDIL``).
        mask_percentage: the density of each layer, in (0, 1].
        parameter_score_init_mode: "default", "N01" or "U01".
        non_algorithmic_hparams: see ``CLAlgorithm``.
        reinit_scores: draw new scores for every task, as CLArena's algorithm does; False keeps them, as the paper's
            code does.
        disable_unlearning: CLArena passes this to every algorithm after its version 1.1.0. It changes nothing here.

    Raises:
        TypeError: ``backbone`` or ``heads`` is of another class, or ``reinit_scores`` is no bool.
        ValueError: ``mask_percentage`` or ``parameter_score_init_mode`` is not one of those, or widths differ.
    """

    backbone: FastSubnetBackbone
    heads: Any  # HeadsTIL or HeadDIL

    def __init__(
        self,
        backbone: FastSubnetBackbone,
        heads: nn.Module,
        mask_percentage: float,
        parameter_score_init_mode: str = "default",
        non_algorithmic_hparams: dict[str, Any] | None = None,
        reinit_scores: bool = True,
        disable_unlearning: bool = False,
    ) -> None:
        if not isinstance(backbone, FastSubnetBackbone):
            raise TypeError(f"backbone must be a FastSubnetBackbone, got {type(backbone).__name__}")
        if not (isinstance(heads, clarena_heads.HeadsTIL) or _is_one_head(heads)):
            raise TypeError(f"heads must be a HeadsTIL or a HeadDIL, got {type(heads).__name__}")
        super().__init__(backbone, heads, non_algorithmic_hparams or {})
        self._first: FirstInputs | None = None
        self._has_ended = False  # in the fit that runs
        self.mask_percentage = ops.check_density(mask_percentage, "mask_percentage")
        self.save_hyperparameters("mask_percentage", "parameter_score_init_mode", "reinit_scores")
        backbone.wsn.score_init = check_score_init(parameter_score_init_mode)
        backbone.wsn.reinit_scores = ops.check_bool("reinit_scores", reinit_scores)

    def setup_task_id(
        self,
        task_id: int,
        num_classes: int,
        optimizer: Any,
        lr_scheduler: Any = None,
    ) -> None:
        """Begin a task, or continue the one in progress. Call this before ``trainer.fit``.

        Args:
            task_id: the task.
            num_classes: the number of outputs of its head.
            optimizer: makes the optimizer; it is called with ``params=``.
            lr_scheduler: makes the scheduler; it is called with ``optimizer=``. None means no scheduler.

        Raises:
            ValueError: the task has ended, or the one head of all tasks has another number of outputs.
            RuntimeError: another task is in progress.
        """
        wsn = self.backbone.wsn
        self.optimizer_t, self.lr_scheduler_t = optimizer, lr_scheduler
        if wsn.current_task == task_id and self._has_head(task_id):
            return
        if _is_one_head(self.heads) and self.heads.if_head_setup():
            width = self.heads.get_head().out_features
            if num_classes != width:
                raise ValueError(f"num_classes must be that of the one head of all tasks, {width}, got {num_classes}")
        wsn.begin_task(task_id, density=self.mask_percentage)
        super().setup_task_id(task_id, num_classes, optimizer, lr_scheduler)

    def _has_head(self, task_id: int) -> bool:
        return self.heads.if_head_setup() if _is_one_head(self.heads) else f"{task_id}" in self.heads.heads

    def configure_optimizers(self) -> Any:
        """Do what ``CLAlgorithm`` does, after taking the heads that finished tasks use out of training."""
        for task in self.backbone.wsn.tasks:
            self.heads.get_head(task).requires_grad_(False)
        return super().configure_optimizers()

    def forward(self, input: Tensor, stage: str, task_id: int | None = None) -> Any:
        """Logits [B, classes of the task], and activations by layer unless ``set_forward_func_return_logits_only``.

        Args:
            input: a batch [B, ...].
            stage: "train" or "validation" uses the mask of the current scores, "test" that of ``task_id``.
            task_id: the task; None means the one that is set up.
        """
        task_id = self.task_id if task_id is None else task_id
        if stage == "test":
            with self.backbone.wsn.use_task(task_id):
                features, activations = self.backbone.features(input)
        else:
            features, activations = self.backbone.features(input)
        logits = self.heads(features, task_id)
        return logits if self.if_forward_func_return_logits_only else (logits, activations)

    def training_step(self, batch: Any) -> dict[str, Tensor]:
        """Loss, accuracy and predictions of a batch (inputs, labels), under the names that CLArena's callbacks read."""
        outputs = self._measure(batch, "train", self.task_id)
        return {"loss": outputs["loss_cls"], **outputs}

    def validation_step(self, batch: Any) -> dict[str, Tensor]:
        return self._measure(batch, "validation", self.task_id)

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        return self._measure(batch, "test", self.get_test_task_id_from_dataloader_idx(dataloader_idx))

    def _measure(self, batch: Any, stage: str, task_id: int) -> dict[str, Tensor]:
        x, y = batch
        logits = self.forward(x, stage, task_id)
        logits = logits if self.if_forward_func_return_logits_only else logits[0]
        preds = logits.argmax(dim=1)
        return {"loss_cls": self.criterion(logits, y), "acc": (preds == y).float().mean(), "preds": preds}

    def on_fit_start(self) -> None:
        """Look at the inputs of the first call. Raise ``RuntimeError`` if the task that was set up is neither in
        progress nor finished, because a checkpoint of another task was loaded."""
        wsn = self.backbone.wsn
        if wsn.current_task == self.task_id:
            self._first = FirstInputs(wsn)
        elif wsn.current_task is not None or self.task_id not in wsn.tasks:
            self._refuse()

    def on_train_start(self) -> None:
        """Lightning calls this if an epoch is left to train. Raise ``RuntimeError`` if the task has ended."""
        if self.backbone.wsn.current_task is None:
            self._refuse()

    def _refuse(self) -> NoReturn:
        wsn = self.backbone.wsn
        raise RuntimeError(
            f"task {self.task_id} was set up last, but {wsn.current_task!r} is in progress and these are finished: "
            f"{wsn.tasks}"
        )

    def on_train_end(self) -> None:
        """End the task. The first batch of this fit serves as the probe of ``end_task``."""
        if self.backbone.wsn.current_task is not None:
            end_task(self.backbone.wsn, self._first, self.trainer)
            self._first, self._has_ended = None, True

    def on_fit_end(self) -> None:
        """End the task if ``on_train_end`` has not done so: Lightning skips that hook if the checkpoint has no epoch
        left to train. Write checkpoints called ``last`` again, so that the task is finished in them."""
        self.on_train_end()
        if self._has_ended:
            self._has_ended = False
            save_last_again(self.trainer)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the ids of the tasks that were set up."""
        checkpoint["wsn_fast"] = {"processed_task_ids": list(self.processed_task_ids)}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Make the heads of the checkpoint, in its order. The state of the optimizer follows this order.

        Raises:
            ValueError: the checkpoint is not one of this class.
        """
        if "wsn_fast" not in checkpoint:
            raise ValueError(f"the checkpoint is not one of {type(self).__name__}: it does not have its tasks")
        known = checkpoint["wsn_fast"]["processed_task_ids"]
        if _is_one_head(self.heads):
            self.heads.setup_task(len(checkpoint["state_dict"]["heads.head.weight"]))
            self.heads.to(self.device)
        else:
            self._make_heads(checkpoint["state_dict"])
            self.heads.head_t = self.heads.get_head(known[-1])  # the state has it under this name too
            self.heads.task_id = getattr(self, "task_id", known[-1])
        # A task that was set up here stays the task to train. on_fit_start compares it with the checkpoint's.
        self.task_id = getattr(self, "task_id", known[-1])
        self.processed_task_ids = [*known, *({self.task_id} - {*known})]
        self.backbone.task_id = self.task_id
        self.backbone.processed_task_ids = list(self.processed_task_ids)

    def _make_heads(self, state: dict[str, Tensor]) -> None:
        """Make the heads of the tasks in a state, in its order."""
        self.heads.heads.clear()
        for name, tensor in state.items():
            match = re.fullmatch(r"heads\.heads\.(\d+)\.weight", name)
            if match:
                out, width = tensor.shape
                self.heads.heads[match[1]] = nn.Linear(width, out, device=self.device, dtype=tensor.dtype)


def _is_one_head(heads: object) -> bool:
    """Whether ``heads`` is one head for all tasks, CLArena's ``HeadDIL``. Its version 1.1.0 has no such class."""
    kind = getattr(clarena_heads, "HeadDIL", None)
    return kind is not None and isinstance(heads, kind)
