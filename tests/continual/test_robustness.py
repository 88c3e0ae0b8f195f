"""What users do to a model between and inside tasks: the promise holds, or an error says what to do."""

from __future__ import annotations

import copy
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_models import CLASSES, batches, convnet, logits, mlp, run_tasks, train
from torch import Tensor, nn

from wsn_fast import WSN, FastSubnetLinear, ForgottenError, TaskHeads, convert, ops


def adamw(params: object) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, 0.01)  # type: ignore[arg-type]


def finished(model: nn.Module, tasks: tuple[int, ...] = (0,), **owners: object) -> WSN:
    wsn = WSN(model, **owners)  # type: ignore[arg-type]
    run_tasks(wsn, tasks, adamw)
    return wsn


class Around(nn.Module):
    """A parent, as a Lightning module or a distributed wrapper is one."""

    def __init__(self, wsn: WSN) -> None:
        super().__init__()
        self.wsn = wsn


def with_dense_layer() -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 16), FastSubnetLinear(16, 12), nn.ReLU(), TaskHeads(12, CLASSES))


# --- loading ---------------------------------------------------------------------------------------------------------
def test_loaded_through_a_parent_module_frozen_parameters_stay_fixed() -> None:
    saved = Around(finished(with_dense_layer(), frozen="1.*")).state_dict()
    parent = Around(WSN(with_dense_layer(), frozen="1.*"))
    parent.load_state_dict(saved)
    before = logits(parent.wsn, 0)
    run_tasks(parent.wsn, [1], adamw)
    assert torch.equal(logits(parent.wsn, 0), before)


def test_loaded_through_a_parent_module_a_task_goes_on_where_it_was() -> None:
    wsn = finished(mlp())
    wsn.begin_task(1, density=0.1)
    parent = Around(WSN(mlp()))
    parent.load_state_dict(Around(wsn).state_dict())
    assert parent.wsn.current_task == 1
    assert parent.wsn.model[1].gate_density == 0.1
    assert parent.wsn.model[-1].active == 1


def test_density_and_rule_come_with_the_state() -> None:
    wsn = WSN(mlp(0.3, "value"))
    other = WSN(mlp(0.7))
    other.load_state_dict(wsn.state_dict())
    assert (other.model[1].density, other.model[1].rule) == (0.3, "value")


def test_going_back_to_an_earlier_state_trains_as_the_first_time() -> None:
    wsn = finished(with_dense_layer(), (0,), frozen="1.*")
    wsn.begin_task(1)
    earlier = copy.deepcopy(wsn.state_dict())
    train(wsn, wsn.guard(adamw(wsn.parameters())), batches(1, 3))
    wsn.end_task()
    first_time = logits(wsn, 1)
    wsn.load_state_dict(earlier, strict=True)
    assert (wsn.tasks, wsn.current_task) == ([0], 1)
    train(wsn, wsn.guard(adamw(wsn.parameters())), batches(1, 3))
    wsn.end_task()
    assert torch.equal(logits(wsn, 1), first_time)


def test_going_back_before_the_first_task_makes_frozen_parameters_trainable_again() -> None:
    wsn = WSN(with_dense_layer(), frozen="1.*")
    start = copy.deepcopy(wsn.state_dict())
    run_tasks(wsn, [0], adamw)
    assert not wsn.model[1].weight.requires_grad
    wsn.load_state_dict(start, strict=False)
    assert wsn.model[1].weight.requires_grad


def test_a_state_of_fewer_tasks_takes_the_later_heads_away() -> None:
    wsn = finished(mlp())
    earlier = copy.deepcopy(wsn.state_dict())
    run_tasks(wsn, [1], adamw)
    wsn.load_state_dict(earlier, strict=True)
    assert wsn.model[-1].tasks == [0]
    wsn.begin_task(1)


def test_a_load_that_fails_leaves_a_usable_model() -> None:
    wsn = finished(mlp())
    before = logits(wsn, 0)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        wsn.load_state_dict({"nope": torch.zeros(1)})
    assert torch.equal(logits(wsn, 0), before)
    wsn(batches(0, 1)[0][0])


