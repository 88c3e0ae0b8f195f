"""A state is loaded whole, or not at all with an error that says why."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_models import CLASSES, convnet, logits, mlp, run_tasks
from torch import Tensor, nn

from wsn_fast import WSN, FastSubnetLinear, StateError, TaskHeads, convert
from wsn_fast.nn.task_ids import decode_json, encode_json

State = dict[str, Any]


def adamw(params: object) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, 0.01)  # type: ignore[arg-type]


def finished(model: nn.Module, tasks: tuple[int, ...] = (0, 1), **owners: Any) -> WSN:
    wsn = WSN(model, **owners)
    run_tasks(wsn, tasks, adamw, steps=2)
    return wsn


class Around(nn.Module):
    def __init__(self, wsn: WSN) -> None:
        super().__init__()
        self.before = nn.Linear(2, 2)
        self.wsn = wsn


@pytest.fixture(scope="module")
def saved() -> State:
    torch.manual_seed(1)
    return copy.deepcopy(finished(convnet()).state_dict())


def without(state: State, *ends: str) -> State:
    return {name: value for name, value in state.items() if not name.endswith(ends)}


def bits(wsn: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in wsn.state_dict().items()}


def assert_nothing_changes(model: nn.Module, wsn: WSN, load: Callable[[], object], match: str = ".") -> None:
    before, tasks, view = bits(model), (wsn.tasks, wsn.current_task), wsn._view
    parameters = list(model.parameters())
    with pytest.raises(StateError, match=match):
        load()
    after = bits(model)
    assert before.keys() == after.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    assert (wsn.tasks, wsn.current_task, wsn._view) == (*tasks[:1], tasks[1], view)
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    wsn.verify()


# --- rows and tasks --------------------------------------------------------------------------------------------------
def changed_extra(state: State, name: str, **fields: Any) -> State:
    return {**state, name: encode_json({**decode_json(state[name]), **fields})}


ORPHANS: dict[str, Callable[[State], State]] = {
    "rows without any extra state": lambda s: without(s, "_extra_state"),
    "rows without the extra state of the layers": lambda s: without(s, ".0._extra_state", ".4._extra_state"),
    "rows without that of one layer": lambda s: without(s, ".4._extra_state"),
    "rows without the register": lambda s: {k: v for k, v in s.items() if k != "_extra_state"},
    "tasks without rows": lambda s: without(s, "_masks"),
    "tasks without the rows of one tensor": lambda s: without(s, "4.bias_masks"),
    "too few rows": lambda s: {**s, "model.0.weight_masks": s["model.0.weight_masks"][:1]},
    "too many rows": lambda s: {**s, "model.0.bias_masks": s["model.0.bias_masks"].repeat(2, 1)},
    "a layer of other tasks": lambda s: changed_extra(s, "model.0._extra_state", tasks=[0, 5]),
    "a layer with the tasks in another order": lambda s: changed_extra(s, "model.0._extra_state", tasks=[1, 0]),
    "a register of one task less": lambda s: changed_extra(
        s, "_extra_state", records=decode_json(s["_extra_state"])["records"][:1]
    ),
    "a task without a head": lambda s: without(s, "heads.i1.weight", "heads.i1.bias"),
    "too few values of a norm": lambda s: {**s, "model.1.running_mean_tasks": s["model.1.running_mean_tasks"][:1]},
    "no values of a norm": lambda s: without(s, "5.weight_tasks"),
    "no weight": lambda s: without(s, "4.weight"),
}


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("damage", ORPHANS.values(), ids=ORPHANS)
def test_rows_and_tasks_that_do_not_fit_are_refused(
    saved: State, damage: Callable[[State], State], strict: bool
) -> None:
    wsn = WSN(convnet())
    assert_nothing_changes(wsn, wsn, lambda: wsn.load_state_dict(damage(saved), strict=strict))


@pytest.mark.parametrize("damage", ORPHANS.values(), ids=ORPHANS)
def test_they_are_refused_by_a_model_with_tasks_too(saved: State, damage: Callable[[State], State]) -> None:
    wsn = finished(convnet(), (7,))
    assert_nothing_changes(wsn, wsn, lambda: wsn.load_state_dict(damage(saved), strict=False))


@pytest.mark.parametrize("damage", ORPHANS.values(), ids=ORPHANS)
def test_they_are_refused_through_a_parent_module(saved: State, damage: Callable[[State], State]) -> None:
    wsn = WSN(convnet())
    parent = Around(wsn)
    state = {f"wsn.{name}": value for name, value in damage(saved).items()} | {
        f"before.{name}": value for name, value in parent.before.state_dict().items()
    }
    assert_nothing_changes(parent, wsn, lambda: parent.load_state_dict(state, strict=False))


@pytest.mark.parametrize("assign", [True, False])
def test_a_whole_state_is_loaded(saved: State, assign: bool) -> None:
    wsn = WSN(convnet())
    wsn.load_state_dict(copy.deepcopy(saved), assign=assign)
    assert wsn.verify().tasks == [0, 1]
    assert all(torch.equal(value, saved[name]) for name, value in wsn.state_dict().items())


LAYER: dict[str, Callable[[State], State]] = {
    "no extra state": lambda s: without(s, "_extra_state"),
    "no masks": lambda s: without(s, "_masks"),
    "one row less": lambda s: {**s, "weight_masks": s["weight_masks"][:1]},
    "another task": lambda s: changed_extra(s, "_extra_state", tasks=[0]),
    "a task twice": lambda s: changed_extra(s, "_extra_state", tasks=[0, 0]),
    "a task that is none": lambda s: changed_extra(s, "_extra_state", tasks=[0, [1]]),
    "a density that is none": lambda s: changed_extra(s, "_extra_state", density=7),
    "a rule that is none": lambda s: changed_extra(s, "_extra_state", rule=[]),
    "a density of a task that is none": lambda s: changed_extra(s, "_extra_state", task_density="x"),
    "an extra state of floats": lambda s: {**s, "_extra_state": torch.ones(3)},
}


@pytest.mark.parametrize("damage", LAYER.values(), ids=LAYER)
def test_a_layer_by_itself_refuses_them_too(saved: State, damage: Callable[[State], State]) -> None:
    start = "model.4."
    state = {name.removeprefix(start): value for name, value in saved.items() if name.startswith(start)}
    layer = FastSubnetLinear(64, 12)
    before = bits(layer)
    with pytest.raises((ValueError, TypeError)):
        layer.load_state_dict(damage(state), strict=False)
    assert all(torch.equal(before[name], value) for name, value in bits(layer).items())
    layer.load_state_dict(state)
    assert layer.tasks == [0, 1]


REGISTERS: dict[str, Any] = {
    "another version": {"version": 99, "records": [], "current": None},
    "no records": {"version": 1, "current": None},
    "records that are none": {"version": 1, "records": [3], "current": None},
    "a task that is none": {"version": 1, "records": [{"task": [1]}], "current": None},
    "a task twice": {"version": 1, "records": [{"task": 1}, {"task": 1}], "current": None},
    "a task that is finished and current": {"version": 1, "records": [{"task": 1}], "current": {"task": 1}},
    "a fingerprint that is none": {"version": 1, "records": [{"task": 1, "fingerprint": [1]}], "current": None},
    "a digest that is none": {"version": 1, "records": [{"task": 1, "fingerprint": {"a": 1}}], "current": None},
    "an unknown field": {"version": 1, "records": [{"task": 1, "more": 1}], "current": None},
    "checksums that are none": {"version": 1, "records": [], "current": None, "frozen": [1]},
    "a checksum that is none": {"version": 1, "records": [], "current": None, "frozen": {"a": 1}},
    "a size that is none": {"version": 1, "records": [{"task": 1, "compressed": -1}], "current": None},
}


@pytest.mark.parametrize("register", REGISTERS.values(), ids=REGISTERS)
def test_a_register_that_is_none_is_refused(saved: State, register: Any) -> None:
    wsn = WSN(convnet())
    assert_nothing_changes(wsn, wsn, lambda: wsn.load_state_dict({**saved, "_extra_state": encode_json(register)}))
    with pytest.raises(ValueError, match=r"the state of WSN|expected the id|cannot have"):
        wsn.set_extra_state(encode_json(register))


@pytest.mark.parametrize("text", ["[" * 5000, "[1]", '{"version": NaN}', '{"version": 1e999}', "\x00"])
def test_a_register_of_other_bytes_is_refused(saved: State, text: str) -> None:
    wsn = WSN(convnet())
    state = {**saved, "_extra_state": torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)}
    assert_nothing_changes(wsn, wsn, lambda: wsn.load_state_dict(state), "does not fit together")


# --- names and shapes ------------------------------------------------------------------------------------------------
class Wrapped(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.backbone = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.backbone(x)


def test_a_missing_and_an_unexpected_name_are_refused_before_anything_is_loaded(saved: State) -> None:
    for state in (without(saved, "5.bias"), {**saved, "model.9.weight": torch.zeros(1)}):
        wsn = WSN(convnet())
        assert_nothing_changes(
            wsn, wsn, lambda wsn=wsn, state=state: wsn.load_state_dict(state), "key\\(s\\) in state_dict"
        )


VALUES: dict[str, Callable[[Tensor], Any]] = {
    "a list": lambda t: t.tolist(),
    "None": lambda t: None,
    "an array": lambda t: t.numpy(),
    "another size": lambda t: t[:-1],
    "more dimensions": lambda t: t[None],
    "integers": lambda t: t.long(),
    "complex numbers": lambda t: t.to(torch.complex64),
    "no values": lambda t: t.to("meta"),
    "a sparse tensor": lambda t: t.to_sparse(),
}


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("change", VALUES.values(), ids=VALUES)
def test_a_value_that_cannot_be_loaded_is_refused(saved: State, change: Callable[[Tensor], Any], strict: bool) -> None:
    wsn = WSN(convnet())
    state = {**saved, "model.4.weight": change(saved["model.4.weight"])}
    match = r"(no tensor|size mismatch|dtype mismatch|no values) for model\.4\.weight"
    assert_nothing_changes(wsn, wsn, lambda: wsn.load_state_dict(state, strict=strict), match)


@pytest.mark.parametrize("assign", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bool, torch.int8])
def test_masks_of_another_dtype_are_refused(saved: State, dtype: torch.dtype, assign: bool) -> None:
    wsn = WSN(convnet())
    state = {**saved, "model.4.weight_masks": saved["model.4.weight_masks"].to(dtype)}
    assert_nothing_changes(wsn, wsn, lambda: wsn.load_state_dict(state, assign=assign), "dtype mismatch")


def wider() -> nn.Sequential:
    model = convnet()
    model[4], model[5], model[7] = FastSubnetLinear(64, 14), nn.LayerNorm(14), TaskHeads(14, CLASSES)
    return model


def deeper() -> nn.Sequential:
    return nn.Sequential(*convnet()[:-1], FastSubnetLinear(12, 12), TaskHeads(12, CLASSES))


OTHERS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "wider": (wider, "another architecture"),
    "deeper": (deeper, "another architecture|lacks"),
    "an MLP": (mlp, "another architecture"),
    "shallower": (lambda: nn.Sequential(*convnet()[:4], TaskHeads(64, CLASSES)), "lacks modules|another architecture"),
}


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(("make", "match"), OTHERS.values(), ids=OTHERS)
def test_the_state_of_another_architecture_is_refused(
    saved: State, make: Callable[[], nn.Module], match: str, strict: bool
) -> None:
    wsn = WSN(make())
    assert_nothing_changes(wsn, wsn, lambda: wsn.load_state_dict(saved, strict=strict), match if strict else ".")


def test_a_state_with_other_owners_is_refused() -> None:
    def model() -> nn.Sequential:
        return nn.Sequential(nn.Flatten(), nn.Linear(36, 16), FastSubnetLinear(16, 12), TaskHeads(12, CLASSES))

    state = finished(model(), (0,), frozen="1.*").state_dict()
    for owners in ({"shared": "1.*"}, {"per_task": "1.*"}):
        wsn = WSN(model(), **owners)
        assert_nothing_changes(wsn, wsn, lambda wsn=wsn: wsn.load_state_dict(state, strict=False))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_values_of_finished_tasks_are_not_rounded_silently(saved: State, dtype: torch.dtype) -> None:
    wsn = WSN(convnet().to(dtype))
    assert_nothing_changes(wsn, wsn, lambda: wsn.load_state_dict(saved), "convert the model first")


def test_a_state_without_finished_tasks_may_have_another_dtype() -> None:
    wsn = WSN(mlp().double())
    wsn.load_state_dict(WSN(mlp()).state_dict())
    assert wsn.tasks == []


# --- partial states --------------------------------------------------------------------------------------------------
def test_weights_alone_can_be_loaded_into_a_model_without_tasks() -> None:
    wsn, other = WSN(mlp()), WSN(mlp())
    weights = {name: value for name, value in other.state_dict().items() if name.endswith(".weight")}
    wsn.load_state_dict(weights, strict=False)
    assert torch.equal(wsn.model[1].weight, other.model[1].weight)


PARTS: dict[str, Callable[[State], State]] = {
    "weights": lambda s: {k: v + 1 for k, v in s.items() if k == "model.0.weight"},
    "all but the register": lambda s: {k: v + 1 for k, v in s.items() if k.endswith(("weight", "bias"))},
    "heads": lambda s: {k: v + 1 for k, v in s.items() if "heads" in k},
    "masks": lambda s: {k: 255 - v for k, v in s.items() if k.endswith("_masks")},
    "rows of a norm": lambda s: {k: v + 1 for k, v in s.items() if k.endswith("_tasks")},
}


@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
def test_a_part_that_would_change_finished_tasks_is_refused(part: Callable[[State], State]) -> None:
    wsn = finished(convnet())
    state = part(bits(wsn))
    assert_nothing_changes(wsn, wsn, lambda: wsn.load_state_dict(state, strict=False), "would change what the finished")


def test_a_part_that_changes_no_finished_task_is_loaded() -> None:
    wsn = finished(convnet())
    scores = {name: value + 1 for name, value in bits(wsn).items() if name.endswith("_score")}
    wsn.load_state_dict(scores, strict=False)
    wsn.verify()
    assert torch.equal(wsn.model[0].weight_score, scores["model.0.weight_score"])


# --- what savers drop ------------------------------------------------------------------------------------------------
def tied() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 12))
    model[2].weight = model[0].weight
    return convert(model, 0.5)


@pytest.mark.parametrize("make", [mlp, convnet, tied])
@pytest.mark.parametrize("keep", ["none", "the first"])
def test_a_first_task_survives_savers_that_drop_empty_tensors(make: Callable[[], nn.Module], keep: str) -> None:
    wsn = WSN(make())
    wsn.begin_task("a", density=0.2)
    empty = [name for name, tensor in wsn.state_dict().items() if not tensor.numel()]
    dropped = empty if keep == "none" else empty[1:]
    state = {name: tensor for name, tensor in wsn.state_dict().items() if name not in dropped}
    assert dropped
    other = WSN(make())
    found = other.load_state_dict(state, strict=False)
    assert (found.missing_keys, found.unexpected_keys) == ([], [])
    other.load_state_dict(state)
    assert (other.tasks, other.current_task) == ([], "a")
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in wsn.state_dict().items())


def test_a_model_by_itself_may_lack_empty_rows_too() -> None:
    wsn, other = WSN(convnet()), WSN(convnet())
    other.model.load_state_dict({name: value for name, value in wsn.model.state_dict().items() if value.numel()})
    assert all(torch.equal(value, other.model.state_dict()[name]) for name, value in wsn.model.state_dict().items())


def test_going_back_to_a_first_task_whose_empty_masks_were_dropped() -> None:
    wsn = WSN(convnet())
    wsn.begin_task("a")
    state = {name: tensor.clone() for name, tensor in wsn.state_dict().items() if tensor.numel()}
    run_tasks(other := WSN(convnet()), [0, 1], adamw, steps=1)
    other.load_state_dict(state, strict=False)
    assert (other.tasks, other.current_task, len(other.model[0].weight_masks)) == ([], "a", 0)
    assert len(other.model[1].weight_tasks) == 0


def test_a_task_may_end_after_tied_duplicates_were_dropped() -> None:
    wsn = WSN(tied())
    for task in ("a", "b"):
        wsn.begin_task(task)
        wsn.end_task()
    state = without(bits(wsn), "2.weight", "2.weight_score")
    other = WSN(tied())
    other.load_state_dict(state, strict=False)
    assert other.verify().tasks == ["a", "b"]


# --- ties ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("through_parent", [False, True])
@pytest.mark.parametrize("tasks", [0, 1, 2])
def test_tied_layers_stay_tied_when_parameters_are_assigned(tasks: int, through_parent: bool) -> None:
    wsn = WSN(tied())
    for task in range(tasks):
        wsn.begin_task(task)
        wsn.end_task()
    fresh = WSN(tied())
    state = {name: value.clone() for name, value in wsn.state_dict().items()}  # as a file has it
    if through_parent:
        parent = Around(fresh)
        whole = {f"wsn.{name}": value for name, value in state.items()}
        parent.load_state_dict({**parent.state_dict(), **whole}, assign=True)
    else:
        fresh.load_state_dict(state, assign=True)
    assert fresh.model[2].weight is fresh.model[0].weight
    assert fresh.model[2].weight_score is fresh.model[0].weight_score
    assert len(list(fresh.gated())) == 3
    fresh.verify()
    fresh.begin_task("next")
    optimizer = fresh.guard(adamw(fresh.parameters()))
    fresh(torch.randn(4, 12)).square().sum().backward()
    optimizer.step()
    fresh.end_task()
    fresh.verify()


@pytest.mark.parametrize("name", ["model.2.weight", "model.2.weight_score"])
@pytest.mark.parametrize("assign", [False, True])
def test_different_values_for_tied_parameters_are_refused(name: str, assign: bool) -> None:
    wsn = WSN(tied())
    state = bits(wsn)
    state[name] = state[name] + 1
    assert_nothing_changes(wsn, wsn, lambda: wsn.load_state_dict(state, assign=assign), "one tied parameter")


# --- other modules ---------------------------------------------------------------------------------------------------
class Renames(nn.Linear):
    """A module that reads its own older states."""

    def _load_from_state_dict(self, state_dict: State, prefix: str, *args: Any) -> None:
        if f"{prefix}kernel" in state_dict:
            state_dict[f"{prefix}weight"] = state_dict.pop(f"{prefix}kernel")
        super()._load_from_state_dict(state_dict, prefix, *args)


def test_a_module_that_loads_in_its_own_way_is_left_to_itself() -> None:
    def model() -> nn.Sequential:
        return nn.Sequential(nn.Flatten(), Renames(36, 16), FastSubnetLinear(16, 12), TaskHeads(12, CLASSES))

    wsn = finished(model(), (0,), frozen="1.*")
    state = wsn.state_dict()
    state["model.1.kernel"] = state.pop("model.1.weight")
    other = WSN(model(), frozen="1.*")
    other.load_state_dict(state)
    assert torch.equal(logits(other, 0), logits(wsn, 0))


def test_what_is_refused_can_be_read_in_one_screen(saved: State) -> None:
    wsn = WSN(mlp())
    with pytest.raises(StateError) as caught:
        wsn.load_state_dict({**saved, **{f"model.{i}.weight": torch.zeros(1) for i in range(1000)}})
    assert len(str(caught.value)) < 4000 and json.dumps(str(caught.value))


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("tasks", [[0], [0, 1, 2]])
@pytest.mark.parametrize(("then", "now"), [("per_task", "frozen"), ("frozen", "per_task")])
def test_a_state_of_other_owners_is_refused(then: str, now: str, tasks: list[int], strict: bool) -> None:
    def make(owner: str) -> WSN:
        body = nn.Sequential(nn.Flatten(), nn.Linear(36, 8), FastSubnetLinear(8, 8), TaskHeads(8, CLASSES))
        return WSN(body, **{owner: "1.*"})

    other, wsn = make(then), make(now)
    run_tasks(other, tasks, lambda params: torch.optim.AdamW(params, 0.01))
    before = copy.deepcopy(wsn.state_dict())
    with pytest.raises(StateError, match=r"1\.(weight|bias)"):
        wsn.load_state_dict(other.state_dict(), strict=strict)
    assert all(torch.equal(tensor, before[name]) for name, tensor in wsn.state_dict().items())
