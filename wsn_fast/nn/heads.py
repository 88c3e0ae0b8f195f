"""The heads of a model: one classifier for each task."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Mapping
from numbers import Integral
from typing import Any, TypeGuard, TypeVar

import torch
from torch import Tensor, nn

from .. import ops
from . import kept_buffers, per_task
from .gated import SubnetLayer
from .head_templates import HeadTemplate, LinearTemplate, ModuleTemplate
from .refusals import StaysInTheLibrary, check_arguments, check_no_symbol
from .task_ids import TaskId, check_task, task_from_key, task_key

Self = TypeVar("Self", bound="TaskHeads")
Removed = tuple[TaskId, int | None, nn.Module | None]
"""What :meth:`TaskHeads.remove` removed: a task, the width of its head, and its head."""


class TaskHeads(StaysInTheLibrary, nn.Module):
    """A head per task, of which one is active. The constructor makes linear heads, and :meth:`of` heads of any kind.

    Args:
        in_features: width of the features.
        out_features: width of a head that is added without a width of its own; None if every task names its own.
        tasks: the tasks that get a head at once: task ids, or a mapping from task id to the width of its head.
        bias, device, dtype: as for ``nn.Linear``, for every head.

    Shape:
        ``[*, in_features] -> [*, out_features of the active task]``; heads of another kind have shapes of their own.
    """

    _active: TaskId | None
    _device_and_dtype: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int | None = None,
        *,
        tasks: Mapping[TaskId, int] | Iterable[TaskId] | None = None,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self._start(
            LinearTemplate(in_features, ops.check_bool("bias", bias)),
            out_features,
            tasks,
            torch.empty(0, device=device, dtype=dtype),
        )

    @classmethod
    @torch.inference_mode(False)  # heads are trained
    def of(
        cls: type[Self],
        template: nn.Module,
        out_features: int | None = None,
        *,
        tasks: Mapping[TaskId, int] | Iterable[TaskId] | None = None,
    ) -> Self:
        """Make heads that are copies of a module.

        In each copy, the modules that have ``reset_parameters`` (those of PyTorch have it) draw new values. Other
        modules, and parametrized ones, keep the values of the template. Parameters of the template that need no
        gradient are not trained, unless none of them needs one. The heads are made on the device of the template, until
        this module is moved.

        A width can be asked for if the template is an ``nn.Linear``, a convolution, or of a subclass: of ``nn.Linear``
        one without a ``forward`` of its own. The head is then made by the constructor of that class, whose arguments
        are read from attributes of the template. Widths are numbers of ``out_features`` or ``out_channels``.

        Args:
            template: any module with parameters; it is copied. An ordinary ``nn.Linear`` gives the heads that the
                constructor of this class makes.
            out_features: width of a head that is added without a width of its own; None for that of the template.
            tasks: as for the constructor of this class.

        Raises:
            TypeError: ``template`` is no module.
            ValueError: it has nothing to train, is not initialised, cannot be copied, or has subnet layers, heads or
                per-task tensors; or a width was asked for that it cannot have.
        """
        _check_template(template)
        if _is_plain_linear(template):
            kind: HeadTemplate = LinearTemplate(template.in_features, template.bias is not None)
            own: int | None = template.out_features
        else:
            kind = ModuleTemplate(template)
            own = kind.own_width
        like = next(param for param in template.parameters() if param.is_floating_point() or param.is_complex())
        heads = cls.__new__(cls)
        heads._start(kind, own if out_features is None else out_features, tasks, like.detach().new_empty(0))
        if out_features is not None:
            heads._checked(out_features)
        return heads.train(template.training)

    def _start(
        self,
        template: HeadTemplate,
        out_features: int | None,
        tasks: Mapping[TaskId, int] | Iterable[TaskId] | None,
        like: Tensor,
    ) -> None:
        super().__init__()
        self._template = template
        self.in_features = template.in_features
        self.out_features = out_features
        self.heads = nn.ModuleDict()
        self._widths: dict[TaskId, int] = {}  # the widths of all heads, removed ones included
        self.active = None
        self.row_tasks: list[tuple[TaskId, Tensor]] | None = None  # each task's rows, while several share a pass
        # Later heads are made with the device and dtype of this buffer, which follows .to() like every buffer.
        self.register_buffer("_device_and_dtype", like, persistent=False)
        widths = tasks if isinstance(tasks, Mapping) else dict.fromkeys(tasks or ())
        for task, width in widths.items():
            self._add(task, width)
        self._sort()

    @property
    def tasks(self) -> list[TaskId]:
        """The tasks that have a head, sorted, ints before strings.

        They are not in the order in which they were added, because a resumed run may add them in another order, and
        the state of an optimizer depends on the order of the parameters.
        """
        return [task_from_key(key) for key in self.heads]

    @property
    def active(self) -> TaskId | None:
        """The task whose head :meth:`forward` uses. Setting it to a task without a head is a ``ValueError``."""
        return self._active

    @active.setter
    def active(self, task: TaskId | None) -> None:
        head = None if task is None else self.head(task)
        # This is a second reference to a head and not a second head, so nn.Module must not register it. Forward reads
        # the head and not its name, so that the same compiled code serves every task.
        self.__dict__.update(_active=task, _active_head=head)

    # --- heads that come and go --------------------------------------------------------------------------------------
    def add(self, task: TaskId, out_features: int | None = None) -> nn.Module:
        """Make a head for ``task``.

        Raises:
            ValueError: the task has a head already, no width is known for it, or the heads cannot have this width.
        """
        head = self._add(task, out_features)
        self._sort()
        return head

    @torch.inference_mode(False)  # heads are trained
    def _add(self, task: TaskId, out_features: int | None) -> nn.Module:
        task = check_task(task)
        if task_key(task) in self.heads:
            raise ValueError(f"task {task!r} already has a head")
        width = self.width(task, out_features)
        head = self._template.make(width, self._device_and_dtype).train(self.training)
        if width is not None:
            self._widths[task] = width
        self.heads[task_key(task)] = head
        return head

    def _sort(self) -> None:
        for one in sorted(self.tasks, key=lambda task: (isinstance(task, str), task)):
            self.heads[task_key(one)] = self.heads.pop(task_key(one))

    def remove(self, task: TaskId) -> Removed:
        """Remove the head of ``task``, if there is one. The result is what :meth:`put_back` takes."""
        if self._active == task:
            self.active = None
        key = task_key(task)
        return task, self._widths.pop(task, None), self.heads.pop(key) if key in self.heads else None

    def put_back(self, removed: Removed) -> None:
        """Undo :meth:`remove`, whose result this takes."""
        task, width, head = removed
        if width is not None:
            self._widths[task] = width
        if head is not None:
            self.heads[task_key(task)] = head
            self._sort()

    def width(self, task: TaskId, out_features: int | None = None) -> int | None:
        """The width that the head of ``task`` has, or would get. None if these heads have no width of their own.

        Raises:
            ValueError: ``out_features`` differs from that of the existing head, is not a positive int, or is not
                possible for these heads; or no width is known.
        """
        known: object = self._widths.get(task, self.out_features if out_features is None else out_features)
        if known is None and self._template.width_name is not None:
            raise ValueError(f"out_features must be given for task {task!r}: these heads have no common width")
        width = self._checked(known)
        if out_features not in (None, known):
            raise ValueError(
                f"out_features must be {known}, the width of the head of task {task!r}, got {out_features!r}"
            )
        return width

    def _checked(self, width: object) -> int | None:
        """Return ``width``. Raises ``ValueError`` if no such head can be made."""
        if width is not None:
            if self._template.width_name is None:
                raise ValueError(
                    f"out_features must be None, got {width!r}: the heads are copies of a {self._template.kind}, whose "
                    "width is not known. A width needs nn.Linear, a subclass without a forward of its own, or a "
                    "convolution"
                )
            if isinstance(width, bool) or not isinstance(width, Integral) or width < 1:
                raise ValueError(f"out_features must be a positive int, got {width!r}")
            width = int(width)
        self._template.check(width, self._device_and_dtype)
        return width

    def head(self, task: TaskId) -> nn.Module:
        """The head of ``task``. Raises ``ValueError`` that lists the known tasks when there is none."""
        key, heads = task_key(check_task(task)), self.heads
        if key not in heads:
            raise ValueError(f"task {task!r} has no head; tasks that have one: {self.tasks}")
        return heads[key]

    def dense(self, task: TaskId) -> nn.Module:
        """A copy of the head of ``task`` that contains nothing of this library."""
        head = copy.deepcopy(self.head(task))
        kept_buffers.release(head)
        return head

    # --- finished tasks ----------------------------------------------------------------------------------------------
    def finish(self, tasks: Iterable[TaskId], *, anew: bool = False) -> None:
        """From now on these ``tasks`` are the finished ones. A forward pass of their heads leaves buffers as they are,
        in training mode too: as they were when the task ended, or (``anew``) as they are now."""
        anew = ops.check_bool("anew", anew)
        if not self._template.has_buffers:  # as for linear heads, of which there may be a thousand
            return
        finished = {task_key(task) for task in tasks}
        for key, head in self.heads.items():
            if key in finished:
                kept_buffers.keep(head, anew)
            else:
                kept_buffers.release(head)

    def untrained(self) -> set[int]:
        """The ids of the parameters of all heads that are not trained, because the template says so."""
        names = self._template.untrained
        found = ((name, p) for head in self.heads.values() for name, p in head.named_parameters()) if names else ()
        return {id(param) for name, param in found if name in names}

    def _let_train(self, head: nn.Module) -> None:
        for name, param in head.named_parameters():
            param.requires_grad_(name not in self._template.untrained)

    # --- computing ---------------------------------------------------------------------------------------------------
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute with the head of the active task. While several tasks share a pass, each head gets the rows of its
        task."""
        check_arguments(args)
        if args and not isinstance(args[0], Tensor):
            check_no_symbol(args[0])
        if self.row_tasks is not None:
            return self._forward_rows(self.row_tasks, *args, **kwargs)
        head: nn.Module | None = self.__dict__["_active_head"]
        if head is None:
            raise RuntimeError("no task is active: call begin_task(task) or use_task(task) before the model")
        return head(*args, **kwargs)

    def _forward_rows(self, groups: list[tuple[TaskId, Tensor]], *args: Any, **kwargs: Any) -> Tensor:
        if len(args) != 1 or kwargs or not isinstance(args[0], Tensor):
            raise TypeError("heads take one tensor while tasks share a pass: use one_pass=False for other heads")
        return stack_rows({task: self.head(task)(args[0][rows]) for task, rows in groups}, groups)

    # --- loading -----------------------------------------------------------------------------------------------------
    def saved(self, state: Mapping[str, Any], prefix: str) -> dict[str, dict[str, Any]]:
        """The heads in a saved state: what each one has by name, by the key of its task. ``prefix`` is what comes
        before the names of this module. A key may be that of no task."""
        start, found = f"{prefix}heads.", {}  # type: tuple[str, dict[str, dict[str, Any]]]
        for name, value in state.items():
            if name.startswith(start):
                key, _, own = name[len(start) :].partition(".")
                if own:
                    found.setdefault(key, {})[own] = value
        return found

    def expected(self, saved: Mapping[str, object]) -> nn.Module:
        """A module with the tensors of a head that was saved as ``saved``, one of :meth:`saved`. It may be on the meta
        device, and must not be changed. Raises ``ValueError`` if these heads cannot have the width of that one."""
        return self._template.expected(saved, self._device_and_dtype)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # If the checkpoint has heads, make the missing ones and delete the others before torch loads the children.
        # The model has heads that the checkpoint lacks if the checkpoint is older than the model, for example.
        incoming = self.saved(state_dict, prefix)
        for key in [key for key in self.heads if incoming and key not in incoming]:
            if self._active is not None and task_key(self._active) == key:
                self.active = None
            del self.heads[key]
        for key, saved in incoming.items():
            # Torch reports a name that belongs to no task as unexpected.
            with contextlib.suppress(ValueError):
                if key not in self.heads:
                    task = task_from_key(key)
                    self._widths.pop(task, None)
                    self._add(task, self._template.width_of(saved))
        self._sort()
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        of = f"in_features={self.in_features}" if isinstance(self._template, LinearTemplate) else self._template.kind
        return f"{of}, tasks={self.tasks}, active={self.active!r}"


