"""Whether a model shows what is kept of the finished task in use."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from .. import ops
from ..nn import per_task
from ..nn.task_ids import TaskId
from ..ops.same_bits import same_bits
from .fingerprints import Drift, ForgottenError
from .model_parts import ModelParts

_HOW = "(as shown: call use_task again)"


def check(parts: ModelParts, task: TaskId | None, tasks: Sequence[TaskId]) -> None:
    """Check that the model computes with what is kept of ``task``: its per-task values, its masks, the masked tensors
    that are kept while it is in use, and its heads.

    Args:
        parts: the parts of the model.
        task: the finished task in use; None, and nothing is checked, if the current scores are.
        tasks: the finished tasks, in the order of their rows.

    Raises:
        ForgottenError: something else is shown; the message names the tensors.
    """
    if task is not None:
        drifts = [Drift(task, name, _HOW) for name in _changed(parts, task, tasks.index(task))]
        if drifts:
            raise ForgottenError(drifts)


def _changed(parts: ModelParts, task: TaskId, row: int) -> Iterator[str]:
    for item in parts.owned:
        per_task_value = item.kind == "per_task"
        if per_task_value and not same_bits(item.tensor, per_task.value(item.module, item.attribute, row)):
            yield item.name
    for prefix, layer in parts.layers.items():
        for gate in layer.gated():
            name, packed = f"{prefix}.{gate.name}".lstrip("."), gate.masks[row]
            view, kept = layer._buffers[f"{gate.name}_view"], layer.gate_state.kept.get(gate.name)
            if view is None or not same_bits(view, packed):
                yield f"{name} (mask)"
            elif kept is not None and kept.param is gate.param and kept.is_right(layer.backend):
                masked = ops.gate_packed(gate.param.detach(), packed, kept.masked.dtype, layer.backend)
                if not same_bits(kept.masked, masked):
                    layer.gate_state.drop_kept()  # the next forward pass makes them from what is kept of the task
                    yield f"{name} (masked)"
    for prefix, heads in parts.heads.items():
        if heads.active != task:
            yield f"{prefix} (head)".lstrip()
