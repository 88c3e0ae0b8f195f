"""How often does ``WSN.infer_task`` find the task of test data, and what does it cost?

    wsn-fast train permuted --data mnist --data-dir mnist/ --tasks 10 --out RUN
    python -m benchmarks.task_inference RUN
    python -m benchmarks.task_inference RUN --supsup 100
    python -m benchmarks.task_inference --convnet

It prints a Markdown table of a finished run, for each method and size of a batch: the share of batches of one task
whose task was found, the accuracy with the tasks that were found beside that with the true ones (an oracle), and the
CPU time by that of a forward pass of one known task. With --supsup it trains SupSup on the tasks of the run, and
measures that; its network has so many outputs. With --convnet it prints the time alone, for ten tasks of a network with
three convolutions and 32 images of 32 x 32 pixels.
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor, nn

from wsn_fast import WSN
from wsn_fast.presets import supsup
from wsn_fast.train.report import Console
from wsn_fast.train.run import Run
from wsn_fast.train.streams import TaskStream

METHODS = ("entropy", "one-shot", "binary")
BATCHES = (1, 10, 100)
ROUNDS = 15
STEPS, BATCH_SIZE = 400, 128


class Found(NamedTuple):
    """What a method found for the test data of one task, in percent.

    Attributes:
        tasks: the share of batches whose task was found.
        accuracy: the share of rows that were classified rightly as the task that was found. Where tasks have classes of
            their own, the task must be right, too.
        oracle: the accuracy as the true task, of the same rows.
    """

    tasks: float
    accuracy: float
    oracle: float


class Data(NamedTuple):
    """The test data of one task, and which rows are classified rightly as each task, bool [B, T]."""

    task: int
    x: Tensor
    right: Tensor


def test_data(wsn: WSN, task: int, x: Tensor, y: Tensor) -> Data:
    """Classify the test data as every task."""
    columns = []
    for one in wsn.tasks:
        with torch.no_grad(), wsn.use_task(one):
            columns.append(torch.cat([wsn(part).argmax(1) for part in x.split(1000)]) == y)
    return Data(task, x, torch.stack(columns, 1))


def measure(wsn: WSN, data: Data, method: str, batch: int, most: int, own_classes: bool) -> Found:
    """Infer the task of test data in batches of one size, at most ``most`` of them. What is over is left out."""
    count = min(len(data.x) // batch, most)
    x, right, true = data.x[: count * batch], data.right[: count * batch], wsn.tasks.index(data.task)
    if method == "entropy":
        entropies = [wsn.infer_task(part).entropy for part in x.split(1000)]
        found = torch.cat([e for e in entropies if e is not None]).view(count, batch, -1).mean(1).argmin(1)
    else:
        tasks = [wsn.infer_task(part, method=method).task for part in x.split(batch)]
        found = torch.tensor([*map(wsn.tasks.index, tasks)], device=x.device)
    rows = found.repeat_interleave(batch)
    hits = right.gather(1, rows[:, None])[:, 0] & ((rows == true) | (not own_classes))
    return Found(_percent(found == true), _percent(hits), _percent(right[:, true]))


def _percent(hits: Tensor) -> float:
    return 100 * float(hits.float().mean())


def cost(wsn: WSN, x: Tensor, method: str) -> float:
    """The CPU time of ``infer_task`` over that of a forward pass of one task: the median of some rounds in turn."""

    def oracle() -> None:
        with torch.no_grad(), wsn.use_task(wsn.tasks[0]):
            wsn(x)

    def seconds(call: Callable[[], object]) -> float:
        begin = time.process_time()
        call()
        return time.process_time() - begin

    ratios = [seconds(lambda: wsn.infer_task(x, method=method)) / seconds(oracle) for _ in range(ROUNDS + 1)]
    return median(ratios[1:])


def trained_supsup(stream: TaskStream, outputs: int) -> WSN:
    """SupSup's LeNet-300-100 without heads, trained for ``STEPS`` or more, in whole epochs of every task.

    It has as many ``outputs`` as the tasks have classes, or more: SupSup adds some that no class needs, which are
    improbable for the inputs of a task that was trained.
    """
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Flatten()]
    widths = (torch.Size(stream.input_shape).numel(), 300, 100, max(outputs, *stream.classes.values()))
    for pair in itertools.pairwise(widths):
        layers += [nn.Linear(*pair), nn.ReLU()]
    wsn = supsup(nn.Sequential(*layers[:-1]), 0.5)
    for data in stream:
        wsn.begin_task(data.task)
        optimizer = wsn.guard(torch.optim.Adam(wsn.parameters(), lr=1e-3))
        wsn.train()
        for _ in range(math.ceil(STEPS * BATCH_SIZE / len(data.train_x))):
            for rows in torch.randperm(len(data.train_x)).split(BATCH_SIZE):
                optimizer.zero_grad()
                nn.functional.cross_entropy(wsn(data.train_x[rows]), data.train_y[rows]).backward()
                optimizer.step()
        wsn.end_task()
    return wsn


def convnet_with_tasks(tasks: int = 10) -> WSN:
    """A network with three convolutions and masks that were not trained, which changes nothing about the time."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for widths in itertools.pairwise((3, 32, 64, 128)):
        layers += [nn.Conv2d(*widths, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    layers[-1] = nn.AdaptiveAvgPool2d(1)
    wsn = supsup(nn.Sequential(*layers, nn.Flatten(), nn.Linear(128, 100)))
    for task in range(tasks):
        wsn.begin_task(task)
        wsn.end_task()
    return wsn.eval()


def row(wsn: WSN, data: Sequence[Data], method: str, batch: int, most: int, own_classes: bool) -> str:
    """A row of the table: the means over the tasks."""
    found = [measure(wsn, one, method, batch, most, own_classes) for one in data]
    means = [sum(column) / len(found) for column in zip(*found, strict=True)]
    shown = " | ".join(f"{mean:.2f} %" for mean in means)
    return f"| {method} | {batch} | {shown} | {cost(wsn, data[0].x[:batch], method):.1f} |"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table of a run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, nargs="?", help="the folder of a finished run of wsn-fast train")
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS, help="what to measure")
    parser.add_argument("--most", type=int, default=10_000, help="the most batches of each size and task")
    parser.add_argument("--supsup", type=int, metavar="OUTPUTS", help="train SupSup on the tasks of the run instead")
    parser.add_argument(
        "--convnet", action="store_true", help="print the time of each method for a convnet, and no more"
    )
    options = parser.parse_args(arguments)
    if options.convnet:
        wsn, x = convnet_with_tasks(), torch.randn(32, 3, 32, 32)
        print("\n".join(f"{method}: {cost(wsn, x, method):.1f}" for method in options.methods))
        return 0
    if options.run is None:
        parser.error("run or --convnet is needed")
    run = Run.resume(options.run, Console(quiet=True))
    if len(run.wsn.tasks) < max(2, len(run.stream)):
        parser.error(
            f"{options.run}: {len(run.wsn.tasks)} of {len(run.stream)} tasks are finished; two, and all, are needed"
        )
    wsn = (run.wsn if options.supsup is None else trained_supsup(run.stream, options.supsup)).eval()
    device = next(wsn.parameters()).device
    own_classes = run.settings.stream not in ("permuted", "rotated")
    tests = [(task, *run.stream.test_data(task)) for task in run.stream.task_ids]
    data = [test_data(wsn, task, x.to(device), y.to(device)) for task, x, y in tests]
    print("| method | rows of a batch | task found | accuracy as that task | accuracy of the oracle | time |")
    print("|---|---|---|---|---|---|")
    for method in options.methods:
        for batch in (batch for batch in BATCHES if all(batch <= len(one.x) for one in data)):
            print(row(wsn, data, method, batch, options.most, own_classes), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
