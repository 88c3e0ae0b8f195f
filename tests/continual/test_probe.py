"""verify(probe) and end_task(probe) find every reader of values that a task must not read, name the tensors, and leave
no trace."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wsn_fast import WSN, ForgottenError, TaskHeads, UnmaskedReadError, convert
from wsn_fast.ops import unpack_mask
from wsn_fast.optim import SubnetAdamW

X = torch.randn(12, 8, generator=torch.Generator().manual_seed(5))


def train(wsn: WSN, task: int | str, loss: Callable[[Any], Tensor], steps: int = 3, **end: Any) -> None:
    wsn.begin_task(task)
    optimizer = wsn.guard(torch.optim.AdamW(wsn.parameters(), 0.05))
    wsn.train()
    for _ in range(steps):
        optimizer.zero_grad()
        loss(wsn(X)).backward()
        optimizer.step()
    wsn.end_task(**end)


def trained(net: nn.Module, tasks: tuple[int | str, ...] = (1, 2), **how: Any) -> WSN:
    wsn = WSN(convert(net, density=0.3, **how))
    for task in tasks:
        train(wsn, task, lambda out: first(out).pow(2).mean())
    return wsn


def first(out: Any) -> Tensor:
    """The first tensor of an output."""
    while not isinstance(out, Tensor):
        out = dataclasses.astuple(out) if dataclasses.is_dataclass(out) else out
        out = next(iter(out.values() if isinstance(out, dict) else out))
    return out


def whole(layer: nn.Module) -> Tensor:
    """The weight without its mask, also in a forward pass, where the attribute is masked."""
    weight = layer._parameters["weight"]
    assert weight is not None
    return weight


# --- readers ---------------------------------------------------------------------------------------------------------
class Base(nn.Module):
    """Two layers and a head. Subclasses read something past a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.enc, self.mid, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def features(self, x: Tensor) -> Tensor:
        return self.mid(self.enc(x).relu())

    def forward(self, x: Tensor) -> Any:
        return self.head(self.features(x))


class TiedDecoder(Base):
    def forward(self, x: Tensor) -> Any:
        return self.head(F.linear(self.features(x), whole(self.enc).t()))


class InEvaluation(Base):
    """Takes a shortcut that is only there in evaluation."""

    def forward(self, x: Tensor) -> Any:
        return super().forward(x) if self.training else self.head(x @ (whole(self.mid) @ whole(self.enc)).t())


class MergedWhenTheModeChanges(Base):
    """Computes with a product of both weights that is made when evaluation begins, as some adapters do."""

    def train(self, mode: bool = True) -> Any:
        super().train(mode)
        self.merged = None if mode else (self.mid.weight @ self.enc.weight).detach()
        return self

    def forward(self, x: Tensor) -> Any:
        return super().forward(x) if self.training else self.head(x @ self.merged.t())


class HiddenReference(Base):
    """Holds the parameter where nobody looks for it."""

    def __init__(self) -> None:
        super().__init__()
        self.held = [self.mid.bias]

    def forward(self, x: Tensor) -> Any:
        return self.head(self.features(x) + self.held[0])


class PenaltyAmongTheOutputs(Base):
    def forward(self, x: Tensor) -> Any:
        return {"logits": super().forward(x), "penalty": whole(self.enc).square().sum()}


class ReadsScores(Base):
    def forward(self, x: Tensor) -> Any:
        y = super().forward(x)
        return y, y * getattr(self.mid, "weight_score", torch.ones(())).mean()


class ReadsTheUnion(Base):
    """Shares of weights that are in use, which grow with every task."""

    def forward(self, x: Tensor) -> Any:
        union = getattr(self.enc, "weight_union", None)
        return super().forward(x) * (1.0 if union is None else union.float().mean())


class NoticesNaN(Base):
    def forward(self, x: Tensor) -> Any:
        if whole(self.enc).isnan().any():
            raise ValueError("there is a NaN")
        return super().forward(x)


READERS: dict[str, tuple[type[Base], list[str]]] = {
    "a tied decoder": (TiedDecoder, ["enc.weight"]),
    "a shortcut in evaluation": (InEvaluation, ["enc.weight", "mid.weight"]),
    "a merge when the mode changes": (MergedWhenTheModeChanges, ["enc.weight", "mid.weight"]),
    "a reference that is hidden": (HiddenReference, ["mid.bias"]),
    "a penalty among the outputs": (PenaltyAmongTheOutputs, ["enc.weight"]),
    "scores": (ReadsScores, ["mid.weight_score"]),
    "the union": (ReadsTheUnion, ["enc.weight_union"]),
    "a check of finiteness": (NoticesNaN, ["enc.weight"]),
}


