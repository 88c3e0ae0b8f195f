"""What does not grow with the number of tasks, and what a model says when it is full."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from small_models import convnet, logits, mlp, run_tasks
from torch import Tensor, nn

from wsn_fast import WSN, convert
from wsn_fast.continual import fingerprints, statistics
from wsn_fast.nn.heads import TaskHeads
from wsn_fast.nn.task_ids import decode_json, encode_json

T = 300


def adamw(params: object) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, 0.01)  # type: ignore[arg-type]


def with_tasks(tasks: int, density: float = 0.1) -> WSN:
    wsn = WSN(convnet(density), reinit_scores=True)
    for task in range(tasks):
        wsn.begin_task(task)
        wsn.end_task()
    return wsn


@pytest.fixture(scope="module")
def many() -> WSN:
    return with_tasks(T)


class Counted:
    """Counts how often, and on how many bytes, something is computed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, where: Any, name: str) -> None:
        self.calls = self.bytes = 0
        real = getattr(where, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            self.bytes += sum(a.numel() * a.element_size() for a in args if isinstance(a, Tensor))
            return real(*args, **kwargs)

        monkeypatch.setattr(where, name, counted)


# --- capacity --------------------------------------------------------------------------------------------------------
def test_the_compression_of_a_task_is_measured_once(many: WSN, monkeypatch: pytest.MonkeyPatch) -> None:
    compress = Counted(monkeypatch, statistics, "compress")
    assert many.capacity().tasks == T
    assert compress.calls == 0


def test_what_was_measured_task_by_task_is_what_is_measured_at_once(many: WSN) -> None:
    gates = [gate for _, gate in many.gated()]
    assert many.capacity() == statistics.capacity([g.masks for g in gates], [g.param.numel() for g in gates])


def test_the_measurement_is_saved(many: WSN, monkeypatch: pytest.MonkeyPatch) -> None:
    other = WSN(convnet(0.1))
    other.load_state_dict(many.state_dict())
    compress = Counted(monkeypatch, statistics, "compress")
    assert other.capacity() == many.capacity()
    assert compress.calls == 0


def test_a_state_without_it_is_measured_when_asked_for(many: WSN, monkeypatch: pytest.MonkeyPatch) -> None:
    state = many.state_dict()
    register = decode_json(state["_extra_state"])
    for record in register["records"]:
        del record["compressed"]
    other = WSN(convnet(0.1))
    other.load_state_dict({**state, "_extra_state": encode_json(register)})
    assert "compressed" not in decode_json(other.state_dict()["_extra_state"])["records"][0]
    assert other.capacity() == many.capacity()
    compress = Counted(monkeypatch, statistics, "compress")
    other.capacity()
    assert compress.calls == 0


def test_large_masks_are_not_compressed_when_a_task_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    wsn = WSN(convert(nn.Sequential(nn.Linear(1500, 1500)), 0.5))
    compress = Counted(monkeypatch, statistics, "compress")
    wsn.begin_task(0)
    wsn.end_task()
    assert compress.calls == 0
    wsn.capacity()
    assert compress.calls == 2


# --- the end of a task and the state ---------------------------------------------------------------------------------
def test_the_end_of_a_task_copies_no_earlier_masks() -> None:
    wsn = with_tasks(16)
    storages = [layer.weight_masks.untyped_storage().data_ptr() for layer in wsn.subnet_layers().values()]
    moved = 0
    for task in range(16, 48):
        wsn.begin_task(task)
        wsn.end_task()
        now = [layer.weight_masks.untyped_storage().data_ptr() for layer in wsn.subnet_layers().values()]
        moved += now != storages
        storages = now
    assert moved <= 16, "32 tasks, and a storage has an eighth to spare"


def test_the_rows_of_earlier_tasks_stay_what_they_are(many: WSN) -> None:
    wsn = with_tasks(20)
    for layer in wsn.subnet_layers().values():
        union = torch.zeros_like(layer.weight_masks[0])
        for row in layer.weight_masks:
            union |= row
        assert torch.equal(layer.weight_union, union)
    assert wsn.verify().tasks == list(range(20))


def test_a_copy_and_the_original_grow_apart() -> None:
    wsn = with_tasks(18)
    other = copy.deepcopy(wsn)
    for one, seed in ((wsn, 1), (other, 2)):
        torch.manual_seed(seed)
        run_tasks(one, [100], adamw, steps=1)
    assert wsn.verify().tasks == other.verify().tasks
    assert not torch.equal(wsn.model[0].weight_masks[-1], other.model[0].weight_masks[-1])


def test_a_state_taken_before_a_task_is_not_changed_by_it() -> None:
    wsn = with_tasks(18)
    state = wsn.state_dict()
    kept = copy.deepcopy(state)
    run_tasks(wsn, [100, 101], adamw, steps=1)
    wsn.load_state_dict(kept)
    run_tasks(wsn, [102], adamw, steps=1)
    rows = [name for name in state if name.endswith(("_masks", "_tasks"))]
    assert rows and all(torch.equal(state[name], kept[name]) for name in rows)


def test_heads_are_sorted_once_however_many_are_loaded(many: WSN, monkeypatch: pytest.MonkeyPatch) -> None:
    state = many.model[-1].state_dict()
    heads = TaskHeads(12, 3)
    sort = Counted(monkeypatch, TaskHeads, "_sort")
    heads.load_state_dict(state)
    assert heads.tasks == list(range(T)) and sort.calls == 1


def test_a_state_of_many_tasks_comes_back(many: WSN) -> None:
    other = WSN(convnet(0.1))
    other.load_state_dict(many.state_dict())
    assert other.tasks == list(range(T))
    assert torch.equal(logits(other, T - 1), logits(many, T - 1))


def test_verify_tells_how_far_it_is(many: WSN) -> None:
    seen: list[tuple[int, int]] = []
    report = many.verify(lambda done, total: seen.append((done, total)))
    assert seen == [(i + 1, T) for i in range(T)] and len(report.tasks) == T


def test_verify_reads_what_a_task_has_once_for_each_task(many: WSN, monkeypatch: pytest.MonkeyPatch) -> None:
    digests = Counted(monkeypatch, fingerprints, "digest")
    report = many.verify()
    assert digests.calls == report.tensors == T * (2 * 4 + 7 + 2)  # weights and masks, per-task values, the head


def test_verify_tells_it_before_it_raises() -> None:
    wsn = with_tasks(3)
    with torch.no_grad():
        wsn.model[0].weight.add_(1)
    seen: list[int] = []
    with pytest.raises(RuntimeError, match=r"0\.weight"):
        wsn.verify(lambda done, total: seen.append(done))
    assert seen == [1, 2, 3]


# --- a full model ----------------------------------------------------------------------------------------------------
FULL = "less than 1 % of these layers is free"


@pytest.mark.parametrize(("density", "full"), [(1.0, True), (0.995, True), (0.98, False), (0.5, False)])
def test_a_task_that_finds_little_room_is_warned_of(density: float, full: bool) -> None:
    wsn = WSN(convert(nn.Sequential(nn.Linear(100, 100)), density))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        wsn.begin_task(0)
        wsn.end_task()
        assert not caught
        wsn.begin_task(1)
    assert [FULL in str(w.message) for w in caught] == [True] * full
    assert all(w.filename == __file__ for w in caught)


def test_only_the_full_layer_is_named() -> None:
    wsn = WSN(convert(nn.Sequential(nn.Linear(30, 30), nn.Linear(30, 30), nn.Linear(30, 30)), {"1": 1.0, "*": 0.3}))
    wsn.begin_task(0)
    wsn.end_task()
    with pytest.warns(UserWarning, match=FULL + r": 1 \(0\.00 %\)\. A new task"):
        wsn.begin_task(1)


def test_a_removed_task_makes_room() -> None:
    wsn = WSN(convert(nn.Sequential(nn.Linear(100, 100)), 1.0))
    wsn.begin_task(0)
    wsn.end_task()
    wsn.remove_task(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wsn.begin_task(1)


def test_a_warning_that_is_an_error_changes_nothing() -> None:
    wsn = WSN(mlp(1.0))
    run_tasks(wsn, [0], adamw)
    with warnings.catch_warnings(), pytest.raises(UserWarning, match=FULL):
        warnings.simplefilter("error")
        wsn.begin_task(1)
    assert wsn.current_task is None and wsn.model[-1].tasks == [0]
    with pytest.warns(UserWarning, match=FULL):
        wsn.begin_task(1)
