"""convert: turns an existing model into a subnet model.

A layer is converted by changing its class in place, as torch does with a lazy module once its shape is known. So the
module, its Parameters, its hooks and all references to it stay the same objects, a module that is used at two paths
stays one module, and no weight is copied. All checks come before the first change.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from .. import ops
from ..nn import per_task
from ..nn.gated import SubnetLayer
from ..nn.heads import TaskHeads
from ..nn.scores import check_score_init
from .checks import BATCH_NORM_CLASSES, Gate, check_batch_norm, check_layer, check_ties
from .new_heads import Heads, HeadSpec, make_heads, within_heads
from .patterns import Patterns, as_patterns
from .selection import FilterFn, Names, Selection, all_names, choose, densities_of, shown, subnet_class_of


@torch.inference_mode(False)  # what is added here is trained
def convert(
    model: nn.Module,
    density: float | Mapping[str, float] = 0.5,
    *,
    rule: str = "magnitude",
    filter_fn: FilterFn | None = None,
    target_modules: Patterns | None = None,
    exclude_modules: Patterns | None = None,
    heads: str | Mapping[str, HeadSpec] | None = None,
    batch_norm: str = "per_task",
    score_init: str = "default",
) -> nn.Module:
    """Turn the linear and convolution layers of a model into subnet layers, in place, and keep their weights.

    Layers are converted if their type is exactly ``nn.Linear``, ``nn.Conv1d/2d/3d``, ``nn.ConvTranspose1d/2d/3d`` or
    Hugging Face's ``Conv1D``. Other modules stay as they are, and so do subnet layers. Tied layers share their scores
    as they share their weight, and normalisation layers become per-task. Where linear layers of an
    ``nn.TransformerEncoderLayer`` are converted, its inference fast path is switched off, because it would bypass the
    masks. Build optimizers afterwards, because the scores are new parameters.

    A name pattern is a full module name, the end of a name after a dot (``"fc1"`` for ``"blocks.0.fc1"``), or an
    ``fnmatch`` pattern for the full name. A pattern that matches nothing is an error, so that a typo does not pass
    silently.

    Args:
        model: the model, which may be a single layer, on any device. A large model may be on the meta device and get
            its memory later (:func:`wsn_fast.materialize`). Only the scores need new memory.
        density: the fraction kept, in (0, 1]; one number for all layers, or numbers by name pattern. The first match
            counts, and every layer needs a match (``"*"`` matches all the rest).
        rule: "magnitude" (the paper's code) or "value" (CLArena); see :func:`wsn_fast.topc_threshold`.
        filter_fn: called with each layer to convert and its name; where it returns false, the layer stays dense.
        target_modules: name patterns of the layers to convert; None means all.
        exclude_modules: name patterns of layers, or of attention modules, to leave as they are.
        heads: classifiers to replace by :class:`TaskHeads`. ``"fc"`` is the name of a module and gives each task a
            head like it: a new ``nn.Linear``, or a copy of any other module (see :meth:`TaskHeads.of`). ``{"fc": 5}``
            gives each task a head of width 5. ``{"fc": [0, "a"]}`` also makes the heads of these two tasks at once.
            ``{"fc": {0: 5, "a": 2}}`` makes them with a width for each. The weights and hooks of an ``nn.Linear`` are
            dropped. Nothing inside a head is converted.
        batch_norm: "per_task" keeps statistics and affine parameters for each task; "stateless" removes both from
            every ``nn.BatchNorm`` outside of heads, which then uses the statistics of the batch only, as in the paper.
        score_init: "default", "N01" or "U01"; see :meth:`SubnetLayer.reset_scores`.

    Returns:
        ``model`` itself.

    Raises:
        TypeError: an argument is of a wrong type.
        ValueError: an argument has a bad value or matches nothing; there is no layer to convert; or a layer cannot be
            converted faithfully, because it is uninitialised or parametrized, because it sits in an attention module
            that bypasses it, or because it shares a weight with something that is not converted.

        If one of these is raised, nothing has been changed.

    Warns:
        UserWarning: a layer that no argument leaves out stays dense, because its class only derives from one of those
            above.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    rule, score_init = ops.check_rule(rule), check_score_init(score_init)
    targets = None if target_modules is None else as_patterns("target_modules", target_modules)
    excluded = None if exclude_modules is None else as_patterns("exclude_modules", exclude_modules)
    names = all_names(model)
    new_heads = make_heads(names, heads)
    of_heads = within_heads(names, new_heads)
    chosen = choose(names, Selection(targets, excluded, filter_fn), of_heads)
    gates = {m: Gate(d, rule) for m, d in densities_of(names, chosen, density).items()}
    for module in chosen:
        check_layer(module, shown(names[module][0]))
    check_ties(names, gates, of_heads)
    check_batch_norm(names, batch_norm)

    _put_heads(names, new_heads)
    _change_classes(names, gates, score_init)
    in_heads = {m for heads in model.modules() if isinstance(heads, TaskHeads) for m in heads.heads.modules()}
    for module in model.modules():
        if batch_norm == "stateless" and isinstance(module, BATCH_NORM_CLASSES) and module not in in_heads:
            _make_stateless(module)
        if per_task.is_norm(module) and module not in in_heads:
            per_task.mark(module, per_task.norm_tensors(module))
        _disable_fast_path(module)
    return model


def _put_heads(names: Names, new_heads: Heads) -> None:
    for parent in names:
        for child_name, child in parent._modules.items():
            if child is not None and child in new_heads:
                parent._modules[child_name] = new_heads[child]


def _change_classes(names: Names, gates: Mapping[nn.Module, Gate], score_init: str) -> None:
    scores = {id(g.param): g.score for m in names if isinstance(m, SubnetLayer) for g in m.gated()}
    for module, (density, rule) in gates.items():
        subnet = subnet_class_of(module)
        assert subnet is not None
        layer = subnet.from_dense(module, density, rule, score_init)
        for gate in layer.gated():
            setattr(layer, f"{gate.name}_score", scores.setdefault(id(gate.param), gate.score))


def _make_stateless(norm: nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.SyncBatchNorm) -> None:
    """Bring ``norm`` into the state that its constructor makes for ``affine=False, track_running_stats=False``."""
    norm.affine = norm.track_running_stats = False
    for name in ("weight", "bias"):
        norm.register_parameter(name, None)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        norm.register_buffer(name, None)


def _disable_fast_path(module: nn.Module) -> None:
    """Make torch's encoder call its layers in inference, where it would read their weights without calling them."""
    if isinstance(module, nn.TransformerEncoderLayer) and _has_subnet(module.children()):
        # 0 tells torch that there is no fast path for this activation. It does not change the activation itself.
        module.activation_relu_or_gelu = 0
    if isinstance(module, nn.TransformerEncoder) and _has_subnet(module.modules()):
        module.use_nested_tensor = False


def _has_subnet(modules: Iterable[nn.Module]) -> bool:
    return any(isinstance(module, SubnetLayer) for module in modules)
