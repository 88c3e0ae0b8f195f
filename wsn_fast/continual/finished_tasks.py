"""What can be done with the finished tasks of a WSN: measure them, remove one, save and load them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from .. import ops
from ..backends.collectives import is_initialized
from ..nn import model_owner
from ..nn.refusals import StaysInTheLibrary
from ..nn.task_ids import TaskId, check_task
from . import (
    fingerprints,
    parallel,
    removal,
    renames,
    shown_values,
    state_hooks,
    statistics,
    superposition,
    task_inference,
)
from .contents import Contents
from .guard import Guards
from .probe import Probe, check_reads
from .statistics import Capacity, TaskStats
from .view import View


class FinishedTasks(StaysInTheLibrary, Contents):
    """The part of :class:`wsn_fast.WSN` that works with finished tasks only."""

    _generation: int
    _guards: Guards
    model: nn.Module

    # --- are they what they were? ----------------------------------------------------------------------------------
    def verify(
        self, progress: Callable[[int, int], object] | None = None, *, probe: Probe | None = None
    ) -> fingerprints.VerifyReport:
        """Check that every tensor that a finished task computes with is, to the bit, what it was when the task ended.
        If a finished task is in use, the model also has to show what is kept of it.

        Args:
            progress: is called after each task with the number of tasks checked and of all. The time grows linearly
                with the tasks.
            probe: what to compute as each finished task, to find code that reads weights without calling their layer,
                as a merge of adapters does: an input, or a tuple, a dict or a function (see
                :func:`~wsn_fast.continual.probe.check_reads`).

        Raises:
            ForgottenError: a tensor has changed; the message names the tasks and the tensors.
            RenamedError: only the names of modules have changed; see :meth:`rename`.
            UnmaskedReadError: a task reads something outside of its mask; the message names the tensors.
        """
        self._refresh()
        report = self._register.verify(self._parts, progress)
        with parallel.together(self._guards.parallel.sharded, parallel.device_of(cast(Any, self))):
            shown_values.check(self._parts, self._view.task, self._register.tasks)
        check_reads(cast(Any, self), self._parts, self._register.tasks, probe)
        return report

    def masked_reads(self) -> AbstractContextManager[None]:
        """In a ``with`` block, code that reads gated tensors gets the masked ones of the task in use, as it does in a
        forward pass: ``layer.weight`` for example. Use it for code that computes with the model without calling it."""
        self._check_whole("masked_reads()", "load the full state in one process")
        return self._parts.scope.opened()

    def check_finite(self) -> None:
        """Raise ``FloatingPointError``, naming the tensor, if a gated tensor or its scores are not all finite."""
        self._parts.check_finite()

    # --- which one is it? ------------------------------------------------------------------------------------------
    def infer_task(
        self,
        x: Tensor,
        *,
        method: str = "entropy",
        tasks: Sequence[TaskId] | None = None,
        one_pass: bool | None = None,
    ) -> task_inference.InferredTask:
        """Find which finished task inputs belong to, where nobody says, by the entropy of the outputs (SupSup, Wortsman
        et al., NeurIPS 2020, section 3.3).

        "entropy" computes every row as every task, in one mixed batch (:meth:`~wsn_fast.WSN.forward_tasks`), and takes
        the task with the least entropy. It costs as much as T forward passes.

        "one-shot" computes all rows with the mean of the masked weights of all tasks, and takes the task whose
        coefficient lowers the entropy most, by the gradient. It costs a forward and a backward pass. "binary" keeps
        the better half of the tasks in each pass, and needs ``ceil(log2(T))`` of them. Both were made for masks over
        weights that are never trained (:func:`wsn_fast.presets.supsup`).

        Call it in evaluation mode. It finds tasks whose inputs differ, such as permuted images. A model is often sure
        of inputs that it has never seen, so measure it on your tasks.

        Args:
            x: ``[B, ...]``. The rows of a batch that belong to one task find it better together than each by itself.
            method: "entropy", "one-shot" or "binary".
            tasks: the finished tasks to choose from; None means all of them.
            one_pass: for "entropy", see :meth:`~wsn_fast.WSN.forward_tasks`.

        Returns:
            The task of the whole batch, the task of each row, and what they were found by.

        Raises:
            RuntimeError: the model is sharded, and ``method`` is not "entropy".
            ValueError: ``method`` is unknown; no task has ended, or one of ``tasks`` is unknown; the outputs are no
                logits of two classes or more; or tasks cannot be superposed, which the message explains.
        """
        method = task_inference.check_method(method, one_pass)
        chosen = [*map(check_task, self._register.tasks if tasks is None else tasks)]
        task_inference.check_tasks(chosen, self._register.tasks)
        if method == "entropy":
            return task_inference.by_entropy(x, chosen, partial(cast(Any, self).forward_tasks, one_pass=one_pass))
        self._check_whole(f"infer_task(method={method!r})", 'use method="entropy"')
        with torch.inference_mode(False), torch.enable_grad():
            rows = x.clone() if x.is_inference() else x
            gradient_of = partial(self._gradient_of_mixture, rows)
            return task_inference.by_gradient(rows, chosen, method == "binary", gradient_of)

    def _gradient_of_mixture(self, x: Tensor, objective: task_inference.Objective, tasks: Sequence[TaskId]) -> Tensor:
        superposition.check_mixable(self._parts)
        alpha = torch.full((len(tasks),), 1 / len(tasks), device=x.device, requires_grad=True)
        with cast(Any, self).use_task(tasks[0]), superposition.superposed(self._parts, tasks, alpha):
            # Within the block, because activation checkpointing repeats parts of the forward pass.
            return torch.autograd.grad(objective(self._parts.scope(self._parts.model, x)), alpha)[0]

    # --- what the tasks share --------------------------------------------------------------------------------------
    def capacity(self) -> Capacity:
        """The capacity used so far, by the paper's formula (fractions; see
        :class:`~wsn_fast.continual.statistics.Capacity`)."""
        masks = self._parts.whole_masks()
        compressed = self._register.compressed(masks)
        return statistics.capacity(masks, self._sizes(), compressed)

    def task_stats(self) -> list[TaskStats]:
        """Density, reuse and new weights of each finished task (see
        :class:`~wsn_fast.continual.statistics.TaskStats`)."""
        return statistics.task_stats(self._register.tasks, self._parts.whole_masks(), self._sizes())

    def _sizes(self) -> list[int]:
        return [gate.param.numel() for _, gate in self._parts.gated()]

    # --- tasks that go ---------------------------------------------------------------------------------------------
    @torch.inference_mode(False)  # what is left is trained
    def remove_task(self, task: TaskId, *, redraw_free: bool = False) -> None:
        """Remove a finished task (exact unlearning). Its mask, head and per-task values go, and the weights that it
        alone used are drawn anew, with their scores, and are free again. Weights with ``requires_grad=False`` stay as
        they are, because no task has trained them. Every other task computes what it did, to the bit. The task may be
        begun again.

        Build the optimizer anew after this call: its running means come from the weights of then.

        Args:
            task: its id.
            redraw_free: also draw anew all other weights that no remaining task uses, and all scores. The training of
                the task has moved those too, although its mask does not keep them. Do not ask for this if the free
                weights are pretrained ones that later tasks are to start with.

        Raises:
            RuntimeError: a task is in progress.
            TypeError: ``redraw_free`` is no bool.
            ValueError: no such task has ended; the message lists those that have.

            After each of these errors, and any other one, every task is still there.
        """
        task, tasks = check_task(task), self._register.tasks
        redraw_free = ops.check_bool("redraw_free", redraw_free)
        if self._register.current is not None:
            raise RuntimeError(f"task {self._register.current.task!r} is in progress: end_task() before remove_task")
        if task not in tasks:
            raise ValueError(f"task {task!r} has not ended; finished tasks: {tasks}")
        self._refresh()
        self._show(View(None, None))
        try:
            removal.remove(
                self._parts, tasks.index(task), redraw_free, lambda: self._register.remove(task, self._parts)
            )
        finally:
            self._generation += 1
            self._guards.kept.forget()  # less is frozen now, and free weights have other values
            self._fix_parameters()
            self._guards.keep_for_task(cast(Any, self))
        gated = (tensor for _, gate in self.gated() for tensor in (gate.param, gate.score))
        self._guards.parallel.send(gated)

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """What DistributedDataParallel(wsn) asks for when it is made: the names of what it must leave alone."""
        self._check_whole("DistributedDataParallel", "its processes average all gradients already")
        if is_initialized():  # torch.jit.trace reads every attribute, and has nothing to do with a wrapper
            parallel.check_can_be_wrapped(cast(Any, self))
        return parallel.leave_alone(cast(Any, self))

    # --- saving and loading ----------------------------------------------------------------------------------------
    def __getstate__(self) -> dict[str, Any]:
        self._check_whole("a copy or a pickle", "wsn_fast.distributed.full_state_dict(wsn) returns what to save")
        self._restore_frozen()
        return self.__dict__

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.gates.of(self._parts.layers.values())  # a copy has its own layers
        model_owner.watch(self.model, self)

    def rename(self, names: renames.Names) -> None:
        """Tell the register of tasks that modules of the model have been renamed, moved or wrapped.

        Args:
            names: the new path of each module by its old one, both relative to the model. The empty path is the model
                itself. The message of :class:`~wsn_fast.RenamedError` has them.

        Raises:
            ForgottenError: under the new names, the finished tasks are not what they were. Nothing has been changed.
            TypeError: ``names`` is no mapping from strings to strings.
        """
        before = self._register.encode()
        self._register.rename(renames.check_names(names))
        try:
            self.verify()
        except BaseException:
            self._register.decode(before)
            raise

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load a state, whole or not at all. It may be of more or fewer tasks.

        Args:
            state_dict: what ``state_dict()`` returned, of this model or of one that was built in the same way. See
                :func:`wsn_fast.rename_state` if its modules have other names.
            strict: as for every module of torch. A state that does not fit together is refused in any case.
            assign: as for every module of torch. Tied parameters stay tied.

        Returns:
            The missing and the unexpected names, as torch does.

        Raises:
            TypeError: ``strict`` or ``assign`` is no bool.
            StateError: the state does not fit the model, or its parts do not fit together. It is a ``RuntimeError`` and
                a ``ValueError``. Nothing has been loaded.
        """
        strict, assign = ops.check_bool("strict", strict), ops.check_bool("assign", assign)
        with state_hooks.strictness(self, strict):
            return super().load_state_dict(state_dict, strict, assign)

    def _before_model_load(self, model: nn.Module, state: dict[str, Any], prefix: str, assign: bool) -> None:
        state_hooks.before_model_load(cast(Any, self), model, state, prefix, assign)

    def get_extra_state(self) -> Tensor:
        """The register of tasks (order, fingerprints, the task in progress) as JSON bytes, for ``state_dict``."""
        return self._register.encode()

    def set_extra_state(self, state: Tensor) -> None:
        """The inverse of :meth:`get_extra_state`. Raises ``ValueError`` for the state of another version."""
        self._register.decode(state)

    # --- what WSN does ---------------------------------------------------------------------------------------------
    def _refresh(self) -> None:
        raise NotImplementedError

    def _show(self, view: View) -> None:
        raise NotImplementedError

    def _fix_parameters(self) -> None:
        raise NotImplementedError
