"""Augmentation: every image is a crop of its own, in some of them mirrored, and nothing but the numbers decides."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

from wsn_fast import WSN
from wsn_fast.train.config import resolve
from wsn_fast.train.report import Console
from wsn_fast.train.run import Run
from wsn_fast.train.samples import Epoch
from wsn_fast.train.samples.augmentation import BORDER, Augmentation


def images(count: int, height: int = 7, width: int = 5) -> Tensor:
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(0))


def crops(image: Tensor) -> list[tuple[int, int, bool, Tensor]]:
    """All results that are possible for an image [C, H, W]."""
    height, width = image.shape[1:]
    bordered, found = pad(image, (BORDER,) * 4), []
    for top in range(2 * BORDER + 1):
        for left in range(2 * BORDER + 1):
            crop = bordered[:, top : top + height, left : left + width]
            found += [(top, left, False, crop), (top, left, True, crop.flip(2))]
    return found


def drawn(x: Tensor, augmented: Tensor) -> list[tuple[int, int, bool]]:
    """What was drawn for each image."""
    return [
        next((top, left, mirrored) for top, left, mirrored, crop in crops(image) if torch.equal(crop, result))
        for image, result in zip(x, augmented, strict=True)
    ]


def test_each_image_is_a_crop_of_its_own() -> None:
    x = images(200)
    draws = drawn(x, Augmentation(Epoch(1, 2, 3))(x, 4))
    assert {top for top, _, _ in draws} == {left for _, left, _ in draws} == {*range(2 * BORDER + 1)}
    assert 70 < sum(mirrored for _, _, mirrored in draws) < 130
    assert len({*draws}) > 60


def test_shape_dtype_and_the_global_generator_stay() -> None:
    before = torch.get_rng_state()
    x = images(4).half()
    result = Augmentation(Epoch(0, 0, 0))(x, 0)
    assert result.shape == x.shape and result.dtype == x.dtype and result.is_contiguous()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("other", [(2, 2, 3, 4), (1, 3, 3, 4), (1, 2, 4, 4), (1, 2, 3, 5)])
def test_every_number_matters_and_the_same_ones_draw_the_same(other: tuple[int, int, int, int]) -> None:
    x = images(20)
    first = Augmentation(Epoch(1, 2, 3))(x, 4)
    assert torch.equal(first, Augmentation(Epoch(1, 2, 3))(x, 4))
    assert not torch.equal(first, Augmentation(Epoch(*other[:3]))(x, other[3]))


def test_parts_of_a_batch_are_drawn_as_the_whole_one() -> None:
    x, augment = images(10), Augmentation(Epoch(1, 2, 3))
    whole = augment(x, 0)
    for part in (slice(0, 4), slice(4, 7), slice(7, 10)):
        assert torch.equal(augment(x[part], 0, part, 10), whole[part])


@pytest.mark.parametrize("split", [False, True])
def test_a_run_trains_on_augmented_images(split: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the batch, however it is cut, and never those that are evaluated."""
    seen: list[Tensor] = []
    forward = WSN.forward

    def watched(self: WSN, x: Tensor) -> Tensor:
        if self.training and split and len(x) > 70:
            raise torch.OutOfMemoryError("out of memory")
        if self.training:
            seen.append(x)
        return forward(self, x)

    monkeypatch.setattr(WSN, "forward", watched)
    settings = resolve(tasks=1, epochs=2, batch_size=128, augment="crops", device="cpu", out=str(tmp_path / "run"))
    run = Run.start(settings, Console(quiet=True))
    x = run.stream[0].train_x
    run.finish()
    expected = []
    for epoch in range(2):
        rows = Epoch(settings.seed, 0, epoch).order(len(x)).split(128)
        expected += [Augmentation(Epoch(settings.seed, 0, epoch))(x[part], number) for number, part in enumerate(rows)]
    assert torch.equal(torch.cat(seen), torch.cat(expected))
