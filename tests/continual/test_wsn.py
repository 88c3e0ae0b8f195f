"""The life of tasks in WSN: begin, end, use, save, load, and what it refuses."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from small_models import INPUT, batches, convnet, logits, mlp, run_tasks, train
from torch import Tensor, nn

from wsn_fast import WSN, FastSubnetLinear, ForgottenError, TaskHeads, ops
from wsn_fast.reference import specification


def adam(params: object) -> torch.optim.Optimizer:
    return torch.optim.Adam(params, 0.01)  # type: ignore[arg-type]


@pytest.fixture
def trained() -> WSN:
    wsn = WSN(convnet())
    run_tasks(wsn, [7, 3], adam)
    return wsn


def test_tasks_in_any_order_and_of_both_kinds() -> None:
    wsn = WSN(mlp())
    for task in (5, "b", -2):
        wsn.begin_task(task)
        assert wsn.current_task == task
        wsn.end_task()
    assert wsn.tasks == [5, "b", -2]
    assert wsn.current_task is None


def test_end_task_takes_the_mask_of_the_scores_as_they_are_now() -> None:
    """Not the one left over from the last forward: the published code's stale mask."""
    wsn = WSN(mlp())
    layer = wsn.model[1]
    wsn.begin_task(0)
    best = wsn.trainable_state()
    train(wsn, wsn.guard(adam(wsn.parameters())), batches(0, 20))
    stale = specification.topc_mask(layer.weight_score, 0.4)
    wsn.load_trainable_state(best)
    wsn.end_task()
    fresh = specification.topc_mask(layer.weight_score, 0.4)
    assert not torch.equal(stale, fresh), "the case can tell the two apart"
    assert torch.equal(layer.mask("weight", 0), fresh)


def test_union_is_the_or_of_the_masks(trained: WSN) -> None:
    for layer in trained.subnet_layers().values():
        masks = [layer.mask("weight", row) for row in range(2)]
        assert torch.equal(ops.unpack_mask(layer.weight_union, layer.weight.shape), specification.union_masks(masks))


