"""Finds the owner of each parameter and buffer. A tensor without an owner is an error, because a later task would
change what earlier tasks compute, and nobody would notice.

An owner is a gate (in subnet layers), a head (in ``TaskHeads``), or one of these kinds: ``per_task`` (a copy per task),
``frozen`` (trained in the first task, then fixed) or ``shared`` (may forget). The kind of a tensor is what the user
declared. Otherwise it is ``per_task`` in a normalisation layer; ``frozen`` for a buffer, which is taken as constant,
unless its name is that of a running statistic; and what the user declared for the rest.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor, nn

from ..convert.patterns import matches
from ..nn import per_task
from ..nn.gated import SubnetLayer
from ..nn.heads import TaskHeads
from . import unowned
from .unowned import Unowned

KINDS = ("per_task", "frozen", "shared")
_RUNNING_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


class OwnershipError(ValueError):
    """Parameters or buffers that tasks share have no owner; ``names`` lists them, a tied one by its first name."""

    def __init__(self, names: list[str], listed: Sequence[str] = (), advice: str = "") -> None:
        lines = "\n  ".join(listed or names)
        super().__init__(
            "these parameters and buffers are neither gated, nor in TaskHeads, nor declared, so training a later task "
            f"would change what earlier tasks compute:\n  {lines}\n"
            'Declare all of them with WSN(model, rest="frozen") or rest="per_task", or each in per_task=[...], '
            f"frozen=[...] or shared=[...] by name, by the name of a module around it{advice}, or by pattern. per_task "
            "keeps a copy per task, frozen trains it in the first task only, shared lets earlier tasks forget."
        )
        self.names = names


class Declared(NamedTuple):
    """The owners that the user declared.

    Attributes:
        patterns: name patterns by kind of owner.
        rest: the kind of everything else; None if that is an error.
    """

    patterns: Mapping[str, tuple[str, ...]]
    rest: str | None = None


def declare(patterns: Mapping[str, tuple[str, ...]], rest: object) -> Declared:
    """The declared owners. Raises ``ValueError`` if ``rest`` is neither None nor one of ``KINDS``."""
    if rest is not None and rest not in KINDS:
        raise ValueError(f"rest must be None or one of {KINDS}, got {rest!r}")
    return Declared(patterns, None if rest is None else str(rest))


class Owned(NamedTuple):
    """A tensor that is neither gated nor in a head.

    Attributes:
        name: its name, the first one of this place.
        kind: one of ``KINDS``, or None if it has no owner.
        module, attribute: where it is.
        names: all names of the tensor, of which a tied one has several.
        constant: whether it is ``frozen`` because nobody declared it and it is a buffer, or needs no gradient.
    """

    name: str
    kind: str | None
    module: nn.Module
    attribute: str
    names: tuple[str, ...]
    constant: bool = False

    @property
    def tensor(self) -> Tensor:
        return _registered(self.module, self.attribute)


def classify(model: nn.Module, declared: Declared) -> list[Owned]:
    """List every tensor of ``model`` that is neither gated nor in a head, with its owner. A tied one is listed at each
    of its places, with one owner.

    Args:
        model: the converted model.
        declared: what the user declared.

    Raises:
        ValueError: patterns match nothing, or gated tensors or heads alone; tensors are declared twice; running
            statistics are declared ``frozen``; or something reads a gated Parameter without its gate. The message lists
            everything of this.
    """
    problems: list[str] = []
    found: list[Owned] = []
    unmatched = {(kind, pattern): None for kind, patterns in declared.patterns.items() for pattern in patterns}
    places = _shared_tensors(model)
    tied: dict[int, list[_Place]] = {}
    for place in places:
        tied.setdefault(id(place.tensor), []).append(place)
    kinds: dict[int, tuple[str | None, bool]] = {}
    for key, same in tied.items():
        names = tuple(name for place in same for name in place.names)
        hits = [(k, p) for k, ps in declared.patterns.items() for p in ps if any(matches(p, n) for n in names)]
        for hit in hits:
            unmatched.pop(hit, None)
        own = sorted({kind for kind, _ in hits})
        if len(own) > 1:
            problems.append(f"{' = '.join(names)} is declared as {' and as '.join(own)}; one owner is needed")
        kinds[key] = (own[0], False) if own else _kind(same, declared.rest)
        if "frozen" in own and any(place.attribute in _RUNNING_STATISTICS for place in same):
            problems.append(
                f"{names[0]} cannot be frozen: running statistics change in every training forward. Leave them "
                "per_task (the default)."
            )
        found += [Owned(p.names[0], kinds[key][0], p.module, p.attribute, names, kinds[key][1]) for p in same]
    gated = _gated(model)
    problems += [_useless(kind, pattern, model, gated) for kind, pattern in unmatched]
    problems += _read_past_gates(tied, gated)
    if problems:
        raise ValueError("\n".join(problems))
    order = {(id(place.module), place.attribute): at for at, place in enumerate(places)}
    return sorted(found, key=lambda item: order[id(item.module), item.attribute])


def _kind(places: Sequence[_Place], rest: str | None) -> tuple[str | None, bool]:
    """The kind of a tensor that no pattern matches, and whether it is a constant."""
    running = any(place.attribute in _RUNNING_STATISTICS for place in places)
    is_buffer = places[0].is_buffer
    marked = any(place.attribute in per_task.marked(place.module) for place in places)  # as it was declared before
    if any(per_task.is_norm(place.module) for place in places) or (marked and (is_buffer or rest is None)):
        return "per_task", False
    if (is_buffer and not running) or not (is_buffer or places[0].tensor.requires_grad):
        return "frozen", True
    return (None if running and rest == "frozen" else rest), False


def mark_per_task(owned: Iterable[Owned], finished: int) -> None:
    """Make each tensor of kind ``per_task`` per task, and undo this for tensors that the user declared otherwise.

    Raises:
        ValueError: ``finished`` tasks have ended already and were trained with other owners. If this is raised, nothing
            has been changed.
    """
    wanted: dict[nn.Module, list[str]] = {}
    for item in owned:
        names = wanted.setdefault(item.module, [])
        if item.kind == "per_task":
            names.append(item.attribute)
    for module, names in wanted.items():
        changed = set(names) ^ set(per_task.marked(module))
        if finished and changed:
            raise ValueError(
                f"{type(module).__name__}.{min(changed)} cannot change its owner to or from per_task: {finished} tasks "
                "have ended already. Pass the per_task=, frozen=, shared= and rest= that they were trained with"
            )
    for module, names in wanted.items():
        if set(per_task.marked(module)) - set(names):
            per_task.unmark(module)
        per_task.mark(module, names)


def check_owned(owned: Sequence[Owned]) -> None:
    """Raise :class:`OwnershipError`, which lists every tensor without an owner, if there is one."""
    tensors = {id(item.tensor): Unowned(item.names, tuple(item.tensor.shape)) for item in owned if item.kind is None}
    if not tensors:
        return
    found = list(tensors.values())
    total = f"{len(found)} tensors, {sum(one.elements for one in found):,} elements" if len(found) > 1 else ""
    around = unowned.prefixes(found, (item.name for item in owned if item.kind is not None))
    advice = f" ({', '.join(map(repr, around))})" if around else ""
    if any(item.kind is None and item.attribute in _RUNNING_STATISTICS for item in owned):
        advice += " (running statistics change in training: per_task or shared)"
    lines = [*unowned.lines(found), *([total] if total else [])]
    raise OwnershipError([one.names[0] for one in found], lines, advice)


class _Place(NamedTuple):
    """Where a tensor is registered, with all names of this place: a module that is used twice has several."""

    names: tuple[str, ...]
    module: nn.Module
    attribute: str

    @property
    def tensor(self) -> Tensor:
        return _registered(self.module, self.attribute)

    @property
    def is_buffer(self) -> bool:
        return self.attribute in self.module._buffers


def _registered(module: nn.Module, attribute: str) -> Tensor:
    """The tensor itself, where the attribute of a module may compute something from it."""
    tensor = module._parameters[attribute] if attribute in module._parameters else module._buffers[attribute]
    assert tensor is not None
    return tensor


def original(name: str) -> str:
    """The name of a module without what ``torch.compile`` puts into it."""
    return name.replace("_orig_mod.", "").removesuffix("_orig_mod")


def _shared_tensors(model: nn.Module) -> list[_Place]:
    """All tensors except gated ones, heads, and those that this library added."""
    of_one_task = {m for heads in model.modules() if isinstance(heads, TaskHeads) for m in heads.heads.modules()}
    names: dict[nn.Module, list[str]] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        if module not in of_one_task:
            names.setdefault(module, []).append(original(prefix))
    places = []
    for module, prefixes in names.items():
        ours = {f"{name}{end}" for name in per_task.marked(module) for end in ("_tasks", "_live")}
        if isinstance(module, TaskHeads):
            ours.add("_device_and_dtype")
        if isinstance(module, SubnetLayer):
            ours |= {f"{name}{end}" for name in module.GATED for end in ("", "_score", "_masks", "_union", "_view")}
        for attribute, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and attribute not in ours:
                places.append(_Place(tuple(f"{p}.{attribute}".lstrip(".") for p in prefixes), module, attribute))
    return places


# --- what is wrong with declarations ---------------------------------------------------------------------------------
def _gated(model: nn.Module) -> dict[int, list[str]]:
    """The names of each gated Parameter, by its id."""
    gated: dict[int, list[str]] = {}
    for prefix, layer in model.named_modules(remove_duplicate=False):
        if isinstance(layer, SubnetLayer):
            for gate in layer.gated():
                gated.setdefault(id(gate.param), []).append(f"{original(prefix)}.{gate.name}".lstrip("."))
    return gated


def _useless(kind: str, pattern: str, model: nn.Module, gated: Mapping[int, list[str]]) -> str:
    """What is wrong with a pattern that matches nothing that needs an owner."""
    hits = [names[0] for names in gated.values() if any(matches(pattern, name) for name in names)]
    if hits:
        more = f" (and {len(hits) - 1} more)" if len(hits) > 1 else ""
        return (
            f"{kind}={pattern!r}: {hits[0]} is gated{more}: leave it out of convert with exclude_modules="
            f"{hits[0].rpartition('.')[0]!r}, or drop the declaration"
        )
    for prefix, heads in model.named_modules():
        names = [f"{original(prefix)}.{name}".lstrip(".") for name in ("heads", "weight", "bias")]
        inside = isinstance(heads, TaskHeads) and (
            *names,
            *(f"{names[0]}.{n}" for n, _ in heads.heads.named_parameters()),
        )
        if inside and any(matches(pattern, name) for name in inside):
            return f"{kind}={pattern!r} matches heads alone, and each task has its own head: drop the declaration"
    return f"{kind}={pattern!r} matches no parameter or buffer that is neither gated nor in TaskHeads"


def _read_past_gates(tied: Mapping[int, Sequence[_Place]], gated: Mapping[int, list[str]]) -> Iterator[str]:
    """Name the places that have a gated Parameter without its gate."""
    for key, places in tied.items():
        if key in gated:
            name = ", ".join(place.names[0] for place in places)
            yield (
                f"{name} and the gated {gated[key][0]} are one tied parameter. Whatever reads {name} reads it without "
                "the mask, so its result would change when later tasks train. Untie them, or leave the gated layer out "
                "of the conversion."
            )


def fix(params: list[nn.Parameter], before: Iterable[nn.Parameter], untrained: set[int]) -> list[nn.Parameter]:
    """Stop the training of ``params``, which must not change any more, and return them. Those of ``before`` that are no
    longer among them are trained again, except for the ids ``untrained``."""
    for param in {*before} - {*params}:
        param.requires_grad_(id(param) not in untrained)
    for param in params:
        if param.requires_grad:
            param.requires_grad_(False)
        if param.grad is not None:
            param.grad = None
    return params
