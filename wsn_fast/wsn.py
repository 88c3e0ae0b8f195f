"""WSN: one model, many tasks, nothing forgotten."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from . import masks as mask_statistics
from . import ops, ownership, per_task, promise
from .layers import Gated, SubnetLayer, check_score_init
from .masks import Capacity, TaskStats
from .optim import OptimizerGuard, check_guardable
from .patterns import Patterns, as_patterns, matches
from .tasks import TaskId, check_task, decode_json, encode_json

Density = float | Mapping[str, float]
_STATE_VERSION = 1


@dataclass
class _Record:
    """A task that was begun: its density as given, and (once it has ended) the fingerprint of what it computes with."""

    task: TaskId
    density: Density | None
    fingerprint: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _View:
    """What the model computes with: the mask of a finished ``task`` or (None) of the current scores, and the head of
    ``head``."""

    task: TaskId | None
    head: TaskId | None


class _ViewContext:
    """Returned by ``use_task``: the view is set already; leaving a ``with`` block puts the previous one back."""

    def __init__(self, wsn: WSN, view: _View) -> None:
        self._wsn, self._previous, self._view = wsn, wsn._view, view
        wsn._show(view)

    def __enter__(self) -> WSN:
        return self._wsn

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Unless something inside the block (begin_task, say) has moved on.
        if self._wsn._view is self._view:
            self._wsn._show(self._previous)


class WSN(nn.Module):
    """Trains a converted model on one task after another, and keeps each to the bit (Kang et al., ICML 2022, Algorithm
    1).

    Args:
        model: a model with subnet layers (see :func:`wsn_fast.convert`), and usually ``TaskHeads``.
        per_task, frozen, shared: name patterns (see :func:`wsn_fast.convert`) that give an owner to parameters and buffers that are neither
            gated nor
            in heads: a copy per task; trained in the first task and then fixed; may forget. Normalisation layers are
            ``per_task`` unless declared otherwise.
        reinit_scores: draw new scores for every task, as CLArena does; the default keeps them, as the paper's code
            does.
        score_init: how they are drawn: "default", "N01" or "U01".

    Raises:
        ValueError: the model has no subnet layer, a pattern matches nothing or twice, ``score_init`` is unknown.
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
        self._layers = {name: m for name, m in model.named_modules() if isinstance(m, SubnetLayer)}
        if not self._layers:
            raise ValueError("model has no subnet layer: convert(model) it first, or build it from FastSubnet layers")
        patterns = {"per_task": per_task, "frozen": frozen, "shared": shared}
        self._declared = {kind: as_patterns(kind, given) for kind, given in patterns.items()}
        ownership.mark_per_task(self._owned())
        self._densities = {name: layer.density for name, layer in self._layers.items()}
        self._view = _View(None, None)
        self._current: _Record | None = None
        self._records: list[_Record] = []
        self._fixed: list[nn.Parameter] = []
        self._adopt_tasks_of_layers()

    # --- what is there
    # --------------------------------------------------------------------------------------------------
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
        return dict(self._layers)

    def _gated(self) -> Iterator[tuple[str, Gated]]:
        for prefix, layer in self._layers.items():
            for gate in layer.gated():
                yield f"{prefix}.{gate.name}".lstrip("."), gate

    def _owned(self) -> list[ownership.Owned]:
        return ownership.classify(self.model, self._declared)

    def _resolve(self, density: Density | None) -> dict[str, float]:
        """The density of each layer for a task: the layers' own, one for all, or by pattern."""
        if density is None:
            return dict(self._densities)
        if not isinstance(density, Mapping):
            return dict.fromkeys(self._densities, ops.check_density(density))
        resolved = dict(self._densities)
        for pattern, value in reversed(list(density.items())):
            hits = [name for name in resolved if matches(pattern, name)]
            if not hits:
                raise ValueError(f"density pattern {pattern!r} matches no subnet layer; layers: {list(resolved)}")
            resolved.update(dict.fromkeys(hits, ops.check_density(value, f"density[{pattern!r}]")))
        return resolved

    def _tasks_of_layers(self) -> list[TaskId]:
        listed = {name: layer.tasks for name, layer in self._layers.items()}
        first, tasks = next(iter(listed.items()))
        for name, other in listed.items():
            if other != tasks:
                raise ValueError(
                    f"subnet layers disagree about the finished tasks: {first} has {tasks}, {name} has {other}"
                )
        return tasks

    # --- the life of a task
    # ---------------------------------------------------------------------------------------------
    def begin_task(self, task: TaskId, *, density: Density | None = None, out_features: int | None = None) -> None:
        """Start to train ``task``: activate its head (making it if need be) and the mask of the current scores.

        Build the optimizer after this call, so that it holds the new head.

        Args:
            task: an int or a str, in any order; each can be begun once.
            density: for this task only: one number, or numbers by pattern of layer names (layers that match none keep
                theirs).
            out_features: width of a head that does not exist yet, if ``TaskHeads`` has no common width.

        Raises:
            ValueError: the task was begun before; a density is outside (0, 1]; a pattern matches no layer.
            RuntimeError: another task is in progress.
            OwnershipError: a parameter or buffer that tasks share has no owner. Nothing has been changed then.
        """
        task = check_task(task)
        self._check_in_sync()
        if task in self.tasks:
            raise ValueError(f"task {task!r} has been trained already; finished tasks: {self.tasks}")
        if self._current is not None:
            raise RuntimeError(f"task {self._current.task!r} is in progress: end_task() before begin_task({task!r})")
        ownership.check_owned(self._owned())
        densities = self._resolve(density)
        for _, heads in promise.named_heads(self.model):
            if task not in heads.tasks:
                heads.add(task, out_features)
        for name, layer in self._layers.items():
            layer.density = densities[name]
            if self.reinit_scores:
                layer.reset_scores(self.score_init)
        self._current = _Record(task, dict(density) if isinstance(density, Mapping) else density)
        self._show(_View(None, task))

    def end_task(self) -> None:
        """Finish the task in progress: its mask is taken from the scores as they are now, and everything it uses is
        frozen.

        Restore the best epoch's weights first, if there are any to restore.

        Raises:
            RuntimeError: no task is in progress.
            FloatingPointError: a weight or score is not finite (the layer is named); the task stays in progress.
        """
        if self._current is None:
            raise RuntimeError("no task is in progress: begin_task(task) first")
        self.check_finite()
        task = self._current.task
        self._show(_View(None, task))
        packed = {
            name: {k: ops.pack_mask(m) for k, m in layer.masks_of_scores().items()}
            for name, layer in self._layers.items()
        }
        for name, layer in self._layers.items():
            layer.append_task(task, packed[name])
        for module in self.model.modules():
            per_task.append_task(module)
        self._records.append(self._current)
        self._current = None
        self._records[-1].fingerprint = self._fingerprint(task, len(self._records) - 1)
        self._fix_parameters()

    def use_task(self, task: TaskId | None) -> _ViewContext:
        """Compute with a finished task's mask, head and per-task values; None, or the task in progress, means the
        current scores.

        Takes effect at once; as a context manager it puts the previous state back on leaving.

        Raises:
            ValueError: the task was never begun; the message lists the known ones.
        """
        self._check_in_sync()
        if task is None:
            return _ViewContext(self, _View(None, self._view.head if self._current is None else self._current.task))
        task = check_task(task)
        if task == self.current_task:
            return _ViewContext(self, _View(None, task))
        if task not in self.tasks:
            raise ValueError(
                f"task {task!r} is unknown; finished tasks: {self.tasks}, in progress: {self.current_task!r}"
            )
        return _ViewContext(self, _View(task, task))

    def use_head(self, task: TaskId) -> _ViewContext:
        """Compute with the mask of the current scores and the head of ``task``, begun or not: what forward transfer
        needs.

        Raises:
            ValueError: there is no such head.
        """
        return _ViewContext(self, _View(None, check_task(task)))

    def _show(self, view: _View) -> None:
        for _, heads in promise.named_heads(self.model):
            heads.active = view.head
        row = None if view.task is None else self.tasks.index(view.task)
        for layer in self._layers.values():
            layer.active_row = row
        for module in self.model.modules():
            per_task.use_row(module, row)
        self._view = view

    # --- computing
    # ------------------------------------------------------------------------------------------------------
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """``model(*args, **kwargs)``, as the task in use."""
        return self.model(*args, **kwargs)

    def forward_tasks(self, x: Tensor, task_ids: Sequence[TaskId] | Tensor) -> Tensor:
        """One batch whose rows belong to different tasks.

        Args:
            x: ``[B, ...]``.
            task_ids: B task ids, a sequence or an integer tensor.

        Returns:
            ``[B, ...]``: row i computed as task ``task_ids[i]``. Rows of one task run as one batch.

        Raises:
            ValueError: the lengths differ, a task is unknown, B is 0, or the tasks' outputs differ in shape.
        """
        ids = [check_task(t) for t in (task_ids.tolist() if isinstance(task_ids, Tensor) else task_ids)]
        if len(ids) != x.shape[0] or not ids:
            raise ValueError(
                f"task_ids must name a task for each of the {x.shape[0]} rows of x (at least one), got {len(ids)}"
            )
        rows_of: dict[TaskId, list[int]] = {}
        for row, task in enumerate(ids):
            rows_of.setdefault(task, []).append(row)
        outputs: dict[TaskId, Tensor] = {}
        for task, rows in rows_of.items():
            with self.use_task(task):
                outputs[task] = self.model(x[torch.tensor(rows, device=x.device)])
        shapes = {task: tuple(out.shape[1:]) for task, out in outputs.items()}
        if len(set(shapes.values())) > 1:
            raise ValueError(
                f"forward_tasks needs outputs of one shape, got {shapes} by task: run such tasks one by one"
            )
        order = torch.tensor([row for rows in rows_of.values() for row in rows], device=x.device)
        return torch.cat(list(outputs.values()))[order.argsort()]

    # --- keeping the promise
    # --------------------------------------------------------------------------------------------
    def guard(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """Make ``optimizer`` keep every finished task to the bit, whatever it does; returns it.

        Hooks around ``optimizer.step`` copy the frozen values and put them back (4 bytes per weight, for the time of a
        step). Weight decay, momentum, Nesterov, schedules, clipping, accumulation and ``GradScaler`` all go through
        ``step``.

        Raises:
            TypeError: not a torch optimizer, or LBFGS, with the reason.
            ValueError: it holds no parameter of this model.
        """
        OptimizerGuard(check_guardable(optimizer, self.model.parameters()), self._gated, lambda: self._fixed)
        return optimizer

    def _fix_parameters(self) -> None:
        """Note which parameters are fixed as a whole by now, and take them out of training."""
        self._fixed = list(self._fixed_parameters())
        for param in self._fixed:
            param.requires_grad_(False)
            param.grad = None

    def _fixed_parameters(self) -> Iterator[nn.Parameter]:
        """Finished heads, and after the first task what was declared ``frozen``."""
        for _, heads in promise.named_heads(self.model):
            for task in heads.tasks:
                if task in self.tasks:
                    yield from heads.head(task).parameters()
        if self._records:
            for item in self._owned():
                if item.kind == "frozen" and isinstance(item.tensor, nn.Parameter):
                    yield item.tensor

    def verify(self) -> promise.VerifyReport:
        """Check the promise: every tensor that a finished task computes with is, to the bit, what it was when the task
        ended.

        Raises:
            ForgottenError: something changed; the message names the tasks and the tensors.
        """
        self._check_in_sync()
        drifts, tensors = [], 0
        for row, record in enumerate(self._records):
            now = self._fingerprint(record.task, row)
            names = sorted(now.keys() | record.fingerprint.keys())
            tensors += len(names)
            drifts += [promise.Drift(record.task, n) for n in names if now.get(n) != record.fingerprint.get(n)]
        if drifts:
            raise promise.ForgottenError(drifts)
        return promise.VerifyReport(self.tasks, tensors, [o.name for o in self._owned() if o.kind == "shared"])

    def _fingerprint(self, task: TaskId, row: int) -> dict[str, str]:
        return promise.fingerprint(self._layers, promise.named_heads(self.model), self._owned(), task, row)

    @torch.no_grad()
    def check_finite(self) -> None:
        """Raise ``FloatingPointError`` naming the first gated tensor whose values or scores are not all finite."""
        for name, gate in self._gated():
            for what, tensor in (("", gate.param), ("_score", gate.score)):
                if not tensor.isfinite().all():
                    raise FloatingPointError(f"{name}{what} has values that are not finite")

    # --- what the tasks share
    # -------------------------------------------------------------------------------------------
    def capacity(self) -> Capacity:
        """The capacity used so far, by the paper's formula (fractions; see :class:`wsn_fast.masks.Capacity`)."""
        gates = [gate for _, gate in self._gated()]
        return mask_statistics.capacity([g.masks for g in gates], [g.param.numel() for g in gates])

    def task_stats(self) -> list[TaskStats]:
        """Density, reuse and new weights of each finished task (see :class:`wsn_fast.masks.TaskStats`)."""
        gates = [gate for _, gate in self._gated()]
        return mask_statistics.task_stats(self.tasks, [g.masks for g in gates], [g.param.numel() for g in gates])

    # --- saving and loading
    # ---------------------------------------------------------------------------------------------
    def trainable_state(self) -> dict[str, Tensor]:
        """A copy of all that training changes (parameters, scores, live buffers): the state of the best epoch, say."""
        return {name: tensor.detach().clone() for name, tensor in self._trainable()}

    @torch.no_grad()
    def load_trainable_state(self, state: Mapping[str, Tensor]) -> None:
        """Put a :meth:`trainable_state` back, in place.

        Raises:
            ValueError: the names are not those of this model's state; nothing has been changed then.
        """
        own = dict(self._trainable())
        if own.keys() != state.keys():
            raise ValueError(
                f"state is of another model: names {sorted(own.keys() ^ state.keys())} are in only one of the two"
            )
        for name, tensor in own.items():
            tensor.copy_(state[name])

    def _trainable(self) -> Iterator[tuple[str, Tensor]]:
        self._show(_View(None, self._view.head))
        stored = {id(tensor) for _, gate in self._gated() for tensor in (gate.masks, gate.union)}
        stored |= {id(getattr(m, f"{name}_tasks")) for m in self.model.modules() for name in per_task.marked(m)}
        for name, tensor in (*self.model.named_parameters(), *self.model.named_buffers()):
            if id(tensor) not in stored:
                yield name, tensor

    def get_extra_state(self) -> Tensor:
        """The register of tasks (order, densities, fingerprints, the task in progress) as JSON bytes, for
        ``state_dict``."""
        current = None if self._current is None else asdict(self._current)
        return encode_json(
            {"version": _STATE_VERSION, "records": [asdict(r) for r in self._records], "current": current}
        )

    def set_extra_state(self, state: Tensor) -> None:
        """The inverse of :meth:`get_extra_state`, called by ``load_state_dict``. ``ValueError`` for another
        version's."""
        decoded = decode_json(state)
        if not isinstance(decoded, dict) or decoded.get("version") != _STATE_VERSION:
            raise ValueError(f"this state of WSN is not of version {_STATE_VERSION}")
        self._records = [_Record(**record) for record in decoded["records"]]
        self._current = None if decoded["current"] is None else _Record(**decoded["current"])

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As in torch. Into a freshly converted model it restores all tasks, and a task in progress too."""
        self._show(_View(None, None))
        outcome = super().load_state_dict(state_dict, strict, assign)
        self._check_in_sync()
        for name, density in self._resolve(self._current.density if self._current else None).items():
            self._layers[name].density = density
        self._show(_View(None, self.current_task))
        self._fix_parameters()
        return outcome

    def _adopt_tasks_of_layers(self) -> None:
        """A model whose layers have finished tasks already (its own ``state_dict`` was loaded): trust them as they
        are."""
        self._records = [_Record(task, None) for task in self._tasks_of_layers()]
        for row, record in enumerate(self._records):
            record.fingerprint = self._fingerprint(record.task, row)
        self._fix_parameters()

    def _check_in_sync(self) -> None:
        if self._tasks_of_layers() != self.tasks:
            raise RuntimeError(
                f"the layers hold masks of tasks {self._tasks_of_layers()}, this WSN knows {self.tasks}: load "
                "checkpoints with wsn.load_state_dict, or make a new WSN(model) after model.load_state_dict"
            )
