"""A plugin for Avalanche: with it, each experience that a strategy trains is one task of a :class:`wsn_fast.WSN`."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from contextlib import AbstractContextManager, ExitStack
from importlib.util import find_spec
from typing import Any

import torch

from wsn_fast import WSN, TaskHeads, ops
from wsn_fast.continual.first_inputs import FirstInputs
from wsn_fast.continual.model_parts import Density
from wsn_fast.nn.heads import stack_rows
from wsn_fast.optim.subnet_optimizer import SubnetOptimizer

from .ours_within import wsn_within

if find_spec("avalanche") is None:
    raise ImportError('this needs Avalanche: pip install "wsn-fast[avalanche]"', name="avalanche")

from avalanche.core import SupervisedPlugin
from avalanche.models import DynamicModule


class WSNPlugin(SupervisedPlugin):
    """Makes each experience that a strategy trains one task of the WSN in ``strategy.model``.

    The task of an experience is its task label, or its number in the stream if it has none. A task begins before the
    strategy makes its optimizer, which then holds the new head and is guarded. It ends when the experience has been
    trained, before the evaluation that follows. Then the model computes the inputs of its first call again, to find
    code that reads weights outside of the mask (``UnmaskedReadError``). If an exception ends the training early, the
    task stays in progress, and the next ``strategy.train`` of this experience goes on with it.

    In an evaluation, finished tasks are computed with their masks, and the task in progress with its current scores. A
    task that has not begun is computed with the current scores too. It gets its head at once, and begins with this
    head; so Avalanche's forward transfer is that of the paper. Rows of several tasks in one batch are computed
    each as its own task.

    Rows of finished tasks in a training batch, as a replay buffer adds them, are left out, with a warning: what a
    finished task uses cannot change any more. Without task labels nobody can tell such rows apart, and the task in
    progress is trained on them.

    Args:
        density: see :meth:`wsn_fast.WSN.begin_task`; the attribute may be changed between experiences.
        by_number: the task of an experience is its number (``current_experience``), and task labels are ignored. Use
            this if experiences that have the same label are tasks of their own.
        verify: whether :meth:`wsn_fast.WSN.verify` checks all finished tasks after each experience.

    Raises:
        TypeError: ``by_number`` or ``verify`` is no bool.
    """

    def __init__(self, *, density: Density | None = None, by_number: bool = False, verify: bool = True) -> None:
        super().__init__()
        self.density = density
        self.by_number = ops.check_bool("by_number", by_number)
        self.verify = ops.check_bool("verify", verify)
        self._first: FirstInputs | None = None
        self._shown = ExitStack()  # closed, it shows again what was shown before the evaluation
        self._has_warned = False
        self._mode: tuple[bool, str] | None = None  # of a SubnetOptimizer, which a pickle of it loses

    # --- training ----------------------------------------------------------------------------------------------------
    def before_train_dataset_adaptation(self, strategy: Any, **kwargs: Any) -> None:
        """Begin the task, unless it is in progress already.

        Raises:
            TypeError: the model has a ``DynamicModule`` of Avalanche.
            ValueError: it does not contain one WSN; or the experience has several task labels, or that of a finished
                task.
            RuntimeError, OwnershipError: as ``begin_task`` of :class:`wsn_fast.WSN`.
        """
        wsn, tasks = _wsn_of(strategy), self._tasks_of(strategy.experience)
        if len(tasks) > 1:
            raise ValueError(
                f"one experience trains one task, got one with the task labels {tasks}: WSNPlugin(by_number=True) "
                "takes experiences as tasks, whatever their labels"
            )
        if tasks[0] in wsn.tasks:
            raise ValueError(
                f"task {tasks[0]!r} has ended already: if experiences with the same task label are tasks of their own, "
                "use WSNPlugin(by_number=True)"
            )
        self._shown.close()  # after an evaluation that an exception ended
        if wsn.current_task == tasks[0]:
            wsn.use_task(tasks[0])
        else:
            _make_heads(wsn, tasks[0], strategy.experience)
            wsn.begin_task(tasks[0], density=self.density)
        self._first = self._first or FirstInputs(wsn)
        _hold_first_heads(strategy.optimizer, wsn)

    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """Guard the optimizer, which has just got the parameters of the new head. A one-pass optimizer that comes from
        a checkpoint takes its mode again."""
        wsn, optimizer = _wsn_of(strategy), strategy.optimizer
        if isinstance(optimizer, SubnetOptimizer):
            if optimizer.knows_model:
                self._mode = optimizer.one_pass, optimizer.accumulate_in
            elif self._mode is not None:
                optimizer.attach(wsn, *self._mode)
        wsn.guard(optimizer)

    def before_training_iteration(self, strategy: Any, **kwargs: Any) -> None:
        """Leave out the rows of finished tasks.

        Raises:
            ValueError: the batch has no other rows.
        """
        if not self._has_labels(strategy.experience):
            return
        (task,) = self._tasks_of(strategy.experience)
        own = strategy.mb_task_id == task
        if own.all():
            return
        if not own.any():
            raise ValueError(f"a training batch must have rows of task {task!r}, got rows of finished tasks only")
        strategy.mbatch = [part[own] for part in strategy.mbatch]
        if not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"task {task!r} is in progress, and rows of other tasks are left out of its training batches: what "
                "finished tasks use cannot change any more. No replay is needed",
                UserWarning,
                stacklevel=2,
            )

    def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """End the task. The first batch of its training serves as the probe of ``end_task``.

        Raises:
            UnmaskedReadError, FloatingPointError, ForgottenError: as ``end_task`` of :class:`wsn_fast.WSN`; the task is
                still in progress.
        """
        if not getattr(strategy.experience, "is_last_subexp", True):
            return  # an online stream has cut the experience into parts
        wsn = _wsn_of(strategy)
        (self._first or FirstInputs(wsn)).end_task()
        self._first = None
        if self.verify:
            wsn.verify()

    # --- evaluation --------------------------------------------------------------------------------------------------
    def before_eval(self, strategy: Any, **kwargs: Any) -> None:
        """Check the model before Avalanche adapts it.

        Raises:
            TypeError: it has a ``DynamicModule`` of Avalanche.
            ValueError: it does not contain one WSN.
        """
        _wsn_of(strategy)

    def before_eval_exp(self, strategy: Any, **kwargs: Any) -> None:
        """Compute as the task of the experience. Tasks that have not begun get their heads."""
        wsn, tasks = _wsn_of(strategy), self._tasks_of(strategy.experience)
        self._shown.close()
        for task in tasks:
            _make_heads(wsn, task, strategy.experience)
        self._shown.enter_context(_show(wsn, tasks[0]))

    def after_eval_forward(self, strategy: Any, **kwargs: Any) -> None:
        """If the experience has several tasks, compute each row of the batch as its own task."""
        if len(self._tasks_of(strategy.experience)) == 1:
            return
        wsn, ids, outputs = _wsn_of(strategy), strategy.mb_task_id, {}
        groups = [(task, (ids == task).nonzero()[:, 0]) for task in ids.unique().tolist()]
        for task, rows in groups:
            with _show(wsn, task):
                outputs[task] = strategy.model(strategy.mb_x[rows])
        strategy.mb_output = stack_rows(outputs, groups)

    def after_eval_exp(self, strategy: Any, **kwargs: Any) -> None:
        """Show again what was shown before."""
        self._shown.close()

    # --- what an experience is of -----------------------------------------------------------------------------------
    def _has_labels(self, experience: Any) -> bool:
        return not self.by_number and hasattr(_whole(experience), "task_labels")

    def _tasks_of(self, experience: Any) -> list[int]:
        """The tasks of an experience: its task labels in ascending order, or its number."""
        whole = _whole(experience)
        if self._has_labels(experience):
            return sorted({int(label) for label in whole.task_labels})
        return [int(whole.current_experience)]


def _whole(experience: Any) -> Any:
    """The experience that ``experience`` is a part of, if it comes from an online stream. Parts have other numbers, and
    neither labels nor classes."""
    shown = experience.logging()  # else Avalanche hides the number
    whole = getattr(shown, "origin_experience", None)
    return shown if whole is None else whole.logging()


def _wsn_of(strategy: Any) -> WSN:
    """The WSN of a strategy. Raises ``TypeError`` if its model has a part that Avalanche changes by itself."""
    for name, module in strategy.model.named_modules():
        if isinstance(module, DynamicModule):
            raise TypeError(
                f"{name or 'the model'} must not be a {type(module).__name__}: Avalanche adds to it, or gives it task "
                'labels, and the WSN knows of neither. Name an nn.Linear as the head, convert(net, heads="..."), and '
                "the WSN makes a head for each task"
            )
    return wsn_within(strategy.model, "the model of the strategy is a WSN, or has it as a part")


def _make_heads(wsn: WSN, task: int, experience: Any) -> None:
    """Make the heads of ``task`` that do not exist. Those without a width of their own get one output for each class of
    the experience, from class 0 on."""
    for heads in wsn.modules():
        if isinstance(heads, TaskHeads) and task not in heads.tasks:
            try:
                heads.add(task)
            except ValueError:
                heads.add(task, 1 + max(_classes_of(experience)))


def _classes_of(experience: Any) -> Iterable[int]:
    """The classes of an experience. Only some benchmarks list them."""
    whole = _whole(experience)
    listed = getattr(whole, "classes_in_this_experience", None)
    return map(int, whole.dataset.targets if listed is None else listed)


def _hold_first_heads(optimizer: torch.optim.Optimizer, wsn: WSN) -> None:
    """Let the first param group have the first heads, if there are several groups. Avalanche puts new parameters into
    the group of those beside them, and finds none beside the first head."""
    held = {id(param) for group in optimizer.param_groups for param in group["params"]}
    new = [param for heads in wsn.modules() if isinstance(heads, TaskHeads) for param in heads.parameters()]
    if len(optimizer.param_groups) > 1 and held.isdisjoint(map(id, new)):
        optimizer.param_groups[0]["params"].extend(new)


def _show(wsn: WSN, task: int) -> AbstractContextManager[object]:
    """Compute as ``task``: with its masks, or with the current scores if it has not ended."""
    return wsn.use_task(task) if task in (*wsn.tasks, wsn.current_task) else wsn.use_head(task)
