"""How do WSN programs that people can install compare? CLArena's beside this library inside CLArena: accuracy, time.

    pip install "wsn-fast[clarena]"
    python -m benchmarks.peer mnist/ --out peers.json

All programs train the same MLP on the same permutations of MNIST in the same order of batches, by Lightning's Trainer.
Each run is a process of its own, and the programs take turns. It prints a Markdown table.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from wsn_fast.train.data import DataError, Dataset, load

from .provenance import provenance

PROGRAMS = {
    "CLArena": "CLArena's `WSN` on its `WSNMaskMLP`, with the gate mended",
    "on our backbone": "CLArena's `WSN` on our `FastSubnetMLP`",
    "ours": "our `FastWSN` on our `FastSubnetMLP`",
    "dense": "CLArena's `Finetuning` on its `CLMLP`: no masks, and it forgets",
}
SETTINGS: Mapping[str, Any] = {
    "tasks": 3, "epochs": 1, "batch": 64, "width": 100, "density": 0.3, "lr": 1e-3, "threads": 1,
}  # fmt: skip
SEEDS = (1, 2, 3)


def make(program: str, inputs: int, settings: Mapping[str, Any]) -> Any:
    """The algorithm of a program, with a backbone of two layers."""
    from clarena.backbones import CLMLP, WSNMaskMLP
    from clarena.backbones.base import PercentileLayerParameterMaskingByScore as Gate
    from clarena.cl_algorithms import WSN, Finetuning
    from clarena.heads import HeadsTIL

    from wsn_fast.integrations.clarena import FastSubnetMLP, FastWSN

    # The published backward has no return, so that nothing can be trained.
    Gate.backward = staticmethod(lambda ctx, grad: (grad, None))
    algorithm, backbone = {
        "CLArena": (WSN, WSNMaskMLP),
        "on our backbone": (WSN, FastSubnetMLP),
        "ours": (FastWSN, FastSubnetMLP),
        "dense": (Finetuning, CLMLP),
    }[program]
    width = settings["width"]
    density = {} if program == "dense" else {"mask_percentage": settings["density"]}
    return algorithm(backbone(inputs, [width], width), HeadsTIL(width), **density)


def tasks_of(data: Dataset, seed: int, settings: Mapping[str, Any]) -> Iterator[tuple[DataLoader[Any], Tensor, Tensor]]:
    """Each task: its batches to train on, and its test images and labels."""
    (train_x, test_x) = (x.flatten(1).float() / x.max() for x in (data.train_x, data.test_x))
    for task in range(settings["tasks"]):
        generator = torch.Generator().manual_seed(1000 * seed + task)
        order = torch.randperm(train_x.shape[1], generator=generator)
        train = TensorDataset(train_x[:, order], data.train_y)
        yield DataLoader(train, settings["batch"], shuffle=True, generator=generator), test_x[:, order], data.test_y


def run(program: str, data: Dataset, seed: int, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Train all tasks with one program.

    Returns:
        ``acc`` and ``bwt`` in percent, and the time of all fits: ``cpu_s`` of the process, and ``elapsed_s``.
    """
    from lightning.pytorch import Trainer

    torch.set_num_threads(settings["threads"])
    torch.manual_seed(seed)
    algorithm = make(program, data.train_x[0].numel(), settings)
    tests, then, cpu, elapsed = [], [], 0.0, 0.0
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    for task, (batches, x, y) in enumerate(tasks_of(data, seed, settings), 1):
        trainer = Trainer(max_epochs=settings["epochs"], accelerator="cpu", devices=1, **quiet)
        begin = time.process_time(), time.perf_counter()
        algorithm.setup_task_id(task, data.classes, partial(torch.optim.Adam, lr=settings["lr"]), None)
        trainer.fit(algorithm.train(), batches)
        cpu, elapsed = cpu + time.process_time() - begin[0], elapsed + time.perf_counter() - begin[1]
        tests.append((x, y))
        then.append(accuracy(algorithm, task, x, y))
    at_end = [accuracy(algorithm, task, x, y) for task, (x, y) in enumerate(tests, 1)]
    bwt = mean(b - a for a, b in zip(then[:-1], at_end[:-1], strict=True))
    return {"program": program, "seed": seed, "acc": mean(at_end), "bwt": bwt, "cpu_s": cpu, "elapsed_s": elapsed}


@torch.no_grad()
def accuracy(algorithm: Any, task: int, x: Tensor, y: Tensor) -> float:
    """The test accuracy of a task in percent."""
    logits = algorithm.eval().forward(x, stage="test", task_id=task)
    logits = logits[0] if isinstance(logits, tuple) else logits
    return 100 * float((logits.argmax(1) == y).float().mean())


def table(runs: Sequence[Mapping[str, Any]]) -> str:
    """The means over the seeds, in Markdown. In brackets are the single runs, in the order of the seeds."""

    def cell(program: str, key: str, digits: int) -> str:
        values = [one[key] for one in runs if one["program"] == program]
        each = ", ".join(f"{value:.{digits}f}" for value in values)
        return f"{mean(values):.{digits}f} ({each})"

    def seconds(program: str) -> float:
        return mean(one["cpu_s"] for one in runs if one["program"] == program)

    lines = [
        "| program | ACC in % | BWT in % | CPU seconds | elapsed seconds | CPU time over CLArena's |",
        "|---|---|---|---|---|---|",
    ]
    for program, what in PROGRAMS.items():
        share = f"{seconds(program) / seconds('CLArena'):.2f}"
        cells = [cell(program, "acc", 2), cell(program, "bwt", 2), cell(program, "cpu_s", 1)]
        lines.append(f"| {' | '.join([what, *cells, cell(program, 'elapsed_s', 1), share])} |")
    return "\n".join(lines)


def in_process(program: str, seed: int, folder: Path) -> dict[str, Any]:
    """:func:`run` in a process of its own."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.peer", str(folder), "--run", program, str(seed)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="has the four idx files of MNIST")
    parser.add_argument("--out", type=Path, help="where to write all runs as JSON")
    parser.add_argument("--run", nargs=2, metavar=("PROGRAM", "SEED"), help="train with one program, and print JSON")
    options = parser.parse_args(arguments)
    if options.run:
        with redirect_stdout(sys.stderr):  # CLArena prints masks
            result = run(options.run[0], load("mnist", options.folder), int(options.run[1]), SETTINGS)
        print(json.dumps(result))
        return 0
    try:
        load("mnist", options.folder)
    except DataError as error:
        parser.error(str(error))
    runs = [in_process(program, seed, options.folder) for seed in SEEDS for program in PROGRAMS]
    print(table(runs))
    if options.out:
        versions = {package: version(package) for package in ("clarena", "lightning")}
        facts = {**provenance(torch.device("cpu")), **versions}
        content = {"facts": facts, "settings": dict(SETTINGS), "runs": runs}
        options.out.write_text(json.dumps(content, indent=1) + "\n", "utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
