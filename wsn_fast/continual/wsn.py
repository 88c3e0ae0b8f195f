"""WSN: trains one model on many tasks, and says where each task begins and ends."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .. import ops
from ..convert.patterns import Patterns, as_patterns
from ..nn import model_owner
from ..nn.densities import Densities
from ..nn.model_gates import ModelGates, in_parallel
from ..nn.scores import ScoreInit, check_score_init
from ..nn.task_ids import TaskId, check_task
from . import advice, fingerprints, mixed_batch, ownership, state_hooks, statistics
from .finished_tasks import FinishedTasks
from .frozen_values import after_task
from .guard import Guards, check_guardable
from .model_parts import Density, ModelParts
from .parallel import check_not_wrapped, device_of, together
from .probe import Probe, check_reads
from .register import Record, TaskRegister
from .view import View

Optimizer = TypeVar("Optimizer")


class WSN(FinishedTasks):
    """Trains a converted model on one task after another and keeps finished tasks to the bit (Kang et al., ICML 2022,
    Algorithm 1).

    Args:
        model: a model with subnet layers (see :func:`wsn_fast.convert`), and usually ``TaskHeads``.
        per_task, frozen, shared: name patterns (see :func:`wsn_fast.convert`) that say what happens to parameters and
            buffers that are neither gated nor in heads. ``per_task`` tensors have a copy for each task; ``frozen``
            parameters are trained in the first task and then fixed, and ``frozen`` buffers are constant from the start;
            ``shared`` tensors may forget. A pattern that matches a module means all tensors below it, and one name of a
            tied parameter is enough. Undeclared normalisation layers are ``per_task``. Other undeclared buffers are
            taken as constant, which the end of a task checks, unless they are called ``running_mean`` and the like.
        rest: "per_task", "frozen" or "shared", for all parameters that are left; None makes them an error.
        reinit_scores: draw new scores for every task, as CLArena does; the default keeps them, as the paper's code
            does.
        score_init: how these scores are drawn: "default", "N01", "U01", or the value of all of them (see
            :meth:`SubnetLayer.reset_scores`).
        keep_masked: keep the masked weights of the finished task in use, which take as much memory as the gated
            weights. Each batch after the first then costs what it costs a dense model. A number n keeps those of the
            last n finished tasks that were in use, for :meth:`forward_tasks` and for programs that often change the
            task, until the next training pass.
        gates_ahead: after each step of a guarded optimizer make the masked weights of the next training forward pass,
            for all layers together: on a GPU in three launches instead of four for each tensor. PyTorch does not see
            an edit of weights or scores through ``.data``, so such an edit takes effect one step later.

    Raises:
        TypeError: a pattern is no string, ``reinit_scores`` or ``gates_ahead`` is no bool, or ``keep_masked`` is
            neither a bool nor an int.
        ValueError: the model has no subnet layer, a pattern matches nothing or twice, ``score_init`` is unknown,
            ``keep_masked`` is less than 1, or the model has finished tasks that were trained with other owners.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        per_task: Patterns = (),
        frozen: Patterns = (),
        shared: Patterns = (),
        rest: str | None = None,
        reinit_scores: bool = False,
        score_init: ScoreInit = "default",
        keep_masked: bool | int = True,
        gates_ahead: bool = False,
    ) -> None:
        super().__init__()
        self.model = model
        self.reinit_scores = ops.check_bool("reinit_scores", reinit_scores)
        keep_masked = ops.check_bool_or_count("keep_masked", keep_masked)
        gates_ahead = ops.check_bool("gates_ahead", gates_ahead)
        self.score_init = check_score_init(score_init)
        owners = {"per_task": per_task, "frozen": frozen, "shared": shared}
        patterns = {owner: as_patterns(owner, given) for owner, given in owners.items()}
        self._parts = ModelParts(model, ownership.declare(patterns, rest))
        self._view = View(None, None)
        # A model may have been loaded with finished tasks. They are trusted as they are, and unions are made of them.
        self._register = TaskRegister(self._parts.tasks_of_layers())
        for layer in self._parts.layers.values():
            layer.rebuild_union()
        self._register.trust(self._parts)
        self._generation = 0  # goes up when a task begins, when it ends, and when a state is loaded
        self._fixed: list[nn.Parameter] = []
        self._guards = Guards()
        for layer in self._parts.layers.values():
            layer.gate_state.keep_masked, layer.gate_state.gates_ahead = keep_masked, gates_ahead
        self.gates = ModelGates().of(self._parts.layers.values())
        self._fix_parameters()
        self._parts.finish(self.tasks, anew=True)
        state_hooks.register(self)
        model_owner.watch(model, self)

    # --- the life of a task ----------------------------------------------------------------------------------------
    @torch.inference_mode(False)
    def begin_task(self, task: TaskId, *, density: Density | None = None, out_features: int | None = None) -> None:
        """Start to train ``task``: activate its head, which is made if it does not exist, and the mask of the current
        scores.

        Build the optimizer after this call, so that it holds the new head.

        Args:
            task: an int or a str, in any order; each can be begun once.
            density: the density for this task only: one number, or numbers by name pattern. Layers that match no
                pattern keep their own density.
            out_features: the width of a head that does not exist yet (``out_channels`` of a convolution), if
                ``TaskHeads`` has no common width.

        Raises:
            ValueError: the task has ended already; a density is outside (0, 1] or its pattern matches no layer, or a
                layer has a rule without one; a width is missing or differs from that of the existing head.
            RuntimeError: another task is in progress; a tensor is on the meta device; or a gated tensor has NaN,
                because it was never initialised.
            OwnershipError: a parameter or buffer that tasks share has no owner.
            ForgottenError: what finished tasks use has changed since the last of them ended.

            If one of these is raised, nothing has been changed.

        Warns:
            UserWarning: less than 1 % of a layer is free.
        """
        task = check_task(task)
        parallel = self._guards.parallel
        with together(parallel.known, device_of(self)):
            densities = self._check_can_begin(task, density, out_features)
        with together(parallel.known, device_of(self)):
            self._register.check_frozen(self._parts, advice.before_task())
            statistics.warn_if_full(self._parts.layers, self._parts.sharding)
        self._show(View(None, None))
        for heads in self._parts.heads.values():
            if task not in heads.tasks:
                heads.add(task, out_features)
        for name, layer in self._parts.layers.items():
            layer.task_density = densities[name]
            if self.reinit_scores:
                layer.reset_scores(self.score_init)
        self._register.current = Record(task, fingerprints.frozen_buffers(self._parts))
        self._generation += 1
        parallel.begin(self)
        self._show(View(None, task))
        self._guards.kept.ran = False

    def _check_can_begin(
        self, task: TaskId, density: Density | None, out_features: int | None
    ) -> dict[str, Densities | None]:
        """Check that ``task`` can be begun. The result is the density of each layer."""
        self._refresh()
        self._register.check_can_begin(task)
        ownership.check_owned(self._parts.owned)
        self._parts.check_initialised()
        self._parts.check_rows(len(self.tasks))
        densities = self._parts.task_densities(density)
        self._parts.check_tied(densities)
        if density is not None:
            self._parts.check_ranked()
        for heads in self._parts.heads.values():
            heads.width(task, out_features)
        return densities

    @torch.inference_mode(False)
    def end_task(self, *, probe: Probe | None = None) -> None:
        """Finish the task in progress: take its mask from the present scores, and freeze everything that it uses.

        If the weights of the best epoch are to be restored, restore them first.

        Args:
            probe: an input, to find code that reads weights without calling their layer; see :meth:`verify`.

        Raises:
            RuntimeError: no task is in progress; or buffers have changed that are ``frozen`` or taken as constant.
            ValueError: a module with per-task tensors was added or replaced after WSN(model).
            FloatingPointError: a weight or score is not finite; the message names the layer.
            UnmaskedReadError: with ``probe``, the task reads something outside of its mask.
            ForgottenError: what finished tasks use has changed in this task; the message names the tensors, and says
                whether a guard ran and what to do.
            OwnershipError: parameters without an owner have come into the model, such as those of an adapter.

            After each of these errors, and any other one, the task is still in progress.
        """
        if self._register.current is None:
            raise RuntimeError("no task is in progress: begin_task(task) first")
        task, row, parallel = self._register.current.task, len(self.tasks), self._guards.parallel
        with together(parallel.group, device_of(self)):
            self._check_can_end(self._register.current)
        with together(parallel.group, device_of(self)):
            self._register.check_frozen(self._parts, advice.after_task(task, self._guards.kept.ran))
        self._show(View(None, task))
        parallel.level(self)
        if self.gates.sharding is not None:
            self.gates.sharding.find_thresholds()
        packed = {
            name: {k: ops.pack_mask(m) for k, m in layer.masks_of_scores().items()}
            for name, layer in self._parts.layers.items()
        }

        def prints() -> tuple[dict[str, str], dict[str, str], int | None]:
            now = fingerprints.fingerprint(self._parts, task, row), after_task(self._parts, self._register.frozen)
            with together(parallel.group, device_of(self)), self._register.as_ended(*now):
                check_reads(self, self._parts, [task], probe)
            parallel.check_ends(self, *now)
            whole = [] if self.gates.sharding is not None else [gate.masks for _, gate in self.gated()]
            return *now, self._register.measured(whole)

        with self._guards.kept.paused():
            self._register.end_current(*self._parts.append_task(task, packed, prints))
            self._guards.kept.forget()  # more is frozen now
        self._generation += 1
        self._fix_parameters()
        self._guards.keep_for_task(self)

    def _check_can_end(self, record: Record) -> None:
        self._refresh()
        ownership.check_owned(self._parts.owned)
        self.check_finite()
        fingerprints.check_frozen_buffers(self._parts, record.fingerprint)
        self._parts.check_rows(len(self.tasks))

    def use_task(self, task: TaskId | None) -> AbstractContextManager[object]:
        """Compute with the masks, head and per-task values of a finished task. None and the task in progress mean the
        current scores.

        The call takes effect at once. Its result is a context manager, which puts the previous state back when it is
        left. Use this for evaluation, call ``eval()`` too, and do not call it between a forward and its backward,
        because it changes per-task values in place.

        Raises:
            ValueError: the task was never begun; the message lists the known ones.
        """
        return self._use(self._view.of(task, self.tasks, self.current_task))

    def use_head(self, task: TaskId) -> AbstractContextManager[object]:
        """Compute with the mask of the current scores and the head of ``task``, which need not have begun. The driver
        measures forward transfer with it.

        Raises:
            ValueError: there is no such head.
        """
        return self._use(View(None, check_task(task)))

    def _use(self, view: View) -> AbstractContextManager[object]:
        """Show ``view`` now. The result is a context manager that shows the previous view again when it is left."""
        previous = self._view
        self._show(view)
        generation = self._generation

        def leave() -> None:
            # The previous view is out of date if a task began or ended meanwhile, or a state was loaded.
            if self._generation == generation:
                try:
                    self._show(previous)
                except BaseException:  # an interrupt, since this needs no memory: no finished task may stay in use
                    self._show(previous)
                    raise

        undo = ExitStack()
        undo.callback(leave)
        return undo

    def _show(self, view: View) -> None:
        self._restore_frozen()
        self._parts.show(None if view.task is None else self.tasks.index(view.task), view.head)
        self._view = view

    # --- computing -------------------------------------------------------------------------------------------------
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call ``model(*args, **kwargs)`` as the task in use."""
        if not torch.compiler.is_compiling():
            self._guards.before_forward(self, args)
        elif in_parallel():
            check_not_wrapped()
        if self.gates.sharding is not None:
            return self.gates.sharding.run(self._parts.scope, self.model, *args, **kwargs)
        if not self.gates.give():
            return self._parts.scope(self.model, *args, **kwargs)
        try:
            return self._parts.scope(self.model, *args, **kwargs)
        finally:
            self.gates.take_back()

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the forward pass of the model in place, with the arguments of ``torch.compile``.

        What is around it stays eager. There the model is given the masked weights that were made ahead or are kept,
        which ``torch.compile(wsn)`` would make anew in every forward pass.
        """
        self._check_whole("compile()", "run it eagerly")
        model = self.model

        def call(*inputs: Any, **named: Any) -> Any:
            return model._call_impl(*inputs, **named)

        # Not model.compile(): in torch 2.11 it compiles a module that has hooks in pieces, in silence and in spite of
        # fullgraph=True, and the model has hooks while a finished task with per-task values is in use.
        model._compiled_call_impl = torch.compile(call, *args, **kwargs)

    @torch.no_grad()
    def forward_tasks(self, x: Tensor, task_ids: Sequence[TaskId] | Tensor, *, one_pass: bool | None = None) -> Tensor:
        """Run a batch whose rows belong to different tasks, for inference, without gradients.

        The processes of a sharded WSN call this together, each with rows of its own. All of them run every task that
        one of them has rows of.

        Args:
            x: ``[B, ...]``.
            task_ids: B task ids, a sequence or an integer tensor.
            one_pass: True runs the whole batch at once, and each linear layer applies to every row the masks of its
                task; False runs the rows of each task as a batch; None takes one pass where that is possible and was
                measured to be faster.

        Returns:
            ``[B, ...]``; row i is computed as task ``task_ids[i]``.

        Raises:
            TypeError: ``one_pass`` is neither a bool nor None.
            ValueError: the lengths differ, a task is unknown, B is 0, the tasks' outputs differ in shape, or
                ``one_pass`` is not possible with this model or these tasks; the message says why.
        """
        with together(self._guards.parallel.sharded, device_of(self)):
            ids = mixed_batch.checked_ids(x, task_ids)
        self._restore_frozen()
        return mixed_batch.forward(self._parts, x, ids, one_pass, self.use_task, self.forward)

    # --- keeping the promise ---------------------------------------------------------------------------------------
    def guard(self, optimizer: Optimizer) -> Optimizer:
        """Make ``optimizer`` keep every finished task to the bit, whatever its ``step`` does, and return it.

        Hooks around ``optimizer.step`` copy the frozen values and put them back. During a step the copies take as much
        memory as the gated weights; on a CPU they keep it until the next step. If something else than the step of a
        class of ``torch.optim`` may write to the weights (a subclass, another library's optimizer, a wrapper, other
        hooks), the copies are kept until the task ends, and every call of this WSN puts the values back. A step that an
        exception ended is put right in the same way. Torch does not copy hooks, so guard a deep copy or an unpickled
        optimizer again.

        Args:
            optimizer: a ``torch.optim.Optimizer``, or an object that acts as one, with ``step`` and ``param_groups``.
                Pass the outermost one of a wrapper: the optimizers in its attributes are guarded with it.

        Raises:
            TypeError: it is no optimizer, or it is or contains LBFGS; the message gives the reason.
            ValueError: it holds no parameter of this model.
        """
        check_guardable(optimizer, self.parameters(), self.gates.sharding is not None)
        self._guards.take(optimizer, self)
        return optimizer

    def check_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Check that a step of ``optimizer`` is no mistake. The guard calls this before each step.

        Raises:
            RuntimeError: a finished task is in use, or the active head gets gradients and no guarded optimizer holds
                it.
        """
        if self._view.task is not None:
            raise RuntimeError(
                f"task {self._view.task!r} is finished and in use: leave use_task before a training step"
            )
        if self.current_task is not None:
            self._guards.check_hold_heads(self.current_task, self._parts.heads.values(), optimizer)

    def _restore_frozen(self) -> None:
        """Put frozen values back that a step may have moved before an exception ended it."""
        if self.gates.sharding is not None:
            self.gates.sharding.reshard()
        self._guards.kept.restore()

    def _fix_parameters(self) -> None:
        """Find the parameters that must not change at all any more, and stop their training. Parameters that are no
        longer among them, because a state of an earlier task was loaded, are trained again."""
        fixed, untrained = list(self._parts.fixed(self.tasks)), self._parts.untrained()
        self._fixed = ownership.fix(fixed, before=self._fixed, untrained=untrained)
        self._parts.finish(self.tasks)

    def _refresh(self) -> None:
        """Find the parts of the model again, because it may have been edited or loaded meanwhile."""
        self._restore_frozen()
        self._parts.refresh(self.model)
        model_owner.watch(self.model, self)
        self.gates.of(self._parts.layers.values())
        known = self._parts.tasks_of_layers()
        if known != self.tasks:
            raise RuntimeError(
                f"the layers hold masks of tasks {known}, this WSN knows {self.tasks}: load checkpoints with "
                "wsn.load_state_dict, or make a new WSN(model) after model.load_state_dict"
            )
        self._fix_parameters()
