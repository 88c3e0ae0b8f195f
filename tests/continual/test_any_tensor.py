"""Every kind of module keeps its finished tasks to the bit, whatever trains it."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from any_modules import CASES, logits, steps, wsn_of

from wsn_fast import WSN, to_dense
from wsn_fast.optim import SubnetAdamW, SubnetSGD

OPTIMIZERS: dict[str, Callable[[WSN], Any]] = {
    "guarded": lambda wsn: wsn.guard(torch.optim.AdamW(wsn.parameters(), 0.05, weight_decay=0.1)),
    "gates ahead": lambda wsn: wsn.guard(torch.optim.AdamW(wsn.parameters(), 0.05, weight_decay=0.1)),
    "SubnetAdamW": lambda wsn: SubnetAdamW(wsn, 0.05, weight_decay=0.1),
    "SubnetAdamW in one pass": lambda wsn: SubnetAdamW(wsn, 0.05, weight_decay=0.1, one_pass=True),
    "SubnetSGD in one pass": lambda wsn: SubnetSGD(wsn, 0.05, momentum=0.9, one_pass=True),
}
TASKS = range(3)


def trained(name: str, optimizer: str) -> tuple[WSN, dict[int, torch.Tensor]]:
    """Three finished tasks, none of which was forgotten when it had ended, and their logits."""
    x, kept = CASES[name].x, {}
    wsn = wsn_of(name, gates_ahead=optimizer == "gates ahead")
    before = {n: gate.param.detach().clone() for n, gate in wsn.gated()}
    for task in TASKS:
        wsn.begin_task(task)
        steps(wsn, OPTIMIZERS[optimizer](wsn), x)
        wsn.eval().end_task(probe=x)
        kept[task] = logits(wsn, task, x)
        for earlier, expected in kept.items():
            assert torch.equal(logits(wsn, earlier, x), expected), (earlier, task)
    assert all(not torch.equal(gate.param, before[n]) for n, gate in wsn.gated())  # all of it was trained
    assert not torch.equal(kept[0], kept[2])
    wsn.verify(probe=x)
    return wsn, kept


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.sample(3)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", CASES)
def test_tasks_are_kept_to_the_bit(name: str, optimizer: str) -> None:
    wsn, kept = trained(name, optimizer)
    x = CASES[name].x
    for task in TASKS:
        with torch.no_grad():
            dense = to_dense(wsn, task).requires_grad_(False)  # PyTorch chooses kernels by this flag
            assert torch.equal(dense(x), kept[task])
        assert not any(type(module).__module__.startswith("wsn_fast") for module in dense.modules())
    fresh = wsn_of(name)
    fresh.load_state_dict(wsn.state_dict())
    assert all(torch.equal(logits(fresh, task, x), kept[task]) for task in TASKS)
    twins = [copy.deepcopy(wsn), *([pickle.loads(pickle.dumps(wsn))] if CASES[name].pickled else [])]
    for twin in twins:
        assert all(torch.equal(logits(twin, task, x), kept[task]) for task in TASKS)
        twin.verify(probe=x)
