"""``WSN(keep_masked=n)``: the masked weights of the last n finished tasks that were in use, also while none is."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from wsn_fast import WSN, convert, ops
from wsn_fast.nn.gated import SubnetLayer

X = torch.randn(3, 6, generator=torch.Generator().manual_seed(1))
TENSORS = 4  # two weights, two biases


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The tensors that are masked by a packed mask from now on."""
    found: list[Tensor] = []
    gate_packed = ops.gate_packed

    def counted(weight: Tensor, *args: Any) -> Tensor:
        found.append(weight)
        return gate_packed(weight, *args)

    monkeypatch.setattr(ops, "gate_packed", counted)
    return found


def make_wsn(keep_masked: bool | int, tasks: int = 3) -> WSN:
    torch.manual_seed(0)
    wsn = WSN(convert(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)), density=0.5), keep_masked=keep_masked)
    for task in range(tasks):
        end(wsn, task)
    return wsn.eval()


def end(wsn: WSN, task: int) -> None:
    """Begin and end a task with a mask of its own."""
    wsn.begin_task(task)
    for layer in wsn.subnet_layers().values():
        layer.reset_scores()
    wsn.end_task()


def first(wsn: WSN) -> SubnetLayer:
    return wsn.subnet_layers()["0"]


@torch.no_grad()
def visit(wsn: WSN, *tasks: int, twice: bool = False) -> list[Tensor]:
    """The logits of each task in turn."""
    found = []
    for task in tasks:
        with wsn.use_task(task):
            found.append(wsn(X.to(first(wsn).weight.dtype)))
            if twice:
                wsn(X)
    return found


def fresh(wsn: WSN, task: int) -> Tensor:
    """The logits of a copy of the model that has kept nothing."""
    return visit(copy.deepcopy(wsn), task)[0]


def assert_all_equal(some: Sequence[Tensor], others: Sequence[Tensor]) -> None:
    assert all(map(torch.equal, some, others))


# --- how many are kept
def test_as_many_tasks_are_kept_as_were_asked_for(made: list[Tensor]) -> None:
    wsn = make_wsn(3)
    before = visit(wsn, 0, 1, 2)
    assert len(made) == 3 * TENSORS
    assert_all_equal(visit(wsn, 0, 1, 2, 2, 0), [*before, before[2], before[0]])
    assert len(made) == 3 * TENSORS


def test_the_task_that_was_left_first_is_dropped(made: list[Tensor]) -> None:
    wsn = make_wsn(2)
    visit(wsn, 0, 1, 0, 2)
    made.clear()
    visit(wsn, 0, 2)
    assert not made
    visit(wsn, 1)
    assert len(made) == TENSORS


def test_one_task_is_kept_after_it_was_left(made: list[Tensor]) -> None:
    wsn = make_wsn(1)
    visit(wsn, 0, 0)
    assert len(made) == TENSORS
    visit(wsn, 1, 0)
    assert len(made) == 3 * TENSORS


def test_tasks_that_nothing_was_computed_with_take_no_place(made: list[Tensor]) -> None:
    wsn = make_wsn(2)
    visit(wsn, 1)
    for task in (2, 0):
        wsn.use_task(task)
    wsn.use_task(None)
    made.clear()
    visit(wsn, 1)
    assert not made


@pytest.mark.parametrize("keep", [True, 2])
def test_a_task_that_is_used_again_while_it_is_in_use_makes_nothing(keep: bool | int, made: list[Tensor]) -> None:
    wsn = make_wsn(keep)
    with torch.no_grad(), wsn.use_task(0):
        wsn(X)
        wsn.use_task(0)
        wsn(X)
    assert len(made) == TENSORS


def test_a_task_may_be_left_for_another_one(made: list[Tensor]) -> None:
    wsn = make_wsn(2)
    with torch.no_grad(), wsn.use_task(0):
        wsn(X)
        with wsn.use_task(1):
            wsn(X)
        wsn(X)
        assert len(made) == 2 * TENSORS
        with wsn.use_task(0):
            wsn(X)
    assert len(made) == 2 * TENSORS


@pytest.mark.parametrize(("keep", "alive"), [(True, [0, 0, 0]), (1, [0, 0, 1]), (2, [0, 1, 1]), (3, [1, 1, 1])])
def test_memory_is_given_back(keep: bool | int, alive: list[int]) -> None:
    """Also that of what the model knows of all layers together, which the second pass of a task makes."""
    wsn, refs = make_wsn(keep), []
    for task in range(3):
        with torch.no_grad(), wsn.use_task(task):
            wsn(X), wsn(X)
            refs.append([weakref.ref(layer.gate_state.kept["weight"].masked) for layer in wsn.subnet_layers().values()])
    assert [[ref() is not None for ref in one] for one in refs] == [[bool(here)] * 2 for here in alive]


def test_never_more_are_there_than_were_asked_for() -> None:
    """While a task is in use, too."""
    wsn, refs = make_wsn(2), []
    for task in (0, 1, 2):
        with torch.no_grad(), wsn.use_task(task):
            wsn(X), wsn(X)
            refs.append(weakref.ref(first(wsn).gate_state.kept["weight"].masked))
            assert sum(ref() is not None for ref in refs) == min(2, task + 1)


def test_nothing_may_be_kept(made: list[Tensor]) -> None:
    wsn = make_wsn(False)
    assert_all_equal(visit(wsn, 0, 1, 0, twice=True), visit(wsn, 0, 1, 0))
    assert len(made) == 9 * TENSORS