def test_parameters_replaced_on_loading_are_protected_too() -> None:
    wsn = finished(mlp(), (0, 1))
    before = logits(wsn, 0)
    wsn.load_state_dict(copy.deepcopy(wsn.state_dict()), assign=True)
    run_tasks(wsn, [2], adamw)
    assert torch.equal(logits(wsn, 0), before)


# --- steps -----------------------------------------------------------------------------------------------------------
class Fails(torch.optim.AdamW):
    """Updates, and then raises as an interrupted step would."""

    def step(self, closure: object = None) -> None:  # type: ignore[override]
        super().step()
        raise KeyboardInterrupt


def test_a_step_that_an_exception_cut_short_moves_nothing_frozen() -> None:
    wsn = finished(mlp())
    before = logits(wsn, 0)
    wsn.begin_task(1)
    optimizer = wsn.guard(Fails(wsn.parameters(), 0.01))
    with pytest.raises(KeyboardInterrupt):
        train(wsn, optimizer, batches(1, 1))
    wsn.verify()
    assert torch.equal(logits(wsn, 0), before)


def test_a_step_while_a_finished_task_is_in_use_is_refused() -> None:
    wsn = finished(convnet())
    wsn.begin_task(1)
    optimizer = wsn.guard(adamw(wsn.parameters()))
    wsn.use_task(0)
    with pytest.raises(RuntimeError, match="task 0 is finished and in use: leave use_task"):
        optimizer.step()


def test_an_optimizer_without_the_new_head_is_refused() -> None:
    wsn = finished(mlp())
    optimizer = wsn.guard(adamw(list(wsn.parameters())))
    wsn.begin_task("next")
    with pytest.raises(RuntimeError, match="no guarded optimizer holds the head of task 'next'"):
        train(wsn, optimizer, batches(1, 1))


def test_two_optimizers_may_share_the_work() -> None:
    wsn = finished(mlp())
    before = logits(wsn, 0)
    wsn.begin_task(1)
    head = list(wsn.model[-1].head(1).parameters())
    rest = [p for p in wsn.parameters() if not any(p is h for h in head)]
    optimizers = [wsn.guard(adamw(rest)), wsn.guard(torch.optim.SGD(head, 0.1, momentum=0.9))]
    for x, y in batches(1, 3):
        F.cross_entropy(wsn(x), y).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
    wsn.end_task()
    assert torch.equal(logits(wsn, 0), before)


# --- what is looked at -----------------------------------------------------------------------------------------------
def test_looking_at_a_finished_task_leaves_tied_norms_alone() -> None:
    model = nn.Sequential(nn.Flatten(), FastSubnetLinear(36, 12), nn.LayerNorm(12), nn.LayerNorm(12), TaskHeads(12, 3))
    model[3].weight = model[2].weight
    wsn = finished(model)
    wsn.begin_task(1)
    train(wsn, wsn.guard(adamw(wsn.parameters())), batches(1, 3))
    live = model[2].weight.clone()
    with wsn.use_task(0):
        assert not torch.equal(model[2].weight, live)
    assert torch.equal(model[2].weight, live)


def test_the_state_of_the_best_epoch_may_be_taken_while_a_finished_task_is_in_use() -> None:
    wsn = finished(convnet())
    wsn.begin_task(1)
    train(wsn, wsn.guard(adamw(wsn.parameters())), batches(1, 3))
    live = wsn.trainable_state()
    with wsn.use_task(0):
        as_zero = logits(wsn, 0)
        during = wsn.trainable_state()
        assert torch.equal(wsn(batches(99, 1)[0][0]), as_zero), "the view stays"
        wsn.load_trainable_state(during)
    assert live.keys() == during.keys()
    assert all(torch.equal(live[name], during[name]) for name in live)
    assert all(torch.equal(live[name], tensor) for name, tensor in wsn.trainable_state().items())
    assert wsn.model[-1].active == 1


def test_a_bare_use_inside_a_block_is_undone_with_it() -> None:
    wsn = finished(mlp(), (0, 1))
    wsn.use_task(1)
    with wsn.use_task(0):
        wsn.use_task(0)
    assert wsn.model[-1].active == 1


