"""A Trainer of Hugging Face's transformers that trains one task of a :class:`wsn_fast.WSN`."""

from __future__ import annotations

import inspect
import os
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import Tensor

from wsn_fast import WSN
from wsn_fast.continual.first_inputs import FirstInputs
from wsn_fast.continual.model_parts import Density
from wsn_fast.continual.register_state import parse
from wsn_fast.nn.task_ids import TaskId, check_task
from wsn_fast.ops import check_bool
from wsn_fast.optim.subnet_optimizer import SubnetOptimizer

from .ours_within import one_pass_within, wsn_within

if find_spec("transformers") is None or find_spec("accelerate") is None:
    raise ImportError(
        'this needs transformers and accelerate: pip install "wsn-fast[transformers]"', name="transformers"
    )

from safetensors import safe_open
from transformers import Trainer, TrainerCallback
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import SAFE_WEIGHTS_NAME, can_return_loss, find_labels

_REGISTER = "_extra_state"  # its name in the state of a WSN


class WSNTrainer(Trainer):
    """``transformers.Trainer`` for a ``WSN``: each ``train`` trains one task.

    The task begins before the optimizer is made and before a checkpoint is loaded. The optimizer is guarded, whoever
    made it. The task ends when everything else of ``train`` is over: the best state is back
    (``load_best_model_at_end``), and all callbacks have run. Then the model computes the inputs of its first call
    again, to find code that reads weights outside of the mask (``UnmaskedReadError``).

    Labels, the columns of a data set that the model takes, and how it takes its loss are those of the model inside of
    the WSN. In the one-pass mode of our optimizers, ``max_grad_norm`` clips by the norm of dW and dS.

    If an exception ends ``train`` early, the task stays in progress. Train again, with ``resume_from_checkpoint=True``
    to continue from the last checkpoint. Checkpoints hold masks, heads and the register of tasks.

    To train with a subclass of ``Trainer``, derive from both: ``class Mine(WSNTrainer, Seq2SeqTrainer)``.

    Args:
        model: the WSN itself.
        args, others, options: as for ``Trainer``. ``optimizers`` holds an optimizer that was built after
            ``wsn.begin_task``. ``optimizer_cls_and_kwargs=(SubnetAdamW, {"lr": 1e-3, "one_pass": True})`` builds one
            of ours.
        task: the task to train. It may be in progress.
        density, out_features: see :meth:`wsn_fast.WSN.begin_task`.
        verify: call ``wsn.verify()`` when the task has ended.

    Raises:
        TypeError: ``model`` is not a WSN, ``task`` neither an int nor a str, or ``verify`` no bool.
        ValueError: a setting would change what finished tasks use, or needs what a WSN cannot do; the message names it.
    """

    optimizer: Any
    label_smoother: Any

    def __init__(
        self,
        model: WSN,
        args: Any = None,
        *others: Any,
        task: TaskId,
        density: Density | None = None,
        out_features: int | None = None,
        verify: bool = True,
        **options: Any,
    ) -> None:
        if options.get("model_init") is not None:
            raise ValueError(
                "model_init would make another model for each train, without the finished tasks: pass the WSN as model"
            )
        if not isinstance(model, WSN):
            raise TypeError(f"model must be a wsn_fast.WSN, got {type(model).__name__}: WSN(convert(model, density))")
        self.task, self.density, self.out_features = check_task(task), density, out_features
        self.verify = check_bool("verify", verify)
        self.wsn = model
        super().__init__(model, args, *others, **options)
        _check_settings(self.args)
        self._look_inside()

    def _look_inside(self) -> None:
        """Find out about the model in the WSN what ``Trainer`` finds out about its model."""
        inner: Any = self.wsn.model
        if hasattr(inner, "get_base_model"):  # of PEFT
            inner = inner.get_base_model()
        taken = inspect.signature(inner.forward).parameters
        if self.args.label_names is None:
            self.label_names = find_labels(type(inner))
        self.can_return_loss = can_return_loss(type(inner))
        if not hasattr(inner, "accepts_loss_kwargs"):
            self.model_accepts_loss_kwargs = any(one.kind is one.VAR_KEYWORD for one in taken.values())
        self._signature_columns = [*dict.fromkeys([*taken, "label", "label_ids", *self.label_names])]
        if self.label_smoother is not None and type(inner).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
            self.label_smoother = partial(self.label_smoother, shift_labels=True)

    # --- the life of the task --------------------------------------------------------------------------------------
    def train(self, resume_from_checkpoint: str | bool | None = None, *others: Any, **options: Any) -> Any:
        """Train the task, and end it. The arguments and the result are those of ``Trainer.train``.

        Raises:
            ValueError: there is no checkpoint to resume from, or it is of another task or of other finished tasks.
                Nothing has been loaded.
            UnmaskedReadError, ForgottenError, FloatingPointError: as ``end_task`` of :class:`wsn_fast.WSN`.
        """
        checkpoint = self._checkpoint(resume_from_checkpoint)
        _forget_accelerate(self.wsn)
        if self.wsn.current_task != self.task:
            self.wsn.begin_task(self.task, density=self.density, out_features=self.out_features)
        first = FirstInputs(self.wsn)
        try:
            result = super().train(checkpoint, *others, **options)
        finally:
            first.stop()
        first.end_task()
        if self.verify:
            self.wsn.verify()
        return result

    def _checkpoint(self, asked: str | bool | None) -> str | None:
        """The folder of the checkpoint to resume from. Its tasks have been checked."""
        folder = _last_checkpoint(self.args.output_dir) if asked is True else asked or None
        if folder is not None:
            self._check_tasks(folder)
        return folder

    def _check_tasks(self, folder: str) -> None:
        path = os.path.join(folder, SAFE_WEIGHTS_NAME)
        if not os.path.isfile(path):
            raise ValueError(f"there is no {path} to resume from")
        with safe_open(path, "pt") as file:
            if _REGISTER not in set(file.keys()):
                raise ValueError(f"{path} is not the state of a WSN: it has no register of tasks")
            register = parse(file.get_tensor(_REGISTER))
        current = None if register.current is None else register.current["task"]
        if current != self.task:
            raise ValueError(
                f"task {self.task!r} is to be trained, but {folder} has {current!r} in progress: give each task an "
                "output_dir of its own"
            )
        if self.wsn.tasks not in ([], register.tasks):
            raise ValueError(
                f"{folder} has the finished tasks {register.tasks}, and this WSN has {self.wsn.tasks}: resume with a "
                "new WSN, or with the one that the checkpoint is of"
            )

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Make the optimizer as ``Trainer`` does, and guard it."""
        if self.optimizer is None and self.optimizer_cls_and_kwargs is not None:
            kind, settings = self.optimizer_cls_and_kwargs
            if inspect.isclass(kind) and issubclass(kind, SubnetOptimizer):
                self.optimizer = kind(self.wsn, **settings)
        return self.wsn.guard(super().create_optimizer(*args, **kwargs))

    # --- what Trainer would do in a way that is wrong for a WSN ------------------------------------------------------
    def create_accelerator_and_postprocess(self) -> None:
        """Make the accelerator, which ``Trainer`` clips gradients with."""
        super().create_accelerator_and_postprocess()
        accelerator = self.accelerator
        clip = accelerator.clip_grad_norm_

        def clip_grad_norm_(parameters: Any, max_norm: float, norm_type: float = 2) -> Tensor:
            optimizer = one_pass_within(self.optimizer)
            if optimizer is None:
                return clip(parameters, max_norm, norm_type)
            accelerator.unscale_gradients()
            return optimizer.clip_grad_norm_(max_norm)

        accelerator.clip_grad_norm_ = clip_grad_norm_

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        # safetensors stores no tensor under two names, and a state needs all names of tied tensors.
        if state_dict is None and self.args.should_save:
            state_dict = {}
            seen: set[tuple[Any, ...]] = set()
            for name, tensor in self.wsn.state_dict().items():
                place = tensor.data_ptr(), tensor.device
                state_dict[name] = tensor.clone() if place in seen else tensor
                seen.add(place)
        super()._save(output_dir, state_dict)


class WSNCallback(TrainerCallback):
    """Makes ``train`` of any ``Trainer`` whose model is a ``WSN`` train one task. Give it to the constructor, in
    ``callbacks``. :class:`WSNTrainer` does more, and needs fewer arguments: use this for a trainer that you cannot
    derive from.

    The task begins when the trainer is made, before its optimizer. It ends when ``train`` ends: after the best state is
    back, but before the callbacks that come after this one. The optimizer is guarded. A callback cannot tell
    ``Trainer`` about the model in the WSN, so ``TrainingArguments`` need ``label_names`` and
    ``remove_unused_columns=False``.

    Args:
        task, density, out_features, verify: see :class:`WSNTrainer`.

    Raises:
        TypeError: ``task`` is neither an int nor a str, or ``verify`` no bool.
    """

    def __init__(
        self,
        task: TaskId,
        *,
        density: Density | None = None,
        out_features: int | None = None,
        verify: bool = True,
    ) -> None:
        self.task, self.density, self.out_features = check_task(task), density, out_features
        self.verify = check_bool("verify", verify)
        self._wsn: WSN | None = None
        self._first: FirstInputs | None = None

    def on_init_end(self, args: Any, state: Any, control: Any, *, model: Any = None, **others: Any) -> None:
        """Begin the task, unless it is in progress already.

        Raises:
            ValueError: the model is no WSN and has none in it; or a training argument cannot be right for a WSN.
        """
        self._wsn = wsn_within(model, "the model of the trainer is a WSN, or has it as a part")
        _check_settings(args)
        if args.remove_unused_columns or args.label_names is None:
            raise ValueError(
                "TrainingArguments need label_names (such as ['labels']) and remove_unused_columns=False: the trainer "
                "cannot see them in the model, or use WSNTrainer, which can"
            )
        _forget_accelerate(self._wsn)
        if self._wsn.current_task != self.task:
            self._wsn.begin_task(self.task, density=self.density, out_features=self.out_features)

    def on_train_begin(self, args: Any, state: Any, control: Any, *, optimizer: Any = None, **others: Any) -> None:
        """Guard the optimizer.

        Raises:
            RuntimeError: the callback was added after the trainer was made; or in the checkpoint that was loaded, this
                task is not in progress.
            ValueError: ``max_grad_norm`` is set, and the optimizer is a one-pass optimizer, which has other gradients.
        """
        wsn = self._wsn
        if wsn is None:
            raise RuntimeError(
                "WSNCallback must be there when the trainer is made: Trainer(callbacks=[WSNCallback(task)])"
            )
        if wsn.current_task != self.task:
            raise RuntimeError(
                f"task {self.task!r} is to be trained, but {wsn.current_task!r} is in progress and these are finished: "
                f"{wsn.tasks}"
            )
        if args.max_grad_norm and one_pass_within(optimizer) is not None:
            raise ValueError(
                f"max_grad_norm must be 0 with a one-pass optimizer, got {args.max_grad_norm}: the trainer would clip "
                "by the norm of other gradients. WSNTrainer clips right"
            )
        wsn.guard(optimizer)
        self._stop()
        self._first = FirstInputs(wsn)

    def on_train_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """End the task. The first batch serves as the probe of ``end_task``."""
        assert self._wsn is not None and self._first is not None
        self._first.end_task()
        self._first = None
        if self.verify:
            self._wsn.verify()

    def _stop(self) -> None:
        if self._first is not None:  # of a training that an exception ended
            self._first.stop()


def _last_checkpoint(output_dir: str) -> str:
    """The newest checkpoint that is complete: ``Trainer`` writes its own state last."""
    found = [one.parent for one in Path(output_dir).glob(f"checkpoint-*/{TRAINER_STATE_NAME}")]
    if not found:
        raise ValueError(f"resume_from_checkpoint=True, but there is no complete checkpoint in {output_dir}")
    return str(max(found, key=lambda folder: int(folder.name.removeprefix("checkpoint-"))))


def _check_settings(args: Any) -> None:
    """Raise ``ValueError`` if a training argument cannot be right for a WSN."""
    for name in ("fp16_full_eval", "bf16_full_eval"):
        if getattr(args, name):
            raise ValueError(f"{name}=True rounds the weights of finished tasks: use bf16=True, which is autocast")
    for name in ("fsdp", "deepspeed"):
        if getattr(args, name):
            raise ValueError(
                f"{name} would cut parameters into shards without their masks: use DDP, or wsn_fast.distributed.shard "
                "with a training loop of your own"
            )
    if args.n_gpu > 1:
        raise ValueError(
            f"Trainer would use DataParallel on {args.n_gpu} GPUs, whose copies do not know the tasks: start it with "
            "torchrun, or set CUDA_VISIBLE_DEVICES to one of them"
        )
    started = int(os.environ.get("WORLD_SIZE", "1")) if "LOCAL_RANK" in os.environ else 1
    if started > args.world_size == 1:
        raise ValueError(
            f"{started} processes were started, and Trainer would train in each of them alone, all with the same "
            "output_dir: on CPUs give use_cpu=True, or set ACCELERATE_USE_CPU=true"
        )


def _forget_accelerate(wsn: WSN) -> None:
    """Undo what the accelerator of an earlier Trainer has done to ``wsn``. The next accelerator would leave the model
    as it is, whatever its own precision."""
    for name in ("forward", "_original_forward", "_is_accelerate_prepared"):
        vars(wsn).pop(name, None)
