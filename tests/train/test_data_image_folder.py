"""Image folders: read exactly, and every fault named with its file."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pytest
from data_errors import error_of
from seen_loading import Seen

from wsn_fast.train import machine
from wsn_fast.train.command_line import main
from wsn_fast.train.data import load, load_several
from wsn_fast.train.report import Console

RNG = np.random.default_rng(0)
TREE = ("train", "val")


def save_image(path: Path, pixels: np.ndarray) -> np.ndarray:
    """Write pixels losslessly (PNG, whatever the suffix: Pillow goes by the content)."""
    image = pytest.importorskip("PIL.Image")
    path.parent.mkdir(parents=True, exist_ok=True)
    image.fromarray(pixels).save(path, format="PNG")
    return pixels


def random_image(height: int = 4, width: int = 3) -> np.ndarray:
    return RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)


def image_tree(root: Path, test: str = "val") -> dict[str, np.ndarray]:
    names = [f"train/{c}/{i}{s}" for c in ("cat", "dog") for i, s in enumerate((".png", ".JPEG"))]
    return {
        name: save_image(root / name, random_image()) for name in (*names, f"{test}/cat/a.jpg", f"{test}/dog/b.png")
    }


@pytest.mark.parametrize("test", ["val", "test"])
def test_image_folder_is_read_exactly(tmp_path: Path, test: str) -> None:
    images = list(image_tree(tmp_path, test).values())
    found = load("folder", tmp_path)
    assert np.array_equal(found.train_x.permute(0, 2, 3, 1), np.stack(images[:4]))
    assert np.array_equal(found.test_x.permute(0, 2, 3, 1), np.stack(images[4:]))
    assert found.train_y.tolist() == [0, 0, 1, 1] and found.test_y.tolist() == [0, 1] and found.classes == 2


def tiny_imagenet(root: Path) -> list[np.ndarray]:
    for wnid in ("n01", "n02"):
        save_image(root / "train" / wnid / "images" / f"{wnid}_0.JPEG", random_image())
        (root / "train" / wnid / f"{wnid}_boxes.txt").write_text("0 0 1 1\n")
    (root / "test" / "images").mkdir(parents=True)
    images = [save_image(root / "val" / "images" / f"val_{i}.JPEG", random_image()) for i in range(3)]
    lines = [f"val_{i}.JPEG\t{wnid}\t0\t0\t1\t1\n" for i, wnid in ((2, "n01"), (0, "n02"), (1, "n01"))]
    (root / "val" / "val_annotations.txt").write_text("".join(lines))
    return images


def test_tiny_imagenet_layout(tmp_path: Path) -> None:
    images = tiny_imagenet(tmp_path)
    found = load("folder", tmp_path)
    assert np.array_equal(found.test_x.permute(0, 2, 3, 1), np.stack([images[2], images[0], images[1]]))
    assert found.test_y.tolist() == [0, 1, 0] and found.train_y.tolist() == [0, 1]


def test_classes_of_tiny_imagenet_are_in_the_order_of_its_list(tmp_path: Path) -> None:
    tiny_imagenet(tmp_path)
    (tmp_path / "wnids.txt").write_text("n02\nn01\n")
    found = load("folder", tmp_path)
    assert found.test_y.tolist() == [1, 0, 1] and found.train_y.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("text", "wrong"), [("n01\n", "n02"), ("n01 n02 n03", "n03"), ("n01 n02 n02", "a class twice")]
)
def test_a_list_of_other_classes_is_named(tmp_path: Path, text: str, wrong: str) -> None:
    tiny_imagenet(tmp_path)
    path = tmp_path / "wnids.txt"
    path.write_text(text)
    assert error_of("folder", tmp_path).startswith(f"{path}: expected each folder of {tmp_path / 'train'} once")
    assert error_of("folder", tmp_path).endswith(f"they differ in {wrong!r}")


def test_greyscale_images_become_rgb(tmp_path: Path) -> None:
    image_tree(tmp_path)
    grey = save_image(tmp_path / "val" / "cat" / "a.jpg", random_image()[:, :, 0].copy())
    assert np.array_equal(load("folder", tmp_path).test_x[0], np.stack([grey] * 3))


def clear(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


@pytest.mark.parametrize(
    ("damage", "where", "fault"),
    [
        (lambda root: (root / "train").rename(root / "old"), "train", "no class folders there"),
        (lambda root: (root / "val").rename(root / "old"), "", "found neither val/ nor test/"),
        (lambda root: clear(root / "train" / "dog"), "train/dog", "no .png, .jpg or .jpeg files"),
        (
            lambda root: save_image(root / "val/eel/a.png", random_image()),
            "val/eel",
            "a class that train/ does not",
        ),
        (
            lambda root: save_image(root / "val/dog/b.png", random_image(5)),
            "val/dog/b.png",
            "(5, 3), the first",
        ),
        (
            lambda root: (root / "train/cat/0.png").write_bytes(b"x"),
            "train/cat/0.png",
            "not a readable image",
        ),
    ],
)
def test_image_folder_faults_are_named(tmp_path: Path, damage: object, where: str, fault: str) -> None:
    image_tree(tmp_path)
    damage(tmp_path)
    message = error_of("folder", tmp_path)
    assert message.startswith(f"{tmp_path / where}: ") and fault in message


def test_truncated_image_is_named(tmp_path: Path) -> None:
    image_tree(tmp_path)
    path = tmp_path / "train" / "dog" / "0.png"
    path.write_bytes(path.read_bytes()[:-30])
    assert error_of("folder", tmp_path).startswith(f"{path}: not a readable image")


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("val_0.JPEG", "line 2: expected a file name and a class of train/, got 'val_0.JPEG'"),
        ("val_0.JPEG\tn09", "line 2: expected a file name and a class of train/"),
        ("val_9.JPEG\tn01", "line 2: no file"),
    ],
)
def test_bad_annotation_is_named_with_its_line(tmp_path: Path, line: str, fault: str) -> None:
    tiny_imagenet(tmp_path)
    path = tmp_path / "val" / "val_annotations.txt"
    path.write_text(f"val_1.JPEG\tn01\n{line}\n")
    assert error_of("folder", tmp_path).startswith(f"{path}: {fault}")


def test_empty_annotations_are_named(tmp_path: Path) -> None:
    tiny_imagenet(tmp_path)
    path = tmp_path / "val" / "val_annotations.txt"
    path.write_text("")
    assert error_of("folder", tmp_path) == f"{path}: no images"


def test_missing_pillow_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image_tree(tmp_path)
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError, match=re.escape("wsn-fast[images]")):
        load("folder", tmp_path)


def test_images_are_shown_while_they_are_read(tmp_path: Path) -> None:
    seen = Seen()
    tiny_imagenet(tmp_path)
    load("folder", tmp_path, seen)
    assert seen.counts == {f"reading {tmp_path / 'train'}": (2, 2), f"reading {tmp_path / 'val'}": (3, 3)}


def test_images_of_several_datasets_are_shown(tmp_path: Path) -> None:
    seen = Seen()
    for name in ("folder", "photos"):
        image_tree(tmp_path / name)
    load_several("folder,photos", tmp_path, seen)
    assert [*seen.counts] == [f"reading {tmp_path / name / part}" for name in ("folder", "photos") for part in TREE]


def test_a_command_shows_the_images_that_it_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When it measures what is fastest, and when the run begins."""
    seen: list[str] = []
    monkeypatch.setattr(Console, "loading", lambda self, items, total, what: seen.append(what) or items)
    monkeypatch.setattr(machine, "cores", lambda: 1)
    image_tree(tmp_path)
    words = ["--data", "folder", "--data-dir", str(tmp_path), "--tasks", "1", "--epochs", "1", "--val-fraction", "0.25"]
    words += ["--threads", "auto", "--device", "cpu", "--quiet", "--out", str(tmp_path / "run")]
    assert main(["train", "permuted", *words]) == 0
    assert seen == [f"reading {tmp_path / part}" for part in TREE] * 2


def test_images_that_do_not_fit_into_memory_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image_tree(tmp_path)
    monkeypatch.setattr(machine, "memory", lambda: 6 * 4 * 3 * 3)
    assert len(load("folder", tmp_path).train_x) == 4
    monkeypatch.setattr(machine, "memory", lambda: None)  # a system that does not tell
    assert len(load("folder", tmp_path).train_x) == 4
    monkeypatch.setattr(machine, "memory", lambda: 6 * 4 * 3 * 3 - 1)
    message = error_of("folder", tmp_path)
    assert f"{tmp_path}: 6 images of (height, width) (4, 3) take 0.0 GiB, this machine has 0.0 GiB" in message
    assert "the stream own loads images when they are needed" in message
