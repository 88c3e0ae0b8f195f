"""The base of all subnet layers: their scores, masks and gate, and what each kind of layer states about itself.

A subnet layer is a dense layer with a density and a rule; a score for each gated tensor; the packed masks of finished
tasks; and ``active_row``, which says whether the mask comes from the current scores (None) or from a finished task (its
row). The masks, the ids of their tasks and the scores are in ``state_dict``. The union is made from the masks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from .. import ops
from ..ops.autograd import GateForm, RawGate, SubnetGate
from ..ops.fusion import Fusion
from . import refusals, rows
from .densities import Densities, check_densities, density_of
from .gate import Gated, check_gateable
from .gate_state import GateState
from .gathered import gathered
from .reads import hooks_of_saved_tensors, reading
from .scores import ScoreInit, check_score_init, draw
from .shards import shard_of
from .task_ids import TaskId, encode_json
from .transforms import are_active, masked_within

L = TypeVar("L", bound="SubnetLayer")


class SubnetLayer(refusals.KeepsItsWeights):
    """The base of all subnet layers. It comes before the dense class among the bases of a layer.

    There are two kinds. A :class:`~wsn_fast.nn.product_layer.ProductLayer` masks its weight and bias itself; a
    :class:`~wsn_fast.nn.tensors.GatedModule` is any module, of which the gated tensors are masked when they are read.

    Attributes, here for a gated tensor called ``weight``:
        weight: as in the dense layer. In a forward pass whoever reads it gets the masked tensor; see
            :mod:`wsn_fast.nn.reads`.
        weight_score: the scores, of the same shape and dtype; None if the tensor is None.
        weight_masks: ``uint8`` [T, ceil(n / 8)], the packed masks of finished tasks.
        weight_union: ``uint8`` [ceil(n / 8)], the OR of those rows; None before the first task has ended.
        weight_view: the packed mask in use, or None for the mask of the current scores (see :attr:`active_row`).
        tasks: the ids of the rows. Like density and rule, they are saved in the layer's extra state.
        row_tasks: int32 [B], the row of the masks that each row of a batch uses, while several tasks share a pass; None
            otherwise (see :mod:`wsn_fast.continual.mixed_batch`).
        task_density: the density of the task in training if it has one of its own; None means :attr:`density`.
        rule: "magnitude", "value", or a constant threshold such as "value >= 0.005".
        gate_state: what the layer keeps from one forward pass to the next.
    """

    GATED: ClassVar[tuple[str, ...]] = ()
    """The names of the gated tensors."""
    TENSORS: ClassVar[tuple[str, ...]] = ()
    """The names of the gated tensors and of their scores."""
    DENSE: ClassVar[type[nn.Module]]
    """The dense class that :meth:`become_dense` turns a layer into, and by default the one that it is made from."""
    TRANSPOSED: ClassVar[bool] = False
    """Whether the weight is the transpose of the weight of ``DENSE``."""
    SERVES_MIXED_BATCHES: ClassVar[bool] = False
    """Whether ``forward`` obeys :attr:`row_tasks`."""
    OWN: ClassVar[tuple[str, ...]] = (
        "rule", "tasks", "_active_row", "_density", "task_density", "_backend", "row_tasks", "_score_init",
        "gate_state",
    )  # fmt: skip
    """The attributes, without tensors, that :meth:`become_dense` deletes, because a ``DENSE`` has none of them."""

    tasks: list[TaskId]
    task_density: Densities | None
    rule: str

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.TENSORS = tuple(f"{name}{end}" for name in cls.GATED for end in ("", "_score"))
        for name in cls.GATED:
            setattr(cls, name, reading(name))

    def _init_subnet(self, density: float | Mapping[str, float], rule: str, score_init: ScoreInit = "default") -> None:
        """Add scores and empty masks to a layer whose weight and bias exist."""
        self.rule = ops.check_rule(rule)
        self.task_density = None
        self.tasks = []
        self._active_row: int | None = None
        self._backend: str | None = None
        self.row_tasks: Tensor | None = None
        self.gate_state = GateState()
        self._score_init = check_score_init(score_init)
        for name in self.GATED:
            param = self.param(name)
            score = masks = None
            if param is not None:
                check_gateable(name, param)
                score = nn.Parameter(torch.empty_like(param))
                masks = torch.zeros(0, ops.packed_size(param.numel()), dtype=torch.uint8, device=param.device)
            self.register_parameter(f"{name}_score", score)
            self.register_buffer(f"{name}_masks", masks)
            self.register_buffer(f"{name}_union", None, persistent=False)
            self.register_buffer(f"{name}_view", None, persistent=False)
        self.density = density
        self.reset_scores(score_init)

    # --- from a dense layer and back -------------------------------------------------------------------------------
    @classmethod
    def is_made_from(cls, kind: type[nn.Module]) -> bool:
        """Whether :func:`wsn_fast.convert` turns modules of exactly the class ``kind`` into layers of this class."""
        return kind is cls.DENSE

    @classmethod
    def from_dense(
        cls: type[L], module: nn.Module, density: Densities, rule: str, score_init: ScoreInit = "default"
    ) -> L:
        """Turn ``module``, of a class for which :meth:`is_made_from` is true, into a layer of this class, in place."""
        module.__class__ = cls
        assert isinstance(module, cls)
        module._complete()
        module._init_subnet(density, rule, score_init)
        return module

    def _complete(self) -> None:
        """Set the attributes that this class has and the dense class that it is made from does not have."""

    def become_dense(self, params: Mapping[str, nn.Parameter]) -> None:
        """Turn this layer into a module of ``DENSE``, in place; scores and masks are dropped.

        Args:
            params: the new parameters by the names of the gated tensors. The weight has the layout of ``DENSE``.
        """
        self._parameters.update(params)
        for name in self.GATED:
            del self._parameters[f"{name}_score"], self._buffers[f"{name}_masks"]
            for derived in (f"{name}_union", f"{name}_view"):
                del self._buffers[derived]
                self._non_persistent_buffers_set.discard(derived)
        for attribute in self.OWN:
            delattr(self, attribute)
        rows.forget_spare(self)
        self.__class__ = self.DENSE  # type: ignore[assignment]

    # --- settings --------------------------------------------------------------------------------------------------
    @property
    def density(self) -> Densities:
        """The fraction of each gated tensor that a mask keeps, in (0, 1], for tasks without a density of their own; or
        a fraction for each by name. Setting anything else raises ``ValueError``."""
        return self._density

    @density.setter
    def density(self, density: float | Mapping[str, float]) -> None:
        self._density = check_densities(density, [gate.name for gate in self.gated()])

    @property
    def gate_density(self) -> Densities:
        """The density of the mask of the current scores."""
        return self._density if self.task_density is None else self.task_density

    def density_of(self, name: str) -> float:
        """The density of the mask of the current scores of the gated tensor ``name``."""
        return density_of(self.gate_density, name)

    @property
    def backend(self) -> str | None:
        """The backends that run this layer's operations (see :func:`wsn_fast.backends.parse_override`), or None to let
        the library choose. Setting an unknown one raises ``ValueError``. It is not saved, because it depends on the
        machine."""
        return self._backend

    @backend.setter
    def backend(self, backend: str | None) -> None:
        self._backend = ops.check_backend(backend)

    @property
    def active_row(self) -> int | None:
        """The row among :attr:`tasks` whose mask is in use, or None for the mask of the current scores."""
        return self._active_row

    @active_row.setter
    def active_row(self, row: int | None) -> None:
        state, buffers = self.gate_state, self._buffers
        state.turn(self._active_row, row)
        self.__dict__["_active_row"] = row  # the attributes of nn.Module are slow
        # Forward reads the mask and not the number of its row, so that the same compiled code serves every task.
        for name in self.GATED:
            masks = buffers[f"{name}_masks"]
            buffers[f"{name}_view"] = None if row is None or masks is None else state.packed(name, masks, row)

    def gated(self) -> Iterator[Gated]:
        """The gated tensors of this layer: the weight, and the bias if there is one."""
        if self.gate_state.shards is not None:
            yield from (shard.gated() for shard in self.gate_state.shards.values())
            return
        # Optimizers call this at every step, so it avoids the slow attribute access of nn.Module where it can.
        parameters, buffers = self._parameters, self._buffers
        for name in self.GATED:
            param = parameters[name] if name in parameters else self.param(name)
            if param is not None:
                score = f"{name}_score"
                scores = parameters[score] if score in parameters else getattr(self, score)
                # mypy cannot know that a tensor that is not None has scores and masks.
                yield Gated(name, param, scores, buffers[f"{name}_masks"], buffers[f"{name}_union"])  # type: ignore[arg-type]

    @torch.no_grad()
    def reset_scores(self, mode: ScoreInit = "default") -> None:
        """Draw new scores.

        Args:
            mode: "default" draws the scores of weights from Kaiming uniform (a = sqrt 5), and those of biases uniformly
                within 1 / sqrt(fan_in), as the paper's code does; "N01" is standard normal; "U01" is uniform on
                [0, 1); a number is the value of all scores.

        Raises:
            ValueError: ``mode`` is another one.
        """
        for gate in self.gated():
            fill = partial(draw, mode=check_score_init(mode), fan_in=self.fan_in(gate.name))
            shard = shard_of(gate.score)
            fill(gate.score) if shard is None else shard.redraw_score(fill)

    @torch.no_grad()
    def initialise(self, names: Iterable[str]) -> None:
        """Initialise those of the named parameters that have left the meta device.

        Scores are drawn in the mode that the layer was made with. Weights and biases become NaN until they are loaded,
        so that nobody uses them unnoticed.
        """
        for name in names:
            param = self._parameters[name]
            if param is not None and not param.is_meta and name in self.TENSORS:
                if name not in self.GATED:
                    draw(param, self._score_init, self.fan_in(name.removesuffix("_score")))
                else:
                    param.fill_(math.nan)

    def fan_in(self, name: str) -> int:
        """The fan-in that the scores of the gated tensor ``name`` are drawn with. For the weight of a product it is
        counted as torch counts it when it initialises a weight: the elements of ``weight[0]``."""
        raise NotImplementedError

    @torch.no_grad()
    def masks_of_scores(self) -> dict[str, Tensor]:
        """The masks of the current scores by gated tensor, bool, each in the shape of its tensor, or of the shard of
        this process."""
        if self.gate_state.shards is not None:
            return {name: shard.keep() for name, shard in self.gate_state.shards.items()}
        return {
            g.name: ops.topc_mask(g.score, self.density_of(g.name), rule=self.rule, backend=self._backend)
            for g in self.gated()
        }

    def mask(self, name: str, row: int) -> Tensor:
        """The mask of the gated tensor ``name`` for the finished task at ``row`` of :attr:`tasks`: bool, in the shape
        of the tensor."""
        return ops.unpack_mask(getattr(self, f"{name}_masks")[row], self.param(name).shape)

    @torch.inference_mode(False)  # masks are read by training too
    def append_task(self, task: TaskId, packed: Mapping[str, Tensor]) -> None:
        """Store the packed masks of a task that has ended, by the names of the gated tensors, and update the union."""
        for name, bits in packed.items():
            rows.append(self, f"{name}_masks", bits)
            union = self._buffers[f"{name}_union"]
            # In place where there is one, because a CUDA graph may read it.
            setattr(self, f"{name}_union", bits.clone() if union is None else union.bitwise_or_(bits))
        self.tasks = [*self.tasks, task]
        self.gate_state.drop_kept()

    @torch.inference_mode(False)  # the union is read by training too
    def rebuild_union(self) -> None:
        """Compute the unions from the masks again, which are others now."""
        self.gate_state.drop_kept()
        for gate in self.gated():
            if gate.masks.shape[0] == 0 or gate.masks.is_meta:
                setattr(self, f"{gate.name}_union", None)
            elif gate.union is None or gate.union.device != gate.masks.device:
                setattr(self, f"{gate.name}_union", ops.union_packed(gate.masks))
            else:
                gate.union.copy_(ops.union_packed(gate.masks))  # in place, because a CUDA graph may read it

    def masked(self, name: str, dtype: torch.dtype) -> Tensor | None:
        """The masked tensor ``W*m`` (or ``b*m_b``) in ``dtype``, with the mask in use; None if there is no bias.

        With the mask of a finished task the result needs no gradient, because these weights never change again.
        """
        parameters, state = self._parameters, self.gate_state  # faster than the attributes of nn.Module
        param = parameters[name] if name in parameters else self.param(name)
        if param is None:
            return None
        if state.shards is not None:
            return gathered(self, name, param, dtype)
        given = state.given.get(name)
        compiling = is_compiling()
        if (
            given is not None
            and given.is_for(param, dtype, compiling)
            and (compiling or given.may_be_taken(hooks_of_saved_tensors(False)))
        ):
            return state.take(name, given, compiling)
        packed = self._buffers[f"{name}_view"]
        if not compiling and are_active():
            return masked_within(param, packed, dtype)
        if packed is not None:
            return state.masked_of_finished(name, param, packed, dtype, self._backend)
        refusals.check_not_recorded()
        score, union = getattr(self, f"{name}_score"), self._buffers[f"{name}_union"]
        mine = compiling or state.owns(param, score)
        if torch.is_grad_enabled() and self.one_pass and mine:
            # If the tensor is used again before the step, autograd adds up the gradients of both uses.
            again: Any = name in state.passes and (compiling or partial(state.begin_gradient, name))
            masked = state.pass_in_one(self, name, param.detach(), score.detach(), dtype)
            raw: Tensor = RawGate.apply(param, masked, again, None if compiling else state.about_raw(name))
            return raw
        ahead = state.ahead(self, name, param, score, dtype) if torch.is_grad_enabled() else None
        form = GateForm(self.density_of(name), self.rule, dtype, self._backend)
        gated: Tensor = SubnetGate.apply(param, score, union, form, ahead)
        return gated

    def param(self, name: str) -> Any:
        """The gated tensor ``name`` itself, also in a forward pass; None if the layer has none."""
        parameters = self._parameters
        if name in parameters:
            return parameters[name]
        return vars(self)[name] if name in vars(self) else getattr(self, name)

    @property
    def one_pass(self) -> bool:
        """Whether backward hands over raw gradients: the layer has an owner (see :attr:`GateState.owner`), and the user
        has frozen none of its gated tensors and scores."""
        parameters = self._parameters
        return self.gate_state.has_owner and all(
            param is None or param.requires_grad for param in map(parameters.get, self.TENSORS)
        )

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        if self.gate_state.shards is not None:
            self._check_stays(fn)
            return self
        self.gate_state.drop()
        on_meta = [name for name, param in self._parameters.items() if param is not None and param.is_meta]
        super()._apply(fn, recurse)
        self.initialise(on_meta)
        return self

    def _check_stays(self, fn: Any) -> None:
        """Raise ``RuntimeError`` if ``fn``, of ``.to()`` for instance, would return other tensors than it is given."""
        for param in self.parameters(recurse=False):
            like_it = torch.empty(0, dtype=param.dtype, device=param.device)
            if fn(like_it) is not like_it:
                raise RuntimeError("a WSN that is sharded cannot be moved or cast: do that before shard(wsn, mesh)")

    def dtype_of_pass(self, x: Tensor) -> torch.dtype:
        """The dtype of the masked tensors for an input, or a gated tensor, ``x``."""
        return x.dtype

    def fusion(self, dtype: torch.dtype, source: str) -> Fusion:
        """Up to how many rows of a batch this layer uses the fused product (see :mod:`wsn_fast.ops.fusion`), and why.

        Args:
            dtype: the compute dtype.
            source: "scores" in training, "packed" for a finished task.
        """
        return Fusion(0, f"{type(self).__name__} has no product that applies the mask itself")

    def mixed_batch_rows(self) -> int:
        """The largest number of rows at which one pass with :attr:`row_tasks` was measured to be faster than one pass
        for each task; 0 if none was."""
        return 0

    def get_extra_state(self) -> Tensor:
        """The ids of the finished tasks, the densities and the rule as JSON bytes, for ``state_dict``.

        They are not stored in a buffer, because DDP would broadcast a buffer at every step.
        """
        return encode_json({name: getattr(self, name) for name in rows.EXTRA_STATE})

    def set_extra_state(self, state: Tensor) -> None:
        """The inverse of :meth:`get_extra_state`; ``load_state_dict`` calls it. Raises ``ValueError`` for a state that
        is not one of a subnet layer."""
        for name, value in rows.layer_fields(state).items():
            setattr(self, name, value)

    @torch.inference_mode(False)
    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        rows.add_empty_masks(self, state_dict, prefix)
        rows.check_layer(self, state_dict, prefix)
        rows.make_room(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.active_row = None
        self.rebuild_union()

    def extra_repr(self) -> str:
        override = f", backend={self._backend!r}" if self._backend is not None else ""
        return f"{super().extra_repr()}, density={self.gate_density}, rule={self.rule!r}{override}".removeprefix(", ")
