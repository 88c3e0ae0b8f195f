"""What there is in a WSN: tasks, layers, heads, and all that training changes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from ..nn.gate import Gated
from ..nn.gated import SubnetLayer
from ..nn.model_gates import ModelGates
from ..nn.task_ids import TaskId
from . import trainable_state
from .frozen_values import Frozen
from .heads_view import HeadsView
from .model_parts import ModelParts
from .register import TaskRegister
from .view import View

_WITHOUT_TASKS = ("from_pretrained", "push_to_hub", "save_pretrained")
# Not shown of the model. Programs that unwrap models look for ``module``, and would go on without the WSN.
_HIDDEN = ("model", "module")


class Contents(nn.Module):
    """The part of :class:`wsn_fast.WSN` that says what is there."""

    gates: ModelGates
    model: nn.Module
    _parts: ModelParts
    _register: TaskRegister
    _view: View
    _fixed: list[nn.Parameter]

    def __getattr__(self, name: str) -> Any:
        """A public attribute that a WSN does not have is that of its model, such as ``config`` or ``generate``.

        Raises:
            AttributeError: the model does not have it either, or it would save the model without its tasks.
        """
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or name in _HIDDEN or not hasattr(self.model, name):
                raise
            if name in _WITHOUT_TASKS:
                raise AttributeError(
                    f"{name} would leave out the tasks: save wsn.state_dict(), or a plain copy, to_dense(wsn, task)"
                ) from None
            return getattr(self.model, name)

    @property
    def tasks(self) -> list[TaskId]:
        """The finished tasks, in the order in which they ended."""
        return self._register.tasks

    @property
    def current_task(self) -> TaskId | None:
        """The task between ``begin_task`` and ``end_task``, or None."""
        return self._register.current_task

    @property
    def heads(self) -> HeadsView:
        """The heads that exist, by task (see :class:`~wsn_fast.continual.heads_view.HeadsView`): ``task in wsn.heads``,
        ``wsn.heads[task]``, ``list(wsn.heads)``."""
        return HeadsView(self._parts)

    def subnet_layers(self) -> dict[str, SubnetLayer]:
        """The subnet layers of the model by name; a layer used twice appears once."""
        return dict(self._parts.layers)

    def gated(self) -> Iterator[tuple[str, Gated]]:
        """The gated tensors by name, with their scores and masks; one that tied layers share appears once."""
        return self._parts.gated()

    def fixed(self) -> list[nn.Parameter]:
        """The parameters that must not change at all any more: the heads of finished tasks and, after the first task,
        the parameters that are declared ``frozen``."""
        return list(self._fixed)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """As for every module. Those of a sharded WSN are the shards, also where FSDP2 keeps gathered tensors."""
        gates: ModelGates | None = vars(self).get("gates")
        if gates is not None and gates.sharding is not None:
            gates.sharding.reshard()
        return super().named_parameters(*args, **kwargs)

    def _check_whole(self, what: str, way_out: str) -> None:
        """Raise ``RuntimeError`` if the gated tensors are cut into shards, where ``what`` would see parts of them."""
        if self.gates.sharding is not None:
            raise RuntimeError(f"{what} needs whole tensors, and this WSN is sharded: {way_out}")

    # --- the best epoch ---------------------------------------------------------------------------------------------
    def trainable_state(self) -> dict[str, Tensor]:
        """Copy all that training changes (parameters, scores, live buffers), to keep the best epoch for example."""
        self._restore_frozen()
        return {name: tensor.detach().clone() for name, tensor in trainable_state.trainable(self._parts)}

    def load_trainable_state(self, state: Mapping[str, Tensor]) -> None:
        """Put a :meth:`trainable_state` back, in place.

        Raises:
            ValueError: the names or shapes are not those of this model, or the state would change what finished tasks
                use. If this is raised, nothing has been changed.
        """
        self._restore_frozen()
        trainable_state.load(self._parts, state, self._fixed)

    def moving(self) -> list[Frozen]:
        """The tensors that training may change now: each with the packed mask of the elements that it may not change
        (``uint8`` [ceil(n / 8)]), or None if it may change all.

        Raises:
            RuntimeError: no task is in progress, or a finished task is in use.
        """
        if self.current_task is None or self._view.task is not None:
            raise RuntimeError("nothing may change: no task is in progress, or a finished task is in use")
        self._restore_frozen()
        return list(trainable_state.moving(self._parts, self.current_task))

    def _restore_frozen(self) -> None:
        raise NotImplementedError
