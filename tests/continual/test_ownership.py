"""Every parameter and buffer that tasks share has an owner, or training does not start."""

from __future__ import annotations

import pytest
import torch
from small_models import batches, logits, train
from torch import Tensor, nn

from wsn_fast import WSN, FastSubnetLinear, OwnershipError, TaskHeads


class Model(nn.Module):
    """A token parameter, a dense layer, a constant buffer, a gated layer and heads."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(36))
        self.dense = nn.Linear(36, 36)
        self.register_buffer("scale", torch.tensor(2.0))
        self.gated = FastSubnetLinear(36, 12)
        self.heads = TaskHeads(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.dense(x.flatten(1) + self.token) * self.scale
        out: Tensor = self.heads(self.gated(hidden).relu())
        return out


ALL = {"per_task": "token", "frozen": ["dense.*", "scale"]}


def two_tasks(wsn: WSN) -> tuple[Tensor, Tensor]:
    """The logits of the first task, when it ended and after the second."""
    for task in (0, 1):
        wsn.begin_task(task)
        train(wsn, wsn.guard(torch.optim.AdamW(wsn.parameters(), 0.01)), batches(task, 5))
        wsn.end_task()
        if task == 0:
            first = logits(wsn, 0)
    return first, logits(wsn, 0)


def test_all_without_an_owner_are_named_before_any_training() -> None:
    wsn = WSN(Model())
    with pytest.raises(OwnershipError) as caught:
        wsn.begin_task(0)
    assert caught.value.names == ["token", "dense.weight", "dense.bias"]  # a buffer is taken as constant
    assert "dense.weight [36, 36] (1,296 elements)" in str(caught.value)
    assert "3 tensors, 1,368 elements" in str(caught.value)
    assert wsn.current_task is None
    assert wsn.model.heads.tasks == []


def test_per_task_and_frozen_keep_the_promise() -> None:
    wsn = WSN(Model(), **ALL)  # type: ignore[arg-type]
    first, later = two_tasks(wsn)
    assert torch.equal(first, later)
    assert wsn.verify().shared == []


def test_per_task_values_differ_between_tasks() -> None:
    wsn = WSN(Model(), **ALL)  # type: ignore[arg-type]
    two_tasks(wsn)
    with wsn.use_task(0):
        first = wsn.model.token.clone()
    with wsn.use_task(1):
        assert not torch.equal(wsn.model.token, first)


def test_frozen_is_trained_in_the_first_task_only() -> None:
    wsn = WSN(Model(), **ALL)  # type: ignore[arg-type]
    values = [wsn.model.dense.weight.detach().clone()]
    for task in (0, 1):
        wsn.begin_task(task)
        train(wsn, wsn.guard(torch.optim.AdamW(wsn.parameters(), 0.01)), batches(task, 3))
        wsn.end_task()
        values.append(wsn.model.dense.weight.detach().clone())
    assert not torch.equal(values[0], values[1])
    assert torch.equal(values[1], values[2])


def test_shared_may_forget_and_reports_say_so() -> None:
    wsn = WSN(Model(), per_task="token", shared=["dense.*", "scale"])
    first, later = two_tasks(wsn)
    assert not torch.equal(first, later)
    assert wsn.verify().shared == ["scale", "dense.weight", "dense.bias"]


def test_a_changed_frozen_buffer_is_found() -> None:
    wsn = WSN(Model(), **ALL)  # type: ignore[arg-type]
    two_tasks(wsn)
    wsn.model.scale.mul_(2)
    with pytest.raises(RuntimeError, match="task 0: scale"):
        wsn.verify()


def test_norms_may_be_declared_otherwise() -> None:
    model = nn.Sequential(FastSubnetLinear(36, 12), nn.LayerNorm(12), TaskHeads(12, 3))
    wsn = WSN(model, frozen="1.*")
    assert list(wsn.model[1].state_dict()) == ["weight", "bias"]


def test_running_statistics_cannot_be_frozen() -> None:
    model = nn.Sequential(FastSubnetLinear(36, 12), nn.BatchNorm1d(12), TaskHeads(12, 3))
    with pytest.raises(ValueError, match=r"1\.running_mean cannot be frozen"):
        WSN(model, frozen="1.*")


class MyRMSNorm(nn.Module):
    """A norm of nobody's library."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(12))


def test_norms_are_known_by_their_name_too() -> None:
    wsn = WSN(nn.Sequential(FastSubnetLinear(36, 12), MyRMSNorm(), TaskHeads(12, 3)))
    wsn.begin_task(0)


