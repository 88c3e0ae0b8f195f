"""``WSN.forward_tasks``: batches whose rows belong to several tasks, task by task and at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from small_models import CLASSES, INPUT, convnet, mlp, run_tasks
from torch import Tensor, nn

from wsn_fast import WSN, FastSubnetLinear, ops
from wsn_fast.nn.gated import SubnetLayer

IDS = [2, 0, 1, 0, 2, 2, 1, 0]
X = torch.randn(len(IDS), *INPUT, generator=torch.Generator().manual_seed(1))
KEEP = [False, True, 1, 2, 3, 9]


def make_wsn(net: Callable[[], nn.Module] = mlp, tasks: Sequence[int] = (0, 1, 2), **options: Any) -> WSN:
    torch.manual_seed(0)
    wsn = WSN(net(), reinit_scores=True, **options)
    run_tasks(wsn, tasks, lambda params: torch.optim.Adam(params, 0.01), steps=2)
    return wsn.eval()


@torch.no_grad()
def one_by_one(wsn: WSN, x: Tensor, ids: Sequence[int]) -> Tensor:
    """What a program without ``forward_tasks`` computes."""
    out = torch.full((len(ids), CLASSES), torch.nan, dtype=x.dtype)
    for task in dict.fromkeys(ids):
        rows = torch.tensor([i for i, one in enumerate(ids) if one == task])
        with wsn.use_task(task):
            out[rows] = wsn(x[rows])
    return out


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The tensors that are masked by a packed mask from now on."""
    found: list[Tensor] = []
    gate_packed = ops.gate_packed
    monkeypatch.setattr(ops, "gate_packed", lambda w, *args: (found.append(w), gate_packed(w, *args))[1])
    return found


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of rows of passes that serve several tasks."""
    found: list[int] = []
    forward = FastSubnetLinear._forward_rows
    monkeypatch.setattr(
        FastSubnetLinear, "_forward_rows", lambda self, x, tasks: (found.append(len(x)), forward(self, x, tasks))[1]
    )
    return found


# --- the result
@pytest.mark.parametrize("keep", KEEP)
@pytest.mark.parametrize("net", [mlp, convnet])
def test_each_row_is_computed_as_its_task(net: Callable[[], nn.Module], keep: bool | int) -> None:
    """To the bit, whatever is kept; batches of all, one and two tasks."""
    wsn = make_wsn(net, keep_masked=keep)
    for _ in range(2):
        for ids in (IDS, [1] * len(IDS), [0, 2] * 4, IDS[::-1]):
            assert torch.equal(wsn.forward_tasks(X, ids), one_by_one(wsn, X, ids)), ids


def test_a_batch_of_one_row_and_one_of_another_dtype() -> None:
    wsn, x = make_wsn().double(), X[:1].double()
    assert torch.equal(wsn.forward_tasks(x, [1]), one_by_one(wsn, x, [1]))


def test_rows_of_the_task_in_progress() -> None:
    wsn = make_wsn(keep_masked=2)
    wsn.begin_task(3)
    ids = [3, 0, 3, 1, 3, 3, 0, 1]
    assert torch.equal(wsn.forward_tasks(X, ids), one_by_one(wsn, X, ids))
    assert wsn.current_task == 3 and wsn._view.task is None and wsn._view.head == 3


# --- what is in use afterwards
@pytest.mark.parametrize("before", [None, 0, 2])
@pytest.mark.parametrize("keep", KEEP)
def test_what_was_in_use_is_in_use_again(keep: bool | int, before: int | None) -> None:
    wsn = make_wsn(keep_masked=keep)
    wsn.use_task(before)
    view = wsn._view
    wsn.forward_tasks(X, IDS)
    assert wsn._view == view
    if before is not None:
        with torch.no_grad():
            assert torch.equal(wsn(X), one_by_one(wsn, X, [before] * len(X)))


@pytest.mark.parametrize("bad", [[0, 1, 7, 0, 1, 0, 1, 0], [7] * 8])
def test_after_an_error_too(bad: list[int]) -> None:
    wsn = make_wsn(keep_masked=2)
    wsn.use_task(1)
    with pytest.raises(ValueError, match="task 7 is unknown"):
        wsn.forward_tasks(X, bad)
    assert wsn._view.task == 1
    assert {layer.active_row for layer in wsn.subnet_layers().values()} == {1}


# --- what is made
def test_with_enough_tasks_kept_the_second_batch_makes_nothing(made: list[Tensor]) -> None:
    wsn = make_wsn(keep_masked=3)
    first = wsn.forward_tasks(X, IDS)
    assert len(made) == 3 * 4
    made.clear()
    assert torch.equal(wsn.forward_tasks(X, IDS), first) and not made


def test_a_batch_makes_no_more_than_its_tasks_one_by_one(made: list[Tensor]) -> None:
    """By default, with a task in use before."""
    wsn = make_wsn()
    wsn.use_task(IDS[0])
    for _ in range(2):
        made.clear()
        wsn.forward_tasks(X, IDS)
        assert len(made) <= 3 * 4


def test_the_short_way_through_the_layers_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that a model takes whose masked weights are kept."""
    wsn = make_wsn(keep_masked=3)
    wsn.forward_tasks(X, IDS)
    monkeypatch.setattr(SubnetLayer, "masked", lambda *args: pytest.fail("the long way"))
    wsn.forward_tasks(X, IDS)


