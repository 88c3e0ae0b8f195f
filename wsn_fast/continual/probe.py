"""Finds code that reads values of a model which a task must not read: weights outside of its mask, scores, and whatever
belongs to other tasks.

A layer applies its mask when it is called. Code that reads ``layer.weight`` without calling the layer (a tied decoder,
a merge of adapters) gets the whole weight, and what it computes changes when later tasks are trained. No fingerprint
shows this. So the model computes a batch twice, the second time with NaN in place of everything that the task must not
read. The outputs have to be equal to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import ops
from ..nn.shards import local
from ..nn.task_ids import TaskId, task_key
from ..ops.same_bits import same_bits
from .model_parts import ModelParts

if TYPE_CHECKING:
    from .wsn import WSN

Probe = Tensor | Sequence[Any] | Mapping[str, Any] | Callable[[TaskId], Any]
"""What a model is checked with; see :func:`check_reads`."""


class UnmaskedReadError(RuntimeError):
    """A finished task computes with values that it must not read: ``task`` is the task, ``names`` are the tensors."""

    def __init__(self, task: TaskId, names: list[str]) -> None:
        listed = "\n  ".join(names)
        super().__init__(
            f"task {task!r} computes with values that it must not read, of these tensors:\n  {listed}\nSome code reads "
            "them, so that no mask is applied, and later tasks would change what this task computes. In a forward pass "
            "of the model, let that code read the attribute (layer.weight, and not layer.parameters() or a reference "
            "that it keeps); outside of one let it read layer.masked('weight', dtype). Or exclude the layer from the "
            "conversion."
        )
        self.task, self.names = task, names


class _Hidden(NamedTuple):
    """A tensor that a task must not read, except for the elements where ``own`` (bool) is True; None means nowhere."""

    name: str
    tensor: Tensor
    own: Tensor | None


def check_reads(wsn: WSN, parts: ModelParts, tasks: Sequence[TaskId], probe: Probe | None) -> None:
    """Check that the finished ``tasks`` read nothing that they must not read when the model computes ``probe``.

    The model computes in evaluation mode, without gradients. Afterwards every parameter, buffer and mode is what it
    was, and so is the state of PyTorch's random generators. This takes the memory of a second copy of the model. If the
    model is sharded, all processes call this, each with inputs of its own, and find what any of them finds.

    Args:
        wsn: the model.
        parts: its parts.
        tasks: the tasks.
        probe: an input of the model; a tuple of inputs; a mapping of inputs by argument name; or a function. It is
            called with a finished task while that task is in use, computes with the model, and returns what it
            computed. The outputs are tensors, or tuples, lists, mappings and dataclasses of tensors. None: nothing is
            checked.

    Raises:
        UnmaskedReadError: a task reads something; the message names the tensors.
        TypeError: ``probe`` is none of those.
        ValueError: the outputs have no tensor with finite elements, so nothing can be compared.
    """
    if probe is None:
        return
    if not (isinstance(probe, Tensor | Mapping | Sequence) or callable(probe)) or isinstance(probe, str):
        raise TypeError(f"probe must be a tensor, a tuple, a mapping or a function, got {type(probe).__name__}")
    for task in tasks:
        with wsn.use_task(task):
            hidden = list(_hidden_from(parts, task, wsn.tasks.index(task)))
            # A function may call the WSN, which would put frozen values back in the place of NaN.
            with wsn._guards.kept.paused(), _Runs(wsn, parts, hidden).undone() as runs:
                names, cause = runs.unmasked_reads(partial(_compute, wsn, probe, task))
        if names:
            raise UnmaskedReadError(task, names) from cause


def _compute(wsn: WSN, probe: Probe, task: TaskId) -> Any:
    if isinstance(probe, Tensor):
        return wsn(probe.clone())  # the model may write to its inputs
    if isinstance(probe, Mapping):
        return wsn(**{name: copied(value) for name, value in probe.items()})
    return probe(task) if callable(probe) else wsn(*map(copied, probe))


def copied(value: Any) -> Any:
    """Copy the tensors in ``value``, which may be in tuples, lists and dicts. The copies need no gradient."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if type(value) in (tuple, list):
        return type(value)(map(copied, value))
    return {name: copied(one) for name, one in value.items()} if type(value) is dict else value


# --- what a task must not read ---------------------------------------------------------------------------------------
def _hidden_from(parts: ModelParts, task: TaskId, row: int) -> Iterator[_Hidden]:
    own: dict[int, Tensor] = {}  # tensors may be gated twice, with different scores
    gated = [*parts.gated()]  # some are computed at each asking: see torch.nn.utils.parametrize
    for _, gate in gated:
        mask = ops.unpack_mask(gate.masks[row], local(gate.param).shape)
        own[id(gate.param)] = mask | own.get(id(gate.param), mask)
    for name, gate in gated:
        yield _Hidden(name, local(gate.param), own[id(gate.param)])
        yield _Hidden(f"{name}_score", local(gate.score), None)
        if gate.union is not None:
            yield _Hidden(f"{name}_union", gate.union, None)
    for prefix, heads in parts.heads.items():
        mine = {id(tensor) for tensor in _tensors_of(heads.head(task))} if task in heads.tasks else set()
        for other in heads.tasks:
            for name, tensor in (*heads.head(other).named_parameters(), *heads.head(other).named_buffers()):
                if id(tensor) not in mine:
                    yield _Hidden(f"{prefix}.heads.{task_key(other)}.{name}".lstrip("."), tensor, None)
    for item in parts.owned:
        if item.kind == "per_task":
            rows, live = (item.module._buffers[f"{item.attribute}{end}"] for end in ("_tasks", "_live"))
            if live is not None:
                yield _Hidden(f"{item.name} (as it is in training)", live, None)
            if rows is not None:
                of_task = torch.zeros(rows.shape, dtype=torch.bool, device=rows.device)
                of_task[row] = True
                yield _Hidden(f"{item.name} of other tasks", rows, of_task)


