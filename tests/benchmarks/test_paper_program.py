"""``benchmarks.paper_program``: its masks, its union, and what each of its options changes."""

from __future__ import annotations

import functools
import re
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks import paper_program
from wsn_fast import WSN
from wsn_fast.reference import specification
from wsn_fast.train import config, data
from wsn_fast.train.data import Dataset
from wsn_fast.train.samples import SamplesInMemory
from wsn_fast.train.streams import TaskStream

DENSITY = 0.2
SIDE = 8  # of the images, which are smaller than those of CIFAR-100


@pytest.fixture
def archive(monkeypatch: pytest.MonkeyPatch) -> Dataset:
    """Noise in the place of CIFAR-100: four images of each class to train on and one to test on, of which five classes
    are a superclass."""
    generator, parts = torch.Generator().manual_seed(0), list[Tensor]()
    for each in (4, 1):
        images = torch.randint(256, (100 * each, 3, SIDE, SIDE), dtype=torch.uint8, generator=generator)
        parts += [images, torch.arange(100).repeat(each)]
    made = Dataset("cifar100", *parts, 100, torch.arange(100) // 5)
    monkeypatch.setattr(data, "load", lambda name, folder: made)
    monkeypatch.setattr(config, "resolve", functools.partial(config.resolve, epochs=4, batch_size=8))
    return made


def mask_of(packed: Tensor, shape: torch.Size) -> Tensor:
    bits = np.unpackbits(packed.numpy(), bitorder="little")[: shape.numel()]
    return torch.from_numpy(bits).bool().view(shape)


# --- masks
@pytest.mark.parametrize("stale", [False, True])
def test_a_task_gets_the_masks_of_the_best_epoch_or_of_the_last_one(
    stale: bool, archive: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config.resolve(stream="superclass", data="cifar100", tasks=2, density=DENSITY, threads=1, device="cpu")
    stream = TaskStream("superclass", archive, 2, 1, val_fraction=0.05, class_order="given")
    wsn = paper_program.network(settings, stream, 5)
    train_epoch, epochs = paper_program.train_epoch, list[dict[str, tuple[Tensor, Tensor]]]()

    def noted(*arguments: object) -> float:
        loss = train_epoch(*arguments)  # type: ignore[arg-type]
        epochs.append({name: (gate.param.detach().clone(), gate.score.detach().clone()) for name, gate in wsn.gated()})
        return loss

    losses = iter([2.0, 1.0, 3.0, 4.0])
    monkeypatch.setattr(paper_program, "train_epoch", noted)
    monkeypatch.setattr(paper_program, "evaluate", lambda *_: (next(losses), 0.0))
    assert paper_program.train_task(wsn, settings, 0, *stream.training(0), stale=stale) == (4, 2)
    differ = 0
    for name, gate in wsn.gated():
        weight, score = epochs[1][name]
        best, last = (specification.topc_mask(epochs[number][name][1], DENSITY) for number in (1, 3))
        differ += int((best != last).sum())
        assert torch.equal(mask_of(gate.masks[0], weight.shape), last if stale else best), name
        assert torch.equal(gate.param, weight) and torch.equal(gate.score, score), "those of the best epoch"
    assert differ > 0


def test_the_union_is_what_some_task_uses(
    archive: Dataset, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made, network = list[WSN](), paper_program.network

    def of_many_densities(*arguments: object) -> WSN:  # so that each layer counts
        wsn = network(*arguments)  # type: ignore[arg-type]
        for number, layer in enumerate(wsn.subnet_layers().values()):
            layer.density = 0.9 - 0.2 * number
        made.append(wsn)
        return wsn

    monkeypatch.setattr(paper_program, "network", of_many_densities)
    paper_program.main(["folder", "--tasks", "2"])
    said = re.findall(r"^\| (\d) \| 4 \| [1-4] \| [\d.]+ \| ([\d.]+) \|$", capsys.readouterr().out, re.MULTILINE)
    gates = [gate for _, gate in made[0].gated()]
    expected = []
    for count in (1, 2):
        masks = [[mask_of(row, gate.param.shape) for row in gate.masks[:count]] for gate in gates]
        unions = torch.cat([specification.union_masks(one).flatten() for one in masks])
        expected.append(f"{100 * unions.double().mean().item():.2f}")
    assert said == [("0", expected[0]), ("1", expected[1])]
    first, both = map(float, expected)
    assert 10 < first < both < min(100, 2 * first), "the tasks use some weights together, and some not"


# --- options
class Given(NamedTuple):
    """What a task is trained and tested with."""

    train: SamplesInMemory
    test: SamplesInMemory
    outputs: int
    stale: bool


def given_by(*options: str) -> list[Given]:
    """What two tasks are given."""
    seen, tests = list[tuple[SamplesInMemory, int, bool]](), list[SamplesInMemory]()

    def train_task(wsn: WSN, _: object, task: int, train: SamplesInMemory, __: object, *, stale: bool) -> object:
        wsn.begin_task(task)
        wsn.end_task()
        seen.append((train, wsn.model.head.head(task).out_features, stale))
        return 1, 1

    def evaluate(wsn: WSN, test: SamplesInMemory) -> tuple[float, float]:
        tests.append(test)
        return 0.0, 50.0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paper_program, "train_task", train_task)
        patch.setattr(paper_program, "evaluate", evaluate)
        paper_program.main(["folder", "--tasks", "2", *options])
    return [Given(train, test, outputs, stale) for (train, outputs, stale), test in zip(seen, tests, strict=True)]


def scrambled(images: Tensor) -> Tensor:
    """Pixel (row, column) of channel c is byte 3 * (SIDE * row + column) + c of an image."""
    channel, row, column = torch.meshgrid(torch.arange(3), torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    return images.flatten(1)[:, 3 * (SIDE * row + column) + channel]


def are_in(images: Tensor, raw: Tensor) -> bool:
    """Whether all images with pixels in [0, 1] are among the raw ones."""
    known = {image.numpy().tobytes() for image in raw}
    pixels = 255 * images
    whole = torch.allclose(pixels, pixels.round(), atol=1e-2)
    return whole and {image.numpy().tobytes() for image in pixels.round().to(torch.uint8)} <= known


def test_the_recipe_normalises_has_an_output_for_each_class_and_no_stale_masks(archive: Dataset) -> None:
    for task in given_by():
        assert abs(task.train.x.mean()) < 0.1 and abs(task.train.x.std() - 1) < 0.1
        assert (task.outputs, task.stale) == (5, False)
        assert {*task.train.y.tolist()} == {*task.test.y.tolist()} == {*range(5)}


def test_unit_scales_the_pixels(archive: Dataset) -> None:
    for task in given_by("--unit"):
        assert are_in(task.train.x, archive.train_x) and are_in(task.test.x, archive.test_x)


def test_scrambled_takes_channels_for_pixels(archive: Dataset) -> None:
    for task in given_by("--unit", "--scrambled"):
        assert are_in(task.train.x, scrambled(archive.train_x)) and are_in(task.test.x, scrambled(archive.test_x))


def test_more_outputs_give_each_class_its_own(archive: Dataset) -> None:
    first, second = given_by("--outputs", "100")
    assert first.outputs == second.outputs == 100
    assert {*first.train.y.tolist()} == {*first.test.y.tolist()} == {*range(5)}
    assert {*second.train.y.tolist()} == {*second.test.y.tolist()} == {*range(5, 10)}


def test_stale_reaches_the_training(archive: Dataset) -> None:
    assert [task.stale for task in given_by("--stale")] == [True, True]
