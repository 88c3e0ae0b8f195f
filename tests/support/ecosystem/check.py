"""The check of one model: two tasks are trained, and what the library promises about them is compared to the bit."""

from __future__ import annotations

import copy
import pickle
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from wsn_fast import WSN, OwnershipError, convert, to_dense
from wsn_fast.nn.per_task import is_norm
from wsn_fast.optim import SubnetAdamW

from .builders import Model

SHARE, TYPED = 0.95, 3
"""What a model has to reach: the least share of gated elements, and the most arguments that a user has to type."""
STEPS = 2
TASKS = ("first", "second")
OPTIMIZERS: dict[str, Callable[[WSN], torch.optim.Optimizer]] = {
    "adamw": lambda wsn: wsn.guard(torch.optim.AdamW(wsn.parameters(), lr=1e-2, weight_decay=0.1)),
    "one_pass": lambda wsn: SubnetAdamW(wsn, lr=1e-2, weight_decay=0.1, one_pass=True),
}
YES = "yes"


@dataclass
class Result:
    """What the check found. A column that is not ``"yes"`` says what was wrong, or "-" where it was not reached.

    Attributes:
        model: the line of the table.
        package, kind: as in :class:`Model`.
        parameters: the floating elements of the model as it was built.
        share: the share of them that is gated, without heads and norms.
        typed: what a user has to type, apart from the density.
        left_out: the tensors that are neither gated nor in heads or norms, with their sizes.
        adamw, one_pass: two tasks were kept by the guarded AdamW, and by the one-pass optimizer.
        dense, load, pickle, copy, probe: see ``_of_finished``; each holds after both optimizers.
        seconds: the CPU time of the whole check.
        traces: the tracebacks of unexpected errors.
    """

    model: str
    package: str
    kind: str
    parameters: int = 0
    share: float = 0.0
    typed: list[str] = field(default_factory=list)
    left_out: dict[str, list[int]] = field(default_factory=dict)
    adamw: str = "-"
    one_pass: str = "-"
    dense: str = "-"
    load: str = "-"
    pickle: str = "-"
    copy: str = "-"
    probe: str = "-"
    seconds: float = 0.0
    exception: str = ""
    traces: list[str] = field(default_factory=list)

    PROMISES = ("adamw", "one_pass", "dense", "load", "pickle", "copy", "probe")

    def broken(self) -> list[str]:
        """The promises that were not kept, each with what was wrong."""
        return [f"{name}: {getattr(self, name)}" for name in self.PROMISES if getattr(self, name) != YES]

    def short_of(self) -> list[str]:
        """The targets that were not reached."""
        found = []
        if self.share < SHARE and not self.exception:
            found.append(f"{self.share:.1%} is gated; left out: {self.left_out}")
        if len(self.typed) > TYPED:
            found.append(f"{len(self.typed)} arguments had to be typed: {self.typed}")
        return found

    def line(self) -> str:
        """One line for the terminal."""
        bad = "; ".join([*self.broken(), *(text[:60] for text in self.short_of())])
        return f"{self.model:40} {self.share:7.2%} {len(self.typed):3} typed {self.seconds:6.1f} s  {bad or 'ok'}"[:400]

    def as_json(self) -> dict[str, Any]:
        """All attributes, for a file."""
        return asdict(self)


class _Fault(Exception):
    """A promise was not kept; the text says how."""


def check(name: str, model: Model) -> Result:
    """Run the whole check of ``model``. Errors become texts in the result."""
    result = Result(name, model.package, model.kind, exception=model.exception)
    start = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the packages
        for column in OPTIMIZERS:
            done = _attempt(result, column, lambda column=column: _train(model, column, result))
            if done is not None:
                _of_finished(result, model, *done)
    result.seconds = round(time.process_time() - start, 1)
    return result


def _attempt(result: Result, column: str, work: Callable[[], Any]) -> Any:
    """Do ``work``, and note in ``column`` whether it succeeded. A fault that an earlier run noted stays."""
    before = getattr(result, column)
    try:
        done = work()
        setattr(result, column, YES if before == "-" else before)
        return done
    except _Fault as fault:
        text = str(fault)
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        result.traces.append(f"{column}: {traceback.format_exc()}")
    setattr(result, column, text if before in ("-", YES) else before)
    return None