def _tensors_of(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _poison(hidden: _Hidden) -> None:
    """Make the hidden elements NaN; in an integer tensor change all their bits."""
    tensor, own = hidden.tensor.detach(), hidden.own
    if not (tensor.is_floating_point() or tensor.is_complex()):
        tensor.copy_(~tensor if own is None else torch.where(own, tensor, ~tensor))
    elif own is None:
        tensor.fill_(torch.nan)
    else:
        tensor.masked_fill_(~own, torch.nan)


# --- running the model -----------------------------------------------------------------------------------------------
class _Runs:
    """Runs of a model that leave no trace.

    Args:
        wsn: the model.
        parts: its parts.
        hidden: what may be poisoned.
    """

    def __init__(self, wsn: WSN, parts: ModelParts, hidden: Sequence[_Hidden]) -> None:
        self._wsn, self._parts, self._hidden = wsn, parts, hidden
        heads = [tensor for one in parts.heads.values() for tensor in _tensors_of(one)]
        tensors = [*(one.tensor for one in hidden), *(item.tensor for item in parts.owned), *heads]
        self._saved = [(t, t.detach().clone()) for t in {id(t): t for t in tensors}.values()]
        self._modes = [(module, module.training) for module in wsn.modules()]
        self._devices = {t.device for t in wsn.parameters() if t.device.type == "cuda"}
        self._inference = any(t.is_inference() for t, _ in self._saved)

    @contextmanager
    def undone(self) -> Iterator[_Runs]:
        """When the context is left, values and modes are what they were."""
        # Tensors that were made in inference mode can be changed only there.
        with torch.inference_mode(self._inference), torch.no_grad():
            try:
                yield self
            finally:
                self._restore()
                self._wsn.train()  # some modules merge weights in one mode, and undo it in the other
                self._wsn.train(self._modes[0][1])
                for module, training in self._modes:
                    module.training = training
                self._restore()

    def _restore(self) -> None:
        for tensor, saved in self._saved:
            tensor.detach().copy_(saved)
        torch.clear_autocast_cache()  # it keeps casts of the values that were there

    def unmasked_reads(self, compute: Callable[[], Any]) -> tuple[list[str], Exception | None]:
        """The names of the hidden tensors that ``compute`` reads, and the error that it raised because of them, if it
        did."""
        expected = self._outputs(compute, ())
        if not self._any(any(bool(one.isfinite().any()) for one in expected)):
            raise ValueError("the outputs for probe have no finite element, so nothing can be compared")
        error: list[Exception] = []
        exact = True

        def differ(poisoned: Sequence[_Hidden]) -> bool:
            try:
                different = not _same(expected, self._outputs(compute, poisoned), exact)
            except torch.OutOfMemoryError:
                raise
            except Exception as raised:  # the model may notice NaN by itself
                error.append(raised)
                different = True
            return self._any(different)

        if not differ(self._hidden):
            return [], None
        exact = _same(expected, self._outputs(compute, ()), True)  # some kernels are not deterministic
        names = [one.name for one in _smallest(self._hidden, differ)]
        return names, error[-1] if error else None

    def _any(self, condition: bool) -> bool:
        """Whether this holds in any process that has a part of the model. All of them go on alike."""
        return bool(self._parts.agree(["it holds"] if condition else []))

    def _outputs(self, compute: Callable[[], Any], poisoned: Iterable[_Hidden]) -> list[Tensor]:
        """What the model computes with these tensors poisoned."""
        self._restore()
        for hidden in poisoned:
            _poison(hidden)
        self._wsn.train()
        self._wsn.eval()  # code that runs when the mode changes, such as a merge of weights, reads what is poisoned
        devices = [device.index for device in self._devices]
        with torch.random.fork_rng(devices):
            return [tensor.detach().clone() for tensor in _flat(compute())]


def _smallest(hidden: Sequence[_Hidden], differ: Callable[[Sequence[_Hidden]], bool]) -> list[_Hidden]:
    """Those of ``hidden`` that make a difference by themselves, or else the smallest group that does."""
    if not hidden or not differ(hidden):
        return []
    if len(hidden) == 1:
        return list(hidden)
    half = len(hidden) // 2
    return [*_smallest(hidden[:half], differ), *_smallest(hidden[half:], differ)] or list(hidden)


def _flat(value: Any) -> Iterator[Tensor]:
    """The tensors in an output: a tensor, or tuples, lists, mappings and dataclasses of them."""
    if isinstance(value, Tensor):
        yield value if value.layout is torch.strided else value.to_dense()
    elif isinstance(value, Mapping):
        for one in value.values():
            yield from _flat(one)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _flat(one)
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from _flat(getattr(value, field.name))


def _same(expected: Sequence[Tensor], outputs: Sequence[Tensor], exact: bool) -> bool:
    """Whether outputs are equal to the bit; if not ``exact``, whether they are not NaN where it was not expected."""
    if len(expected) != len(outputs):
        return False
    if exact:
        return all(map(same_bits, expected, outputs))
    return not any(
        one.shape != other.shape or bool((other.isnan() & ~one.isnan()).any())
        for one, other in zip(expected, outputs, strict=True)
    )