def test_a_pattern_that_matches_nothing() -> None:
    with pytest.raises(ValueError, match="frozen='embedding' matches no parameter or buffer"):
        WSN(Model(), frozen=["embedding"])


def test_a_pattern_that_is_no_string() -> None:
    with pytest.raises(TypeError, match="shared must be name patterns"):
        WSN(Model(), shared=[3])  # type: ignore[list-item]


def test_two_owners() -> None:
    with pytest.raises(ValueError, match="token is declared as frozen and as shared"):
        WSN(Model(), frozen="token", shared="*")


def test_a_parameter_tied_to_a_gated_one() -> None:
    model = Model()
    model.dense.weight = nn.Parameter(torch.randn(12, 36))
    model.gated.weight = model.dense.weight
    with pytest.raises(ValueError, match=r"dense\.weight and the gated gated\.weight are one tied parameter"):
        WSN(model, **ALL)  # type: ignore[arg-type]


def test_one_parameter_with_two_owners() -> None:
    model = Model()
    model.extra = nn.Module()
    model.extra.token = model.token
    with pytest.raises(ValueError, match=r"token = extra\.token is declared as frozen and as per_task"):
        WSN(model, per_task="tok[e]n", frozen=["dense.*", "scale", "extra.token"])


# --- the owner of a tied tensor --------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["token", "extra.token", "extra"])
@pytest.mark.parametrize("kind", ["per_task", "frozen"])
def test_one_name_of_a_tied_parameter_is_enough(name: str, kind: str) -> None:
    model = Model()
    model.extra = nn.Module()
    model.extra.token = model.token
    wsn = WSN(model, rest="frozen", **{kind: name})
    first, later = two_tasks(wsn)
    assert torch.equal(first, later)
    wsn.verify()


def test_a_tied_parameter_is_listed_once_with_all_names() -> None:
    model = Model()
    model.extra = nn.Module()
    model.extra.token = model.token
    with pytest.raises(OwnershipError, match=r"  token \[36\] \(= extra\.token\) \(36 elements\)\n") as caught:
        WSN(model).begin_task(0)
    assert caught.value.names == ["token", "dense.weight", "dense.bias"]


def test_a_module_that_is_used_twice_has_two_names() -> None:
    model = Model()
    model.again = model.dense
    with pytest.raises(OwnershipError, match=r"  dense\.weight \[36, 36\] \(= again\.weight\) \(1,296 elements\)\n"):
        WSN(model).begin_task(0)
    WSN(model, per_task="token", frozen="again").begin_task(0)


# --- the rest --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("rest", ["frozen", "per_task", "shared"])
def test_the_rest(rest: str) -> None:
    wsn = WSN(Model(), rest=rest)
    first, later = two_tasks(wsn)
    assert torch.equal(first, later) == (rest != "shared")
    assert wsn.verify().shared == (["token", "dense.weight", "dense.bias"] if rest == "shared" else [])
    assert (wsn.model.state_dict().get("dense.weight_tasks") is not None) == (rest == "per_task")


def test_declarations_come_before_the_rest() -> None:
    model = nn.Sequential(FastSubnetLinear(36, 12), nn.LayerNorm(12), nn.Linear(12, 12), TaskHeads(12, 3))
    wsn = WSN(model, frozen="2.weight", rest="per_task")
    names = list(wsn.model.state_dict())
    assert {"1.weight_tasks", "2.bias_tasks"} <= set(names) and "2.weight_tasks" not in names


@pytest.mark.parametrize("rest", ["froze", True, ["frozen"], ""])
def test_a_rest_of_no_kind(rest: object) -> None:
    with pytest.raises(ValueError, match="rest must be None or one of"):
        WSN(Model(), rest=rest)  # type: ignore[arg-type]


def test_another_rest_for_a_model_with_finished_tasks_is_refused() -> None:
    wsn = WSN(Model(), rest="per_task")
    two_tasks(wsn)
    with pytest.raises(ValueError, match=r"Pass the per_task=, frozen=, shared= and rest= that they were trained with"):
        WSN(wsn.model, rest="frozen")
    WSN(wsn.model, rest="per_task").verify()


def test_what_was_frozen_is_a_constant_for_another_rest() -> None:
    wsn = WSN(Model(), rest="frozen")
    first, _ = two_tasks(wsn)
    again = WSN(wsn.model, rest="per_task")
    assert not any(name.endswith("_tasks") for name in again.state_dict())
    again.begin_task(2)
    train(again, again.guard(torch.optim.AdamW(again.parameters(), 0.01)), batches(2, 5))
    again.end_task()
    assert torch.equal(logits(again, 0), first)