# --- training
def build(model: Model, seed: int = 0) -> nn.Module:
    """The model in float32 with the random weights of ``seed``.

    Many models begin with branches that are switched off: a norm or a scale of zeros at the end, a position table of
    zeros. What these branches compute would not show in the outputs, so constant parameters are made random as well.
    """
    torch.manual_seed(seed)
    dense = model.build().float()
    with torch.no_grad():
        for param in dense.parameters():
            if param.requires_grad and param.numel() > 1 and bool((param == param.flatten()[0]).all()):
                param.add_(torch.randn_like(param), alpha=0.1)
    return dense


def converted(model: Model, result: Result | None = None, seed: int = 0) -> WSN:
    """Convert the model and begin the first task, typing what has to be typed: the heads, what the table says, and
    ``rest`` if some tensor has no owner."""
    dense = build(model, seed)
    parameters, counted = sum(p.numel() for p in _floating(dense).values()), _counted(dense, model.heads)
    subnet, typed = _convert(dense, model.heads)
    owners = dict(model.owners)
    wsn = WSN(subnet, **owners)
    try:
        wsn.begin_task(TASKS[0])
    except OwnershipError:
        owners |= {"rest": "per_task"}
        wsn = WSN(subnet, **owners)
        wsn.begin_task(TASKS[0])
    if result is not None and not result.parameters:
        names = [value if isinstance(value, str) else each for value in owners.values() for each in _listed(value)]
        result.typed = [*typed, *names]
        result.parameters = parameters
        gated = {id(gate.param) for _, gate in wsn.gated()}
        left = {name: p for name, p in counted.items() if id(p) not in gated}
        all_elements = sum(p.numel() for p in counted.values())
        result.share = 1 - sum(p.numel() for p in left.values()) / max(all_elements, 1)
        result.left_out = {name: list(p.shape) for name, p in left.items()}
    return wsn


