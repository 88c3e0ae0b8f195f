"""A training loop that is not ours probes with what the model was called with first."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wsn_fast import WSN, UnmaskedReadError, convert
from wsn_fast.continual import statistics
from wsn_fast.continual.first_inputs import FirstInputs

X = torch.randn(12, 8, generator=torch.Generator().manual_seed(5))


class Model(nn.Module):
    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.enc, self.head, self.tied, self.calls = nn.Linear(8, 8), nn.Linear(8, 3), tied, []

    def forward(self, x: Tensor, *, factor: float = 1.0) -> Tensor:
        self.calls.append((x.detach().clone(), factor))
        y = self.enc(x.mul_(factor))
        return self.head(F.linear(y, self.enc._parameters["weight"].t()) if self.tied else y)


def begun(**how: Any) -> tuple[WSN, FirstInputs]:
    wsn = WSN(convert(Model(**how), density=0.3, heads="head"))
    wsn.begin_task(1)
    return wsn, FirstInputs(wsn)


def test_the_first_call_is_repeated_at_the_end_of_the_task() -> None:
    wsn, first = begun()
    x = X.clone()
    wsn(x, factor=2.0).sum().backward()
    wsn(X + 1)
    x.zero_()
    wsn.model.calls.clear()
    first.end_task()
    assert wsn.tasks == [1]
    assert [factor for _, factor in wsn.model.calls] == [2.0, 2.0]
    assert all(torch.equal(seen, X) for seen, _ in wsn.model.calls)
    assert not wsn._forward_pre_hooks


def test_a_reader_is_found_and_the_task_goes_on() -> None:
    wsn, first = begun(tied=True)
    wsn(X.clone())
    with pytest.raises(UnmaskedReadError):
        first.end_task()
    assert (wsn.current_task, wsn.tasks) == (1, [])


def test_without_a_call_there_is_a_warning() -> None:
    wsn, first = begun(tied=True)
    with pytest.warns(RuntimeWarning, match=r"task 1: whether .* was not checked \(the WSN was not called\)"):
        first.end_task()
    assert wsn.tasks == [1]


def test_inputs_that_cannot_be_computed_any_more_are_a_warning() -> None:
    wsn, first = begun()
    wsn(X.clone())
    wsn.model.forward = lambda x, **_: 1 / 0
    with pytest.warns(RuntimeWarning, match=r"was not checked \(ZeroDivisionError: division by zero\)"):
        first.end_task()
    assert wsn.tasks == [1]


def test_an_error_of_the_end_itself_is_raised() -> None:
    wsn, first = begun()
    wsn(X.clone())
    with torch.no_grad():
        wsn.model.enc.weight.fill_(torch.inf)
    with warnings.catch_warnings(), pytest.raises(FloatingPointError):
        first.end_task()
    assert wsn.current_task == 1


def test_a_copy_of_the_model_copies_its_own_inputs() -> None:
    wsn, first = begun()
    twin = copy.deepcopy(wsn)
    twin(X.clone())
    with pytest.warns(RuntimeWarning, match="the WSN was not called"):
        first.end_task()


def test_a_compiled_call_is_left_alone() -> None:
    torch.compiler.reset()
    wsn, first = begun()
    wsn.model.calls = None
    wsn.model.forward = lambda x: wsn.model.head(wsn.model.enc(x))
    torch.compile(wsn, backend="aot_eager", fullgraph=True)(X.clone())
    with pytest.warns(RuntimeWarning, match="the WSN was not called"):
        first.end_task()


def test_an_error_in_what_the_task_is_recorded_with_leaves_it_in_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    wsn, first = begun()
    wsn(X.clone())
    before = {name: tensor.clone() for name, tensor in wsn.state_dict().items()}

    def fail(masks: object) -> None:
        raise OSError("no zstandard here")

    with monkeypatch.context() as patch:
        patch.setattr(statistics, "compressed_bytes", fail)
        with pytest.raises(OSError, match="no zstandard here"):
            first.end_task()
    assert wsn.tasks == [] and wsn.current_task == 1
    assert all(torch.equal(tensor, before[name]) for name, tensor in wsn.state_dict().items())
    wsn.end_task()
    assert wsn.verify().tasks == [1]
