"""Heads that are no nn.Linear: everything that a WSN does with heads works for them."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from wsn_fast import WSN, ForgottenError, StateError, UnmaskedReadError, convert, to_dense
from wsn_fast.optim import SubnetAdamW

CLASSES = 3


class Plain(nn.Linear):
    """A subclass without a forward of its own."""


class Cosine(nn.Linear):
    """A subclass with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x) @ F.normalize(self.weight).T


class Prototypes(nn.Module):
    """No reset_parameters, a constant that is not saved, and one of integers."""

    def __init__(self) -> None:
        super().__init__()
        self.centres = nn.Parameter(torch.linspace(-1, 1, 8 * CLASSES).reshape(CLASSES, 8))
        self.register_buffer("scale", torch.linspace(1, 2, CLASSES), persistent=False)
        self.register_buffer("order", torch.arange(CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        return (-torch.cdist(x, self.centres) * self.scale)[:, self.order]


class Counts(nn.Module):
    """Adds the number of its forward passes, in evaluation mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, CLASSES)
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return self.linear(x) + self.count


KINDS: dict[str, Callable[[], nn.Module]] = {
    "subclass": lambda: Plain(8, CLASSES),
    "own forward": lambda: Cosine(8, CLASSES, bias=False),
    "sequence": lambda: nn.Sequential(nn.Dropout(0.1), nn.Linear(8, CLASSES)),
    "batch norm": lambda: nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, CLASSES)),
    "layer norm": lambda: nn.Sequential(nn.LayerNorm(8), nn.Linear(8, CLASSES)),
    "spectral norm": lambda: parametrizations.spectral_norm(nn.Linear(8, CLASSES)),
    "no reset": Prototypes,
    "counts": Counts,
    "convolution": lambda: nn.Conv2d(4, CLASSES, 1),
}
each_kind = pytest.mark.parametrize("kind", KINDS)


def net(kind: str) -> nn.Module:
    """A converted model whose classifier is of this kind. A convolution gets a map of features."""
    torch.manual_seed(1)
    body: list[nn.Module] = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU()]
    if kind != "convolution":
        body += [nn.Flatten(), nn.Linear(64, 8), nn.ReLU()]
    model = nn.Sequential()
    model.features, model.classifier = nn.Sequential(*body), KINDS[kind]()
    return convert(model, 0.4, heads="classifier")


def inputs(seed: int, size: int = 12) -> Tensor:
    return torch.randn(size, 1, 6, 6, generator=torch.Generator().manual_seed(seed))


def train(wsn: WSN, task: int, one_pass: bool = False, steps: int = 4) -> None:
    """One task up to just before its end."""
    wsn.begin_task(task)
    optimizer: torch.optim.Optimizer
    if one_pass:
        optimizer = SubnetAdamW(wsn, lr=0.02, weight_decay=0.1, one_pass=True)
    else:
        optimizer = torch.optim.AdamW(wsn.parameters(), lr=0.02, weight_decay=0.1)
    optimizer = wsn.guard(optimizer)
    wsn.train()
    for step in range(steps):
        x = inputs(100 * task + step)
        out = wsn(x)
        y = torch.randint(CLASSES, (len(x), *out.shape[2:]), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad(set_to_none=False)
        F.cross_entropy(out, y).backward()
        optimizer.step()
    wsn.eval()


def finished(kind: str, tasks: int = 2, one_pass: bool = False) -> WSN:
    wsn = WSN(net(kind))
    for task in range(tasks):
        train(wsn, task, one_pass)
        wsn.end_task()
    return wsn


@torch.no_grad()
def logits(wsn: WSN, task: int) -> Tensor:
    wsn.eval()
    with wsn.use_task(task):
        return wsn(inputs(7)).clone()


@each_kind
@pytest.mark.parametrize("one_pass", [False, True])
def test_a_finished_task_stays_what_it_was(kind: str, one_pass: bool) -> None:
    wsn = finished(kind, 1, one_pass)
    expected = logits(wsn, 0)
    train(wsn, 1, one_pass)
    wsn.end_task(probe=inputs(3))
    assert torch.equal(logits(wsn, 0), expected)
    assert not torch.equal(logits(wsn, 1), expected)
    assert wsn.verify(probe=inputs(3)).tasks == [0, 1]


@each_kind
def test_a_forward_pass_in_training_mode_changes_nothing_of_a_finished_head(kind: str) -> None:
    wsn = finished(kind)
    expected = [logits(wsn, task) for task in (0, 1)]
    for task in (0, 1):
        wsn.train()
        with wsn.use_task(task):
            wsn(inputs(8) + 3)
        wsn.model.classifier.head(task).train()(wsn.model.features(inputs(9)))
    assert all(torch.equal(logits(wsn, task), expected[task]) for task in (0, 1))
    wsn.verify()


@each_kind
def test_a_state_makes_the_heads_of_a_new_model(kind: str) -> None:
    wsn = finished(kind)
    train(wsn, 2)
    other = WSN(net(kind))
    other.load_state_dict(wsn.state_dict(), strict=True)
    assert list(other.heads) == [0, 1, 2] and other.current_task == 2
    assert all(torch.equal(logits(other, task), logits(wsn, task)) for task in (0, 1))
    other.use_task(None)
    other.end_task()
    expected = logits(other, 0)
    other.train()
    with other.use_task(0):
        other(inputs(8) + 3)  # the loaded buffers are kept
    assert torch.equal(logits(other, 0), expected)
    other.verify()


@each_kind
def test_an_earlier_state_takes_heads_away_and_lets_others_train(kind: str) -> None:
    wsn = WSN(net(kind))
    train(wsn, 0)
    state = copy.deepcopy(wsn.state_dict())
    wsn.end_task()
    train(wsn, 1)
    wsn.load_state_dict(state, strict=True)
    assert list(wsn.heads) == [0] and wsn.current_task == 0
    assert all(param.requires_grad for param in wsn.heads[0].parameters())
    wsn.train()
    before = {name: buffer.clone() for name, buffer in wsn.heads[0].named_buffers()}
    wsn(inputs(8) + 3)
    changed = {name for name, buffer in wsn.heads[0].named_buffers() if not torch.equal(buffer, before[name])}
    assert bool(changed) == (kind in ("batch norm", "spectral norm", "counts"))


@each_kind
@pytest.mark.parametrize("how", ["missing", "shape", "unknown"])
def test_a_state_that_does_not_fit_is_not_loaded(kind: str, how: str) -> None:
    state = finished(kind, 1).state_dict()
    name = next(name for name in state if ".heads.i0." in name)
    if how == "missing":
        del state[name]
    elif how == "shape":
        state[name] = torch.zeros(2, *state[name].shape)
    else:
        state[f"{name}_more"] = state[name]
    other = WSN(net(kind))
    with pytest.raises(StateError, match=r"[Nn]othing has been loaded"):
        other.load_state_dict(state)
    assert list(other.heads) == [] and other.tasks == []


@each_kind
def test_to_dense_puts_the_head_in_place(kind: str) -> None:
    wsn = finished(kind)
    for task in (0, 1):
        dense = to_dense(wsn, task).eval()
        assert type(dense.classifier) is type(wsn.heads[task])
        # torch pickles no parametrized module
        copied = None if kind == "spectral norm" else pickle.loads(pickle.dumps(dense))
        assert torch.equal(dense(inputs(7)), logits(wsn, task))
        assert copied is None or torch.equal(copied(inputs(7)), logits(wsn, task))
        assert not any(param.requires_grad for param in dense.classifier.parameters())
        assert not [name for name in dense.state_dict() if "heads" in name]


@each_kind
def test_copies_and_pickles_go_on(kind: str) -> None:
    wsn = finished(kind)
    copies = [copy.deepcopy(wsn)]
    if kind != "spectral norm":
        copies.append(pickle.loads(pickle.dumps(wsn)))
    for clone in copies:
        expected = logits(clone, 0)
        assert torch.equal(expected, logits(wsn, 0))
        train(clone, 2)
        clone.end_task()
        assert torch.equal(logits(clone, 0), expected)
        assert list(clone.heads) == [0, 1, 2] and list(wsn.heads) == [0, 1]


@each_kind
def test_a_batch_of_several_tasks(kind: str) -> None:
    wsn = finished(kind).eval()
    x, ids = inputs(7, 6), [1, 0, 0, 1, 0, 1]
    mixed = wsn.forward_tasks(x, ids)
    for task in (0, 1):
        rows = [row for row, one in enumerate(ids) if one == task]
        with wsn.use_task(task), torch.no_grad():
            torch.testing.assert_close(mixed[rows], wsn(x[rows]))


def test_one_pass_over_a_batch_of_several_tasks() -> None:
    torch.manual_seed(0)
    body = [nn.Flatten(), nn.Linear(36, 8), nn.ReLU()]
    wsn = WSN(convert(nn.Sequential(*body, KINDS["batch norm"]()), 0.4, heads="3"))
    for task in (0, 1):
        train(wsn, task)
        wsn.end_task()
    x, ids = inputs(7, 6), [1, 0, 0, 1, 0, 1]
    torch.testing.assert_close(wsn.forward_tasks(x, ids, one_pass=True), wsn.forward_tasks(x, ids, one_pass=False))


@each_kind
def test_a_task_that_is_removed(kind: str) -> None:
    wsn = finished(kind)
    expected = logits(wsn, 1)
    wsn.remove_task(0)
    assert list(wsn.heads) == [1]
    assert torch.equal(logits(wsn, 1), expected)
    train(wsn, 0)
    wsn.end_task()
    assert torch.equal(logits(wsn, 1), expected)
    wsn.verify()


@each_kind
def test_a_head_that_somebody_writes_to_is_found(kind: str) -> None:
    wsn = finished(kind, 1)
    train(wsn, 1)
    with torch.no_grad():
        next(wsn.model.classifier.head(0).parameters()).add_(1)
    with pytest.raises(ForgottenError, match="task 0: classifier"):
        wsn.end_task()
    assert wsn.current_task == 1


def test_a_buffer_that_somebody_writes_to_is_found() -> None:
    wsn = finished("batch norm", 1)
    wsn.heads[0][1].running_mean.add_(1)
    with pytest.raises(ForgottenError, match=r"task 0: classifier\.1\.running_mean"):
        wsn.begin_task(1)


def test_a_trainable_state_does_not_bring_buffers_of_finished_heads() -> None:
    wsn = finished("batch norm", 1)
    state = wsn.trainable_state()
    wsn.begin_task(1)
    wsn.load_trainable_state({**wsn.trainable_state(), **state})
    state["classifier.heads.i0.1.running_mean"] = torch.ones(6)
    with pytest.raises(ValueError, match=r"classifier\.heads\.i0\.1\.running_mean"):
        wsn.load_trainable_state({**wsn.trainable_state(), **state})


class Reads(nn.Sequential):
    """Reads the head of task 0 in every task."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self[3].head(0)[3].bias


def test_a_read_of_another_head_is_found() -> None:
    torch.manual_seed(0)
    model = Reads(nn.Flatten(), nn.Linear(36, 8), nn.ReLU(), KINDS["batch norm"]())
    wsn = WSN(convert(model, 0.4, heads="3"))
    for task in (0, 1):
        wsn.begin_task(task)
        wsn.end_task()
    with pytest.raises(UnmaskedReadError) as error:
        wsn.verify(probe=inputs(3))
    assert (error.value.task, error.value.names) == (1, ["3.heads.i0.3.bias"])


def test_an_optimizer_without_the_head_is_refused() -> None:
    wsn = WSN(net("batch norm"))
    optimizer = wsn.guard(torch.optim.SGD(wsn.parameters(), 0.1))
    wsn.begin_task(0)
    wsn.train()
    wsn(inputs(0)).sum().backward()
    with pytest.raises(RuntimeError, match="no guarded optimizer holds the head of task 0"):
        optimizer.step()


def test_widths_of_a_convolution() -> None:
    wsn = WSN(net("convolution"))
    wsn.begin_task("wide", out_features=7)
    assert wsn(inputs(0)).shape == (12, 7, 4, 4)
    wsn.end_task()
    wsn.begin_task("usual")
    assert wsn(inputs(0)).shape == (12, CLASSES, 4, 4)
    other = WSN(net("convolution"))
    other.load_state_dict(wsn.state_dict(), strict=True)
    assert torch.equal(logits(other, "wide"), logits(wsn, "wide"))  # type: ignore[arg-type]


def test_a_width_that_is_not_possible_is_refused_before_anything_is_made() -> None:
    wsn = WSN(net("sequence"))
    with pytest.raises(ValueError, match="out_features must be None, got 7: the heads are copies of a Sequential"):
        wsn.begin_task(0, out_features=7)
    assert wsn.current_task is None and list(wsn.heads) == []


def test_what_the_template_does_not_train_stays_so() -> None:
    template = KINDS["batch norm"]()
    template[0].weight.requires_grad_(False)
    torch.manual_seed(0)
    wsn = WSN(convert(nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.ReLU(), template), 0.4, heads="3"))
    train(wsn, 0)
    state = copy.deepcopy(wsn.state_dict())
    wsn.end_task()
    wsn.load_state_dict(state)
    assert [name for name, param in wsn.heads[0].named_parameters() if not param.requires_grad] == ["0.weight"]


class Renamed(nn.Linear):
    """Saves its weight under another name, and loads it in its own way."""

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}kernel"] = destination.pop(f"{prefix}weight")

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        state_dict[f"{prefix}weight"] = state_dict.pop(f"{prefix}kernel")
        super()._load_from_state_dict(state_dict, prefix, *args)


