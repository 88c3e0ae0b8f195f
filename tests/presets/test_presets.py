"""The presets keep the promise of every WSN, and refuse what their papers do not define."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wsn_fast import WSN, to_dense
from wsn_fast.optim import SubnetAdamW
from wsn_fast.presets import PackNet, piggyback, supsup

X = torch.randn(6, 1, 6, 6, generator=torch.Generator().manual_seed(1))


def convnet() -> nn.Sequential:
    torch.manual_seed(0)
    first = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 12)
    return nn.Sequential(*first, nn.LayerNorm(12), nn.ReLU(), nn.Linear(12, 3))


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 16), nn.ReLU(), nn.Linear(16, 3))


MAKE: dict[str, Callable[..., WSN]] = {"PackNet": PackNet, "piggyback": piggyback, "supsup": supsup}
each_preset = pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)


def steps(wsn: WSN, optimizer: Any, count: int = 5) -> None:
    wsn.train()
    for _ in range(count):
        optimizer.zero_grad(set_to_none=False)
        F.cross_entropy(wsn(torch.randn(16, 1, 6, 6)), torch.randint(3, (16,))).backward()
        optimizer.step()


def learn(wsn: WSN, task: int, optimizer: Any = None) -> None:
    wsn.begin_task(task)
    optimizer = optimizer or wsn.guard(torch.optim.AdamW(wsn.parameters(), lr=0.01, weight_decay=0.1))
    steps(wsn, optimizer)
    if isinstance(wsn, PackNet):
        wsn.prune()
        steps(wsn, optimizer)
    wsn.end_task(probe=X)
    wsn.eval()


def outputs(wsn: WSN) -> list[Tensor]:
    found = []
    for task in wsn.tasks:
        with torch.no_grad(), wsn.use_task(task):
            found.append(wsn(X))
    return found


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected) and all(map(torch.equal, found, expected))


@each_preset
def test_finished_tasks_stay_to_the_bit(make: Callable[..., WSN]) -> None:
    wsn = make(convnet(), heads="7")
    kept: list[Tensor] = []
    for task in range(3):
        learn(wsn, task)
        now = outputs(wsn)
        assert_same(now[:task], kept)
        kept = now
    wsn.verify(probe=X)
    assert not torch.equal(kept[0], kept[1])


@each_preset
def test_save_and_load(make: Callable[..., WSN]) -> None:
    wsn, other = make(convnet(), heads="7"), make(convnet(), heads="7")
    for task in range(2):
        learn(wsn, task)
    other.load_state_dict(wsn.state_dict())
    assert_same(outputs(other.eval()), outputs(wsn))
    assert_same(outputs(copy.deepcopy(wsn)), outputs(wsn))
    learn(other, 2)
    assert_same(outputs(other)[:2], outputs(wsn))


@each_preset
def test_what_is_done_with_finished_tasks(make: Callable[..., WSN]) -> None:
    wsn = make(mlp(), heads="3")
    for task in range(2):
        learn(wsn, task)
    both = outputs(wsn)
    rows = wsn.forward_tasks(X, [0, 1, 1, 0, 1, 0], one_pass=True)
    torch.testing.assert_close(rows, torch.stack([both[t][i] for i, t in enumerate([0, 1, 1, 0, 1, 0])]))
    assert wsn.infer_task(X).entropy.shape == (6, 2)
    capacity, (first, second) = wsn.capacity(), wsn.task_stats()
    assert max(first.density, second.density) <= capacity.union_density <= 1
    torch.testing.assert_close(to_dense(wsn, 1)(X), both[1])


@each_preset
def test_an_optimizer_of_the_library_computes_the_same(make: Callable[..., WSN]) -> None:
    one, other = make(mlp(), heads="3"), make(mlp(), heads="3")
    other.load_state_dict(one.state_dict())
    for wsn, kind in ((one, SubnetAdamW), (other, torch.optim.AdamW)):
        torch.manual_seed(2)
        wsn.begin_task(0)
        settings = {"lr": 0.01, "weight_decay": 0.0}
        if kind is SubnetAdamW:
            optimizer: Any = SubnetAdamW(wsn, **settings, score_weight_decay=0.0, one_pass=True)
        else:
            optimizer = wsn.guard(torch.optim.AdamW(wsn.parameters(), **settings))
        steps(wsn, optimizer)
    for (name, a), (_, b) in zip(one.named_parameters(), other.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, msg=lambda text, name=name: f"{name}: {text}")


# --- PackNet ---------------------------------------------------------------------------------------------------------
def test_a_packnet_task_uses_the_weights_of_all_before_it() -> None:
    wsn = PackNet(mlp(), 0.5, heads="3")
    for task in range(3):
        learn(wsn, task)
    layer: Any = wsn.subnet_layers()["1"]
    masks = [layer.mask("weight", row) for row in range(3)]
    assert [int(mask.sum()) for mask in masks] == [288, 432, 504]
    assert all((later | earlier).equal(later) for earlier, later in itertools.pairwise(masks))
    assert layer.mask("bias", 0).all(), "biases belong to the first task, whole"
    assert not layer.weight[~masks[2]].any(), "the optimizer of before has moved them"


def test_each_task_may_have_a_density_of_its_own() -> None:
    wsn = PackNet(mlp(), 0.5, heads="3")
    wsn.begin_task(0, density={"1": 0.25})
    wsn.prune()
    kept = {name: int(gate.score.sum()) for name, gate in wsn.gated()}
    assert kept == {"1.weight": 144, "1.bias": 16}


def test_a_task_that_keeps_all_needs_no_pruning_and_leaves_nothing() -> None:
    wsn = PackNet(mlp(), 1.0, heads="3")
    learn(wsn, 0)
    before = wsn.state_dict()
    with pytest.raises(RuntimeError, match="task 1 cannot begin: no weight is free, because the 1 finished"):
        wsn.begin_task(1)
    assert wsn.current_task is None and wsn.state_dict().keys() == before.keys()


def test_the_last_free_weights_are_used_up() -> None:
    wsn = PackNet(nn.Sequential(nn.Flatten(), nn.Linear(36, 1, bias=False)), 0.5)
    weight, left = wsn.model[1].weight, []
    with pytest.raises(RuntimeError, match="no weight is free"):
        for task in range(20):
            wsn.begin_task(task)
            with torch.no_grad():  # training makes the free weights different from 0
                weight.copy_(weight.where(weight != 0, torch.arange(1.0, 37)))
            wsn.prune()
            wsn.end_task()
            left.append(int((weight == 0).sum()))
    assert left == [18, 9, 4, 2, 1, 0]


def test_a_tensor_without_weights_is_refused_and_nothing_is_pruned() -> None:
    wsn = PackNet(mlp(), {"1": 0.5, "3": 0.01})
    wsn.begin_task(0)
    before = {name: gate.param.detach().clone() for name, gate in wsn.gated()}
    with pytest.raises(ValueError, match=r"density 0\.01 keeps none of the 48 weights of 3\.weight"):
        wsn.prune()
    assert not wsn.is_pruned and all(torch.equal(gate.param, before[name]) for name, gate in wsn.gated())


def test_a_later_task_that_keeps_nothing_is_refused() -> None:
    wsn = PackNet(mlp(), 0.5, heads="3")
    learn(wsn, 0)
    wsn.begin_task(1, density=0.001)
    with pytest.raises(ValueError, match="the density of task 1 keeps none of the weights that are free"):
        wsn.prune()


def test_packnet_says_what_comes_next() -> None:
    wsn = PackNet(mlp(), 0.5, heads="3")
    with pytest.raises(RuntimeError, match="no task is in progress"):
        wsn.prune()
    wsn.begin_task(0)
    with pytest.raises(RuntimeError, match=r"task 0 is not pruned, .*prune\(\) first"):
        wsn.end_task()
    wsn.prune()
    with pytest.raises(RuntimeError, match="task 0 is pruned already"):
        wsn.prune()
    wsn.end_task()
    assert wsn.tasks == [0] and not wsn.is_pruned


def test_a_packnet_resumes_after_it_was_pruned() -> None:
    wsn, other = PackNet(mlp(), 0.5, heads="3"), PackNet(mlp(), 0.5, heads="3")
    wsn.begin_task(0)
    wsn.prune()
    other.load_state_dict(wsn.state_dict())
    assert other.is_pruned
    other.end_task()
    assert torch.equal(other.subnet_layers()["1"].mask("weight", 0), wsn.subnet_layers()["1"].weight_score == 1)


def test_weights_that_are_not_finite_are_not_pruned() -> None:
    wsn = PackNet(mlp(), 0.5, heads="3")
    wsn.begin_task(0)
    with torch.no_grad():
        wsn.model[1].weight[0, 0] = math.nan
    with pytest.raises(FloatingPointError, match=r"1\.weight"):
        wsn.prune()


# --- masks over frozen weights ---------------------------------------------------------------------------------------
def test_a_pretrained_model_is_what_a_piggyback_task_begins_with() -> None:
    dense = mlp()
    expected = dense[:3](X)
    wsn = piggyback(dense, heads="3")
    wsn.begin_task(0)
    assert torch.equal(wsn.model[:3](X), expected)


@pytest.mark.parametrize("make", [piggyback, supsup])
def test_only_scores_norms_and_heads_are_trained(make: Callable[..., WSN]) -> None:
    wsn = make(convnet(), heads="7")
    wsn.begin_task("before")  # draws scores
    wsn.end_task()
    before = {name: param.detach().clone() for name, param in wsn.named_parameters() if "bias_score" not in name}
    learn(wsn, 0)
    changed = {name for name, param in wsn.named_parameters() if name in before and not param.equal(before[name])}
    norms = {f"model.{n}.{tensor}" for n in (1, 5) for tensor in ("weight", "bias")}
    assert changed == {"model.0.weight_score", "model.4.weight_score"} | (norms if make is piggyback else set())


def test_a_task_that_is_removed_leaves_the_weights_as_they_are() -> None:
    wsn = piggyback(mlp(), heads="3")
    learn(wsn, 0)
    learn(wsn, 1)
    before = {name: gate.param.clone() for name, gate in wsn.gated()}
    kept = outputs(wsn)[1]
    wsn.remove_task(0, redraw_free=True)
    assert all(torch.equal(gate.param, before[name]) for name, gate in wsn.gated())
    assert_same(outputs(wsn), [kept])


def test_the_weights_of_supsup_are_signed_constants() -> None:
    wsn = supsup(convnet(), heads="7")
    for path, fan_in in (("0", 9), ("4", 64)):
        layer = wsn.subnet_layers()[path]
        assert torch.equal(layer.weight.abs(), torch.full_like(layer.weight, math.sqrt(2 / fan_in)))
        assert 0.25 < float((layer.weight > 0).float().mean()) < 0.75
        assert not layer.bias.any()
    for norm in (wsn.model[1], wsn.model[5]):
        assert torch.equal(norm.weight, torch.ones_like(norm.weight)) and not norm.bias.any()


def test_a_supsup_task_has_scores_of_its_own() -> None:
    wsn = supsup(mlp(), heads="3")
    wsn.begin_task(0)
    first = wsn.subnet_layers()["1"].weight_score.clone()
    wsn.end_task()
    wsn.begin_task(1)
    assert not (wsn.subnet_layers()["1"].weight_score == first).any()


@pytest.mark.filterwarnings("error")
def test_nobody_is_warned_that_weights_which_are_not_trained_are_used_up() -> None:
    wsn = piggyback(mlp(), heads="3")
    for task in range(2):  # the masks have all weights
        wsn.begin_task(task)
        wsn.end_task()
    assert wsn.capacity().union_density == 1


def test_without_heads_the_last_layer_is_masked_too() -> None:
    wsn = supsup(mlp())
    learn(wsn, 0)
    learn(wsn, 1)
    assert {*wsn.subnet_layers()} == {"1", "3"} and not torch.equal(*outputs(wsn))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": math.nan}, "threshold must be a finite number, got nan"),
        ({"threshold": "a"}, "threshold must be a finite number, got 'a'"),
        ({"score_init": True}, "score_init must be a finite number, got True"),
        ({"score_init": 0.001}, r"score_init must be at least threshold \(0\.005\), got 0\.001"),
        ({"heads": "9"}, "'9'"),
    ],
)
def test_what_piggyback_refuses(options: dict[str, Any], message: str) -> None:
    model = mlp()
    with pytest.raises(ValueError, match=message):
        piggyback(model, **options)
    assert type(model[1]) is nn.Linear and all(p.requires_grad for p in model.parameters())


def test_a_density_is_refused_where_the_threshold_is_constant() -> None:
    wsn = piggyback(mlp(), heads="3")
    with pytest.raises(ValueError, match=r"density must be None: 1 has the rule 'value >= 0\.005'"):
        wsn.begin_task(0, density=0.1)
    assert wsn.current_task is None