def _listed(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else list(value)


def _convert(dense: nn.Module, heads: Any) -> tuple[nn.Module, list[str]]:
    given = dict.fromkeys(heads) if isinstance(heads, tuple) else heads
    return convert(dense, density=0.5, heads=given), ["heads"] if heads else []


def _floating(dense: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in dense.named_parameters() if p.is_floating_point()}


def _counted(dense: nn.Module, heads: Any) -> dict[str, nn.Parameter]:
    """The floating parameters that are trained, outside of heads and norms, by name."""
    apart = set()
    for name, module in dense.named_modules():
        if name in _listed(heads or ()) or is_norm(module):
            apart |= {id(p) for p in module.parameters()}
    return {name: p for name, p in _floating(dense).items() if p.requires_grad and id(p) not in apart}


def _train(model: Model, column: str, result: Result) -> tuple[WSN, dict[str, Any], dict[str, list[Tensor]]]:
    """Train two tasks. Returns the WSN, the inputs, and what each task computed when it ended."""
    wsn = converted(model, result)
    torch.manual_seed(7)
    inputs = model.inputs()
    kept: dict[str, list[Tensor]] = {}
    weights = [{name: gate.param.detach().clone() for name, gate in wsn.gated()}]
    for task in TASKS:
        if wsn.current_task is None:
            wsn.begin_task(task)
        _steps(wsn, model, OPTIMIZERS[column](wsn))
        wsn.end_task()
        kept[task] = _outputs(wsn, inputs, task)
        weights.append({name: gate.param.detach().clone() for name, gate in wsn.gated()})
    for before, after, task in zip(weights, weights[1:], TASKS, strict=False):
        if all(map(torch.equal, before.values(), after.values())):
            raise _Fault(f"the {task} task has trained no gated weight")
    _compare(kept[TASKS[0]], _outputs(wsn, inputs, TASKS[0]), "the first task has changed")
    wsn.train()  # so that the first task in use below fills whatever a model caches in evaluation
    for task in reversed(TASKS):
        _compare(kept[task], _outputs(wsn, inputs, task), f"the {task} task differs after the other one was in use")
    if same(kept[TASKS[0]], kept[TASKS[1]]):
        raise _Fault("both tasks compute the same")
    wsn.verify()
    return wsn, inputs, kept


def _steps(wsn: WSN, model: Model, optimizer: torch.optim.Optimizer) -> None:
    """Train with the squared distance to random targets, so that every output has a gradient."""
    wsn.train()
    torch.manual_seed(11 + len(wsn.tasks))
    inputs = model.inputs()
    for _ in range(STEPS):
        optimizer.zero_grad()
        outputs = [t for t in flat(wsn(**copied(inputs))) if t.requires_grad]
        loss = sum((t - torch.randn_like(t)).square().mean() for t in outputs)  # which may be others in the next step
        loss.backward()
        optimizer.step()


def _outputs(wsn: WSN, inputs: Mapping[str, Any], task: str) -> list[Tensor]:
    wsn.eval()
    with wsn.use_task(task):
        return _compute(wsn, inputs)


@torch.no_grad()
def _compute(model: nn.Module, inputs: Mapping[str, Any]) -> list[Tensor]:
    """What ``model`` computes. Some models draw random numbers in evaluation, too."""
    torch.manual_seed(3)
    return [t.clone() for t in flat(model(**copied(inputs)))]


# --- what holds of finished tasks
def _of_finished(result: Result, model: Model, wsn: WSN, inputs: dict[str, Any], kept: dict[str, list[Tensor]]) -> None:
    """Check what holds once tasks have ended:

    * dense: ``to_dense`` computes what each task computes;
    * load: so does a newly converted model that has loaded the state, strictly;
    * pickle: so does a pickled copy, if the model could be pickled before it was converted;
    * copy: so does a deep copy, if the model could be copied before;
    * probe: no task reads what it must not read.
    """
    wsn.eval()

    def dense() -> None:
        for task in TASKS:
            _compare(kept[task], _compute(to_dense(wsn, task), inputs), f"to_dense of the {task} task differs")

    def load() -> None:
        fresh = converted(model, seed=1)
        fresh.load_state_dict(wsn.state_dict(), strict=True)
        compare_all(fresh, "a model with the loaded state differs")

    def pickled() -> None:
        compare_all(pickle.loads(pickle.dumps(wsn)), "the pickled model differs")

    def deep() -> None:
        compare_all(copy.deepcopy(wsn), "the copy differs")

    def compare_all(other: WSN, text: str) -> None:
        for task in TASKS:
            _compare(kept[task], _outputs(other, inputs, task), f"{text} in the {task} task")

    _attempt(result, "dense", dense)
    _attempt(result, "load", load)
    for column, before, work in (("pickle", pickle.dumps, pickled), ("copy", copy.deepcopy, deep)):
        _attempt(result, column, work)
        if getattr(result, column) != YES and _refuses(before, model):
            setattr(result, column, YES)
    _attempt(result, "probe", lambda: wsn.verify(probe=inputs))


def _refuses(work: Callable[[nn.Module], Any], model: Model) -> bool:
    """Whether ``work`` fails with the model as it was before it was converted, after a training pass."""
    dense = build(model).train()
    try:
        dense(**model.inputs())
        work(dense)
    except Exception:
        return True
    return False


# --- tensors
def flat(value: Any) -> Iterator[Tensor]:
    """The floating tensors in an output: a tensor, or tuples, lists, mappings and dataclasses of them."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        for one in value.values():
            yield from flat(one)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from flat(one)
    elif is_dataclass(value) and not isinstance(value, type):
        for each in fields(value):
            yield from flat(getattr(value, each.name))


def copied(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The same arguments in tensors of their own, since a model may write to its inputs."""
    return {name: value.clone() if isinstance(value, Tensor) else value for name, value in inputs.items()}


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    """Whether two outputs are equal to the bit."""
    return len(first) == len(second) and all(
        a.shape == b.shape
        and a.dtype == b.dtype
        and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
        for a, b in zip(first, second, strict=True)
    )


def _compare(expected: list[Tensor], got: list[Tensor], text: str) -> None:
    if not expected or not all(t.isfinite().any() for t in expected):
        raise _Fault("the outputs have nothing finite to compare")
    if not same(expected, got):
        gap = max((a - b).abs().nan_to_num().max().item() for a, b in zip(expected, got, strict=False))
        raise _Fault(f"{text} (by {gap:.1e})")