def _is_plain_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether ``module`` is an ``nn.Linear`` to which nothing was done (pruning and weight norm replace its weight)."""
    own = {name for name, _ in (*module.named_parameters(), *module.named_buffers())}
    return type(module) is nn.Linear and "forward" not in vars(module) and "weight" in own <= {"weight", "bias"}


def _check_template(template: object) -> None:
    if not isinstance(template, nn.Module):
        raise TypeError(f"template must be an nn.Module, got {type(template).__name__}")
    for name, inner in template.named_modules():
        if isinstance(inner, SubnetLayer | TaskHeads) or per_task.marked(inner):
            raise ValueError(
                f"template must be an ordinary module, and {name or 'it'} ({type(inner).__name__}) has masks, heads or "
                "values of tasks: name the head in the first convert, or give a module that was not converted"
            )


def stack_rows(outputs: Mapping[TaskId, Tensor], groups: Iterable[tuple[TaskId, Tensor]]) -> Tensor:
    """Join the outputs of several tasks into one batch, in the order of the rows of that batch.

    Args:
        outputs: the outputs of each task, ``[rows of the task, ...]``.
        groups: each task with the indices of its rows, int64, in the order of ``outputs``.

    Raises:
        TypeError: an output is no tensor.
        ValueError: the outputs differ in shape.
    """
    for out in outputs.values():
        if not isinstance(out, Tensor):
            raise TypeError(f"forward_tasks needs outputs that are tensors, got {type(out).__name__}")
    shapes = {task: tuple(out.shape[1:]) for task, out in outputs.items()}
    if len(set(shapes.values())) > 1:
        raise ValueError(f"forward_tasks needs outputs of one shape, got {shapes} by task: run such tasks one by one")
    joined = torch.cat(list(outputs.values()))
    return torch.empty_like(joined).index_copy_(0, torch.cat([rows for _, rows in groups]), joined)
