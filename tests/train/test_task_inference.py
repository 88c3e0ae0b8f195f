"""``benchmarks.task_inference``: how often the task of a run's test images is found."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from benchmarks import task_inference
from wsn_fast.train.report import Console
from wsn_fast.train.run import Run


def rows(printed: str) -> list[list[float]]:
    """The rows of the table, the methods by their place in ``METHODS``."""
    found = re.findall(
        r"^\| ([\w-]+) \| (\d+) \| ([\d.]+) % \| ([\d.]+) % \| ([\d.]+) % \| ([\d.]+) \|$", printed, re.M
    )
    return [[task_inference.METHODS.index(row[0]), *map(float, row[1:])] for row in found]


def test_the_tasks_of_a_run_are_found(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert task_inference.main([str(copy), "--methods", "entropy"]) == 0
    table = rows(capsys.readouterr().out)
    assert [row[:2] for row in table] == [[0, 1], [0, 10], [0, 100]]
    found, accuracy, oracle = ([row[i] for row in table] for i in (2, 3, 4))
    assert 50 < found[0] < found[1] <= found[2] == 100
    # The last rows of the test data make no whole batch.
    assert accuracy[0] < oracle[0] and accuracy[2] == oracle[2] > 40
    assert all(row[5] > 0 for row in table)


def test_each_method_has_a_row_for_each_size(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert task_inference.main([str(copy), "--most", "2"]) == 0
    table = rows(capsys.readouterr().out)
    assert [row[:2] for row in table] == [[method, size] for method in range(3) for size in task_inference.BATCHES]


def test_a_row_of_classes_of_its_own_needs_the_right_task(copy: Path) -> None:
    run = Run.resume(copy, Console(quiet=True))
    wsn = run.wsn.eval()
    x, y = run.stream.test_data(0)
    data = task_inference.test_data(wsn, 0, x, y)
    shared, own = (task_inference.measure(wsn, data, "entropy", 1, 10_000, classes) for classes in (False, True))
    assert own.tasks == shared.tasks and own.oracle == shared.oracle
    assert own.accuracy < shared.accuracy
    with torch.no_grad(), wsn.use_task(0):
        right = wsn(x).argmax(1) == y
    found = torch.tensor([task == 0 for task in wsn.infer_task(x).rows])
    assert own.accuracy == pytest.approx(100 * float((right & found).float().mean()))


@pytest.mark.parametrize("method", ["one-shot", "binary"])
def test_a_method_finds_the_task_of_each_batch(copy: Path, method: str) -> None:
    run = Run.resume(copy, Console(quiet=True))
    wsn = run.wsn.eval()
    x, y = run.stream.test_data(1)
    found = task_inference.measure(wsn, task_inference.test_data(wsn, 1, x, y), method, 50, 4, False)
    tasks = [wsn.infer_task(part, method=method).task for part in x[:200].split(50)]
    assert found.tasks == 100 * tasks.count(1) / 4


def test_a_run_that_is_not_finished_is_refused(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run.resume(copy, Console(quiet=True))
    run.wsn.remove_task(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(task_inference.Run, "resume", lambda *_: run)
        with pytest.raises(SystemExit):
            task_inference.main([str(copy)])
    assert "1 of 2 tasks are finished" in capsys.readouterr().err