class DecodesByAttribute(Base):
    """The tied decoder that reads the attribute."""

    def forward(self, x: Tensor) -> Any:
        return self.head(F.linear(self.features(x), self.enc.weight.t()))


class TakesAShortcut(Base):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x) if self.training else self.head(x @ (self.mid.weight @ self.enc.weight).t())


class Penalised(Base):
    def forward(self, x: Tensor) -> Any:
        return {"logits": super().forward(x), "penalty": self.enc.weight.square().sum()}


@pytest.mark.parametrize("model", [DecodesByAttribute, TakesAShortcut, Penalised])
def test_readers_of_attributes_read_what_the_task_may_read(model: type[Base]) -> None:
    wsn = trained(model(), tasks=(1,), heads="head").eval()
    with torch.no_grad(), wsn.use_task(1):
        expected = wsn(X)
    for task in (2, 3):
        train(wsn, task, lambda out: first(out).pow(2).mean(), probe=X)
    wsn.verify(probe=X)
    with torch.no_grad(), wsn.eval().use_task(1):
        found = wsn(X)
    pairs = zip(expected.values(), found.values(), strict=True) if isinstance(found, dict) else [(expected, found)]
    assert all(torch.equal(*pair) for pair in pairs)


@pytest.mark.parametrize("reader", READERS)
def test_verify_finds_it_and_names_the_tensors(reader: str) -> None:
    model, names = READERS[reader]
    wsn = trained(model(), heads="head")
    wsn.verify()
    with pytest.raises(UnmaskedReadError, match="task 1 computes with values that it must not read") as error:
        wsn.verify(probe=X)
    assert (error.value.task, error.value.names) == (1, names)


@pytest.mark.parametrize("reader", READERS)
def test_the_end_of_the_first_task_finds_it_and_the_task_goes_on(reader: str) -> None:
    model, names = READERS[reader]
    wsn = WSN(convert(model(), density=0.3, heads="head"))
    with pytest.raises(UnmaskedReadError) as error:
        train(wsn, "a", lambda out: first(out).pow(2).mean(), probe=X)
    assert error.value.names == names
    assert (wsn.current_task, wsn.tasks) == ("a", [])
    assert all(layer.active_row is None and layer.tasks == [] for layer in wsn.subnet_layers().values())
    wsn.end_task()
    assert wsn.verify().tasks == ["a"]


def test_an_error_of_the_model_because_of_nan_is_the_cause() -> None:
    wsn = trained(NoticesNaN(), heads="head")
    with pytest.raises(UnmaskedReadError) as error:
        wsn.verify(probe=X)
    assert isinstance(error.value.__cause__, ValueError)


def test_code_outside_of_the_model_is_found_with_a_function() -> None:
    """A merge of adapters, or a penalty on weights in the loss."""
    wsn = trained(Base(), heads="head")
    wsn.verify(probe=X)
    layer = wsn.subnet_layers()["enc"]
    asked = []

    def merged(task: int) -> Tensor:
        asked.append((task, layer.active_row))
        return wsn(X) + layer.weight.sum()

    with pytest.raises(UnmaskedReadError) as error:
        wsn.verify(probe=merged)
    assert error.value.names == ["enc.weight"]
    assert {*asked} == {(1, 0)}


def test_a_function_may_choose_inputs_and_use_the_task_itself() -> None:
    inputs = {1: X, 2: X[:5]}

    def logits(task: int) -> Tensor:
        with wsn.use_task(task):
            return wsn(inputs[task])

    wsn = trained(Base(), heads="head")
    wsn.verify(probe=logits)
    inputs[3] = X
    train(wsn, 3, lambda out: first(out).pow(2).mean(), probe=logits)
    assert wsn.tasks == [1, 2, 3]


class ReadsAnotherHead(Base):
    """Subtracts what the heads of all tasks have in common."""

    def forward(self, x: Tensor) -> Any:
        heads = [head.weight for head in self.head.heads.values()] if isinstance(self.head, TaskHeads) else []
        return super().forward(x) - sum(weight.mean() for weight in heads)


