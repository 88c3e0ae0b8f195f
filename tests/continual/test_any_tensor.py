"""Every kind of module keeps its finished tasks to the bit, whatever trains it."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from operator import attrgetter
from typing import Any

import pytest
import torch
from any_modules import CASES, logits, steps, wsn_of
from torch import nn

from wsn_fast import WSN, TaskHeads, convert, to_dense
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


# --- batches with rows of several tasks ---
class RowWise(nn.Module):
    """Computes each row by itself, with tensors that are masked where they are read."""

    row_wise = True

    def __init__(self) -> None:
        super().__init__()
        self.matrix, self.bias = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.matrix + self.bias


class RowWiseReader(nn.Module):
    """Computes each row by itself, and reads the weight of a layer that could serve several tasks at once."""

    row_wise = True

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) @ self.linear.weight


class RowWiseSecretReader(RowWiseReader):
    """Reads it in a way that no code of the class shows."""

    def __init__(self) -> None:
        super().__init__()
        self.read = attrgetter("linear.weight")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) @ self.read(self)


def with_three_tasks(body: nn.Module) -> WSN:
    wsn = WSN(convert(nn.Sequential(body, TaskHeads(8, 3)), 0.4), reinit_scores=True).eval()
    for task in TASKS:
        wsn.begin_task(task)
        wsn.end_task()
    return wsn


@pytest.mark.parametrize(
    ("kind", "error", "match"),
    [
        (RowWise, ValueError, "one_pass is not possible: 0 reads tensors that are masked for one task at a time"),
        (RowWiseReader, ValueError, "one_pass is not possible: 0 reads tensors that are masked for one task at a time"),
        (
            RowWiseSecretReader,
            RuntimeError,
            r"'weight' of FastSubnetLinear is read in a pass with rows of several tasks",
        ),
    ],
)
def test_rows_of_several_tasks_never_get_the_mask_of_another(
    kind: type[nn.Module], error: type[Exception], match: str
) -> None:
    wsn, x = with_three_tasks(kind()), torch.randn(6, 8)
    tasks = [0, 1, 2, 2, 1, 0]
    with pytest.raises(error, match=match):
        wsn.forward_tasks(x, tasks, one_pass=True)
    found = wsn.forward_tasks(x, tasks)
    for row, task in enumerate(tasks):
        torch.testing.assert_close(found[row], logits(wsn, task, x)[row])


@pytest.mark.parametrize("name", ["attention", "LSTM", "bare", "tied decoder", "bag"])
def test_rows_of_several_tasks(name: str) -> None:
    wsn, kept = trained(name, "guarded")
    tasks = [0, 1, 2, 2, 1, 0]
    found = wsn.forward_tasks(CASES[name].x, tasks)
    for row, task in enumerate(tasks):
        torch.testing.assert_close(found[row], kept[task][row])


# --- settings ---
@pytest.mark.parametrize("keep_masked", [False, True, 2])
@pytest.mark.parametrize("gates_ahead", [False, True])
def test_what_is_kept_changes_nothing(keep_masked: bool | int, gates_ahead: bool) -> None:
    x = CASES["tied decoder"].x
    wsn, kept = wsn_of("tied decoder", keep_masked=keep_masked, gates_ahead=gates_ahead), {}
    for task in TASKS:
        wsn.begin_task(task)
        steps(wsn, OPTIMIZERS["guarded"](wsn), x)
        wsn.eval().end_task(probe=x)
        kept[task] = logits(wsn, task, x)
    for task in (0, 1, 2, 1, 0, 0):
        assert torch.equal(logits(wsn, task, x), kept[task])


def test_tasks_may_be_removed() -> None:
    wsn, kept = trained("bare", "SubnetAdamW in one pass")
    wsn.remove_task(1)
    wsn.verify(probe=CASES["bare"].x)
    assert all(torch.equal(logits(wsn, task, CASES["bare"].x), kept[task]) for task in (0, 2))


def test_one_pass_and_plain_optimizers_agree() -> None:
    for name in ("attention", "LSTM", "bare", "tied layers"):
        found = []
        for one_pass in (False, True):
            torch.manual_seed(0)
            wsn = wsn_of(name)
            wsn.begin_task(0)
            steps(wsn, SubnetAdamW(wsn, 0.01, one_pass=one_pass), CASES[name].x, 3)
            found.append(wsn.state_dict())
        torch.testing.assert_close(*found)
