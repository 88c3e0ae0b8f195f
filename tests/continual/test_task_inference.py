"""Tasks that nobody names are found by the entropy of the outputs."""

from __future__ import annotations

import pytest
import torch
from small_models import mlp
from torch import Tensor, nn

from wsn_fast import WSN, FastSubnetLinear, TaskHeads

X = 90 * torch.randn(6, 36, generator=torch.Generator().manual_seed(3))


def finished(tasks: tuple[object, ...] = ("a", 1, 2)) -> WSN:
    torch.manual_seed(0)
    wsn = WSN(mlp(), reinit_scores=True)
    for task in tasks:
        wsn.begin_task(task)  # type: ignore[arg-type]
        wsn.end_task()
    return wsn.eval()


def entropies(wsn: WSN, x: Tensor) -> Tensor:
    columns = []
    for task in wsn.tasks:
        with torch.no_grad(), wsn.use_task(task):
            columns.append(torch.distributions.Categorical(logits=wsn(x)).entropy())
    return torch.stack(columns, 1)


@pytest.mark.parametrize("one_pass", [None, False, True])
def test_the_task_with_the_least_entropy_is_found(one_pass: bool | None) -> None:
    wsn = finished()
    found, expected = wsn.infer_task(X, one_pass=one_pass), entropies(wsn, X)
    torch.testing.assert_close(found.entropy, expected)
    assert found.task == wsn.tasks[int(expected.mean(0).argmin())]
    assert found.rows == [wsn.tasks[int(i)] for i in expected.argmin(1)]
    assert len(set(found.rows)) > 1, "otherwise this shows little"


def test_some_tasks_to_choose_from() -> None:
    wsn = finished()
    found = wsn.infer_task(X, tasks=[2, "a"])
    torch.testing.assert_close(found.entropy, entropies(wsn, X)[:, [2, 0]])
    assert {found.task, *found.rows} <= {2, "a"}


def test_a_task_in_use_and_one_in_training_are_left_as_they_are() -> None:
    wsn = finished()
    wsn.begin_task("new")
    wsn.use_task(1)
    before = wsn(X)
    assert wsn.infer_task(X).entropy.shape == (6, 3)
    assert torch.equal(wsn(X), before)
    wsn.use_task(None)
    assert wsn.current_task == "new"
    wsn.verify()


class Certain(nn.Module):
    """Gives all of the probability to one class, as task 0; NaN as task 1; and as task 2 nearly all."""

    row_wise = True

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.heads = FastSubnetLinear(4, 4, density=0.5), TaskHeads(4, 3)
        self.scale = 0.0

    def forward(self, x: Tensor) -> Tensor:
        y = self.heads(self.layer(x))
        outputs = [[0.0, -torch.inf, -torch.inf], [torch.nan, 0.0, 0.0], [0.0, -9.0, -9.0]]
        active = self.heads.active
        return y * 0 + torch.tensor(outputs[active if isinstance(active, int) else 0])


def test_certainty_has_no_entropy_and_nan_is_no_certainty() -> None:
    wsn = WSN(Certain())
    for task in range(3):
        wsn.begin_task(task)
        wsn.end_task()
    found = wsn.eval().infer_task(torch.ones(2, 4), one_pass=False)
    assert found.entropy[:, 0].tolist() == [0, 0] and found.entropy[:, 1].isnan().all()
    assert found.task == 0
    assert wsn.infer_task(torch.ones(2, 4), tasks=[1, 2], one_pass=False).task == 2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: finished(()).infer_task(X), "needs finished tasks, and there is none"),
        (lambda: finished().infer_task(X, tasks=["b"]), "'b'"),
        (lambda: finished().infer_task(X[:0]), "at least one"),
        (lambda: one_output().infer_task(X), r"at least two classes, got outputs of the shape \[6, 1\]"),
    ],
)
def test_what_cannot_be_inferred_is_refused(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()  # type: ignore[operator]


def one_output() -> WSN:
    wsn = WSN(nn.Sequential(FastSubnetLinear(36, 4, density=0.5), TaskHeads(4, 1)))
    wsn.begin_task(0)
    wsn.end_task()
    return wsn
