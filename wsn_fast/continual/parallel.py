"""A WSN inside of DistributedDataParallel, "the wrapper": what it must leave alone, what the processes tell each other,
and what is refused.

The wrapper averages the gradients of the parameters that it found when it was made. The WSN averages those of all
others (:mod:`wsn_fast.continual.unreduced`), so one wrapper serves all tasks. The wrapper also sends tensors of the
first process to all others. It must not send masks and per-task values, because the processes may show different tasks.
What the processes draw by themselves, heads and scores, the WSN sends: when a task begins if the wrapper is known by
then, and before its first training pass in any case.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..backends import collectives
from ..nn import per_task
from ..nn.gated import SubnetLayer
from ..nn.heads import TaskHeads
from ..nn.model_gates import in_parallel
from ..nn.shards import shard_of
from . import alike
from .unreduced import Unreduced

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from .model_parts import ModelParts
    from .wsn import WSN

_OF_GATES = ("masks", "union", "view")
IS_TRAINED = attrgetter("requires_grad")
_AGAIN = "Wrap the WSN again: DistributedDataParallel(wsn)"


class Parallel:
    """The wrapper of one WSN.

    Attributes:
        WRAPPED_IN: where the processes are, for messages.
    """

    WRAPPED_IN = " of DistributedDataParallel"

    def __init__(self) -> None:
        self._wrapper: weakref.ref[DistributedDataParallel] | None = None
        self._eager: Any = None
        self._path = ""  # of the WSN in the module that is wrapped
        self._seen: int | None = None  # the generation of the last finished task that was shown in the wrapper
        self._begun: int | None = None  # the generation that the processes were made alike for
        self._params: list[nn.Parameter] | None = None
        self._settled: object = None  # what the averages depend on
        self._unreduced = Unreduced()
        self._trained_in: ProcessGroup | None = None  # the processes that train the task in progress

    @property
    def sharded(self) -> ProcessGroup | None:
        """The processes that hold the shards of the model; None if it is whole."""
        return None

    # --- forward passes
    def before_forward(self, wsn: WSN) -> None:
        """A forward pass is about to run: if it runs in a wrapper, check it. Before the first one that trains, send
        what the processes have drawn by themselves.

        Raises:
            RuntimeError: the processes cannot stay alike; the message has the reason and a way out.
        """
        ddp = DistributedDataParallel._get_active_ddp_module() if in_parallel() else None
        if ddp is not None:
            if self._eager is None:  # compiled code must not contain this
                self._eager = torch.compiler.disable(self._before_forward)
            self._eager(ddp, wsn)

    def _before_forward(self, ddp: DistributedDataParallel, wsn: WSN) -> None:
        if not self._is_within(ddp, wsn):
            return
        _check_options(ddp)
        if wsn._view.task is not None:
            if self._seen != wsn._generation and ddp.will_sync_module_buffers():
                _check_leaves_alone(ddp, wsn, self._path)
            self._seen = wsn._generation
        elif torch.is_grad_enabled() and wsn.current_task is not None:
            if self._settled != self._state_of(wsn):
                self._prepare(ddp, wsn)
            if ddp.require_backward_grad_sync:
                self._unreduced.expect()

    def _is_within(self, ddp: DistributedDataParallel, wsn: WSN) -> bool:
        if self._wrapper is None or self._wrapper() is not ddp:
            path = next((name for name, module in ddp.module.named_modules() if module is wsn), None)
            if path is None:
                return False
            self._wrapper, self._path = weakref.ref(ddp), f"{path}.".lstrip(".")
            self._settled = self._seen = self._begun = self._params = None
        return True

    def _state_of(self, wsn: WSN) -> object:
        """What decides which gradients the wrapper and the WSN have to average."""
        raw = [layer.one_pass for layer in wsn._parts.layers.values()]
        return wsn._generation, raw, None if self._params is None else [*map(IS_TRAINED, self._params)]

    def _prepare(self, ddp: DistributedDataParallel, wsn: WSN) -> None:
        held, raw = {id(param) for param in ddp._module_parameters}, _scores_of_raw(wsn._parts)
        _check_held(ddp, wsn, held, raw)
        # Heads come later than the wrapper; and a module around the WSN names nothing.
        ddp.parameters_to_ignore |= {f"{self._path}{name}" for name in leave_alone(wsn)}
        ddp._assign_modules_buffers()  # it would send an empty list if no buffer is left
        if self._begun != wsn._generation:
            self._trained_in = ddp.process_group
            collectives.end_calmly()
            drawn = {id(tensor): tensor for tensor in drawn_by_processes(wsn)}
            alike.send(ddp.process_group, drawn.values())
            _check_alike(ddp.process_group, wsn, [one for one in kept_of_tasks(wsn) if id(one[1]) not in drawn])
            self._begun = wsn._generation
        self._params = [*wsn.parameters()]
        not_held = [param for param in self._params if param.requires_grad and id(param) not in held]
        self._unreduced.watch(not_held, ddp.process_group)
        self._settled = self._state_of(wsn)

    # --- the life of a task
    @property
    def known(self) -> ProcessGroup | None:
        """The processes of the wrapper, if there is one and it has run; else None."""
        ddp = None if self._wrapper is None or not collectives.is_initialized() else self._wrapper()
        return None if ddp is None else ddp.process_group

    @property
    def group(self) -> ProcessGroup | None:
        """The processes that train the task in progress; None if this one is alone."""
        return self._trained_in if collectives.is_initialized() else None

    def begin(self, wsn: WSN) -> None:
        """A task begins, which no process has trained yet. All take the heads and scores of the first one, if there is
        a wrapper that has run."""
        self._trained_in = None
        alike.send(self.known, drawn_by_processes(wsn))

    def send(self, tensors: Iterable[Tensor]) -> None:
        """Send ``tensors``, which all processes have drawn anew, if there is a wrapper that has run."""
        alike.send(self.known, tensors)

    def level(self, wsn: WSN) -> None:
        """The task ends: all processes take the buffers that the first one has, such as running statistics."""
        alike.send(self.group, _live_buffers(wsn))

    def check_ends(self, wsn: WSN, *digests: dict[str, str]) -> None:
        """Raise ``RuntimeError``, which names the tensors, if the processes are about to keep different values.

        Args:
            wsn: the model.
            digests: digests of what the task computes with, by name.
        """
        if self.group is None:
            return
        merged = {f"{i} {name}": text for i, one in enumerate(digests) for name, text in one.items()}
        found = alike.different_texts(self.group, merged, device_of(wsn))
        if found:
            names = sorted({name.partition(" ")[2] for name in found})
            raise RuntimeError(
                f"the processes{self.WRAPPED_IN} have different values of {alike.listed(names)}: something "
                "has changed them in one process and not in the others. The task is still in progress"
            )


class OtherFailedError(RuntimeError):
    """Something has failed in another process and not in this one. The message has the errors of the others."""


@contextmanager
def together(group: ProcessGroup | None, device: torch.device) -> Iterator[None]:
    """What fails in the block in one process of ``group`` fails in all of them: without this, the others would wait."""
    try:
        yield
    except Exception as error:
        _tell(group, device, f"{type(error).__name__}: {error}")
        raise
    _tell(group, device, "")


def _tell(group: ProcessGroup | None, device: torch.device, failed: str) -> None:
    if collectives.size(group) == 1:
        return
    some = torch.tensor([int(bool(failed))], device=device)
    collectives.largest_over(group, some)
    if bool(some):
        texts = collectives.texts_of(group, failed)
        if not failed:
            others = "\n".join(f"process {rank}: {text}" for rank, text in enumerate(texts) if text)
            raise OtherFailedError(f"another process of the group has failed\n{others}")


# --- what a wrapper leaves alone
def leave_alone(wsn: WSN) -> list[str]:
    """The names in ``wsn`` of what a wrapper must neither send nor reduce: masks, heads, what tasks have copies of, and
    the scores of layers that a one-pass optimizer trains."""
    raw = _scores_of_raw(wsn._parts)
    names = [name for name, param in wsn.named_parameters() if id(param) in raw] + _buffers_left_alone(wsn)
    for path, module in wsn.named_modules():
        if isinstance(module, TaskHeads):
            own = (*dict(module.named_parameters()), *dict(module.named_buffers()))
            names += [f"{path}.{name}" for name in own]
    return names


def _buffers_left_alone(wsn: WSN) -> list[str]:
    """Those of masks and of what tasks have copies of. Some of them are None now: they come and go."""
    return [
        f"{path}.{name}"
        for path, module in wsn.named_modules()
        for name in module._buffers
        if _is_left_alone(module, name)
    ]


def _is_left_alone(module: nn.Module, name: str) -> bool:
    if isinstance(module, SubnetLayer) and any(name == f"{gate}_{end}" for gate in module.GATED for end in _OF_GATES):
        return True
    return name.removesuffix("_tasks").removesuffix("_live") in per_task.marked(module)


def check_can_be_wrapped(wsn: WSN) -> None:
    """Raise ``RuntimeError`` if a finished task is in use, because the wrapper would send what the first process shows;
    or if the wrapper would run without telling that it does."""
    if getattr(sys.modules.get("torch._dynamo.config"), "optimize_ddp", None) == "python_reducer":
        raise RuntimeError(
            "torch._dynamo.config.optimize_ddp must not be 'python_reducer': a WSN could not see that it runs inside "
            "of DistributedDataParallel"
        )
    if wsn._view.task is not None:
        raise RuntimeError(
            f"task {wsn._view.task!r} is finished and in use: leave use_task before DistributedDataParallel(wsn), "
            "which sends what the first process shows to all others"
        )


def _scores_of_raw(parts: ModelParts) -> set[int]:
    layers = [layer for layer in parts.layers.values() if layer.one_pass]
    return {id(gate.score) for layer in layers for gate in layer.gated()}


# --- what processes have to have in common
def drawn_by_processes(wsn: WSN) -> Iterator[Tensor]:
    """What each process may have drawn by itself: heads of tasks that have not ended, and scores; and live buffers,
    which the wrapper does not send."""
    for heads in wsn._parts.heads.values():
        for task in heads.tasks:
            if task not in wsn.tasks:
                yield from heads.head(task).parameters()
                yield from heads.head(task).buffers()
    for _, gate in wsn.gated():
        if shard_of(gate.score) is None:
            yield gate.score
    yield from _per_task_buffers(wsn)


def _live_buffers(wsn: WSN) -> Iterator[Tensor]:
    """The buffers that the task in progress keeps when it ends."""
    for heads in wsn._parts.heads.values():
        if wsn.current_task is not None and wsn.current_task in heads.tasks:
            yield from heads.head(wsn.current_task).buffers()
    yield from _per_task_buffers(wsn)


def _per_task_buffers(wsn: WSN) -> Iterator[Tensor]:
    for module in wsn._parts.copied:
        for name in per_task.marked(module):
            if name in module._buffers:
                yield getattr(module, name)


def kept_of_tasks(wsn: WSN) -> Iterator[alike.Named]:
    """Parameters, masks and what is kept of finished tasks."""
    yield from wsn.named_parameters()
    for path, module in wsn.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and name.endswith(("_masks", "_tasks")) and _is_left_alone(module, name):
                yield f"{path}.{name}", buffer


def _check_alike(group: ProcessGroup, wsn: WSN, tensors: list[alike.Named]) -> None:
    settings = {f"the density or rule of {n}": f"{x.gate_density} {x.rule}" for n, x in wsn._parts.layers.items()}
    names = alike.different_texts(group, settings, device_of(wsn))
    names += alike.different_tensors(group, tensors, device_of(wsn))
    if names:
        raise RuntimeError(
            f"the processes of DistributedDataParallel have different values of {alike.listed(names)}: their masks "
            "would differ. Make the model in the same way and with one seed, or load one state, in all of them"
        )


def device_of(wsn: WSN) -> torch.device:
    """The device on which the processes compare what is in no tensor of the model."""
    return next(wsn.parameters()).device


# --- what is refused
def _check_options(ddp: DistributedDataParallel) -> None:
    if ddp.mixed_precision is not None:
        raise RuntimeError(
            "DistributedDataParallel(mixed_precision=...) rounds the scores, and the masks would not be those of the "
            "scores: use torch.autocast"
        )
    if ddp._join_config.enable:
        raise RuntimeError(
            "DistributedDataParallel.join() does not know which gradients the WSN averages, and processes would wait "
            "for each other without an end: give every process as many batches"
        )


def check_not_wrapped() -> None:
    """Raise ``RuntimeError`` if a wrapper runs. Compiled code calls this, because it cannot do what :class:`Parallel`
    does. If it may break its graph, it does so here, and the forward pass of the WSN is eager."""
    if DistributedDataParallel._get_active_ddp_module() is not None:
        raise RuntimeError(
            "torch.compile has compiled a WSN inside of DistributedDataParallel, where the WSN has to see each forward "
            "pass: call wsn.compile() instead, which compiles its model"
        )


def _check_leaves_alone(ddp: DistributedDataParallel, wsn: WSN, path: str) -> None:
    sent = {f"{path}{name}" for name in _buffers_left_alone(wsn)} - ddp.parameters_to_ignore
    if sent:
        raise RuntimeError(
            f"task {wsn._view.task!r} is finished and in use inside of a DistributedDataParallel that sends buffers of "
            f"one process to all others, {alike.listed(sorted(sent))} too: call the WSN itself, wsn(x), to evaluate, "
            "or call wsn_fast.distributed.leave_alone(module) before DistributedDataParallel(module)"
        )


def _check_held(ddp: DistributedDataParallel, wsn: WSN, held: set[int], raw: set[int]) -> None:
    """Raise ``RuntimeError`` if the wrapper waits for gradients that will not come."""
    if ddp.find_unused_parameters or ddp.static_graph:
        return
    names = {id(param): name for name, param in wsn.named_parameters()}
    scores = [names[key] for key in names if key in held and key in raw]
    if scores:
        raise RuntimeError(
            f"DistributedDataParallel waits for gradients of {alike.listed(scores)}, which have none in the one-pass "
            "mode: build the one-pass optimizer before DistributedDataParallel(wsn), or pass "
            "find_unused_parameters=True to it, which sends zeros for them. If another module is wrapped, call "
            "wsn_fast.distributed.leave_alone(module, scores=True) before it is"
        )
    fixed: list[Any] = [names[id(p)] for p in ddp._module_parameters if id(p) in names and not p.requires_grad]
    # Heads of earlier tasks may be among them, for which a wrapper that came later does not wait. It counts what it
    # waits for, and does not name it.
    trained = sum(param.requires_grad for param in ddp._module_parameters)
    if fixed and ddp._get_ddp_logging_data()["num_parameter_tensors"] > trained:
        raise RuntimeError(
            f"DistributedDataParallel waits for gradients of {alike.listed(fixed)}, which are not trained any more, as "
            f"frozen parameters are not after the first task. {_AGAIN}"
        )