def test_masks_take_one_bit_per_parameter_and_no_gradient(trained: WSN) -> None:
    for layer in trained.subnet_layers().values():
        assert layer.weight_masks.shape == (2, (layer.weight.numel() + 7) // 8)
        assert layer.weight_masks.element_size() == 1
        assert not layer.weight_masks.requires_grad


def test_scores_are_kept_between_tasks_by_default() -> None:
    wsn = WSN(mlp())
    run_tasks(wsn, [0], adam)
    before = wsn.model[1].weight_score.clone()
    wsn.begin_task(1)
    assert torch.equal(wsn.model[1].weight_score, before)


@pytest.mark.parametrize("mode", ["default", "N01", "U01"])
def test_scores_are_drawn_anew_where_asked_for(mode: str) -> None:
    wsn = WSN(mlp(), reinit_scores=True, score_init=mode)
    before = wsn.model[1].weight_score.clone()
    wsn.begin_task(0)
    assert not torch.equal(wsn.model[1].weight_score, before)
    assert (wsn.model[1].weight_score.min() >= 0) == (mode == "U01")


def test_a_density_of_its_own_for_a_task() -> None:
    wsn = WSN(mlp(0.4))
    wsn.begin_task(0, density=0.1)
    wsn.end_task()
    wsn.begin_task(1, density={"1": 0.2})
    wsn.end_task()
    wsn.begin_task(2)
    wsn.end_task()
    kept = [
        [round(layer.mask("weight", r).float().mean().item(), 1) for r in range(3)]
        for layer in wsn.subnet_layers().values()
    ]
    assert kept == [[0.1, 0.2, 0.4], [0.1, 0.4, 0.4]]


def test_use_task_takes_effect_at_once_and_a_with_block_puts_the_previous_state_back(trained: WSN) -> None:
    x = batches(99, 1)[0][0]
    trained.eval()
    with torch.no_grad():
        trained.use_task(7)
        seven = trained(x)
        with trained.use_task(3):
            three = trained(x)
        assert torch.equal(trained(x), seven)
    assert not torch.equal(three, seven)
    assert torch.equal(logits(trained, 3), three)


def test_use_task_masks_the_weights_of_the_task(trained: WSN) -> None:
    layer = trained.model[4]
    with trained.use_task(7):
        assert torch.equal(
            layer.masked("weight", torch.float32), specification.select(layer.mask("weight", 0), layer.weight)
        )


def test_validation_uses_the_mask_of_the_current_scores() -> None:
    wsn = WSN(mlp())
    wsn.begin_task(0)
    x = batches(0, 1)[0][0]
    wsn(x)
    wsn.model[1].reset_scores()
    wsn.eval()
    with wsn.use_task(0):
        expected = specification.select(specification.topc_mask(wsn.model[1].weight_score, 0.4), wsn.model[1].weight)
        assert torch.equal(wsn.model[1].masked("weight", torch.float32), expected)


def test_begin_task_inside_a_with_block_is_not_undone_by_it(trained: WSN) -> None:
    with trained.use_task(7):
        trained.begin_task("new")
    assert trained.model[-1].active == "new"
    assert trained.model[0].active_row is None


def test_use_head_shows_an_untrained_head_under_the_current_scores(trained: WSN) -> None:
    heads = trained.model[-1]
    heads.add("later")
    with trained.use_head("later"):
        assert heads.active == "later"
        assert trained.model[0].active_row is None
    assert heads.active == 3


def test_normalisation_is_per_task(trained: WSN) -> None:
    norm = trained.model[1]
    with trained.use_task(7):
        first = norm.running_mean.clone()
    with trained.use_task(3):
        assert not torch.equal(norm.running_mean, first)


def test_a_task_starts_from_the_normalisation_of_the_one_before(trained: WSN) -> None:
    with trained.use_task(3):
        last = trained.model[1].running_mean.clone()
    trained.use_task(7)
    trained.begin_task(9)
    assert torch.equal(trained.model[1].running_mean, last)


def test_a_batch_of_several_tasks(trained: WSN) -> None:
    x = torch.randn(6, *INPUT)
    trained.eval()
    with torch.no_grad():
        mixed = trained.forward_tasks(x, [7, 3, 3, 7, 3, 7])
        assert torch.equal(mixed[[1, 2, 4]], _as(trained, 3, x[[1, 2, 4]]))
        assert torch.equal(mixed[[0, 3, 5]], _as(trained, 7, x[[0, 3, 5]]))
        assert torch.equal(trained.forward_tasks(x, torch.tensor([7, 3, 3, 7, 3, 7])), mixed)


def _as(wsn: WSN, task: int, x: Tensor) -> Tensor:
    with wsn.use_task(task):
        out: Tensor = wsn(x)
    return out


def test_forward_tasks_refuses_what_it_cannot_stack(trained: WSN) -> None:
    with pytest.raises(ValueError, match="for each of the 2 rows of x"):
        trained.forward_tasks(torch.randn(2, *INPUT), [7])
    with pytest.raises(ValueError, match="task 4 is unknown"):
        trained.forward_tasks(torch.randn(1, *INPUT), [4])
    wide = WSN(nn.Sequential(FastSubnetLinear(3, 4), TaskHeads(4, tasks={0: 2, 1: 5})))
    for task in (0, 1):
        wide.begin_task(task)
        wide.end_task()
    with pytest.raises(ValueError, match=r"outputs of one shape, got \{0: \(2,\), 1: \(5,\)\}"):
        wide.forward_tasks(torch.randn(2, 3), [0, 1])


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies(trained: WSN, copier: Callable[[WSN], WSN]) -> None:
    twin = copier(trained)
    assert torch.equal(logits(twin, 7), logits(trained, 7))
    run_tasks(twin, [1], adam)
    twin.verify()
    assert trained.tasks == [7, 3]


def test_state_dict_restores_all_tasks_into_a_freshly_converted_model(trained: WSN) -> None:
    buffer = io.BytesIO()
    torch.save(trained.state_dict(), buffer)
    buffer.seek(0)
    fresh = WSN(convnet())
    fresh.load_state_dict(torch.load(buffer, weights_only=True), strict=True)
    assert fresh.tasks == [7, 3]
    for task in (7, 3):
        assert torch.equal(logits(fresh, task), logits(trained, task))
    fresh.verify()
    assert fresh.capacity() == trained.capacity()


def test_the_state_dict_of_the_model_alone_restores_them_too(trained: WSN) -> None:
    model = convnet()
    WSN(model)
    model.load_state_dict(trained.model.state_dict(), strict=True)
    assert torch.equal(logits(WSN(model), 7), logits(trained, 7))


def test_a_state_dict_taken_while_an_old_task_is_in_use_holds_the_live_values(trained: WSN) -> None:
    live = copy.deepcopy(trained.state_dict())
    with trained.use_task(7):
        assert not torch.equal(trained.model[1].running_mean, live["model.1.running_mean"])
        during = trained.state_dict()
    assert all(torch.equal(during[name], live[name]) for name in live)


def test_a_model_loaded_behind_the_back_of_its_wsn_is_noticed(trained: WSN) -> None:
    other = WSN(convnet())
    other.model.load_state_dict(trained.model.state_dict())
    with pytest.raises(RuntimeError, match=r"hold masks of tasks \[7, 3\], this WSN knows \[\]"):
        other.begin_task(0)


def test_a_task_in_progress_survives_a_checkpoint() -> None:
    wsn = WSN(mlp())
    run_tasks(wsn, [0], adam)
    wsn.begin_task("x", density={"1": 0.1})
    fresh = WSN(mlp())
    fresh.load_state_dict(wsn.state_dict())
    assert (fresh.current_task, fresh.model[1].gate_density, fresh.model[3].gate_density) == ("x", 0.1, 0.4)
    assert fresh.model[-1].active == "x"
    with pytest.raises(ValueError, match="task 0 has been trained already"):
        fresh.end_task()
        fresh.begin_task(0)


def test_trainable_state_of_another_model_is_refused(trained: WSN) -> None:
    with pytest.raises(ValueError, match="state is of another model"):
        trained.load_trainable_state(WSN(mlp()).trainable_state())


def test_capacity_and_stats_by_the_formula(trained: WSN) -> None:
    gates = [g for layer in trained.subnet_layers().values() for g in layer.gated()]
    total = sum(g.param.numel() for g in gates)
    masks = [[ops.unpack_mask(g.masks[row], g.param.shape) for g in gates] for row in range(2)]
    kept = [sum(int(m.sum()) for m in row) for row in masks]
    both = sum(int((a & b).sum()) for a, b in zip(*masks, strict=True))
    union = (sum(kept) - both) / total
    capacity = trained.capacity()
    assert capacity.union_density == pytest.approx(union)
    assert capacity.capacity == pytest.approx(specification.capacity(union, capacity.compression, 2))
    assert capacity.capacity_paper == pytest.approx(specification.capacity(union, 0.78, 2))
    first, second = trained.task_stats()
    assert first == (7, pytest.approx(kept[0] / total), 0.0, pytest.approx(kept[0] / total))
    assert second == (
        3,
        pytest.approx(kept[1] / total),
        pytest.approx(both / kept[1]),
        pytest.approx((kept[1] - both) / total),
    )


@pytest.mark.parametrize(("density", "low", "high"), [(0.5, -0.01, 0.02), (0.03, 0.7, 0.81)])
def test_compression_is_measured_and_not_the_papers_constant(density: float, low: float, high: float) -> None:
    wsn = WSN(nn.Sequential(FastSubnetLinear(784, 300, bias=False, density=density)))
    wsn.begin_task(0)
    wsn.end_task()
    assert low <= wsn.capacity().compression < high  # the entropy of a random mask allows 0 and 0.806


def test_capacity_before_the_first_task() -> None:
    assert WSN(mlp()).capacity() == (0.0, 0.0, 0.0, 0.0, 0)


@pytest.mark.parametrize(
    ("tensor", "name"),
    [
        (lambda m: m[0].weight, "0.weight"),
        (lambda m: m[4].weight_masks, r"4.weight \(mask\)"),
        (lambda m: m[1].running_var_tasks, "1.running_var"),
        (lambda m: m[-1].head(3).bias, "7.bias"),
    ],
    ids=["weight", "mask", "statistics", "head"],
)
def test_verify_names_what_drifted(trained: WSN, tensor: Callable[[nn.Module], Tensor], name: str) -> None:
    with torch.no_grad():
        tensor(trained.model).add_(1)
    with pytest.raises(ForgottenError, match=f"task [37]: {name}"):
        trained.verify()


def test_verify_ignores_weights_that_no_task_owns(trained: WSN) -> None:
    layer = trained.model[4]
    with torch.no_grad():
        layer.weight[~ops.unpack_mask(layer.weight_union, layer.weight.shape)] += 1
    assert trained.verify().tasks == [7, 3]


def test_a_task_begun_twice(trained: WSN) -> None:
    with pytest.raises(ValueError, match=r"task 7 has been trained already; finished tasks: \[7, 3\]"):
        trained.begin_task(7)


def test_a_task_begun_inside_another(trained: WSN) -> None:
    trained.begin_task(1)
    with pytest.raises(RuntimeError, match="task 1 is in progress"):
        trained.begin_task(2)
    assert trained.current_task == 1


def test_ending_what_was_not_begun(trained: WSN) -> None:
    with pytest.raises(RuntimeError, match="no task is in progress"):
        trained.end_task()


def test_using_an_unknown_task(trained: WSN) -> None:
    with pytest.raises(ValueError, match=r"task 'seven' is unknown; finished tasks: \[7, 3\]"):
        trained.use_task("seven")


@pytest.mark.parametrize("density", [0, 1.5, {"*": 2.0}])
def test_a_bad_density_for_a_task_changes_nothing(trained: WSN, density: object) -> None:
    with pytest.raises(ValueError, match=r"must be a number in \(0, 1\]"):
        trained.begin_task(1, density=density)  # type: ignore[arg-type]
    assert trained.current_task is None
    assert trained.model[-1].tasks == [3, 7]


def test_a_density_pattern_that_matches_nothing(trained: WSN) -> None:
    with pytest.raises(ValueError, match="density pattern 'encoder' matches no subnet layer"):
        trained.begin_task(1, density={"encoder": 0.1})


def test_scores_that_are_not_finite_stop_end_task_and_name_the_layer() -> None:
    wsn = WSN(mlp())
    wsn.begin_task(0)
    with torch.no_grad():
        wsn.model[3].weight_score[0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match=r"3\.weight_score has values that are not finite"):
        wsn.end_task()
    assert wsn.current_task == 0


def test_a_model_without_subnet_layers() -> None:
    with pytest.raises(ValueError, match="model has no subnet layer"):
        WSN(nn.Linear(2, 2))


def test_an_unknown_score_init() -> None:
    with pytest.raises(ValueError, match=r"score_init must be one of .* got 'kaiming'"):
        WSN(mlp(), score_init="kaiming")


def test_layers_that_disagree_about_the_tasks(trained: WSN) -> None:
    trained.model[4].append_task(1, {g.name: g.masks[0] for g in trained.model[4].gated()})
    with pytest.raises(ValueError, match="disagree about the finished tasks: 0 has"):
        WSN(trained.model)
