"""Why do the paper's program and this library differ on CIFAR-100 Superclass, in accuracy and in the union of masks?

    python -m benchmarks.paper_program CIFAR_FOLDER --density 0.1 --tasks 5
    python -m benchmarks.paper_program CIFAR_FOLDER --density 0.1 --tasks 5 --unit --scrambled --outputs 100 --stale

The second line does what the published program does with its data and masks: pixels are scaled to [0, 1] and not
normalised (--unit); it reads the archive's rows, which have a channel after the other, as if each pixel had its three
channels together (--scrambled); each head has 100 outputs (--outputs 100); and it stores the mask of a task's end,
while weights and scores go back to those of the best epoch (--stale; that program's mask is of the batch before the
last step, and ours of the scores after it). All else is the recipe of ``wsn-fast train superclass``. It prints, for
each task, the epochs, the test accuracy, and which share of all gated weights the tasks so far own.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from wsn_fast import WSN
from wsn_fast.continual.statistics import capacity
from wsn_fast.convert.to_subnet import convert
from wsn_fast.train import config, data, nets
from wsn_fast.train.loop import evaluate, make_optimizer, train_epoch
from wsn_fast.train.report import masks_of
from wsn_fast.train.samples import Epoch, SamplesInMemory
from wsn_fast.train.streams import TaskStream


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--density", type=float, default=0.1)
    parser.add_argument("--tasks", type=int, default=5)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--outputs", type=int, default=5)
    for name in ("unit", "scrambled", "stale"):
        parser.add_argument(f"--{name}", action="store_true")
    given = parser.parse_args(arguments)
    settings = config.resolve(
        stream="superclass", data="cifar100", density=given.density, seed=given.seed, tasks=given.tasks, threads=1,
        memory_format="channels_last", device="cpu",
    )  # fmt: skip
    dataset = data.load("cifar100", given.folder)
    if given.scrambled:
        dataset = replace(dataset, train_x=scrambled(dataset.train_x), test_x=scrambled(dataset.test_x))
    stream = TaskStream(
        "superclass", dataset, given.tasks, given.seed, val_fraction=settings.val_fraction, class_order="given"
    )
    wsn = network(settings, stream, given.outputs)
    print("| task | epochs | best | test accuracy | union |\n|---|---|---|---|---|", flush=True)
    accuracies = []
    for task in range(given.tasks):
        train, val, test = (
            of_program(part, stream, task, unit=given.unit, first=5 * task if given.outputs > 5 else 0)
            for part in (*stream.training(task), stream.test(task))
        )
        epochs, best = train_task(wsn, settings, task, train, val, stale=given.stale)
        with wsn.use_task(task):
            accuracies.append(evaluate(wsn, test)[1])
        masks = masks_of(wsn)
        union = 100 * capacity(list(masks.packed.values()), list(masks.sizes.values())).union_density
        print(f"| {task} | {epochs} | {best} | {accuracies[-1]:.1f} | {union:.2f} |", flush=True)
    print(f"| mean | | | {sum(accuracies) / len(accuracies):.2f} | |")


def scrambled(images: Tensor) -> Tensor:
    """Images uint8 [N, 3, 32, 32] whose bytes are taken for those of [N, 32, 32, 3]."""
    count, channels, height, width = images.shape
    return images.reshape(count, height, width, channels).permute(0, 3, 1, 2).contiguous()


def of_program(samples: SamplesInMemory, stream: TaskStream, task: int, *, unit: bool, first: int) -> SamplesInMemory:
    """The samples, in [0, 1] if ``unit``, with labels from ``first`` on."""
    x = (samples.x * stream.std[task] + stream.mean[task]) / 255 if unit else samples.x
    return SamplesInMemory(x, samples.y + first)


def network(settings: config.TrainConfig, stream: TaskStream, outputs: int) -> WSN:
    """The net of the settings, whose heads have so many outputs."""
    torch.set_num_threads(settings.threads)
    torch.manual_seed(settings.seed)
    dense = nets.build(settings.net, stream.input_shape, outputs)
    dense.memory_format = torch.channels_last
    heads = {"head": dict.fromkeys(stream.task_ids, outputs)}
    net = convert(dense, settings.density, rule=settings.rule, heads=heads, score_init=settings.score_init)
    return WSN(net, reinit_scores=settings.reinit_scores, score_init=settings.score_init, gates_ahead=True)


def train_task(
    wsn: WSN, settings: config.TrainConfig, task: int, train: SamplesInMemory, val: SamplesInMemory, *, stale: bool
) -> tuple[int, int]:
    """Train and end a task, with the learning rate and the best epoch of the recipe. Returns the number of epochs and
    the best one."""
    wsn.begin_task(task)
    optimizer = make_optimizer(wsn, settings)
    lr, epoch, best_loss, best_epoch, bad = settings.lr, 0, math.inf, 0, 0
    best = wsn.trainable_state()
    while epoch < settings.epochs and lr >= settings.lr_min:
        batches = train.epoch(settings.batch_size, Epoch(settings.seed, task, epoch))
        train_epoch(wsn, optimizer, batches, lambda: None)
        epoch += 1
        loss, _ = evaluate(wsn, val)
        if loss < best_loss:
            best, best_loss, best_epoch, bad = wsn.trainable_state(), loss, epoch, 0
            continue
        bad += 1
        if bad >= settings.lr_patience:
            lr, bad = lr / settings.lr_factor, 0
            for group in optimizer.param_groups:
                group["lr"] = lr
    last = wsn.trainable_state()
    scores = {name: last[name] for name in best if "score" in name}
    wsn.load_trainable_state({**best, **scores} if stale else best)
    wsn.end_task()
    if stale:  # the next task begins with the scores of the best epoch
        own = dict(wsn.model.named_parameters())
        with torch.no_grad():
            for name in scores:
                own[name].copy_(best[name])
    return epoch, best_epoch


if __name__ == "__main__":
    main()
