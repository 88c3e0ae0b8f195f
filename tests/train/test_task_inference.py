"""``benchmarks.task_inference``: how often the task of a run's test images is found."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from benchmarks import task_inference
from wsn_fast.train.report import Console
from wsn_fast.train.run import Run


def test_the_tasks_of_a_run_are_found(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert task_inference.main([str(copy)]) == 0
    printed = capsys.readouterr().out
    rows = re.findall(r"^\| (\d+) \| ([\d.]+) % \| ([\d.]+) % \| ([\d.]+) % \|$", printed, re.MULTILINE)
    assert [int(row[0]) for row in rows] == [1, 10, 100]
    found, accuracy, oracle = ([float(row[i]) for row in rows] for i in (1, 2, 3))
    assert 50 < found[0] < found[1] <= found[2] == 100
    assert accuracy[0] < accuracy[2] == oracle[0] == oracle[2] > 40
    assert "2 tasks. Its time by that of a forward pass of one known task" in printed


def test_a_row_of_classes_of_its_own_needs_the_right_task(copy: Path) -> None:
    run = Run.resume(copy, Console(quiet=True))
    wsn = run.wsn.eval()
    x, y = run.stream.test_data(0)
    shared, own = (task_inference.measure(wsn, 0, x, y, (1,), own_classes) for own_classes in (False, True))
    assert own.tasks == shared.tasks and own.oracle == shared.oracle
    assert own.accuracy[1] < shared.accuracy[1]
    with torch.no_grad(), wsn.use_task(0):
        right = wsn(x).argmax(1) == y
    found = torch.tensor([task == 0 for task in wsn.infer_task(x).rows])
    assert own.accuracy[1] == pytest.approx(100 * float((right & found).float().mean()))


def test_a_run_that_is_not_finished_is_refused(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run.resume(copy, Console(quiet=True))
    run.wsn.remove_task(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(task_inference.Run, "resume", lambda *_: run)
        with pytest.raises(SystemExit):
            task_inference.main([str(copy)])
    assert "1 of 2 tasks are finished" in capsys.readouterr().err