def test_values_of_other_tasks_are_poisoned_heads() -> None:
    wsn = trained(ReadsAnotherHead(), heads="head")
    with pytest.raises(UnmaskedReadError) as error:
        wsn.verify(probe=X)
    assert error.value.names == ["head.heads.i2.weight"]


class ReadsAllRows(nn.Module):
    """Uses the statistics of all tasks together."""

    def __init__(self, rows: bool) -> None:
        super().__init__()
        self.enc, self.norm, self.head, self.rows = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 3), rows

    def forward(self, x: Tensor) -> Tensor:
        kept = self.norm.running_mean_tasks if self.rows else self.norm.running_mean_live
        more = 0.0 if kept is None or not len(kept) or self.training else kept.mean()
        return self.head(self.norm(self.enc(x))) + more


@pytest.mark.parametrize(
    ("rows", "name"),
    [(True, "norm.running_mean of other tasks"), (False, "norm.running_mean (as it is in training)")],
)
def test_values_of_other_tasks_are_poisoned_per_task(rows: bool, name: str) -> None:
    wsn = trained(ReadsAllRows(rows), heads="head")
    with pytest.raises(UnmaskedReadError) as error:
        wsn.verify(probe=X)
    assert error.value.names == [name]


def test_a_group_is_named_if_no_tensor_is_enough_by_itself() -> None:
    class Both(Base):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x) + (whole(self.enc).isnan().any() & whole(self.mid).isnan().any())

    with pytest.raises(UnmaskedReadError) as error:
        trained(Both(), heads="head").verify(probe=X)
    assert {"enc.weight", "mid.weight"} <= {*error.value.names}


# --- models that are right -------------------------------------------------------------------------------------------
class ReadsTheMaskedWeight(Base):
    """The remedy: what the layer itself would compute with."""

    def forward(self, x: Tensor) -> Any:
        y = self.features(x)
        tied = self.enc.masked("weight", y.dtype) if hasattr(self.enc, "masked") else self.enc.weight
        return self.head(F.linear(y, tied.t()))


@pytest.mark.parametrize("one_pass", [True, False], ids=["one pass", "standard"])
@pytest.mark.parametrize("gates_ahead", [True, False], ids=["ahead", "not ahead"])
def test_the_masked_weight_may_be_read_anywhere(one_pass: bool, gates_ahead: bool) -> None:
    wsn = WSN(convert(ReadsTheMaskedWeight(), density=0.3, heads="head"), gates_ahead=gates_ahead)
    kept = {}
    for task in (1, 2, 3):
        wsn.begin_task(task)
        optimizer = SubnetAdamW(wsn, 0.05, one_pass=one_pass)
        for _ in range(4):
            optimizer.zero_grad()
            wsn(X + task).pow(2).mean().backward()
            optimizer.step()
        wsn.end_task(probe=X)
        for earlier, before in kept.items():
            with torch.no_grad(), wsn.use_task(earlier):
                assert torch.equal(wsn(X), before)
        with torch.no_grad(), wsn.use_task(task):
            kept[task] = wsn(X)


DENSE = ["0", "1"]
RIGHT: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], dict[str, Any]]] = {
    "norms and dropout": (
        lambda: nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.LayerNorm(8), nn.Dropout(0.5), nn.Linear(8, 3)),
        {"heads": "4"},
        {},
    ),
    "a transformer": (
        lambda: nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Linear(8, 3)),
        {"heads": "1", "exclude_modules": "0.self_attn"},
        {"per_task": "0.self_attn.*"},
    ),
    "frozen and per-task layers": (
        lambda: nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)),
        {"heads": "3", "exclude_modules": DENSE},
        {"frozen": "0.*", "per_task": "1.*"},
    ),
    "no head": (lambda: nn.Sequential(nn.Linear(8, 3)), {}, {}),
}


@pytest.mark.parametrize("kind", RIGHT)
def test_a_model_that_only_calls_its_layers_passes(kind: str) -> None:
    net, how, owners = RIGHT[kind]
    wsn = WSN(convert(net(), density=0.3, **how), **owners)
    for task in ("a", "b"):
        train(wsn, task, lambda out: out.pow(2).mean(), probe=X)
    assert wsn.verify(probe=X).tasks == ["a", "b"]


def test_tied_layers_share_what_they_read() -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 3))
    net[2].weight = net[0].weight
    trained(net, heads="3").verify(probe=X)


@dataclasses.dataclass
class Output:
    logits: Tensor
    notes: dict[str, Any]


