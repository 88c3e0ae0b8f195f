"""The guard where a step is more than an update: closures that use the model, steps cut short, states loaded after."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from small_models import batches, logits, mlp, run_tasks

from wsn_fast import WSN


def sgd(params: object) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, 0.1)  # type: ignore[arg-type]


def test_a_closure_may_look_at_a_finished_task() -> None:
    """Lightning's automatic optimization runs every ``training_step`` in the optimizer's closure."""
    wsn = WSN(mlp())
    run_tasks(wsn, [0], sgd)
    before = logits(wsn, 0)
    wsn.begin_task(1)
    optimizer = wsn.guard(torch.optim.AdamW(wsn.parameters(), 0.1, weight_decay=0.1))
    x, y = batches(1, 1)[0]

    def closure() -> torch.Tensor:
        with torch.no_grad(), wsn.use_task(0):
            wsn(x)
        loss = F.cross_entropy(wsn(x), y)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert torch.equal(logits(wsn, 0), before)


def test_a_state_loaded_after_a_step_was_cut_short_is_what_was_loaded() -> None:
    other = WSN(mlp())
    run_tasks(other, [0], sgd)
    wsn = WSN(mlp())
    run_tasks(wsn, [0], sgd)
    wsn.begin_task(1)
    optimizer = wsn.guard(torch.optim.AdamW(wsn.parameters(), 0.1))

    def closure() -> float:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(closure)
    wsn.load_state_dict(copy.deepcopy(other.state_dict()))
    assert torch.equal(logits(wsn, 0), logits(other, 0))


def test_loaded_heads_have_the_order_of_the_state() -> None:
    """Optimizers save their state by the order of parameters."""
    wsn = WSN(mlp())
    run_tasks(wsn, [1], sgd)
    wsn.begin_task(2)
    resumed = WSN(mlp())
    resumed.begin_task(2)
    resumed.load_state_dict(wsn.state_dict())
    assert [n for n, _ in resumed.named_parameters()] == [n for n, _ in wsn.named_parameters()]