# --- patterns --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("pattern", ["visual", "visual.blocks", "blocks", "visual.block?", "blocks.0"])
def test_a_pattern_may_be_the_name_of_a_module(pattern: str) -> None:
    model = Model()
    model.visual = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(2, 2)]), "blocks2": nn.Linear(2, 2)})
    wsn = WSN(model, frozen=pattern)
    with pytest.raises(OwnershipError) as caught:
        wsn.begin_task(0)
    rest = [] if pattern == "visual" else ["visual.blocks2.weight", "visual.blocks2.bias"]
    assert caught.value.names == ["token", "dense.weight", "dense.bias", *rest]


def test_everything_that_is_wrong_is_reported_together() -> None:
    model = nn.Sequential(FastSubnetLinear(36, 12), nn.BatchNorm1d(12), nn.Linear(12, 12), TaskHeads(12, 3, tasks=[0]))
    with pytest.raises(ValueError, match="is declared as") as caught:
        WSN(model, frozen=["1.*", "2", "typo"], shared=["2.b*", "0", "3"], per_task=["2.weight", "other"])
    assert str(caught.value).splitlines() == [
        "1.running_mean cannot be frozen: running statistics change in every training forward. Leave them per_task "
        "(the default).",
        "1.running_var cannot be frozen: running statistics change in every training forward. Leave them per_task "
        "(the default).",
        "1.num_batches_tracked cannot be frozen: running statistics change in every training forward. Leave them "
        "per_task (the default).",
        "2.weight is declared as frozen and as per_task; one owner is needed",
        "2.bias is declared as frozen and as shared; one owner is needed",
        "per_task='other' matches no parameter or buffer that is neither gated nor in TaskHeads",
        "frozen='typo' matches no parameter or buffer that is neither gated nor in TaskHeads",
        "shared='0': 0.weight is gated (and 1 more): leave it out of convert with exclude_modules='0', or drop the "
        "declaration",
        "shared='3' matches heads alone, and each task has its own head: drop the declaration",
    ]


@pytest.mark.parametrize("pattern", ["heads", "heads.weight", "heads.*", "*.bias"])
def test_a_pattern_for_heads_alone(pattern: str) -> None:
    model = nn.ModuleDict({"body": FastSubnetLinear(3, 3, bias=False), "heads": TaskHeads(3, 3)})
    with pytest.raises(ValueError, match="matches heads alone, and each task has its own head: drop the declaration"):
        WSN(model, per_task=pattern)


def test_a_pattern_may_match_gated_tensors_too() -> None:
    model = nn.ModuleDict({"block": nn.ModuleList([FastSubnetLinear(3, 3), nn.Linear(3, 3)])})
    WSN(model, frozen="block").begin_task(0)


# --- long lists ------------------------------------------------------------------------------------------------------
class Tower(nn.Module):
    """A dense transformer beside a gated layer."""

    def __init__(self) -> None:
        super().__init__()
        self.gated = FastSubnetLinear(3, 3)
        self.mixed = nn.ModuleDict({"gate": nn.Linear(3, 4), "norm": nn.LayerNorm(3)})
        self.visual = nn.ModuleDict({"wpe": nn.Embedding(10, 4), "h": nn.ModuleList(self.block() for _ in range(12))})

    def block(self) -> nn.Module:
        return nn.ModuleDict({"attn": nn.MultiheadAttention(4, 2), "up": nn.Linear(4, 8, bias=False)})


def test_many_tensors_are_listed_by_module_and_alike_modules_together() -> None:
    with pytest.raises(OwnershipError) as caught:
        WSN(Tower()).begin_task(0)
    lines = str(caught.value).splitlines()
    assert [line.strip() for line in lines[1:-1]] == [
        "mixed.gate: weight [4, 3], bias [4] (16 elements)",
        "visual.wpe.weight [10, 4] (40 elements)",
        "12 x visual.h.*.attn: in_proj_weight [12, 4], in_proj_bias [12] (720 elements)",
        "12 x visual.h.*.attn.out_proj: weight [4, 4], bias [4] (240 elements)",
        "12 x visual.h.*.up.weight [8, 4] (384 elements)",
        "63 tensors, 1,400 elements",
    ]
    assert 'rest="frozen"' in lines[-1] and 'rest="per_task"' in lines[-1]
    assert "by the name of a module around it ('mixed.gate', 'visual')" in lines[-1]
    assert len(caught.value.names) == 63 and caught.value.names[2] == "visual.wpe.weight"
    WSN(Tower(), frozen=["mixed.gate", "visual"]).begin_task(0)