@pytest.mark.parametrize("inside", [False, True])
def test_a_head_that_loads_in_its_own_way(inside: bool) -> None:
    def made() -> WSN:
        torch.manual_seed(0)
        last: nn.Module = nn.Sequential(nn.Linear(8, 8), Renamed(8, 3)) if inside else Renamed(8, 3)
        return WSN(convert(nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.ReLU(), last), 0.4, heads="3"))

    wsn = made()
    for task in (0, 1):
        train(wsn, task)
        wsn.end_task()
    state = wsn.state_dict()
    assert [name for name in state if name.endswith("kernel")]
    other = made()
    other.load_state_dict(state, strict=True)
    assert all(torch.equal(logits(other, task), logits(wsn, task)) for task in (0, 1))
    other.verify()


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("kind", ["batch norm", "sequence", "own forward"])
def test_an_exported_program_keeps_the_head_of_its_task(kind: str) -> None:
    wsn = finished(kind).eval()
    expected = logits(wsn, 0)
    with wsn.use_task(0), torch.no_grad():
        program = torch.export.export(wsn, (inputs(7),), strict=False).module()
        traced = torch.jit.trace(wsn, (inputs(7),))
    with wsn.use_task(1), torch.no_grad():
        assert torch.equal(program(inputs(7)), expected)
        assert torch.equal(traced(inputs(7)), expected)