# --- edited models ---------------------------------------------------------------------------------------------------
def test_a_shared_module_inside_heads_needs_an_owner() -> None:
    class Heads(TaskHeads):
        def __init__(self) -> None:
            super().__init__(12, CLASSES)
            self.before = nn.Linear(12, 12)

    wsn = WSN(nn.Sequential(nn.Flatten(), FastSubnetLinear(36, 12), Heads()))
    with pytest.raises(ValueError, match=r"2\.before\.weight"):
        wsn.begin_task(0)


def test_a_layer_replaced_after_a_task_has_ended_is_found() -> None:
    wsn = finished(mlp())
    wsn.model[3] = FastSubnetLinear(16, 12)
    with pytest.raises(ValueError, match="A layer cannot join or be replaced after a task has ended"):
        wsn.begin_task(1)


def test_a_norm_replaced_after_a_task_has_ended_is_found_before_training() -> None:
    wsn = finished(convnet())
    wsn.model[1] = nn.GroupNorm(2, 4)
    with pytest.raises(
        ValueError, match=r"1\.weight has values for 0 finished tasks, but the subnet layers have masks for 1"
    ):
        wsn.begin_task(1)


def test_a_layer_added_before_the_first_task_takes_part() -> None:
    wsn = WSN(mlp())
    wsn.model[3] = FastSubnetLinear(16, 12)
    run_tasks(wsn, [0, 1], adamw)
    assert wsn.model[3].tasks == [0, 1]
    wsn.verify()


def test_a_frozen_buffer_that_changes_is_an_error_at_the_end_of_the_task() -> None:
    class Drifts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.zeros(36))

        def forward(self, x: Tensor) -> Tensor:
            self.mean.mul_(0.9).add_(0.1)
            return x.flatten(1) - self.mean

    wsn = WSN(nn.Sequential(Drifts(), FastSubnetLinear(36, 12), TaskHeads(12, CLASSES)), frozen="0.mean")
    with pytest.raises(RuntimeError, match=r"0\.mean is a buffer declared frozen and has changed: declare it per_task"):
        run_tasks(wsn, [0], adamw)
    assert wsn.current_task == 0


def test_other_owners_for_a_model_with_finished_tasks_are_refused() -> None:
    wsn = finished(convnet())
    rows = wsn.model[1].running_mean_tasks.clone()
    with pytest.raises(ValueError, match="cannot change its owner to or from per_task: 1 tasks have ended"):
        WSN(wsn.model, shared="1.*")
    assert torch.equal(wsn.model[1].running_mean_tasks, rows)


def test_heads_that_exist_are_not_converted() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 12), TaskHeads(12, CLASSES, tasks=[0]))
    convert(model, 0.5)
    assert type(model[2].head(0)) is nn.Linear


def test_a_width_that_contradicts_the_head_is_refused_before_anything_is_made() -> None:
    wsn = WSN(nn.Sequential(FastSubnetLinear(36, 12), TaskHeads(12), TaskHeads(12, tasks={0: 5})))
    with pytest.raises(ValueError, match="out_features must be 5, the width of the head of task 0, got 3"):
        wsn.begin_task(0, out_features=3)
    assert wsn.model[1].tasks == []


# --- the end of a task -----------------------------------------------------------------------------------------------
def test_a_task_that_cannot_be_stored_stays_in_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    wsn = finished(convnet())
    wsn.begin_task(1)
    train(wsn, wsn.guard(adamw(wsn.parameters())), batches(1, 3))
    append = FastSubnetLinear.append_task

    def out_of_memory(self: FastSubnetLinear, *args: object) -> None:
        raise MemoryError

    monkeypatch.setattr(FastSubnetLinear, "append_task", out_of_memory)
    with pytest.raises(MemoryError):
        wsn.end_task()
    assert (wsn.tasks, wsn.current_task, wsn.model[0].tasks) == ([0], 1, [0])
    monkeypatch.setattr(FastSubnetLinear, "append_task", append)
    wsn.end_task()
    assert wsn.model[0].tasks == wsn.model[4].tasks == [0, 1]
    assert torch.equal(
        ops.unpack_mask(wsn.model[0].weight_union, wsn.model[0].weight.shape),
        wsn.model[0].mask("weight", 0) | wsn.model[0].mask("weight", 1),
    )
    wsn.verify()