OUTPUTS: dict[str, Callable[[Tensor], Any]] = {
    "tuple": lambda y: (y, [y + 1, "text"]),
    "dict": lambda y: {"y": y, "more": {"z": (y.argmax(1), None)}},
    "dataclass": lambda y: Output(y, {"n": 3, "y": y}),
    "integers": lambda y: y.argmax(1),
}


@pytest.mark.parametrize("kind", OUTPUTS)
@pytest.mark.parametrize("reads", [True, False], ids=["reads", "right"])
def test_outputs_of_any_form(kind: str, reads: bool) -> None:
    class Model(TiedDecoder if reads else Base):
        def forward(self, x: Tensor) -> Any:
            return OUTPUTS[kind](super().forward(x)) if not self.training else super().forward(x)

    wsn = trained(Model(), heads="head")
    if reads:
        with pytest.raises(UnmaskedReadError):
            wsn.verify(probe=X)
    else:
        wsn.verify(probe=X)


PROBES: dict[str, Any] = {
    "tuple": (X, 2.0),
    "list": [X, 2.0],
    "dict": {"x": X, "factor": 2.0},
    "nested": ({"x": X}, 2.0),
}


@pytest.mark.parametrize("kind", PROBES)
def test_probes_of_any_form(kind: str) -> None:
    class Scaled(Base):
        def forward(self, x: Any, factor: float = 1.0) -> Any:
            x = x["x"] if isinstance(x, dict) else x
            return super().forward(x.mul_(factor))  # writes to its input

    before = X.clone()
    wsn = WSN(convert(Scaled(), density=0.3, heads="head"))
    train(wsn, 1, lambda out: out.pow(2).mean(), steps=0)
    wsn.verify(probe=PROBES[kind])
    assert torch.equal(X, before)


class Random(Base):
    """Draws random numbers in evaluation too."""

    def forward(self, x: Tensor) -> Any:
        return super().forward(F.dropout(x, 0.3, training=True))


def test_random_numbers_are_the_same_in_all_runs_and_afterwards() -> None:
    wsn = trained(Random(), heads="head")
    state = torch.get_rng_state()
    wsn.verify(probe=X)
    assert torch.equal(torch.get_rng_state(), state)


class Unsteady(Base):
    """Rounds otherwise at each call, as some kernels do."""

    calls = 0
    reads = False

    def forward(self, x: Tensor) -> Any:
        self.calls += 1
        y = super().forward(x) * (1 + 1e-6 * self.calls)
        return y + whole(self.enc).sum() * 0 if self.reads else y


def test_outputs_that_differ_each_time_are_searched_for_nan() -> None:
    wsn = trained(Unsteady(), heads="head")
    wsn.verify(probe=X)
    wsn.model.reads = True
    with pytest.raises(UnmaskedReadError) as error:
        wsn.verify(probe=X)
    assert error.value.names == ["enc.weight"]


# --- no trace --------------------------------------------------------------------------------------------------------
class Everything(Base):
    def __init__(self, fails: bool = False) -> None:
        super().__init__()
        self.norm, self.drop, self.fails = nn.BatchNorm1d(8), nn.Dropout(0.1), fails
        self.register_buffer("seen", torch.zeros(3))

    def forward(self, x: Tensor) -> Any:
        if not self.training:
            self.seen += x.sum()
            if self.fails:
                raise KeyboardInterrupt
        return self.head(self.drop(self.norm(self.features(x))))


def bits(wsn: WSN) -> dict[str, bytes]:
    tensors = {**dict(wsn.named_parameters()), **dict(wsn.named_buffers())}
    return {name: t.detach().reshape(-1).view(torch.uint8).numpy().tobytes() for name, t in tensors.items()}