# --- whether one pass is taken
@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """One pass was measured to be faster for up to 8 rows."""
    monkeypatch.setattr(FastSubnetLinear, "mixed_batch_rows", lambda self: 8)


@pytest.mark.usefixtures("measured")
@pytest.mark.parametrize("keep", [False, True, 1, 2])
def test_one_pass_is_taken_where_it_was_measured_to_be_faster(keep: bool | int, at_once: list[int]) -> None:
    wsn = make_wsn(keep_masked=keep)
    torch.testing.assert_close(wsn.forward_tasks(X, IDS), one_by_one(wsn, X, IDS))
    assert at_once == [8, 8]


@pytest.mark.usefixtures("measured")
def test_it_was_not_measured_against_masked_weights_that_are_kept(at_once: list[int]) -> None:
    wsn = make_wsn(keep_masked=3)
    wsn.forward_tasks(X, IDS)
    assert not at_once
    wsn.forward_tasks(X, IDS, one_pass=True)
    assert at_once == [8, 8]


@pytest.mark.usefixtures("measured")
def test_larger_batches_go_task_by_task(at_once: list[int]) -> None:
    wsn = make_wsn()
    wsn.forward_tasks(torch.cat([X, X]), IDS * 2)
    assert not at_once


def test_where_nothing_was_measured_a_batch_goes_task_by_task(at_once: list[int]) -> None:
    """As on a CPU, where one pass would mask the weights anew in each batch."""
    wsn = make_wsn()
    assert all(layer.mixed_batch_rows() == 0 for layer in wsn.subnet_layers().values())
    wsn.forward_tasks(X, IDS)
    assert not at_once


@pytest.mark.usefixtures("measured")
def test_a_model_that_does_not_allow_one_pass_goes_task_by_task(at_once: list[int]) -> None:
    wsn = make_wsn(lambda: nn.Sequential(mlp(), nn.LayerNorm(CLASSES)))
    wsn.forward_tasks(X, IDS)
    assert not at_once
    with pytest.raises(ValueError, match="one_pass is not possible: 1 is a LayerNorm"):
        wsn.forward_tasks(X, IDS, one_pass=True)


def test_one_pass_that_was_asked_for_does_not_look_at_measurements(at_once: list[int]) -> None:
    wsn = make_wsn()
    torch.testing.assert_close(wsn.forward_tasks(X, IDS, one_pass=True), one_by_one(wsn, X, IDS))
    wsn.forward_tasks(X, IDS, one_pass=False)
    assert at_once == [8, 8]
