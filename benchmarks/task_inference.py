"""How often does ``WSN.infer_task`` find the task of a test image, and what does it cost?

    wsn-fast train permuted --data mnist --data-dir mnist/ --tasks 10 --out RUN
    python -m benchmarks.task_inference RUN

It prints a Markdown table of a finished run: the share of batches of one task whose task was found, and the accuracy
with the tasks that were found beside that with the true ones (an oracle).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor

from wsn_fast import WSN
from wsn_fast.train.report import Console
from wsn_fast.train.run import Run

BATCHES = (1, 10, 100)
ROUNDS = 5


class Found(NamedTuple):
    """What was found for the test data of one task, in percent.

    Attributes:
        tasks: by the size of a batch, the share of batches whose task was found.
        accuracy: the same, of rows that were classified rightly as the task that was found. Where tasks have classes of
            their own, the task must be right, too.
        oracle: the accuracy as the true task.
    """

    tasks: dict[int, float]
    accuracy: dict[int, float]
    oracle: float


def measure(wsn: WSN, task: int, x: Tensor, y: Tensor, batches: Sequence[int], own_classes: bool) -> Found:
    """Infer the task of these test data of ``task``, in batches of each size. What is over is left out."""
    size = len(x) // max(batches) * max(batches)
    parts = x[:size].split(max(batches))
    entropy = torch.cat([wsn.infer_task(part).entropy for part in parts])
    right = torch.stack([_right(wsn, one, parts, y[:size]) for one in wsn.tasks], 1)  # [B, T]
    true = wsn.tasks.index(task)
    tasks, accuracy = {}, {}
    for batch in batches:
        found = entropy.view(-1, batch, len(wsn.tasks)).mean(1).argmin(1)
        tasks[batch] = _percent(found == true)
        rows = found.repeat_interleave(batch)
        accuracy[batch] = _percent(right.gather(1, rows[:, None])[:, 0] & ((rows == true) | (not own_classes)))
    return Found(tasks, accuracy, _percent(right[:, true]))


def _right(wsn: WSN, task: object, parts: Sequence[Tensor], y: Tensor) -> Tensor:
    with torch.no_grad(), wsn.use_task(task):  # type: ignore[arg-type]
        return torch.cat([wsn(part).argmax(1) for part in parts]) == y


def _percent(hits: Tensor) -> float:
    return 100 * float(hits.float().mean())


def cost(wsn: WSN, x: Tensor) -> float:
    """The time of ``infer_task`` over that of a forward pass of one task: the median of some rounds in turn."""

    def oracle() -> None:
        with torch.no_grad(), wsn.use_task(wsn.tasks[0]):
            wsn(x)

    def seconds(call: Callable[[], object]) -> float:
        begin = time.perf_counter()
        call()
        return time.perf_counter() - begin

    ratios = [seconds(lambda: wsn.infer_task(x)) / seconds(oracle) for _ in range(ROUNDS + 1)]
    return median(ratios[1:])


def table(found: Sequence[Found], batches: Sequence[int]) -> str:
    """The means over the tasks, in Markdown."""

    def mean(values: Sequence[float]) -> str:
        return f"{sum(values) / len(values):.2f}"

    lines = ["| rows of a batch | task found | accuracy as that task | accuracy of the oracle |", "|---|---|---|---|"]
    for batch in batches:
        tasks, accuracy = [f.tasks[batch] for f in found], [f.accuracy[batch] for f in found]
        lines.append(f"| {batch} | {mean(tasks)} % | {mean(accuracy)} % | {mean([f.oracle for f in found])} % |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table of a run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the folder of a finished run of wsn-fast train")
    options = parser.parse_args(arguments)
    run = Run.resume(options.run, Console(quiet=True))
    wsn = run.wsn.eval()
    if len(wsn.tasks) < max(2, len(run.stream)):
        parser.error(
            f"{options.run}: {len(wsn.tasks)} of {len(run.stream)} tasks are finished; two, and all, are needed"
        )
    data = [[tensor.to(run.device) for tensor in run.stream.test_data(task)] for task in run.stream.task_ids]
    least = min(len(x) for x, _ in data)
    batches = [batch for batch in BATCHES if batch <= least]
    own_classes = run.settings.stream == "split"
    found = [measure(wsn, task, *data[i], batches, own_classes) for i, task in enumerate(run.stream.task_ids)]
    print(table(found, batches))
    times = ", ".join(f"{cost(wsn, data[0][0][:batch]):.1f} for {batch} rows" for batch in batches)
    print(f"\n{len(wsn.tasks)} tasks. Its time by that of a forward pass of one known task: {times}.")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
