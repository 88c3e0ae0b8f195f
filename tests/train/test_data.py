"""Datasets in memory: what `load` and `Dataset` accept and refuse."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from data_errors import error_of

from wsn_fast.train.data import DATASETS, DataError, Dataset, load, load_several


def test_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=f"{', '.join(DATASETS)}, got 'svhn'"):
        load("svhn")


@pytest.mark.parametrize("name", [name for name in DATASETS if name != "digits"])
def test_missing_data_dir_is_named(name: str) -> None:
    with pytest.raises(ValueError, match=f"data_dir: dataset '{name}'"):
        load(name)


def test_data_dir_must_be_a_folder(tmp_path: Path) -> None:
    assert f"{tmp_path / 'none'}: not a folder" in error_of("mnist", tmp_path / "none")


def test_digits_are_the_vendored_data() -> None:
    digits = load("digits")
    assert digits.train_x.shape == (1442, 1, 8, 8) and digits.test_x.shape == (355, 1, 8, 8)
    assert digits.train_x.dtype == torch.uint8 and int(digits.train_x.max()) == 16 and digits.classes == 10
    assert torch.bincount(digits.test_y).tolist() == [35, 36, 35, 36, 36, 36, 36, 35, 34, 36]
    assert digits.fingerprint == "2420fa816a879043f3e735e124a86ae3"


def small_parts() -> list[torch.Tensor]:
    train, test = torch.arange(24).to(torch.uint8), torch.arange(8).to(torch.uint8)
    return [train.view(6, 1, 2, 2), torch.arange(6) % 3, test.view(2, 1, 2, 2), torch.arange(2)]


@pytest.mark.parametrize("part", range(4))
def test_fingerprint_changes_with_one_value(part: int) -> None:
    parts = small_parts()
    before = Dataset("own", *parts, 3).fingerprint
    parts[part].view(-1)[1] ^= 1
    assert Dataset("own", *parts, 3).fingerprint != before


def test_fingerprint_changes_with_the_shape_alone() -> None:
    train_x, train_y, test_x, test_y = small_parts()
    before = Dataset("own", train_x, train_y, test_x, test_y, 3).fingerprint
    flat = Dataset("own", train_x.view(6, 1, 1, 4), train_y, test_x.view(2, 1, 1, 4), test_y, 3)
    assert flat.fingerprint != before


def test_fingerprint_does_not_depend_on_strides() -> None:
    train_x, *rest = small_parts()
    strided = train_x.permute(0, 1, 3, 2).contiguous().permute(0, 1, 3, 2)
    assert Dataset("own", strided, *rest, 3).fingerprint == Dataset("own", train_x, *rest, 3).fingerprint


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        (0, lambda x: x.float(), r"own \(train\): expected uint8 images"),
        (1, lambda y: y.int(), r"own \(train\): expected uint8 images .* int64 labels"),
        (2, lambda x: x.flatten(1), r"own \(test\): expected uint8 images"),
        (1, lambda y: y[:5], r"own \(train\): 6 images but 5 labels"),
        (3, lambda y: y + 2, r"own \(test\): label 3 is outside 0..2"),
        (3, lambda y: y - 1, r"own \(test\): label -1 is outside 0..2"),
        (0, lambda x: x[:, :, :0], r"own \(train\): no images"),
        (2, lambda x: x.view(2, 1, 1, 4), r"training images are \(1, 2, 2\), test images \(1, 1, 4\)"),
    ],
)
def test_dataset_refuses_parts_that_do_not_fit(part: int, change: object, message: str) -> None:
    parts = small_parts()
    parts[part] = change(parts[part])
    with pytest.raises(DataError, match=message):
        Dataset("own", *parts, 3)


def test_superclasses_must_fit_the_classes() -> None:
    with pytest.raises(DataError, match=r"own: expected int64 superclasses \[3\], got torch.int64 \[2\]"):
        Dataset("own", *small_parts(), 3, torch.tensor([0, 1]))


# --- several ---


def write_mnist(folder: Path, images: int) -> None:
    folder.mkdir(parents=True)
    for prefix in ("train", "t10k"):
        header = b"\0\0\x08\x03" + b"".join(n.to_bytes(4, "big") for n in (images, 2, 2))
        (folder / f"{prefix}-images-idx3-ubyte").write_bytes(header + bytes(4 * images))
        header = b"\0\0\x08\x01" + images.to_bytes(4, "big")
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(header + bytes(images))


def test_several_datasets_lie_in_folders_of_their_names(tmp_path: Path) -> None:
    write_mnist(tmp_path / "fashion_mnist", 3)
    write_mnist(tmp_path / "MNIST" / "raw", 5)
    found = load_several("fashion_mnist,digits,mnist", tmp_path)
    assert [(d.name, len(d.test_x)) for d in found] == [("fashion_mnist", 3), ("digits", 355), ("mnist", 5)]


def test_another_name_is_a_folder_of_images(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    for part in ("train", "test"):
        (tmp_path / "svhn" / part / "zero").mkdir(parents=True)
        image.new("RGB", (4, 4)).save(tmp_path / "svhn" / part / "zero" / "1.png")
    digits, svhn = load_several("digits,svhn", tmp_path)
    assert svhn.name == "svhn" and svhn.train_x.shape == (1, 3, 4, 4) and digits.name == "digits"
    with pytest.raises(DataError, match=f"{tmp_path / 'notmnist'}: not a folder"):
        load_several("digits,notmnist", tmp_path)
    with pytest.raises(ValueError, match="data_dir: dataset 'folder' is read from a folder, and none was given"):
        load_several("svhn")