@pytest.mark.parametrize("fails", [True, False], ids=["fails", "ends"])
@pytest.mark.parametrize("when", ["verify", "end_task"])
def test_every_value_and_mode_stays_what_it_was(fails: bool, when: str) -> None:
    wsn = WSN(convert(Everything(), density=0.3, heads="head"), per_task="seen")
    for task in (1, 2):
        train(wsn, task, lambda out: out.pow(2).mean())
    wsn.begin_task(3)
    wsn.train()
    wsn.model.norm.eval()
    free = ~unpack_mask(wsn.model.mid.weight_union, (8, 8)).flatten()
    with torch.no_grad():  # values that a sum with something would not bring back
        wsn.model.mid.weight.view(-1)[free.nonzero()[:2, 0]] = torch.tensor([-0.0, 1e-42])
    wsn.model.fails = fails
    before, modes = bits(wsn), [module.training for module in wsn.modules()]
    call = wsn.verify if when == "verify" else wsn.end_task
    if fails:
        with pytest.raises(KeyboardInterrupt):
            call(probe=X)
    else:
        call(probe=X)
    after = bits(wsn)
    if when == "end_task" and not fails:  # the end of a task adds rows
        grown = {name for name in before if name.endswith(("_masks", "_tasks", "_union"))}
        before, after = ({n: b for n, b in values.items() if n not in grown} for values in (before, after))
    assert [name for name in before if before[name] != after[name]] == []
    assert before.keys() == after.keys()
    assert [module.training for module in wsn.modules()] == modes


def test_training_goes_on_as_if_nothing_had_been_probed() -> None:
    ends = []
    for probed in (True, False):
        torch.manual_seed(0)
        wsn = WSN(convert(Everything(), density=0.3, heads="head"), per_task="seen", gates_ahead=True)
        train(wsn, 1, lambda out: out.pow(2).mean())
        wsn.begin_task(2)
        optimizer = SubnetAdamW(wsn, 0.05, one_pass=True)
        for _ in range(3):
            optimizer.zero_grad()
            wsn.train()
            wsn(X).pow(2).mean().backward()
            optimizer.step()
            if probed:
                wsn.verify(probe=X)
        ends.append(bits(wsn))
    assert ends[0] == ends[1]


def test_the_view_stays() -> None:
    wsn = trained(Base(), heads="head")
    wsn.use_task(2)
    before = wsn(X)
    wsn.verify(probe=X)
    assert torch.equal(wsn(X), before)


@pytest.mark.parametrize("inside", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_in_every_grad_mode(inside: Callable[[], Any]) -> None:
    wsn = WSN(convert(Everything(), density=0.3, heads="head"), per_task="seen")
    train(wsn, 1, lambda out: out.pow(2).mean())
    with inside():
        wsn.verify(probe=X)
    wrong = trained(TiedDecoder(), heads="head")
    with inside(), pytest.raises(UnmaskedReadError):
        wrong.verify(probe=X)


def test_under_autocast() -> None:
    wsn, wrong = trained(Base(), heads="head"), trained(TiedDecoder(), heads="head")
    with torch.autocast("cpu", torch.bfloat16):
        wsn.verify(probe=X)
        with pytest.raises(UnmaskedReadError):
            wrong.verify(probe=X)


def test_a_model_that_was_compiled() -> None:
    wsn, wrong = trained(Base(), heads="head"), trained(TiedDecoder(), heads="head")
    for one in (wsn, wrong):
        one.compile(backend="aot_eager")
    wsn.verify(probe=X)
    with pytest.raises(UnmaskedReadError):
        wrong.verify(probe=X)


# --- mistakes --------------------------------------------------------------------------------------------------------
def test_changed_values_come_first() -> None:
    wsn = trained(TiedDecoder(), heads="head")
    with torch.no_grad():
        wsn.subnet_layers()["mid"].weight.add_(1)
    with pytest.raises(ForgottenError):
        wsn.verify(probe=X)


@pytest.mark.parametrize("probe", ["text", 3, 1.5])
def test_what_is_no_probe(probe: Any) -> None:
    with pytest.raises(TypeError, match="probe must be a tensor, a tuple, a mapping or a function"):
        trained(Base(), heads="head").verify(probe=probe)


def test_an_error_of_the_model_itself_is_handed_on() -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        trained(Base(), heads="head").verify(probe=X[:, :3])


@pytest.mark.parametrize("probe", [X[:0], X * torch.nan, lambda task: None], ids=["empty", "nan", "nothing"])
def test_outputs_that_say_nothing_are_an_error(probe: Any) -> None:
    with pytest.raises(ValueError, match="the outputs for probe have no finite element"):
        trained(Base(), heads="head").verify(probe=probe)


def test_no_memory_is_no_reading() -> None:
    class Full(Base):
        def forward(self, x: Tensor) -> Any:
            if whole(self.enc).isnan().any():
                raise torch.OutOfMemoryError("full")
            return super().forward(x)

    with pytest.raises(torch.OutOfMemoryError):
        trained(Full(), heads="head").verify(probe=X)
