"""Omniglot's archives: classes, rotations and parts as the paper's program makes them, and every fault named."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from data_errors import error_of
from fuzz import damaged, fuzzed
from hypothesis import strategies as st
from seen_loading import Seen

from wsn_fast.train.data import DataError, Dataset, load

Image = pytest.importorskip("PIL.Image")


def drawing(column: int, row: int = 10) -> bytes:
    """A drawing of one black stroke on white, in black and white as published."""
    pixels = np.full((105, 105), 255, np.uint8)
    pixels[row : row + 8, column : column + 8] = 0
    file = io.BytesIO()
    Image.fromarray(pixels).convert("1").save(file, format="PNG")
    return file.getvalue()


def write(archive: Path, alphabets: dict[str, list[int]], drawings: int = 20) -> None:
    """An archive with the alphabets, and in each a character for each row that its strokes have."""
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr(f"{archive.stem}/", b"")
        file.writestr("__MACOSX/._images", b"?")
        for alphabet, rows in alphabets.items():
            for c in reversed(range(len(rows))):
                for n in range(drawings):
                    name = f"{archive.stem}/{alphabet}/character{c + 1:02}/{c:04}_{n + 1:02}.png"
                    file.writestr(name, drawing(4 * n, rows[c]))


def images_of(row: int) -> list[bytes]:
    """The 20 drawings of a character in the four rotations, sorted."""
    images = []
    for n in range(20):
        pixels = Image.open(io.BytesIO(drawing(4 * n, row))).convert("L").resize((32, 32), Image.Resampling.BICUBIC)
        images += [np.rot90(np.asarray(pixels), turns).tobytes() for turns in range(4)]
    return sorted(images)


def rows_of(found: Dataset, rows: list[int]) -> list[int]:
    """The row of each class; it must be one of ``rows``."""
    known = {tuple(images_of(row)): row for row in rows}
    x, y = torch.cat([found.train_x, found.test_x]), torch.cat([found.train_y, found.test_y])
    return [known[tuple(sorted(image.numpy().tobytes() for image in x[y == c]))] for c in range(found.classes)]


def test_a_character_is_a_class_with_four_rotations_of_its_drawings(tmp_path: Path) -> None:
    write(tmp_path / "images_background_small1.zip", {"Greek": [10, 40]})
    found = load("omniglot", tmp_path)
    assert found.train_x.shape == (120, 1, 32, 32) and found.test_x.shape == (40, 1, 32, 32) and found.classes == 2
    assert torch.bincount(found.train_y).tolist() == [60, 60] and torch.bincount(found.test_y).tolist() == [20, 20]
    assert rows_of(found, [10, 40]) == [10, 40]


def test_the_same_files_give_the_same_parts(tmp_path: Path) -> None:
    write(tmp_path / "images_evaluation.zip", {"Greek": [10, 30]})
    assert load("omniglot", tmp_path).fingerprint == load("omniglot", tmp_path).fingerprint


def test_characters_are_in_the_order_of_archives_alphabets_and_names(tmp_path: Path) -> None:
    write(tmp_path / "images_evaluation.zip", {"Atlantean": [90]})
    write(tmp_path / "images_background.zip", {"Greek": [70], "Balinese": [50, 10, 30]})
    assert rows_of(load("omniglot", tmp_path), [10, 30, 50, 70, 90]) == [50, 10, 30, 70, 90]


def test_an_alphabet_of_two_archives_counts_once(tmp_path: Path) -> None:
    write(tmp_path / "images_background_small1.zip", {"Greek": [10, 20], "Korean": [30]})
    write(tmp_path / "images_background_small2.zip", {"Greek": [60, 70], "Latin": [40]})
    assert rows_of(load("omniglot", tmp_path), [10, 20, 30, 40]) == [10, 20, 30, 40]


def test_faults_are_named_with_their_file(tmp_path: Path) -> None:
    assert f"{tmp_path}: found none of images_background.zip" in error_of("omniglot", tmp_path)
    archive = tmp_path / "images_background.zip"
    archive.write_bytes(b"PK\x03\x04 no archive")
    assert f"{archive}: damaged archive (BadZipFile" in error_of("omniglot", tmp_path)
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("images_background/readme.txt", "none")
    assert f"{archive}: no images" in error_of("omniglot", tmp_path)
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("images_background/Greek/character01/0001_01.png", b"no image")
    assert f"{archive}:images_background/Greek/character01/0001_01.png: not a readable" in error_of(
        "omniglot", tmp_path
    )


def test_a_member_that_expands_without_end(tmp_path: Path) -> None:
    archive = tmp_path / "images_background.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("images_background/Greek/character01/0001_01.png", bytes(1 << 24))
    assert archive.stat().st_size < 1 << 16
    assert "the image has more than 65536 bytes" in error_of("omniglot", tmp_path)


@fuzzed(200, st.data())
def test_damaged_archive(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    root = tmp_path_factory.mktemp("omniglot")
    archive = root / "images_background.zip"
    write(archive, {"Greek": [10]}, drawings=2)
    archive.write_bytes(data.draw(damaged(archive.read_bytes())))
    try:
        found = load("omniglot", root)
    except DataError as error:
        assert str(archive) in str(error)
        return
    assert len(found.train_x) == len(found.train_y) > 0


def test_archives_are_shown_while_they_are_read(tmp_path: Path) -> None:
    write(tmp_path / "images_evaluation.zip", {"Greek": [5, 40]})
    seen = Seen()
    load("omniglot", tmp_path, seen)
    assert seen.counts == {"reading images_evaluation.zip": (42, 42)}  # and what is no image