@pytest.mark.parametrize(
    ("keep", "error", "message"),
    [
        (0, ValueError, "keep_masked must be at least 1 if it is a number, got 0"),
        (-3, ValueError, "got -3"),
        (2.0, TypeError, "keep_masked must be True, False or an int, got 2.0"),
        (None, TypeError, "got None"),
        ("all", TypeError, "got 'all'"),
    ],
)
def test_what_is_no_number_of_tasks_is_refused(keep: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make_wsn(keep)


# --- what is kept is right
def other_mask(wsn: WSN) -> None:
    first(wsn).weight_masks[0] = first(wsn).weight_masks[1]


def other_masks(wsn: WSN) -> None:
    first(wsn).weight_masks = first(wsn).weight_masks.flip(0)


def other_data(wsn: WSN) -> None:
    first(wsn).weight_masks.data = first(wsn).weight_masks.flip(0)


def replace_weight(wsn: WSN) -> None:
    first(wsn)._parameters["weight"] = nn.Parameter(torch.randn(8, 6))  # the attribute refuses other values


def load_another_state(wsn: WSN) -> None:
    wsn.load_state_dict({name: 2 * t if name.endswith(".weight") else t for name, t in wsn.state_dict().items()})


def load_fewer_tasks(wsn: WSN) -> None:
    """Row 0 is another task then."""
    wsn.load_state_dict(make_wsn(True, tasks=0).state_dict())
    end(wsn, 5)
    end(wsn, 0)


def remove_the_first(wsn: WSN) -> None:
    """Its row is that of the next task then."""
    wsn.remove_task(0)
    end(wsn, 0)


CHANGES: dict[str, Callable[[WSN], object]] = {
    "in place": lambda wsn: first(wsn).weight.mul_(2),
    "in place through detach": lambda wsn: first(wsn).weight.detach().mul_(2),
    "a bias": lambda wsn: first(wsn).bias.add_(1),  # type: ignore[union-attr]
    "another Parameter": replace_weight,
    "double": lambda wsn: wsn.double(),
    "there and back": lambda wsn: wsn.half().float(),
    "another mask": other_mask,
    "other masks": other_masks,
    "other memory of the masks": other_data,
    "another backend": lambda wsn: setattr(first(wsn), "backend", "torch"),
    "a state": load_another_state,
    "a state with fewer tasks": load_fewer_tasks,
    "a task more": lambda wsn: end(wsn, 3),
    "a task less": remove_the_first,
    "a saved state": lambda wsn: wsn.state_dict(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
@torch.no_grad()
def test_what_changes_while_a_task_is_not_in_use_is_seen(change: Callable[[WSN], object]) -> None:
    wsn = make_wsn(3)
    visit(wsn, 0, 1, twice=True)
    change(wsn)
    assert_all_equal(visit(wsn, 0), [fresh(wsn, 0)])
    assert_all_equal(visit(wsn, 0), [fresh(wsn, 0)])


def test_only_what_has_changed_is_made_again(made: list[Tensor]) -> None:
    wsn = make_wsn(2)
    visit(wsn, 0)
    with torch.no_grad():
        first(wsn).weight.mul_(2)
    made.clear()
    visit(wsn, 0)
    assert [weight.shape for weight in made] == [first(wsn).weight.shape]


# --- when all is dropped
def is_kept(wsn: WSN) -> bool:
    return any(layer.gate_state.keeps_others() for layer in wsn.subnet_layers().values())


def train(wsn: WSN) -> None:
    wsn(X).sum().backward()


DROPPING: dict[str, Callable[[WSN], object]] = {
    "a training pass": train,
    "the end of a task": lambda wsn: end(wsn, 3),
    "the removal of a task": lambda wsn: wsn.remove_task(2),
    "a move": lambda wsn: wsn.to(torch.float32),
    "a state": lambda wsn: wsn.load_state_dict(wsn.state_dict()),
}


@pytest.mark.parametrize("event", DROPPING.values(), ids=DROPPING.keys())
def test_memory_is_not_held_where_it_is_of_no_use(event: Callable[[WSN], object]) -> None:
    wsn = make_wsn(2)
    visit(wsn, 0, 1, twice=True)
    assert is_kept(wsn)
    event(wsn)
    assert not is_kept(wsn)


def test_a_move_gives_memory_back_while_a_task_is_in_use() -> None:
    wsn = make_wsn(True)
    with torch.no_grad(), wsn.use_task(0):
        wsn(X), wsn(X)
        ref = weakref.ref(first(wsn).gate_state.kept["weight"].masked)
        wsn.to(torch.float32)
        assert ref() is None


def test_a_layer_that_took_the_place_of_another_one_is_given_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    wsn = make_wsn(True)
    with torch.no_grad(), wsn.use_task(0):
        expected = wsn(X), wsn(X)
        wsn.model[2] = copy.deepcopy(wsn.model[2])
        wsn.verify()  # looks for the layers again
        wsn(X)
        monkeypatch.setattr(SubnetLayer, "masked", lambda *args: pytest.fail("a layer was given nothing"))
        assert torch.equal(wsn(X), expected[0])


def test_other_passes_drop_nothing() -> None:
    wsn = make_wsn(2)
    visit(wsn, 0)
    with torch.no_grad():
        wsn(X)
    with wsn.use_task(1):
        wsn(X)
    assert is_kept(wsn)


def test_a_copy_has_none_and_keeps_as_many() -> None:
    wsn = make_wsn(2)
    visit(wsn, 0)
    twin = copy.deepcopy(wsn)
    assert not is_kept(twin)
    visit(twin, 0)
    assert is_kept(twin)
