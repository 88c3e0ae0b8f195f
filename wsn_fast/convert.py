"""Existing models to subnet models.

A layer is converted by changing its class in place, as torch does when a lazy module learns its shape: the module,
its Parameters, its hooks and all references to it stay what they were, a module used at two paths stays one, and no
weight is copied. All checks come before the first change.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from . import ops, per_task
from .heads import TaskHeads
from .layers import FastSubnetConv1d, FastSubnetConv2d, FastSubnetConv3d, FastSubnetLinear, FastSubnetTransposedLinear
from .patterns import Patterns, as_patterns, matches
from .subnet import SubnetLayer, check_score_init
from .tasks import TaskId

FilterFn = Callable[[nn.Module, str], bool]
HeadSpec = Mapping[TaskId, int] | Iterable[TaskId] | int
Names = dict[nn.Module, list[str]]
Heads = dict[nn.Module, TaskHeads]

BATCH_NORMS = ("per_task", "stateless")

_SUBNET_CLASSES: tuple[tuple[type[nn.Module], type[SubnetLayer]], ...] = (
    (nn.Linear, FastSubnetLinear),
    (nn.Conv1d, FastSubnetConv1d),
    (nn.Conv2d, FastSubnetConv2d),
    (nn.Conv3d, FastSubnetConv3d),
)
_HF_CONV1D = ("transformers.pytorch_utils", "Conv1D")

# Classes, by module and name, that use the weights of linear layers inside them without calling those layers.
_WEIGHT_READERS = (
    ("torch.nn.modules.activation", "MultiheadAttention"),
    ("torchvision.models.swin_transformer", "ShiftedWindowAttention"),
    ("timm.models.beit", "Attention"),
    ("timm.models.eva", "EvaAttention"),
    ("timm.models.swin_transformer_v2", "WindowAttention"),
)


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
    """Turn the linear and convolution layers of a model into subnet layers, in place, their weights kept.

    Converted are layers whose type is exactly ``nn.Linear``, ``nn.Conv1d/2d/3d`` or Hugging Face's ``Conv1D``. All
    else is left alone, subnet layers included. Tied layers share their scores as they share their weight, and
    normalisation layers become per-task. Where linear layers of an ``nn.TransformerEncoderLayer`` are converted, its
    inference fast path, which would bypass the masks, is switched off. Build optimizers afterwards: the scores are
    new parameters.

    A name pattern is a full module name, the end of one after a dot (``"fc1"`` for ``"blocks.0.fc1"``), or an
    ``fnmatch`` pattern for the full name. One that matches nothing is an error: a typo must not pass silently.

    Args:
        model: the model, which may be a single layer, on any device; on "meta" for large ones, which get their memory
            later (:func:`wsn_fast.materialize`). Only scores need memory here.
        density: the fraction kept, in (0, 1], for all layers, or by name pattern: the first match counts, and every
            layer needs one (``"*"`` takes all the rest).
        rule: "magnitude" (the paper's code) or "value" (CLArena); see :func:`wsn_fast.topc_threshold`.
        filter_fn: called with each layer to convert and its name; where it answers false, the layer stays dense.
        target_modules: name patterns of the layers to convert; None means all.
        exclude_modules: name patterns of layers, or of attention modules, to leave as they are.
        heads: classifiers to replace by :class:`TaskHeads` (their weights and hooks are dropped): the name of an
            ``nn.Linear``, for heads of its width; or a mapping from such names to the width of all heads, to task
            ids, or to a mapping from task ids to widths.
        batch_norm: "per_task" keeps statistics and affine parameters for each task; "stateless" takes both from every
            ``nn.BatchNorm``, which then uses batch statistics only, as in the paper.
        score_init: "default", "N01" or "U01"; see :meth:`SubnetLayer.reset_scores`.

    Returns:
        ``model`` itself.

    Raises:
        TypeError: an argument is of a wrong type.
        ValueError: an argument has a bad value or matches nothing; there is no layer to convert; or one cannot be
            converted faithfully: it is uninitialised or parametrized, sits in an attention module that bypasses it,
            or shares a weight with something that is not converted. Nothing has been changed then.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    rule, score_init = ops.check_rule(rule), check_score_init(score_init)
    targets = None if target_modules is None else as_patterns("target_modules", target_modules)
    excluded = None if exclude_modules is None else as_patterns("exclude_modules", exclude_modules)
    names = _names(model)
    new_heads = _new_heads(names, heads)
    chosen = _choose(names, _Selection(targets, excluded, filter_fn), new_heads)
    gates = {m: _Gate(d, rule) for m, d in _densities(names, chosen, density).items()}
    for module in chosen:
        _check_layer(module, _shown(names[module][0]))
    _check_ties(names, gates, new_heads)
    _check_batch_norm(names, batch_norm)

    _put_heads(names, new_heads)
    _change_classes(names, gates, score_init)
    for module in model.modules():
        if batch_norm == "stateless" and isinstance(module, _BatchNorm):
            _make_stateless(module)
        if per_task.is_norm(module):
            per_task.mark(module, per_task.norm_tensors(module))
        _disable_fast_path(module)
    return model


# --- names --------------------------------------------------------------------------------------------------
def _names(model: nn.Module) -> Names:
    """Every module with all its names, in order: one that is used at two paths has two."""
    names: Names = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
        if any(is_lazy(t) for t in (*module._parameters.values(), *module._buffers.values())):
            raise ValueError(f"{_shown(name)} is not initialised yet: run a batch through the model first")
    return names


def _shown(name: str) -> str:
    return name or "(the model itself)"


def _matches(pattern: str, names: Iterable[str]) -> bool:
    return any(matches(pattern, name) for name in names)


class _Selection(NamedTuple):
    """Which layers the user wants converted. ``names`` are all names of one module."""

    targets: tuple[str, ...] | None
    excluded: tuple[str, ...] | None
    filter_fn: FilterFn | None

    def targets_by_name(self, names: Sequence[str]) -> bool:
        return any(_matches(pattern, names) for pattern in self.targets or ())

    def excludes(self, names: Sequence[str]) -> bool:
        return any(_matches(pattern, names) for pattern in self.excluded or ())

    def wants(self, module: nn.Module, names: Sequence[str]) -> bool:
        if self.excludes(names) or (self.targets is not None and not self.targets_by_name(names)):
            return False
        return self.filter_fn is None or bool(self.filter_fn(module, names[0]))

    def check_used(self, known: Names) -> None:
        for argument, patterns in (("target_modules", self.targets), ("exclude_modules", self.excluded)):
            for pattern in patterns or ():
                if not any(_matches(pattern, names) for names in known.values()):
                    listed = [names[0] for names in known.values()]
                    raise ValueError(f"{argument}={pattern!r} matches no layer to convert; these are: {listed}")


# --- the plan: nothing here changes the model ---------------------------------------------------------------
class _Gate(NamedTuple):
    density: float
    rule: str


def _subnet_class(module: nn.Module) -> type[SubnetLayer] | None:
    """What ``module`` would be converted to, by its exact type; None if it is not convertible."""
    # A parametrized module has a class of its own: it must be seen, to be refused.
    kind = parametrize.type_before_parametrizations(module)
    if (kind.__module__, kind.__name__) == _HF_CONV1D:
        return FastSubnetTransposedLinear
    return next((subnet for dense, subnet in _SUBNET_CLASSES if kind is dense), None)


def _choose(names: Names, selection: _Selection, new_heads: Heads) -> list[nn.Module]:
    """The modules to convert, in the order of the model."""
    of_heads = {m for heads in names if isinstance(heads, TaskHeads) for m in heads.heads.modules()}
    layers: Names = {m: n for m, n in names.items() if _subnet_class(m) and m not in of_heads}
    subnets: Names = {m: n for m, n in names.items() if isinstance(m, SubnetLayer)}
    readers: Names = {m: n for m, n in names.items() if _reads_weights(m)}
    inside: Names = {m: names[m] for reader in readers for m in _linears(reader)}
    selection.check_used({**layers, **subnets, **readers, **inside})
    for reader in readers:
        _check_reader(reader, selection, names)
    candidates = {m: n for m, n in layers.items() if m not in new_heads and m not in inside}
    chosen = [m for m, own in candidates.items() if selection.wants(m, own)]
    if not chosen and not subnets:
        raise ValueError(
            "model has no layer to convert; filter_fn, target_modules and exclude_modules chose from "
            f"{[own[0] for own in candidates.values()]}"
        )
    return chosen


def _reads_weights(module: nn.Module) -> bool:
    return any((c.__module__, c.__name__) in _WEIGHT_READERS for c in type(module).__mro__)


def _linears(module: nn.Module) -> list[nn.Module]:
    return [m for m in module.modules() if isinstance(m, nn.Linear)]


def _check_reader(reader: nn.Module, selection: _Selection, names: Names) -> None:
    """Refuse to convert inside a module that would bypass the masks, unless the user leaves it out."""
    own = names[reader]
    asked = selection.targets_by_name(own) or any(selection.wants(m, names[m]) for m in _linears(reader))
    if asked and not selection.excludes(own):
        raise ValueError(
            f"{_shown(own[0])} ({type(reader).__name__}) computes with bare weights or with those of linear "
            "layers that it does not call, so masks would be dropped silently. Either leave it dense "
            f"(exclude_modules={own[0]!r}) and declare its parameters in WSN(model, per_task=..., frozen=... "
            "or shared=...), or use an attention module that calls its nn.Linear layers."
        )


def _densities(
    names: Names, chosen: Sequence[nn.Module], density: float | Mapping[str, float]
) -> dict[nn.Module, float]:
    if not isinstance(density, Mapping):
        return dict.fromkeys(chosen, ops.check_density(density))
    as_patterns("density", density)
    by_pattern = {p: ops.check_density(d, f"density[{p!r}]") for p, d in density.items()}
    wanted, densities = set(chosen), {}
    # A pattern for layers that an earlier call converted is no typo either, though they stay what they are.
    unused = by_pattern.keys() - {"*"}
    for module in (*chosen, *(m for m in names if isinstance(m, SubnetLayer))):
        pattern = next((p for p in by_pattern if _matches(p, names[module])), None)
        unused -= {pattern}
        if module in wanted:
            if pattern is None:
                raise ValueError(f"density has no pattern for {_shown(names[module][0])} ('*' takes the rest)")
            densities[module] = by_pattern[pattern]
    if unused:
        raise ValueError(f"density: {sorted(unused)} match no layer to convert that earlier patterns do not")
    return densities


def _check_layer(module: nn.Module, name: str) -> None:
    """Refuse a layer that would not be itself with another class."""
    for attribute in ("weight", "bias"):
        param = module._parameters.get(attribute)
        if param is not getattr(module, attribute):
            raise ValueError(
                f"{name}.{attribute} is computed (weight_norm, spectral_norm, pruning, another parametrization), "
                "so there is nothing to gate: remove the parametrization, or exclude the layer"
            )
        if param is not None and (param.dtype not in ops.SCORE_DTYPES or not param.numel()):
            raise ValueError(
                f"{name}.{attribute} must be non-empty and of a dtype in {ops.SCORE_DTYPES}, got "
                f"{param.dtype} {tuple(param.shape)}: exclude the layer"
            )
    if "forward" in vars(module):
        raise ValueError(f"{name}.forward was replaced on the instance and would bypass the mask: undo that")


class _Use(NamedTuple):
    """A place where a Parameter is registered."""

    name: str
    module: nn.Module
    param: nn.Parameter


def _check_ties(names: Names, gates: Mapping[nn.Module, _Gate], new_heads: Heads) -> None:
    """All layers that share a weight must be gated alike, and nothing else may read it."""
    uses: defaultdict[int, list[_Use]] = defaultdict(list)
    for module, own in names.items():
        for attribute, param in module._parameters.items():
            if param is not None and module not in new_heads:
                # Without memory (on meta) only identity can tell.
                use = _Use(f"{own[0]}.{attribute}".lstrip("."), module, param)
                uses[param.data_ptr() or id(param)].append(use)
    for tied in uses.values():
        ours = [use for use in tied if use.module in gates]
        if len(tied) == 1 or not ours:
            continue
        ungated = [use for use in tied if use.module not in gates and not isinstance(use.module, SubnetLayer)]
        if ungated:
            raise ValueError(
                f"{ours[0].name} is tied to {ungated[0].name}, which is not converted and would read it "
                "without the mask: exclude the former (exclude_modules), make it a head (heads) or untie them"
            )
        if any(use.param is not tied[0].param for use in tied):
            raise ValueError(
                f"{tied[0].name} and {tied[-1].name} share memory but are not one Parameter: tie or part them"
            )
        shared = {use.name: _gate(use.module, gates) for use in tied}
        if len(set(shared.values())) > 1:
            raise ValueError(f"one tied parameter needs one density and rule: {shared}")


def _gate(module: nn.Module, gates: Mapping[nn.Module, _Gate]) -> _Gate:
    return _Gate(module.density, module.rule) if isinstance(module, SubnetLayer) else gates[module]


def _check_batch_norm(names: Names, batch_norm: str) -> None:
    if batch_norm not in BATCH_NORMS:
        raise ValueError(f"batch_norm must be one of {BATCH_NORMS}, got {batch_norm!r}")
    for module, own in names.items():
        if batch_norm == "stateless" and isinstance(module, _BatchNorm) and per_task.marked(module):
            raise ValueError(f"batch_norm='stateless', but an earlier convert made {_shown(own[0])} per-task")


def _new_heads(names: Names, heads: str | Mapping[str, HeadSpec] | None) -> Heads:
    """The classifiers to replace, each with its replacement."""
    specs = {heads: None} if isinstance(heads, str) else {} if heads is None else heads
    if not isinstance(specs, Mapping):
        raise TypeError(f"heads must be a module name or a mapping from module names, got {heads!r}")
    linears = {n: m for m, own in names.items() for n in own if type(m) is nn.Linear}
    made: Heads = {}
    for name, spec in specs.items():
        if name not in linears:
            raise ValueError(f"heads: {name!r} is no nn.Linear of the model; these are: {sorted(linears)}")
        old = linears[name]
        width, tasks = _widths(name, spec, old.out_features)
        bias, like = old.bias is not None, old.weight
        new = TaskHeads(old.in_features, width, tasks=tasks, bias=bias, device=like.device, dtype=like.dtype)
        made[old] = new.train(old.training)
    return made


def _widths(
    name: str, spec: HeadSpec | None, width: int
) -> tuple[int | None, Mapping[TaskId, int] | list[TaskId] | None]:
    """The width of all heads (None if each task names its own), and the tasks to make heads for at once."""
    if spec is None:
        return width, None
    if isinstance(spec, int):
        return _check_width(name, spec), None
    if isinstance(spec, Mapping):
        return None, {task: _check_width(name, each) for task, each in spec.items()}
    if isinstance(spec, str) or not isinstance(spec, Iterable):
        raise TypeError(f"heads[{name!r}] must be a width, task ids, or widths by task id, got {spec!r}")
    return width, list(spec)


def _check_width(name: str, width: object) -> int:
    if not isinstance(width, int) or isinstance(width, bool) or width < 1:
        raise ValueError(f"heads[{name!r}]: the width of a head must be a positive int, got {width!r}")
    return width


# --- the change ---------------------------------------------------------------------------------------------
def _put_heads(names: Names, new_heads: Heads) -> None:
    for parent in names:
        for child_name, child in parent._modules.items():
            if child is not None and child in new_heads:
                parent._modules[child_name] = new_heads[child]


def _change_classes(names: Names, gates: Mapping[nn.Module, _Gate], score_init: str) -> None:
    scores = {id(g.param): g.score for m in names if isinstance(m, SubnetLayer) for g in m.gated()}
    for module, (density, rule) in gates.items():
        subnet = _subnet_class(module)
        assert subnet is not None
        module.__class__ = subnet
        assert isinstance(module, SubnetLayer)
        if isinstance(module, FastSubnetTransposedLinear):
            module.in_features, module.out_features = module.weight.shape
        module._init_subnet(density, rule, score_init)
        for gate in module.gated():
            setattr(module, f"{gate.name}_score", scores.setdefault(id(gate.param), gate.score))


def _make_stateless(norm: _BatchNorm) -> None:
    """What the constructor does for ``affine=False, track_running_stats=False``."""
    norm.affine = norm.track_running_stats = False
    for name in ("weight", "bias"):
        norm.register_parameter(name, None)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        norm.register_buffer(name, None)


def _disable_fast_path(module: nn.Module) -> None:
    """Make torch's encoder call its layers in inference too, where it would read their weights instead."""
    if isinstance(module, nn.TransformerEncoderLayer) and _has_subnet(module.children()):
        # Zero stands for "an activation without a fast path"; the activation itself is another attribute.
        module.activation_relu_or_gelu = 0
    if isinstance(module, nn.TransformerEncoder) and _has_subnet(module.modules()):
        module.use_nested_tensor = False


def _has_subnet(modules: Iterable[nn.Module]) -> bool:
    return any(isinstance(module, SubnetLayer) for module in modules)
