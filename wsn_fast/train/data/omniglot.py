"""Omniglot from its zip archives as published, with the images and the rotations of the paper's Omniglot Rotation.

A character has 20 drawings of 105 x 105 pixels. Each is scaled to 32 x 32 and turned by 0, 90, 180 and 270 degrees,
which gives 80 images of one class. A quarter of them, chosen at random, is for testing. As in the paper's program a
drawing may be in both parts, turned differently.
"""

from __future__ import annotations

import io
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from wsn_fast.train.data.dataset import Dataset
from wsn_fast.train.data.decoding import decode
from wsn_fast.train.data.files import DataError
from wsn_fast.train.data.loading import Shows, shows_nothing

_ARCHIVES = ("images_background.zip", "images_background_small1.zip", "images_background_small2.zip",
             "images_evaluation.zip")  # fmt: skip
_MEMBER = re.compile(r"[^/]+/(?P<alphabet>[^/]+)/(?P<character>character\d+)/[^/]+\.png")
_LARGEST = 1 << 16  # bytes of one image; the published ones have some hundred
_SIDE = 32


def load_omniglot(root: Path, shows: Shows = shows_nothing) -> Dataset:
    """The dataset ``omniglot`` from the archives in ``root``. Classes are characters, in the order of archives,
    alphabets and characters. An alphabet that two archives hold counts once."""
    archives = [root / name for name in _ARCHIVES if (root / name).is_file()]
    if not archives:
        raise DataError(f"{root}: found none of {', '.join(_ARCHIVES)}")
    known: set[str] = set()
    images: list[Tensor] = []
    for archive in archives:
        drawings = _drawings(archive, known, shows)
        known |= {alphabet for alphabet, _ in drawings}
        images += map(torch.stack, drawings.values())
    if not images:
        raise DataError(f"{', '.join(map(str, archives))}: no images ALPHABET/characterNN/*.png in the archives")
    train, test = zip(*map(_divided, images), strict=True)
    return Dataset("omniglot", *_labelled(train), *_labelled(test), len(images))


def _drawings(archive: Path, without: set[str], shows: Shows) -> dict[tuple[str, str], list[Tensor]]:
    """By alphabet and character: the drawings uint8 [1, 32, 32] of an archive, but for some alphabets."""
    found: dict[tuple[str, str], list[Tensor]] = {}
    for name, content in _members(archive, without, shows):
        match = _MEMBER.fullmatch(name)
        assert match is not None
        pixels = decode(io.BytesIO(content), f"{archive}:{name}", "L", (_SIDE, _SIDE))
        found.setdefault((match["alphabet"], match["character"]), []).append(torch.from_numpy(pixels)[None])
    return found


def _members(archive: Path, without: set[str], shows: Shows) -> Iterator[tuple[str, bytes]]:
    """The names and contents of the images in an archive, sorted by name."""
    try:
        with zipfile.ZipFile(archive) as opened:
            members = sorted(opened.infolist(), key=lambda member: member.filename)
            for member in shows(members, len(members), f"reading {archive.name}"):
                match = _MEMBER.fullmatch(member.filename)
                if match is None or match["alphabet"] in without:
                    continue
                with opened.open(member) as file:
                    content = file.read(_LARGEST + 1)
                if len(content) > _LARGEST:
                    raise DataError(f"{archive}:{member.filename}: the image has more than {_LARGEST} bytes")
                yield member.filename, content
    except DataError:
        raise
    except Exception as error:  # zipfile raises many kinds for damaged files
        raise DataError(f"{archive}: damaged archive ({type(error).__name__}: {error})") from error


def _divided(drawings: Tensor) -> tuple[Tensor, Tensor]:
    """The images of one character for training and for testing, from its drawings uint8 [N, 1, 32, 32]."""
    images = torch.cat([torch.rot90(drawings, turns, (2, 3)) for turns in range(4)])
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    train, test = order.split([len(images) - len(images) // 4, len(images) // 4])
    return images[train], images[test]


def _labelled(images: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """The images of all classes, and their labels."""
    return torch.cat(images), torch.arange(len(images)).repeat_interleave(torch.tensor([len(part) for part in images]))
