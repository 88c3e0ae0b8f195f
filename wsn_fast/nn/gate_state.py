"""What a subnet layer keeps from one forward pass to the next: gates that were made ahead, the passes whose raw
gradients a one-pass optimizer takes, and the masked tensors of the finished task in use.

docs/design.md draws the states of a gate and the transitions. :mod:`wsn_fast.nn.model_gates` is the same for a model.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from .. import ops
from ..backends import is_exporting, recording
from ..ops.raw_gradients import RawGradient
from .gate import Gated
from .reads import Read, Scope
from .shards import ShardedGate, address

if TYPE_CHECKING:
    from .gated import SubnetLayer

Stamp = tuple[object, ...]
MIXED: Stamp = ("gradients of passes with different values", None)
"""Where a stamp is expected: no present values have it."""


class Pass(NamedTuple):
    """What the optimizer needs to know about the forward pass whose raw gradient it takes.

    Attributes:
        tau: the threshold of the scores.
        dtype: the dtype of the masked tensor.
        stamp: :func:`stamp` at the time of the pass; empty if ``torch.compile`` traced it; :data:`MIXED` if the
            gradient of an earlier pass, with another stamp, was waiting for the step at that time.
        alone: the stamp of the pass itself if ``stamp`` is :data:`MIXED`, else empty.
    """

    tau: Tensor
    dtype: torch.dtype
    stamp: Stamp
    alone: Stamp = ()


@dataclass(slots=True, eq=False)
class Ready:
    """A gate that was made for the next forward pass: by the step of an optimizer of :mod:`wsn_fast.optim`, while it
    had weight and scores at hand, or after a step for all layers together.

    Attributes:
        masked: the masked tensor.
        window: that of :class:`wsn_fast.backends.updates.Next`; None if no optimizer made the gate.
        next: the threshold, the dtype, and :func:`stamp` at that time: what a pass that uses the gate is.
    """

    masked: Tensor
    window: Tensor | None
    next: Pass


class Kept(NamedTuple):
    """A masked tensor of a finished task, and what it was made from, with versions, addresses and the backend."""

    masked: Tensor
    param: Tensor
    packed: Tensor
    stamp: Stamp

    def is_right(self, backend: str | None) -> bool:
        """Whether nothing has changed since."""
        param, packed = self.param, self.packed
        return self.stamp == (param._version, param.data_ptr(), packed._version, packed.data_ptr(), backend)

    def is_of(self, masks: Tensor, row: int) -> bool:
        """Whether the mask is this row of ``masks``, [T, bytes]. It has its address then, and nothing else can have
        this address as long as the object here holds the mask."""
        place = masks.data_ptr() + row * masks.stride(0)  # a mask consists of bytes
        return self.packed.data_ptr() == place and self.packed.device == masks.device


class KeptTask(dict[str, Kept]):
    """The masked tensors of a finished task, by gated tensor.

    Attributes:
        of_model: what :class:`ModelGates <wsn_fast.nn.model_gates.ModelGates>` knows of those of all layers.
    """

    of_model: Any = None


@dataclass(slots=True, eq=False)
class Given:
    """A masked tensor that the layer computes with in the forward pass of the model that is running.

    Attributes:
        masked: the tensor, in the compute dtype. In training autograd leads from it to the gates of all layers.
        param: the tensor that it was made from.
        version: that of ``param``, for a finished task.
        score: the scores in training, or None for a finished task.
        ready: in training the gate that was made ahead.
        raw: whether a one-pass optimizer takes the gradient.
        read: the version of ``masked`` when an attribute first returned it in this pass, None if none has.
        dtype: that of ``masked``.
    """

    masked: Tensor
    param: Tensor
    version: int = 0
    score: Tensor | None = None
    ready: Ready | None = None
    raw: bool = False
    read: int | None = None
    dtype: torch.dtype = field(init=False)

    def __post_init__(self) -> None:
        self.dtype = self.masked.dtype

    def is_for(self, param: Tensor | None, dtype: torch.dtype, compiling: bool) -> bool:
        """Whether this is the masked tensor of ``param`` as it is now, in ``dtype``."""
        if self.param is not param or self.dtype is not dtype:
            return False
        if compiling:  # the versions were compared before the compiled code was entered
            return True
        score, ready = self.score, self.ready
        if score is None or ready is None:
            return param._version == self.version
        then = ready.next.stamp
        return param._version == then[0] and score._version == then[1]

    def may_be_taken(self, hooks: object | None) -> bool:
        """Whether a layer may compute with it here. In training, what is saved for backward under ``hooks`` (activation
        checkpointing, offloading) is computed again later, or moved: each layer then has a Function of its own. The
        caller asks for the hooks, because ``torch.compile`` cannot trace a function that does."""
        return hooks is None or self.score is None or not torch.is_grad_enabled()


def stamp(layer: SubnetLayer, param: Tensor, score: Tensor) -> Stamp:
    """Everything that the gate of a tensor depends on, as far as Python can see it. It does not show an edit through
    ``.data`` or NumPy."""
    density = layer.task_density
    return (
        param._version, score._version, address(param), address(score), layer.rule,
        layer._density if density is None else density,
    )  # fmt: skip


class GateState:
    """The state of the gates of one layer. A copy of a layer has a new one.

    Attributes:
        keep_masked: whether the masked tensors of the finished task in use are kept, one copy of each gated tensor, so
            that the next forward pass need not make them again. A number n keeps those of the n finished tasks that
            were in use last, also while none is, until a training pass, the end of a task, or a move.
        gates_ahead: whether the gates of the next forward pass are made after a step, for all layers together, also
            when the optimizer is not a one-pass optimizer.
        has_owner: whether there is an :attr:`owner`: a plain value, for the forward pass and for compiled code.
        passes: for each gated tensor the forward pass since the last step of the optimizer in :attr:`owner`.
        noted: how many passes were noted in :attr:`passes` so far, without those of compiled code: ``torch.compile``
            would make the code again for each number.
        ready: the gates that were made for the next forward pass, by gated tensor.
        given: the masked tensors for the forward pass of the model that is running, by gated tensor.
        kept: the masked tensors of the finished task in use.
        shards: the gated tensors, if FSDP2 has cut them into shards.
        scope: whether forward passes run, in which the attributes of gated tensors are masked.
        reads: what such attributes returned in the forward pass that is running, each after what it depends on.
        compute_dtypes: the dtype of each masked tensor in the last training forward pass, while :attr:`gates_ahead`.
        compiled: whether compiled code has run the forward pass of the layer.
        traced: whether compiled code has used a weight since the last step, and nothing is known about its gradient.
    """

    def __init__(self, keep_masked: bool | int = True, gates_ahead: bool = False, scope: Scope | None = None) -> None:
        self.keep_masked, self.gates_ahead = keep_masked, gates_ahead
        self.scope = Scope() if scope is None else scope
        self.shards: dict[str, ShardedGate] | None = None
        self.reads: dict[str, Read] = {}
        self._owner: weakref.ref[object] | None = None
        self.has_owner = False
        self._owned: set[int] = set()  # ids of the tensors whose raw gradients go to the owner
        self.passes: dict[str, Pass] = {}
        self.noted = 0
        self.ready: dict[str, Ready] = {}
        self.given: dict[str, Given] = {}
        self.kept = KeptTask()
        self._left: dict[int, KeptTask] = {}  # by row, of tasks that are not in use; the last one was left last
        self.compute_dtypes: dict[str, torch.dtype] = {}
        self.compiled = self.traced = False
        self._about: dict[str, RawGradient] = {}

    def __reduce__(self) -> tuple[type[GateState], tuple[bool | int, bool, Scope]]:
        return GateState, (self.keep_masked, self.gates_ahead, self.scope)  # a copy has no optimizer

    # --- who takes the gradients
    @property
    def owner(self) -> object | None:
        """The one-pass optimizer that takes the raw gradients, which are those of the masked tensors, while this
        optimizer is alive; None when backward computes the gradients of Eq. 4 and 5."""
        return None if self._owner is None else self._owner()

    def _lose_owner(self, owner: weakref.ref[object]) -> None:
        if self._owner is owner:
            self.has_owner = False
            for about in self._about.values():
                about.watch(None)

    def belongs_to(self, owner: object | None, gates: Iterator[Gated], adds_in_bfloat16: bool = False) -> None:
        """From now on ``owner`` takes the raw gradients of ``gates``, which are added up as :class:`RawGradient` says.
        None: backward computes those of Eq. 4 and 5."""
        if owner is not self.owner or (owner is None and self._owner is not None):
            self._owned = set()
            for gate in gates:  # the old and the new owner need different kinds of gradients: drop both
                gate.param.grad = gate.score.grad = None
                watchable = self.shards is None and gate.param.is_leaf
                if watchable:  # raw gradients may stay in the compute dtype
                    gate.param.grad_dtype = gate.param.dtype if owner is None else None
                self._owned |= {id(gate.param), id(gate.score)}
                watched = gate.param if owner is not None and watchable else None
                self.about_raw(gate.name).watch(watched, adds_in_bfloat16)
            self.passes.clear()
            self.ready.clear()
        self._owner = None if owner is None else weakref.ref(owner, self._lose_owner)
        self.has_owner = owner is not None

    def owns(self, param: Tensor, score: Tensor) -> bool:
        """Whether these are tensors of the layer itself: ``torch.func.functional_call`` may have put those of another
        copy of the model in their place."""
        return id(param) in self._owned and id(score) in self._owned

    def about_raw(self, name: str) -> RawGradient:
        """What is known about the gradient of the tensor ``name`` that the owner takes."""
        if name not in self._about:
            self._about[name] = RawGradient()
        return self._about[name]

    # --- transitions
    def drop(self) -> None:
        """The values got another dtype or device, which autograd's version counters do not show."""
        self.ready.clear()
        self.drop_kept()
        self.given.clear()
        self.reads.clear()

    def drop_kept(self) -> None:
        """The masked tensors of finished tasks will not be needed for a while, or are those of other masks."""
        self.kept = KeptTask()
        self._left.clear()

    def keeps_others(self) -> bool:
        """Whether masked tensors of finished tasks are there that are not in use."""
        return bool(self._left)

    def turn(self, before: int | None, row: int | None) -> None:
        """The layer computes with another finished task, given by its row, or (None) with the current scores."""
        self.given = {}
        if row == before:
            return
        most = self.keep_masked
        if before is not None and self.kept and not isinstance(most, bool):
            self._left[before] = self.kept
        self.kept = KeptTask() if row is None else self._left.pop(row, KeptTask())
        while len(self._left) > max(0, most - (row is not None)):
            del self._left[next(iter(self._left))]

    def made_ready(
        self, layer: SubnetLayer, name: str, pair: tuple[Tensor, Tensor], masked: Tensor, tau: Tensor,
        window: Tensor | None,
    ) -> None:  # fmt: skip
        """The gate of a tensor and its scores, which are the ``pair``, was made ahead from their present values. If a
        step made it, the pass before is over. See :class:`Ready`."""
        self.passes.pop(name, None)
        self.traced = False
        following = Pass(tau, masked.dtype, stamp(layer, *pair))
        ready = self.ready.get(name)
        if ready is not None and ready.masked is masked and ready.window is window:
            ready.next = following
        else:
            self.ready[name] = Ready(masked, window, following)

    def restamp(self, layer: SubnetLayer) -> None:
        """The replay of a CUDA graph changed weights and scores, and made the gates of the new ones."""
        for gate in layer.gated():
            ready = self.ready.get(gate.name)
            if ready is not None:
                pair = gate.param, gate.score
                self.made_ready(layer, gate.name, pair, ready.masked, ready.next.tau, ready.window)

    def is_ready(self, layer: SubnetLayer) -> bool:
        """Whether all gates that were made ahead are up to date, and none is missing. True if none are made for this
        layer, and while a finished task is in use."""
        if not (layer.one_pass or self.ready) or layer._active_row is not None:
            return True
        return all(self.ready_gate(layer, gate.name, gate.param, gate.score) is not None for gate in layer.gated())

    def ready_gate(self, layer: SubnetLayer, name: str, param: Tensor, score: Tensor) -> Ready | None:
        """The gate of a tensor that was made ahead, if it is up to date."""
        ready = self.ready.get(name)
        return ready if ready is not None and ready.next.stamp == stamp(layer, param, score) else None

    def pass_in_one(self, layer: SubnetLayer, name: str, param: Tensor, score: Tensor, dtype: torch.dtype) -> Tensor:
        """The masked tensor for a forward pass in the one-pass mode: the one that was made ahead if it is up to date,
        else a new one. Notes the pass in :attr:`passes`."""
        compiling = is_compiling()
        ready = None if compiling else self.ready_gate(layer, name, param, score)
        if ready is not None and ready.next.dtype is dtype:
            masked, last = ready.masked, ready.next
        else:
            masked, tau = ops.gate(param, score, layer.density_of(name), layer.rule, dtype, layer.backend)
            last = Pass(tau, dtype, () if compiling else stamp(layer, param, score))
            self.traced |= compiling
        if not compiling:
            self.noted += 1
        self.note(name, last, waiting=layer.param(name).grad is not None)
        return masked

    def note(self, name: str, last: Pass, waiting: bool) -> None:
        """A forward pass used the gate. ``waiting`` tells whether a gradient of an earlier pass waits for the step."""
        before = self.passes.get(name) if waiting else None
        if before is None or not before.stamp or before.stamp == last.stamp:
            self.passes[name] = last
        elif last.stamp:
            self.passes[name] = last._replace(stamp=MIXED, alone=last.stamp)
        else:  # compiled code does not say when its backward pass begins a new gradient
            self.passes[name] = last._replace(stamp=before.stamp)

    def begin_gradient(self, name: str) -> None:
        """Backward found that the tensor has no gradient any more: the one that was waiting at the last pass is gone,
        and the step need not notice what has changed since then."""
        last = self.passes.get(name)
        if last is not None and last.alone:
            self.passes[name] = last._replace(stamp=last.alone, alone=())

    def take(self, name: str, given: Given, compiling: bool) -> Tensor:
        """The layer computes with a tensor that it was given. In training it can do so once in a pass: where it is used
        again, a Function of its own adds up the gradients in the dtype of the weight."""
        if compiling:
            self.compiled = True  # the pass is noted when it is over: see settle
        elif given.score is not None and torch.is_grad_enabled():
            del self.given[name]
            if given.raw and given.ready is not None:
                self.noted += 1
                self.note(name, given.ready.next, waiting=given.param.grad is not None)
        return given.masked

    def settle(self) -> None:
        """The forward pass of the model is over. Compiled code does not say which tensors it has taken; what is still
        there of its layer was taken if anything was."""
        if self.compiled:
            for name, given in self.given.items():
                if given.raw and given.ready is not None:
                    self.noted += 1
                    self.note(name, given.ready.next, waiting=given.param.grad is not None)
        self.given = {}

    def ahead(
        self, layer: SubnetLayer, name: str, param: Tensor, score: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor] | None:
        """The masked tensor and the threshold that were made ahead for a training forward pass outside the one-pass
        mode, if they are up to date. ``torch.func`` may have put a tensor here that is no Parameter."""
        if not self.gates_ahead or type(param) is not nn.Parameter:
            return None
        compiling = is_compiling()
        if not compiling and recording():
            return None
        self.compute_dtypes[name] = dtype
        ready = None if compiling else self.ready_gate(layer, name, param, score)
        return None if ready is None or ready.next.dtype is not dtype else (ready.masked, ready.next.tau)

    def packed(self, name: str, masks: Tensor, row: int) -> Tensor:
        """The mask of a finished task: a row of ``masks``. If the masked tensor is kept, it is the object by which the
        layer knows that it is the same mask."""
        kept = self.kept.get(name)
        if kept is not None and kept.is_of(masks, row):
            return kept.packed
        self.kept.pop(name, None)
        return masks[row]

    def masked_of_finished(
        self, name: str, param: Tensor, packed: Tensor, dtype: torch.dtype, backend: str | None
    ) -> Tensor:
        """The masked tensor of the finished task in use. Its weights are frozen, so it is made once and kept until the
        task is left (see :attr:`keep_masked`), the layer is moved, or the tensor or the mask is written to."""
        if is_compiling() and not is_exporting():
            self.compiled = True  # so that the model keeps the tensor for the next pass: see ModelGates
        if (
            not self.keep_masked or is_compiling() or recording()
            or param.is_inference() or packed.is_inference()  # autograd counts no versions of these
        ):  # fmt: skip
            return ops.gate_packed(param.detach(), packed, dtype, backend)
        kept = self.kept.get(name)
        same = kept is not None and kept.param is param and kept.packed is packed and kept.masked.dtype is dtype
        if kept is None or not same or not kept.is_right(backend):
            with torch.inference_mode(False):  # a tensor of inference mode could not be used outside it
                masked = ops.gate_packed(param.detach(), packed, dtype, backend)
            now = (param._version, param.data_ptr(), packed._version, packed.data_ptr(), backend)
            kept = self.kept[name] = Kept(masked, param, packed, now)
        return kept.masked
