"""What is in use or was replaced when a task ends or a state is loaded; and hooks where rows of tasks share a pass."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_models import batches, convnet, logits, mlp, run_tasks, train
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from wsn_fast import WSN, ForgottenError


def adamw(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, 0.05)


def in_second_task(model: Callable[[], nn.Sequential] = convnet) -> WSN:
    wsn = WSN(model())
    run_tasks(wsn, [0], adamw)
    wsn.begin_task(1)
    train(wsn, wsn.guard(adamw(wsn.parameters())), batches(1, 3))
    return wsn


@pytest.mark.parametrize("name", ["1.weight", "1.running_mean", "5.bias"])
def test_a_task_that_ends_while_another_is_in_use_keeps_its_own_norms(name: str) -> None:
    wsn = in_second_task()
    live = wsn.model.get_parameter(name) if "mean" not in name else wsn.model.get_buffer(name)
    before = live.detach().clone()
    wsn.use_task(0)
    assert not torch.equal(live, before)
    wsn.end_task()
    assert torch.equal(wsn.model.get_buffer(f"{name}_tasks")[1], before)


@pytest.mark.parametrize("place", [1, 5])
def test_a_norm_that_is_replaced_within_a_task_is_found_at_its_end(place: int) -> None:
    wsn = in_second_task()
    wsn.model[place] = nn.BatchNorm2d(4) if place == 1 else nn.LayerNorm(12)
    with pytest.raises(ValueError, match=rf"{place}\.weight has values for 0 finished tasks.* added or replaced"):
        wsn.end_task()
    assert wsn.current_task == 1
    with pytest.raises(ForgottenError, match=rf"task 0: {place}\.weight \(float32, now absent\)"):
        wsn.verify()


@pytest.mark.parametrize("inside", [0, 1])
def test_a_state_that_is_loaded_in_a_block_decides_what_is_in_use_after_it(inside: int) -> None:
    other = WSN(convnet())
    run_tasks(other, [5], adamw)
    wsn = in_second_task()
    with wsn.use_task(inside):
        wsn.load_state_dict(copy.deepcopy(other.state_dict()))
    assert (wsn._view.task, wsn._view.head) == (None, 5)
    assert torch.equal(logits(wsn, 5), logits(other, 5))


HOOKS: dict[str, Callable[[nn.Sequential], Any]] = {
    "before a layer": lambda model: model[1].register_forward_pre_hook(lambda *_: None),
    "after a layer": lambda model: model[1].register_forward_hook(lambda *_: None),
    "before all modules": lambda model: register_module_forward_pre_hook(lambda *_: None),
    "after all modules": lambda model: register_module_forward_hook(lambda *_: None),
}


@pytest.mark.parametrize("hook", HOOKS)
def test_rows_of_several_tasks_do_not_share_a_pass_where_hooks_run(hook: str) -> None:
    wsn = WSN(mlp())
    run_tasks(wsn, [0, 1], adamw)
    x = batches(0, 1)[0][0][:4]
    wsn.eval().forward_tasks(x, [0, 1, 0, 1], one_pass=True)
    handle = HOOKS[hook](wsn.model)
    try:
        with pytest.raises(ValueError, match=r"one_pass is not possible: .* hooks"):
            wsn.forward_tasks(x, [0, 1, 0, 1], one_pass=True)
    finally:
        handle.remove()