def test_a_task_may_end_in_inference_mode() -> None:
    wsn = WSN(mlp())
    wsn.begin_task(0)
    with torch.inference_mode():
        wsn.end_task()
    run_tasks(wsn, [1], adamw)
    wsn.verify()


@pytest.mark.parametrize("density", [np.float32(0.25), Fraction(1, 3), {"*": Fraction(1, 4)}])
def test_a_density_of_any_number_type_can_be_saved(density: object) -> None:
    wsn = WSN(mlp())
    wsn.begin_task(0, density=density)  # type: ignore[arg-type]
    fresh = WSN(mlp())
    fresh.load_state_dict(wsn.state_dict())
    assert fresh.model[1].gate_density == wsn.model[1].gate_density != 0.4


def test_a_layers_density_set_later_holds_for_the_next_task() -> None:
    wsn = finished(mlp(0.4))
    wsn.model[1].density = 0.2
    run_tasks(wsn, [1], adamw)
    assert wsn.model[1].mask("weight", 1).float().mean().item() == pytest.approx(0.2, abs=0.01)


# --- elsewhere -------------------------------------------------------------------------------------------------------
def test_compiled_code_serves_any_number_of_tasks() -> None:
    """More tasks than torch recompiles for: the code must not depend on which task is in use."""
    torch.compiler.reset()
    wsn = WSN(mlp())
    compiled = torch.compile(wsn.model, fullgraph=True, dynamic=False, backend="aot_eager")
    for task in range(12):
        wsn.begin_task(task)
        optimizer = wsn.guard(adamw(wsn.parameters()))
        F.cross_entropy(compiled(batches(task, 1)[0][0]), batches(task, 1)[0][1]).backward()
        optimizer.step()
        wsn.end_task()
    x = batches(99, 1)[0][0]
    wsn.eval()
    with torch.no_grad():
        for task in range(12):
            with wsn.use_task(task):
                assert torch.equal(compiled(x), wsn.model(x))


def test_a_model_swapped_for_its_compiled_self_keeps_its_names() -> None:
    wsn = finished(convnet())
    wsn.model = torch.compile(wsn.model, backend="aot_eager")  # type: ignore[assignment]
    assert wsn.verify().tasks == [0]


def test_a_converted_dtype_is_called_that() -> None:
    wsn = finished(mlp()).double()
    with pytest.raises(ForgottenError, match=r"1\.weight \(float32, now float64\)"):
        wsn.verify()


def test_tied_layers_count_once() -> None:
    model = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 12))
    model[1].weight = model[0].weight
    wsn = WSN(convert(model, 0.5))
    wsn.begin_task(0)
    wsn.end_task()
    assert sum(g.param.numel() for _, g in wsn.gated()) == 144 + 12 + 12
    assert wsn.capacity().union_density == pytest.approx(0.5, abs=0.01)


def test_another_default_device_changes_nothing() -> None:
    wsn, x = finished(convnet()), batches(99, 1)[0][0]
    before = logits(wsn, 0)
    with torch.device("meta"), torch.no_grad(), wsn.use_task(0):
        assert torch.equal(wsn(x), before)
        assert not wsn.model[0].masks_of_scores()["weight"].is_meta
        state = wsn.state_dict()
    WSN(convnet()).load_state_dict(state)


def test_a_model_on_meta_can_be_wrapped_and_run() -> None:
    with torch.device("meta"):
        wsn = WSN(convert(nn.Sequential(nn.Linear(4, 3)), 0.5))
        assert wsn(torch.empty(2, 4)).is_meta


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize(("make", "error"), [
    (lambda: FastSubnetLinear(0, 4), ValueError),
    (lambda: FastSubnetLinear(4, 2, dtype=torch.complex64), TypeError),
])  # fmt: skip
def test_layers_that_cannot_be_gated_are_refused_at_once(make: object, error: type[Exception]) -> None:
    with pytest.raises(error, match="weight must"):
        make()  # type: ignore[operator]
