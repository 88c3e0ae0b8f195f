"""WSN: one model, many tasks, nothing forgotten."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from . import masks as mask_statistics
from . import ops, ownership, promise, rows
from .guard import OptimizerGuard, check_guardable
from .heads import stack_rows
from .masks import Capacity, TaskStats
from .parts import Density, ModelParts
from .patterns import Patterns, as_patterns
from .subnet import Gated, SubnetLayer, check_score_init
from .tasks import TaskId, check_task, decode_json, encode_json

_STATE_VERSION = 1


@dataclass
class _Record:
    """A task that was begun, and (once it has ended) the fingerprint of what it computes with."""

    task: TaskId
    fingerprint: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _View:
    """What the model computes with: the mask of a finished ``task`` or (None) of the current scores; the head of
    ``head``."""

    task: TaskId | None
    head: TaskId | None


class WSN(nn.Module):
    """Trains a converted model on one task after another, and keeps each to the bit (Kang et al., ICML 2022,
    Algorithm 1).

    Args:
        model: a model with subnet layers (see :func:`wsn_fast.convert`), and usually ``TaskHeads``.
        per_task, frozen, shared: name patterns (see :func:`wsn_fast.convert`) that give an owner to parameters and
            buffers that are neither gated nor in heads: a copy per task; trained in the first task and then fixed
            (buffers: constant from the start); may forget. Normalisation layers are ``per_task`` unless declared
            otherwise.
        reinit_scores: draw new scores for every task, as CLArena does; the default keeps them, as the paper's code
            does.
        score_init: how they are drawn: "default", "N01" or "U01".

    Raises:
        ValueError: the model has no subnet layer, a pattern matches nothing or twice, ``score_init`` is unknown, or the
            model has finished tasks that were trained with other owners.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        per_task: Patterns = (),
        frozen: Patterns = (),
        shared: Patterns = (),
        reinit_scores: bool = False,
        score_init: str = "default",
    ) -> None:
        super().__init__()
        self.model = model
        self.reinit_scores = reinit_scores
        self.score_init = check_score_init(score_init)
        declared = {"per_task": per_task, "frozen": frozen, "shared": shared}
        self._parts = ModelParts(model, {kind: as_patterns(kind, given) for kind, given in declared.items()})
        self._view = _View(None, None)
        self._current: _Record | None = None
        self._records = [_Record(task) for task in self._parts.tasks_of_layers()]
        for row, record in enumerate(self._records):  # of a model that was loaded with them: trusted as they are
            record.fingerprint = promise.fingerprint(self._parts, record.task, row)
        self._chapter = 0  # goes up when a task begins or ends, or a state is loaded
        self._constants: dict[str, str] = {}  # digests of frozen buffers when the task in progress began
        self._fixed: list[nn.Parameter] = []
        self._guards: weakref.WeakSet[OptimizerGuard] = weakref.WeakSet()
        self._fix_parameters()
        # Hooks, and not an override of load_state_dict: they run when a parent module is loaded, too.
        self.register_load_state_dict_pre_hook(_before_load)
        self.register_load_state_dict_post_hook(_after_load)
        self.register_state_dict_pre_hook(_before_save)

    def __getstate__(self) -> dict[str, Any]:
        # Guards belong to optimizers, which a copy of the model does not bring along.
        return {**self.__dict__, "_guards": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({**state, "_guards": weakref.WeakSet()})

    # --- what is there ---------------------------------------------------------------------------------------------
    @property
    def tasks(self) -> list[TaskId]:
        """The finished tasks, in the order in which they ended."""
        return [record.task for record in self._records]

    @property
    def current_task(self) -> TaskId | None:
        """The task between ``begin_task`` and ``end_task``, or None."""
        return self._current.task if self._current else None

    def subnet_layers(self) -> dict[str, SubnetLayer]:
        """The subnet layers of the model by name; a layer used twice appears once."""
        return dict(self._parts.layers)

    def gated(self) -> Iterator[tuple[str, Gated]]:
        """The gated tensors by name, with their scores and masks; one that tied layers share appears once."""
        return self._parts.gated()

    def fixed(self) -> list[nn.Parameter]:
        """The parameters that must not change at all by now: finished heads, and after the first task what is declared
        ``frozen``."""
        return list(self._fixed)

    # --- the life of a task ----------------------------------------------------------------------------------------
    def begin_task(self, task: TaskId, *, density: Density | None = None, out_features: int | None = None) -> None:
        """Start to train ``task``: activate its head (making it if need be) and the mask of the current scores.

        Build the optimizer after this call, so that it holds the new head.

        Args:
            task: an int or a str, in any order; each can be begun once.
            density: for this task only: one number, or numbers by pattern of layer names (layers that match none keep
                theirs).
            out_features: width of a head that does not exist yet, if ``TaskHeads`` has no common width.

        Raises:
            ValueError: the task was begun before; a density is outside (0, 1] or its pattern matches no layer; a width
                is missing or another.
            RuntimeError: another task is in progress; a tensor is on the meta device, or a gated one has NaN: it was
                never initialised.
            OwnershipError: a parameter or buffer that tasks share has no owner.

            Nothing has been changed then.
        """
        task = check_task(task)
        self._refresh()
        if task in self.tasks:
            raise ValueError(f"task {task!r} has been trained already; finished tasks: {self.tasks}")
        if self._current is not None:
            raise RuntimeError(f"task {self._current.task!r} is in progress: end_task() before begin_task({task!r})")
        ownership.check_owned(self._parts.owned)
        self._parts.check_initialised()
        self._parts.check_rows(len(self._records))
        densities = self._parts.task_densities(density)
        self._parts.check_tied(densities)
        for heads in self._parts.heads.values():
            heads.width(task, out_features)
        self._show(_View(None, None))
        for heads in self._parts.heads.values():
            if task not in heads.tasks:
                heads.add(task, out_features)
        for name, layer in self._parts.layers.items():
            layer.task_density = densities[name]
            if self.reinit_scores:
                layer.reset_scores(self.score_init)
        self._constants = self._frozen_buffers()
        self._current = _Record(task)
        self._chapter += 1
        self._show(_View(None, task))

    @torch.inference_mode(False)
    def end_task(self) -> None:
        """Finish the task in progress: its mask is taken from the scores as they are now, and everything it uses is
        frozen.

        Restore the best epoch's weights first, if there are any to restore.

        Raises:
            RuntimeError: no task is in progress; a buffer that is declared ``frozen`` has changed.
            FloatingPointError: a weight or score is not finite (the layer is named).

            The task stays in progress then, and whatever else goes wrong.
        """
        if self._current is None:
            raise RuntimeError("no task is in progress: begin_task(task) first")
        self._refresh()
        self.check_finite()
        for name, then in self._constants.items():
            if self._frozen_buffers().get(name) != then:
                raise RuntimeError(f"{name} is a buffer declared frozen and has changed: declare it per_task")
        task, row = self._current.task, len(self._records)
        self._show(_View(None, task))
        self._parts.check_rows(row)
        packed = {
            name: {k: ops.pack_mask(m) for k, m in layer.masks_of_scores().items()}
            for name, layer in self._parts.layers.items()
        }
        fingerprint = self._parts.append_task(task, packed, lambda: promise.fingerprint(self._parts, task, row))
        self._records.append(_Record(task, fingerprint))
        self._current = None
        self._chapter += 1
        self._fix_parameters()

    def use_task(self, task: TaskId | None) -> AbstractContextManager[object]:
        """Compute with a finished task's mask, head and per-task values; None, or the task in progress, means the
        current scores.

        Takes effect at once; as a context manager it puts the previous state back on leaving. For evaluation (call
        ``eval()`` too), and not between a forward and its backward: per-task values change in place.

        Raises:
            ValueError: the task was never begun; the message lists the known ones.
        """
        if task is None:
            return self._use(_View(None, self._view.head if self._current is None else self._current.task))
        task = check_task(task)
        if task == self.current_task:
            return self._use(_View(None, task))
        if task not in self.tasks:
            raise ValueError(
                f"task {task!r} is unknown; finished tasks: {self.tasks}, in progress: {self.current_task!r}"
            )
        return self._use(_View(task, task))

    def use_head(self, task: TaskId) -> AbstractContextManager[object]:
        """Compute with the mask of the current scores and the head of ``task``, begun or not: what forward transfer
        needs.

        Raises:
            ValueError: there is no such head.
        """
        return self._use(_View(None, check_task(task)))

    def _use(self, view: _View) -> AbstractContextManager[object]:
        """Show ``view`` now; the result, as a context manager, puts the previous one back on leaving."""
        previous = self._view
        self._show(view)
        chapter = self._chapter

        def leave() -> None:
            # Unless a task began or ended meanwhile, or a state was loaded: the previous view is history then.
            if self._chapter == chapter:
                self._show(previous)

        undo = ExitStack()
        undo.callback(leave)
        return undo

    def _show(self, view: _View) -> None:
        self._settle()
        self._parts.show(None if view.task is None else self.tasks.index(view.task), view.head)
        self._view = view

    # --- computing -------------------------------------------------------------------------------------------------
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """``model(*args, **kwargs)``, as the task in use."""
        return self.model(*args, **kwargs)

    @torch.no_grad()
    def forward_tasks(self, x: Tensor, task_ids: Sequence[TaskId] | Tensor, *, one_pass: bool | None = None) -> Tensor:
        """One batch whose rows belong to different tasks: inference, without gradients.

        Args:
            x: ``[B, ...]``.
            task_ids: B task ids, a sequence or an integer tensor.
            one_pass: True runs the whole batch at once, and each linear layer gives every row its own masks; False runs
                the rows of each task as a batch; None takes one pass where it is possible and measured to be faster.

        Returns:
            ``[B, ...]``: row i computed as task ``task_ids[i]``.

        Raises:
            ValueError: the lengths differ, a task is unknown, B is 0, the tasks' outputs differ in shape, or
                ``one_pass`` is not possible with this model or these tasks; the message says why.
        """
        ids = [check_task(t) for t in (task_ids.tolist() if isinstance(task_ids, Tensor) else task_ids)]
        if len(ids) != x.shape[0] or not ids:
            raise ValueError(
                f"task_ids must name a task for each of the {x.shape[0]} rows of x (at least one), got {len(ids)}"
            )
        groups = rows.group(ids, x.device)
        if one_pass is None or one_pass:
            obstacle = rows.obstacle(self._parts, ids)
            if one_pass and obstacle:
                raise ValueError(f"one_pass is not possible: {obstacle}")
            if not obstacle and (one_pass or rows.pays(self._parts, len(ids))):
                with rows.shown(self._parts, ids, groups):
                    return self.model(x)
        outputs = {}
        for task, where in groups:
            with self.use_task(task):
                outputs[task] = self.model(x[where])
        return stack_rows(outputs, groups)

    # --- keeping the promise ---------------------------------------------------------------------------------------
    def guard(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """Make ``optimizer`` keep every finished task to the bit, whatever it does; returns it.

        Hooks around ``optimizer.step`` copy the frozen values and put them back (as many bytes as the gated weights
        take, for the time of a step). Weight decay, momentum, Nesterov, schedules, clipping, accumulation and
        ``GradScaler`` all go through ``step``. Torch does not copy hooks: guard a deep copy or an unpickled optimizer
        again.

        Raises:
            TypeError: not a torch optimizer, or LBFGS, with the reason.
            ValueError: it holds no parameter of this model.
        """
        check_guardable(optimizer, self.model.parameters())
        known = next((guard for guard in self._guards if guard.is_of(optimizer)), None)
        if known is None:
            self._guards.add(OptimizerGuard(optimizer, self))
        else:
            known.claim()
        return optimizer

    def check_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Called by the guard before each step.

        Raises:
            RuntimeError: a finished task is in use, or the active head gets gradients and no guarded optimizer holds
                it.
        """
        if self._view.task is not None:
            raise RuntimeError(
                f"task {self._view.task!r} is finished and in use: leave use_task before a training step"
            )
        if self._current is None:
            return
        for heads in self._parts.heads.values():
            params = [p for p in heads.head(self._current.task).parameters() if p.grad is not None]
            if params and not any(guard.holds(params) for guard in self._guards):
                raise RuntimeError(
                    f"no guarded optimizer holds the head of task {self._current.task!r}, which would never learn: "
                    "build optimizers after begin_task, or add_param_group the head"
                )

    def verify(self) -> promise.VerifyReport:
        """Check the promise: every tensor that a finished task computes with is, to the bit, what it was when the task
        ended.

        Raises:
            ForgottenError: something changed; the message names the tasks and the tensors.
        """
        self._refresh()
        drifts: list[promise.Drift] = []
        tensors = 0
        for row, record in enumerate(self._records):
            now = promise.fingerprint(self._parts, record.task, row)
            tensors += len(now)
            drifts += promise.compare(record.task, record.fingerprint, now)
        if drifts:
            raise promise.ForgottenError(drifts)
        shared = [item.name for item in self._parts.owned if item.kind == "shared"]
        return promise.VerifyReport(self.tasks, tensors, shared)

    def check_finite(self) -> None:
        """Raise ``FloatingPointError`` naming the first gated tensor whose values or scores are not all finite."""
        self._parts.check_finite()

    def _settle(self) -> None:
        """Put back what a step that was cut short by an exception may have moved."""
        for guard in self._guards:
            guard.settle()

    def _fix_parameters(self) -> None:
        """Note which parameters are fixed as a whole by now, and take them out of training; others come back into it (a
        state of an earlier task was loaded)."""
        fixed = list(self._parts.fixed(self.tasks))
        for param in {*self._fixed} - {*fixed}:
            param.requires_grad_(True)
        for param in fixed:
            param.requires_grad_(False)
            param.grad = None
        self._fixed = fixed

    def _frozen_buffers(self) -> dict[str, str]:
        return {
            item.name: promise.digest(item.tensor)
            for item in self._parts.owned
            if item.kind == "frozen" and not isinstance(item.tensor, nn.Parameter)
        }

    def _refresh(self) -> None:
        """Look at the model again, which may have been edited or loaded meanwhile."""
        self._settle()
        self._parts.refresh(self.model)
        known = self._parts.tasks_of_layers()
        if known != self.tasks:
            raise RuntimeError(
                f"the layers hold masks of tasks {known}, this WSN knows {self.tasks}: load checkpoints with "
                "wsn.load_state_dict, or make a new WSN(model) after model.load_state_dict"
            )
        self._fix_parameters()

    # --- what the tasks share --------------------------------------------------------------------------------------
    def capacity(self) -> Capacity:
        """The capacity used so far, by the paper's formula (fractions; see :class:`wsn_fast.masks.Capacity`)."""
        gates = [gate for _, gate in self.gated()]
        return mask_statistics.capacity([g.masks for g in gates], [g.param.numel() for g in gates])

    def task_stats(self) -> list[TaskStats]:
        """Density, reuse and new weights of each finished task (see :class:`wsn_fast.masks.TaskStats`)."""
        gates = [gate for _, gate in self.gated()]
        return mask_statistics.task_stats(self.tasks, [g.masks for g in gates], [g.param.numel() for g in gates])

    # --- saving and loading ----------------------------------------------------------------------------------------
    def trainable_state(self) -> dict[str, Tensor]:
        """A copy of all that training changes (parameters, scores, live buffers): the state of the best epoch, say."""
        self._settle()
        return {name: tensor.detach().clone() for name, tensor in self._parts.trainable()}

    @torch.no_grad()
    def load_trainable_state(self, state: Mapping[str, Tensor]) -> None:
        """Put a :meth:`trainable_state` back, in place.

        Raises:
            ValueError: the names or shapes are not those of this model's state, or it would change what finished tasks
                use; nothing has been changed then.
        """
        self._settle()
        own = dict(self._parts.trainable())
        if own.keys() != state.keys():
            raise ValueError(f"state is of another model: names {sorted(own.keys() ^ state.keys())} are in only one")
        wrong = [name for name, tensor in own.items() if tensor.shape != state[name].shape]
        if wrong:
            raise ValueError(f"state is of another model: {wrong} have other shapes")
        moved = self._parts.moved(own, state, self._fixed)
        if moved:
            raise ValueError(f"state is of an earlier task: it would change what finished tasks use of {moved}")
        for name, tensor in own.items():
            tensor.copy_(state[name])

    def get_extra_state(self) -> Tensor:
        """The register of tasks (order, fingerprints, the task in progress) as JSON bytes, for ``state_dict``."""
        current = None if self._current is None else asdict(self._current)
        records: Iterable[dict[str, Any]] = map(asdict, self._records)
        return encode_json({"version": _STATE_VERSION, "records": list(records), "current": current})

    def set_extra_state(self, state: Tensor) -> None:
        """The inverse of :meth:`get_extra_state`, called by ``load_state_dict``. ``ValueError`` for another
        version's."""
        decoded = decode_json(state)
        if decoded.get("version") != _STATE_VERSION:
            raise ValueError(f"this state of WSN is not of version {_STATE_VERSION}, got {decoded.get('version')!r}")
        self._records = [_Record(**record) for record in decoded["records"]]
        self._current = None if decoded["current"] is None else _Record(**decoded["current"])


def _before_save(wsn: WSN, prefix: str, keep_vars: bool) -> None:
    wsn._settle()


def _before_load(wsn: WSN, *_: Any) -> None:
    wsn._settle()
    for guard in wsn._guards:
        guard.forget()


def _after_load(wsn: WSN, incompatible_keys: Any) -> None:
    """After ``load_state_dict``, of the WSN or of a module around it: be where the checkpoint was."""
    wsn._refresh()
    wsn._chapter += 1
    heads = [task for task in (wsn.current_task, wsn._view.head, *reversed(wsn.tasks)) if task is not None]
    known = [h for h in heads if all(h in module.tasks for module in wsn._parts.heads.values())]
    wsn._show(_View(None, known[0] if known else None))
