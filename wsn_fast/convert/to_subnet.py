"""convert: turns an existing model into a subnet model.

A layer is converted by changing its class in place, as torch does with a lazy module once its shape is known. So the
module, its Parameters, its hooks and all references to it stay the same objects, a module that is used at two paths
stays one module, and no weight is copied. All checks come before the first change.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from .. import ops
from ..nn import per_task
from ..nn.gated import SubnetLayer
from ..nn.heads import TaskHeads
from ..nn.reads import share_scope
from ..nn.registry import subnet_class
from ..nn.scores import ScoreInit, check_score_init
from . import report, slices
from .checks import BATCH_NORM_CLASSES, Gate, check_batch_norm, check_modules, check_ties
from .new_heads import Heads, HeadSpec, make_heads, within_heads
from .patterns import Patterns, as_patterns
from .problems import Problems
from .selection import Chosen, FilterFn, Names, Selection, all_names, choose, densities_of


@torch.inference_mode(False)  # what is added here is trained
def convert(
    model: nn.Module,
    density: float | Mapping[str, slices.Density] = 0.5,
    *,
    rule: str = "magnitude",
    filter_fn: FilterFn | None = None,
    target_modules: Patterns | None = None,
    exclude_modules: Patterns | None = None,
    heads: str | Mapping[str, HeadSpec] | None = None,
    batch_norm: str = "per_task",
    score_init: ScoreInit = "default",
) -> nn.Module:
    """Turn a model into a subnet model, in place, and keep its weights: gate its matrices and biases.

    Outside of heads and normalisation layers, linear and convolution layers are gated. So is, in embeddings, attention,
    recurrent layers, experts and modules of any other class, every Parameter with at least two dimensions longer than 1
    and every one whose name contains "bias". There, other vectors and constant Parameters (``requires_grad=False``)
    stay as they are and need an owner, as buffers do (see :class:`wsn_fast.WSN`). Normalisation layers become per-task.

    Layers that multiply with a weight get fast classes (:class:`FastSubnetLinear` and so on). Other modules compute as
    before, and get the masked tensor when they read an attribute: in a forward pass of the model, also when another
    module reads it (tied decoders, fused attention, torch's fast paths for transformers). Tied tensors share their
    scores as they share their values. Build optimizers afterwards, because the scores are new parameters.

    A name pattern is a full name of a module or Parameter, the end of a name after a dot (``"fc1"`` for
    ``"blocks.0.fc1"``), or an ``fnmatch`` pattern for the full name. The name of a module stands for everything in it.
    A pattern that matches nothing is an error, so that a typo does not pass silently.

    Logs, in the logger ``wsn_fast``, how many parameters are gated, and which are left out and why.

    Args:
        model: the model, which may be a single layer, on any device. A large model may be on the meta device and get
            its memory later (:func:`wsn_fast.materialize`). Only the scores need new memory.
        density: the fraction kept, in (0, 1]; one number for all layers, or numbers by name pattern. The first match
            counts, and every tensor needs a match (``"*"`` matches all the rest). For the ``in_proj_weight`` of an
            ``nn.MultiheadAttention`` three numbers, as in ``{"in_proj_weight": (0.3, 0.3, 0.5), "*": 0.4}``, are those
            of query, key and value, which become Parameters of their own.
        filter_fn: called with each module and its name; where it returns false, the module stays dense.
        target_modules: name patterns of what is gated; None means everything above. A pattern that names a Parameter
            itself gates it also if it is a vector.
        exclude_modules: name patterns of what is left as it is.
        rule: "magnitude" (the paper's code) or "value" (CLArena); see :func:`wsn_fast.topc_threshold`. A rule such as
            "value >= 0.005" keeps every score of at least this number, whatever the density.
        heads: classifiers to replace by :class:`TaskHeads`. ``"fc"`` is the name of a module and gives each task a
            head like it: a new ``nn.Linear``, or a copy of any other module (see :meth:`TaskHeads.of`). ``{"fc": 5}``
            gives each task a head of width 5. ``{"fc": [0, "a"]}`` also makes the heads of these two tasks at once.
            ``{"fc": {0: 5, "a": 2}}`` makes them with a width for each. The weights and hooks of an ``nn.Linear`` are
            dropped. Nothing inside a head is converted.
        batch_norm: "per_task" keeps statistics and affine parameters for each task; "stateless" removes both from
            every ``nn.BatchNorm`` outside of heads, which then uses the statistics of the batch only, as in the paper.
        score_init: "default", "N01", "U01" or a number; see :meth:`SubnetLayer.reset_scores`.

    Returns:
        ``model`` itself.

    Raises:
        TypeError: an argument is of a wrong type.
        ValueError: an argument has a bad value or matches nothing; there is nothing to gate; a module is uninitialised,
            or does with its weight what a masked weight does not allow; or a tied parameter would not be gated
            everywhere. The message lists everything that was found.

        If one of these is raised, nothing has been changed.

    Warns:
        UserWarning: less than half of the floating parameters outside of heads and normalisation layers are gated, and
            no argument asked for that.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    rule, score_init = ops.check_rule(rule), check_score_init(score_init)
    targets = None if target_modules is None else as_patterns("target_modules", target_modules)
    excluded = None if exclude_modules is None else as_patterns("exclude_modules", exclude_modules)
    names = all_names(model)
    new_heads = make_heads(names, heads)
    of_heads = within_heads(names, new_heads)
    problems = Problems()
    chosen, left = choose(names, Selection(targets, excluded, filter_fn), of_heads, problems)
    gates = {m: Gate(d, rule) for m, d in densities_of(names, chosen, density, problems).items()}
    check_modules(names, chosen, problems)
    check_ties(names, chosen, gates, of_heads, problems)
    check_batch_norm(names, batch_norm, problems)
    problems.check()

    _put_heads(names, new_heads)
    _change_classes(names, chosen, gates, score_init)
    in_heads = {m for heads in model.modules() if isinstance(heads, TaskHeads) for m in heads.heads.modules()}
    for module in model.modules():
        if batch_norm == "stateless" and isinstance(module, BATCH_NORM_CLASSES) and module not in in_heads:
            _make_stateless(module)
        if per_task.is_norm(module) and module not in in_heads:
            per_task.mark(module, per_task.norm_tensors(module))
    share_scope(model, [module for module in model.modules() if isinstance(module, SubnetLayer)])
    report.tell(model, left)
    return model


def _put_heads(names: Names, new_heads: Heads) -> None:
    for parent in names:
        for child_name, child in parent._modules.items():
            if child is not None and child in new_heads:
                parent._modules[child_name] = new_heads[child]


def _change_classes(names: Names, chosen: Chosen, gates: Mapping[nn.Module, Gate], score_init: ScoreInit) -> None:
    scores = {id(g.param): g.score for m in names if isinstance(m, SubnetLayer) for g in m.gated()}
    classes = {module: subnet_class(module, attributes) for module, attributes in chosen.items()}
    for module, kind in classes.items():  # when all classes exist: a class of the user may not allow to derive from it
        if any(module._parameters.get(attribute) is None for attribute in chosen[module]):
            slices.split(module)
        layer = kind.from_dense(module, *gates[module], score_init)
        for gate in layer.gated():
            setattr(layer, f"{gate.name}_score", scores.setdefault(id(gate.param), gate.score))


def _make_stateless(norm: nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.SyncBatchNorm) -> None:
    """Bring ``norm`` into the state that its constructor makes for ``affine=False, track_running_stats=False``."""
    norm.affine = norm.track_running_stats = False
    for name in ("weight", "bias"):
        norm.register_parameter(name, None)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        norm.register_buffer(name, None)
