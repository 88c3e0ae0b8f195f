"""What all subnet layers share: scores, masks, the gate.

A subnet layer is its dense parent plus: a density and a rule; a score for each gated tensor; the packed masks of
finished tasks; and ``active_row``, which says whether the mask comes from the current scores (None) or from a finished
task (its row). The masks, the ids of their tasks and the scores are in ``state_dict``; what can be derived from them
(the union) is not.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import ops
from .autograd import RawGate, SubnetGate, SubnetProduct
from .backends.shapes import Geometry
from .tasks import TaskId, decode_json, encode_json

_EXTRA_STATE = ("tasks", "density", "task_density", "rule")
SCORE_INITS = ("default", "N01", "U01")


def check_score_init(mode: object) -> str:
    """``mode`` if it is one of ``SCORE_INITS``, else ``ValueError``."""
    if mode not in SCORE_INITS:
        raise ValueError(f"score_init must be one of {SCORE_INITS}, got {mode!r}")
    return str(mode)


def _check_gateable(name: str, param: Tensor) -> None:
    if param.dtype not in ops.SCORE_DTYPES:
        raise TypeError(f"{name} must be float32, float64, bfloat16 or float16, got {param.dtype}")
    if param.numel() == 0:
        raise ValueError(f"{name} must have at least one element, got shape {tuple(param.shape)}")


class Gated(NamedTuple):
    """A gated tensor of a layer with what belongs to it. ``masks`` is [T, ceil(n / 8)] and ``union`` [ceil(n / 8)] or
    None (T = 0)."""

    name: str
    param: Tensor
    score: Tensor
    masks: Tensor
    union: Tensor | None


class RawPass(NamedTuple):
    """What an optimizer needs to know of the forward pass whose raw gradient it takes: the threshold, the dtype of the
    masked tensor, and :meth:`SubnetLayer.stamp` as it was."""

    tau: Tensor
    dtype: torch.dtype
    stamp: tuple[object, ...]


class Ready(NamedTuple):
    """A gate that the optimizer made for the next forward pass while it had weight and scores at hand; see
    :class:`wsn_fast.backends.updates.Next`. ``stamp`` is :meth:`SubnetLayer.stamp` as it was then."""

    masked: Tensor
    tau: Tensor
    window: Tensor
    stamp: tuple[object, ...]


class SubnetLayer(nn.Module):
    """What all subnet layers share; comes before the dense parent among the bases.

    Attributes:
        weight, bias: as in the dense layer.
        weight_score, bias_score: the scores, of the same shape and dtype; None without a bias.
        weight_masks, bias_masks: ``uint8`` [T, ceil(n / 8)], the packed masks of finished tasks.
        weight_union, bias_union: ``uint8`` [ceil(n / 8)], the OR of those rows; None before the first task has ended.
        tasks: the ids of the rows; in ``state_dict`` as part of the layer's extra state, like density and rule.
        weight_view, bias_view: the packed mask in use, or None for the mask of the current scores (see
            :attr:`active_row`).
        last_pass: the forward passes since the last step by gated tensor, for the optimizer in :attr:`raw_owner`.
        ready: what it made for the next ones.
        row_tasks: int32 [B], the row of the masks that each row of a batch uses, while several tasks share a pass; None
            otherwise (see :mod:`wsn_fast.rows`).
        task_density: the density of the task in training if it has one of its own; None means :attr:`density`.
        rule: "magnitude" or "value".
    """

    GATED = ("weight", "bias")
    OWN = (
        "rule", "tasks", "_active_row", "_density", "task_density", "_backend", "row_tasks", "_raw_owner",
        "_raw_ids", "last_pass", "ready", "_score_init",
    )  # fmt: skip
    """The attributes that the dense parent does not have."""

    weight: Tensor
    bias: Tensor | None
    weight_score: Tensor
    weight_masks: Tensor
    weight_union: Tensor | None
    weight_view: Tensor | None
    bias_masks: Tensor
    bias_score: Tensor | None
    tasks: list[TaskId]
    task_density: float | None
    rule: str

    def _init_subnet(self, density: float, rule: str, score_init: str = "default") -> None:
        """Add scores and empty masks to a layer whose dense half exists."""
        self.rule = ops.check_rule(rule)
        self.density = density
        self.task_density = None
        self.tasks = []
        self._active_row: int | None = None
        self._backend: str | None = None
        self.row_tasks: Tensor | None = None
        self._raw_owner: weakref.ref[object] | None = None
        self._raw_ids: set[int] = set()
        self.last_pass: dict[str, RawPass] = {}
        self.ready: dict[str, Ready] = {}
        self._score_init = check_score_init(score_init)
        for name in self.GATED:
            param = getattr(self, name)
            score = masks = None
            if param is not None:
                _check_gateable(name, param)
                score = nn.Parameter(torch.empty_like(param))
                masks = torch.zeros(0, ops.packed_size(param.numel()), dtype=torch.uint8, device=param.device)
            self.register_parameter(f"{name}_score", score)
            self.register_buffer(f"{name}_masks", masks)
            self.register_buffer(f"{name}_union", None, persistent=False)
            self.register_buffer(f"{name}_view", None, persistent=False)
        self.reset_scores(score_init)

    @property
    def density(self) -> float:
        """The fraction of each gated tensor that masks keep unless a task has a density of its own, in (0, 1]. Setting
        anything else is a ``ValueError``."""
        return self._density

    @density.setter
    def density(self, density: float) -> None:
        self._density = ops.check_density(density)

    @property
    def gate_density(self) -> float:
        """The density of the mask of the current scores."""
        return self._density if self.task_density is None else self.task_density

    @property
    def backend(self) -> str | None:
        """An override of what runs this layer's operations (see :func:`wsn_fast.backends.parse_override`), or None for
        what is chosen by itself. Setting an unknown one is a ``ValueError``. Not saved: it is about this machine."""
        return self._backend

    @backend.setter
    def backend(self, backend: str | None) -> None:
        self._backend = ops.check_backend(backend)

    @property
    def raw_owner(self) -> object | None:
        """The one-pass optimizer (:mod:`wsn_fast.optim`) that takes the raw gradient of the masked weight, while it is
        alive; None for gradients as Eq. 4 and 5 have them."""
        return None if self._raw_owner is None else self._raw_owner()

    @raw_owner.setter
    def raw_owner(self, optimizer: object | None) -> None:
        if optimizer is not self.raw_owner or (optimizer is None and self._raw_owner is not None):
            for gate in self.gated():  # a gradient of the one kind is nothing for the other
                gate.param.grad = gate.score.grad = None
                if gate.param.is_leaf:  # raw gradients may stay in the compute dtype
                    gate.param.grad_dtype = gate.param.dtype if optimizer is None else None
            self.last_pass.clear()
            self.ready.clear()
            self._raw_ids = {id(t) for gate in self.gated() for t in (gate.param, gate.score)}
        self._raw_owner = None if optimizer is None else weakref.ref(optimizer)

    @property
    def one_pass(self) -> bool:
        """Whether backward hands over raw gradients: there is a :attr:`raw_owner`, and nothing here is frozen by
        hand."""
        # All parameters of a subnet layer are gated tensors and their scores.
        return self.raw_owner is not None and all(p is None or p.requires_grad for p in self._parameters.values())

    def __getstate__(self) -> dict[str, Any]:
        # A copy has no optimizer.
        return {**self.__dict__, "_raw_owner": None, "last_pass": {}, "ready": {}}

    @property
    def active_row(self) -> int | None:
        """The row among :attr:`tasks` whose mask is in use, or None for the mask of the current scores."""
        return self._active_row

    @active_row.setter
    def active_row(self, row: int | None) -> None:
        self._active_row = row
        # Forward sees the mask and not its number, so that compiled code serves every task.
        for gate in self.gated():
            setattr(self, f"{gate.name}_view", None if row is None else gate.masks[row])

    def gated(self) -> Iterator[Gated]:
        """The gated tensors that this layer has: the weight, and the bias if there is one."""
        # Past nn.Module's attribute access where it can be: optimizers come here at every step.
        parameters, buffers = self._parameters, self._buffers
        for name in self.GATED:
            param = parameters[name] if name in parameters else getattr(self, name)
            if param is not None:
                score = f"{name}_score"
                scores = parameters[score] if score in parameters else getattr(self, score)
                # mypy cannot know that what belongs to a tensor is there when the tensor is.
                yield Gated(name, param, scores, buffers[f"{name}_masks"], buffers[f"{name}_union"])  # type: ignore[arg-type]

    @torch.no_grad()
    def reset_scores(self, mode: str = "default") -> None:
        """Draw new scores: "default" is Kaiming uniform (a = sqrt 5) for weights and uniform within 1 / sqrt(fan_in)
        for biases, as in the paper's code; "N01" is standard normal; "U01" is uniform on [0, 1). Another mode is a
        ``ValueError``."""
        mode = check_score_init(mode)
        for gate in self.gated():
            self._draw(gate.score, mode)

    def _draw(self, score: Tensor, mode: str) -> None:
        if mode == "default":
            # Both default initialisations are uniform within the same bound: gain(sqrt 5) * sqrt(3 / fan_in) = 1 /
            # sqrt(fan_in).
            bound = 1 / math.sqrt(self._fan_in())
            nn.init.uniform_(score, -bound, bound)
        elif mode == "N01":
            nn.init.normal_(score)
        else:
            nn.init.uniform_(score)

    @torch.no_grad()
    def initialise(self, names: Iterable[str]) -> None:
        """Initialise parameters that have just left the meta device, if they have: scores are drawn as the layer was
        told when it was made, and weights and biases are NaN until they are loaded, so that none is used unnoticed."""
        for name in names:
            param = self._parameters[name]
            if param is not None and not param.is_meta:
                if name.endswith("_score"):
                    self._draw(param, self._score_init)
                else:
                    param.fill_(math.nan)

    def _fan_in(self) -> int:
        return self.weight[0].numel()

    @torch.no_grad()
    def masks_of_scores(self) -> dict[str, Tensor]:
        """The boolean mask of the current scores for each gated tensor, by its name."""
        return {
            g.name: ops.topc_mask(g.score, self.gate_density, rule=self.rule, backend=self._backend)
            for g in self.gated()
        }

    def mask(self, name: str, row: int) -> Tensor:
        """The boolean mask of a finished task (``row`` among :attr:`tasks`) for the gated tensor ``name``, in its
        shape."""
        return ops.unpack_mask(getattr(self, f"{name}_masks")[row], getattr(self, name).shape)

    @torch.no_grad()
    def append_task(self, task: TaskId, packed: Mapping[str, Tensor]) -> None:
        """Store the packed masks of a task that has ended, by the names of the gated tensors, and update the union."""
        for name, bits in packed.items():
            rows = torch.cat([getattr(self, f"{name}_masks"), bits.unsqueeze(0)])
            setattr(self, f"{name}_masks", rows)
        self.tasks = [*self.tasks, task]
        self.rebuild_union()

    def rebuild_union(self) -> None:
        """Derive the unions from the masks again."""
        for gate in self.gated():
            if gate.masks.shape[0] == 0 or gate.masks.is_meta:
                setattr(self, f"{gate.name}_union", None)
            elif gate.union is None or gate.union.device != gate.masks.device:
                setattr(self, f"{gate.name}_union", ops.union_packed(gate.masks))
            else:
                gate.union.copy_(ops.union_packed(gate.masks))  # in place, for a CUDA graph that reads it

    def masked(self, name: str, dtype: torch.dtype) -> Tensor | None:
        """``W*m`` (or ``b*m_b``) in ``dtype``, as this layer uses it now; None without a bias.

        With the mask of a finished task the result is a constant: its weights never change again.
        """
        param = getattr(self, name)
        if param is None:
            return None
        packed = self._buffers[f"{name}_view"]
        if packed is not None:
            return ops.gate_packed(param.detach(), packed, dtype, self._backend)
        score, union = getattr(self, f"{name}_score"), self._buffers[f"{name}_union"]
        # Not for the parameters of another copy of the model (torch.func.functional_call).
        mine = torch.compiler.is_compiling() or {id(param), id(score)} <= self._raw_ids
        if torch.is_grad_enabled() and self.one_pass and mine:
            # Autograd adds the gradients of several uses before the weight sees them.
            again = name in self.last_pass
            raw: Tensor = RawGate.apply(param, self._masked_ahead(name, param.detach(), score.detach(), dtype), again)
            return raw
        masked: Tensor = SubnetGate.apply(param, score, self.gate_density, self.rule, union, dtype, self._backend)
        return masked

    def _masked_ahead(self, name: str, param: Tensor, score: Tensor, dtype: torch.dtype) -> Tensor:
        """The gate for a one-pass optimizer: the one that it made ahead, if that is still the one."""
        compiling = torch.compiler.is_compiling()
        stamp = () if compiling else self.stamp(param, score)
        ready = None if compiling else self.ready.get(name)
        if ready is not None and ready.masked.dtype is dtype and ready.stamp == stamp:
            masked, tau = ready.masked, ready.tau
        else:
            masked, tau = ops.gate(param, score, self.gate_density, self.rule, dtype, self._backend)
        before = self.last_pass.get(name)
        if before is not None and getattr(self, name).grad is not None:
            stamp = before.stamp  # a gradient waits that came from there: the step has to see what changed since
        self.last_pass[name] = RawPass(tau, dtype, stamp)
        return masked

    def stamp(self, param: Tensor, score: Tensor) -> tuple[object, ...]:
        """What the gate of a tensor depends on, as far as Python can see: an edit through ``.data`` or NumPy does not
        show."""
        return (
            param._version, score._version, param.data_ptr(), score.data_ptr(), self.rule, self.gate_density,
        )  # fmt: skip

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        # Another dtype or device, written past autograd's eyes, and perhaps to the same address.
        self.ready.clear()
        on_meta = [name for name, param in self._parameters.items() if param is not None and param.is_meta]
        super()._apply(fn, recurse)
        self.initialise(on_meta)
        return self

    def is_ready(self) -> bool:
        """Whether the gates that a one-pass optimizer made ahead are all still right; True without one."""
        if not self.one_pass or self._active_row is not None:
            return True
        ready = [self.ready.get(gate.name) for gate in self.gated()]
        gates = zip(ready, self.gated(), strict=True)
        return all(r is not None and r.stamp == self.stamp(gate.param, gate.score) for r, gate in gates)

    def restamp(self) -> None:
        """Take the gates made ahead for those of the weights and scores of now: a replayed CUDA graph made them."""
        for gate in self.gated():
            if gate.name in self.ready:
                stamp = self.stamp(gate.param, gate.score)
                self.ready[gate.name] = self.ready[gate.name]._replace(stamp=stamp)

    def compute_dtype(self, x: Tensor) -> torch.dtype:
        """The dtype in which autocast, if it is on, would run the dense layer; else that of the weight."""
        kind = x.device.type
        # Like autocast itself, which leaves float64 alone and does not know meta tensors.
        if self.weight.dtype is torch.float64 or x.is_meta:
            return self.weight.dtype
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.weight.dtype

    def _mask_source(self) -> str:
        """Where the mask of the weight comes from: "scores", or "packed" for a finished task."""
        return "scores" if self.weight_view is None else "packed"

    def _product(
        self, x: Tensor, bias: Tensor | None, geometry: Geometry | None, groups: int = 1, transposed: bool = False
    ) -> Tensor:
        """The product of ``x``, in the compute dtype, with the masked weight, which is not written to memory."""
        packed = self.weight_view
        weight, score = (self.weight, self.weight_score) if packed is None else (self.weight.detach(), None)
        result: Tensor = SubnetProduct.apply(
            x, weight, score, bias, self.gate_density, self.rule, self.weight_union, packed, geometry, groups,
            transposed, self._backend,
        )  # fmt: skip
        return result

    def _takes(self, x: Tensor, dtype: torch.dtype) -> bool:
        """Whether a fused product may have ``x``; what else there is to say about it, torch's own product says."""
        if self.one_pass and self.weight_view is None:
            return False
        if self.weight.dtype not in ops.FUSED_DTYPES or self.weight_score.dtype not in ops.FUSED_DTYPES:
            return False
        return x.device == self.weight.device and (x.dtype is dtype or torch.is_autocast_enabled(x.device.type))

    def get_extra_state(self) -> Tensor:
        """The ids of the finished tasks, the densities and the rule as JSON bytes, for ``state_dict``. Not a buffer,
        which DDP would broadcast at every step."""
        return encode_json({name: getattr(self, name) for name in _EXTRA_STATE})

    def set_extra_state(self, state: Tensor) -> None:
        """The inverse of :meth:`get_extra_state`, called by ``load_state_dict``. ``ValueError`` for another's state."""
        for name, value in decode_json(state).items():
            if name not in _EXTRA_STATE:
                raise ValueError(f"the extra state of a subnet layer has no {name!r}")
            setattr(self, name, value)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # A checkpoint may hold more tasks than this layer knows: make room, so that torch's own shape check decides
        # the rest.
        for gate in self.gated():
            own, incoming = gate.masks, state_dict.get(f"{prefix}{gate.name}_masks")
            if isinstance(incoming, Tensor) and incoming.ndim == 2 and incoming.shape[1] == own.shape[1]:
                setattr(self, f"{gate.name}_masks", own.new_zeros(incoming.shape))
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.active_row = None
        self.rebuild_union()

    def extra_repr(self) -> str:
        override = "" if self._backend is None else f", backend={self._backend!r}"
        return f"{super().extra_repr()}, density={self.gate_density}, rule={self.rule!r}{override}"
