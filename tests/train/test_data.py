"""The readers: what they return for good files, and that every fault is named with its file."""

from __future__ import annotations

import gzip
import os
import pickle
import re
import struct
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from wsn_fast.train.data import DATASETS, DataError, Dataset, load

RNG = np.random.default_rng(0)


def idx_bytes(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def idx_arrays() -> dict[str, np.ndarray]:
    def random(*shape: int, high: int) -> np.ndarray:
        return RNG.integers(0, high, shape, dtype=np.uint8)

    return {
        "train-images-idx3-ubyte": random(6, 5, 4, high=256),
        "train-labels-idx1-ubyte": random(6, high=10),
        "t10k-images-idx3-ubyte": random(3, 5, 4, high=256),
        "t10k-labels-idx1-ubyte": random(3, high=10),
    }


def write_idx(folder: Path, arrays: dict[str, np.ndarray], compress: bool = False) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in arrays.items():
        if compress:
            (folder / f"{name}.gz").write_bytes(gzip.compress(idx_bytes(array)))
        else:
            (folder / name).write_bytes(idx_bytes(array))


CIFAR_FILES = {
    "cifar10": ("cifar-10-batches-py", [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"], "labels"),
    "cifar100": ("cifar-100-python", ["train", "test"], "fine_labels"),
}


def cifar_batch(name: str, rows: int = 2, classes: int = 10) -> dict[bytes, object]:
    labels = RNG.integers(0, classes, rows).tolist()
    return {
        b"data": RNG.integers(0, 256, (rows, 3072), dtype=np.uint8),
        CIFAR_FILES[name][2].encode(): labels,
    }


def write_cifar(root: Path, name: str, protocol: int = 2) -> dict[str, dict[bytes, object]]:
    folder, members, _ = CIFAR_FILES[name]
    (root / folder).mkdir(parents=True, exist_ok=True)
    batches = {member: cifar_batch(name) for member in members}
    for member, batch in batches.items():
        (root / folder / member).write_bytes(pickle.dumps(batch, protocol))
    return batches


def python2_pickle(pixels: np.ndarray, labels: list[int]) -> bytes:
    """A batch as the official files have it: protocol 2 of Python 2 (`str` opcodes), numpy.core names."""
    raw = pixels.tobytes()
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85U\x01btR"
    dtype = b"cnumpy\ndtype\n(U\x02u1K\x00K\x01tR(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    shape = b"K" + bytes([len(pixels)]) + b"M\x00\x0c\x86"
    state = b"(K\x01" + shape + dtype + b"\x89T" + struct.pack("<I", len(raw)) + raw + b"tb"
    listed = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    return b"\x80\x02}(U\x04data" + array + state + b"U\x06labels" + listed + b"u."


def assert_cifar(found: Dataset, batches: dict[str, dict[bytes, object]], name: str) -> None:
    _, members, labels = CIFAR_FILES[name]
    pixels = np.concatenate([batches[member][b"data"] for member in members[:-1]]).reshape(-1, 3, 32, 32)
    assert np.array_equal(found.train_x, pixels)
    assert found.train_y.tolist() == [y for member in members[:-1] for y in batches[member][labels.encode()]]
    assert np.array_equal(found.test_x, batches[members[-1]][b"data"].reshape(-1, 3, 32, 32))
    assert found.test_y.tolist() == batches[members[-1]][labels.encode()]


def error_of(name: str, root: Path) -> str:
    with pytest.raises(DataError) as caught:
        load(name, root)
    return str(caught.value)


# --- load and Dataset ---


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


# --- idx ---


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
@pytest.mark.parametrize("compress", [False, True])
def test_idx_files_are_read_exactly(tmp_path: Path, name: str, compress: bool) -> None:
    arrays = idx_arrays()
    write_idx(tmp_path, arrays, compress)
    found = load(name, str(tmp_path))
    parts = (found.train_x[:, 0], found.train_y, found.test_x[:, 0], found.test_y)
    assert all(np.array_equal(part, array) for part, array in zip(parts, arrays.values(), strict=True))
    assert found.name == name and found.classes == 10


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("mnist", "mnist"),
        ("mnist", "MNIST/raw"),
        ("fashion_mnist", "fashion_mnist"),
        ("fashion_mnist", "FashionMNIST/raw"),
    ],
)
def test_idx_files_are_found_in_the_usual_folders(tmp_path: Path, name: str, folder: str) -> None:
    arrays = idx_arrays()
    write_idx(tmp_path / folder, arrays)
    assert np.array_equal(load(name, tmp_path).test_y, arrays["t10k-labels-idx1-ubyte"])


@pytest.mark.parametrize("missing", list(idx_arrays()))
def test_missing_idx_file_names_what_was_looked_for_and_where(tmp_path: Path, missing: str) -> None:
    write_idx(tmp_path, idx_arrays())
    (tmp_path / missing).unlink()
    message = error_of("mnist", tmp_path)
    assert f"{missing} or {missing}.gz: no such file in {tmp_path}, {tmp_path / 'mnist'}" in message


IMAGES = idx_bytes(np.ones((6, 5, 4), np.uint8))


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"", "truncated, 0 bytes where the idx header alone has 16"),
        (IMAGES[:15], "truncated, 15 bytes where the idx header alone has 16"),
        (IMAGES[:-1], "truncated, 119 bytes of data where shape [6, 5, 4] needs 120"),
        (IMAGES + b"\0", "too long, 121 bytes of data where shape [6, 5, 4] needs 120"),
        (b"PK\3\4" + IMAGES[4:], "wrong magic 0x504b0304"),
        (IMAGES[:2] + b"\x0d" + IMAGES[3:], "idx dtype code 0x0d, expected 0x08"),
        (IMAGES[:3] + b"\x01" + IMAGES[4:], "1 dimensions in the idx header, expected 3"),
        (IMAGES[:4] + b"\xff" * 12 + IMAGES[16:], "truncated, 120 bytes of data"),
        (gzip.compress(IMAGES)[:-9], "cannot be read, perhaps truncated or damaged"),
        (gzip.compress(IMAGES)[:-8] + b"\0" * 8, "cannot be read, perhaps truncated or damaged"),
        (gzip.compress(IMAGES)[:10] + b"\xff" * 30, "cannot be read, perhaps truncated or damaged"),
        (b"\x1f\x8b" + b"\0" * 30, "cannot be read, perhaps truncated or damaged"),
    ],
)
def test_damaged_idx_file_is_named_with_its_fault(tmp_path: Path, content: bytes, fault: str) -> None:
    write_idx(tmp_path, idx_arrays())
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(content)
    message = error_of("mnist", tmp_path)
    assert message.startswith(f"{path}: ") and fault in message


@pytest.mark.parametrize(
    ("name", "array", "fault"),
    [
        ("train-labels-idx1-ubyte", np.zeros(5, np.uint8), "6 images but 5 labels"),
        ("t10k-labels-idx1-ubyte", np.array([0, 10, 0], np.uint8), "label 10 is outside 0..9"),
        ("t10k-images-idx3-ubyte", np.zeros((3, 5, 5), np.uint8), "images of (5, 5) pixels"),
        ("train-images-idx3-ubyte", np.zeros((6, 0, 4), np.uint8), "no images"),
    ],
)
def test_idx_files_that_do_not_fit_together(tmp_path: Path, name: str, array: np.ndarray, fault: str) -> None:
    write_idx(tmp_path, idx_arrays() | {name: array})
    message = error_of("mnist", tmp_path)
    assert name in message and fault in message


# --- CIFAR ---


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
@pytest.mark.parametrize("protocol", range(6))
def test_cifar_folders_are_read_exactly(tmp_path: Path, name: str, protocol: int) -> None:
    batches = write_cifar(tmp_path, name, protocol)
    assert_cifar(load(name, tmp_path), batches, name)


def test_cifar_files_may_lie_in_the_data_dir_itself(tmp_path: Path) -> None:
    batches = write_cifar(tmp_path, "cifar100")
    assert_cifar(load("cifar100", tmp_path / "cifar-100-python"), batches, "cifar100")


def test_cifar_as_python_2_wrote_it(tmp_path: Path) -> None:
    batches = write_cifar(tmp_path, "cifar10")
    for member, batch in batches.items():
        path = tmp_path / "cifar-10-batches-py" / member
        path.write_bytes(python2_pickle(batch[b"data"], batch[b"labels"]))
    assert_cifar(load("cifar10", tmp_path), batches, "cifar10")


def test_the_python_2_pickle_is_one_that_numpy_reads() -> None:
    pixels = RNG.integers(0, 256, (2, 3072), dtype=np.uint8)
    batch = pickle.loads(python2_pickle(pixels, [3, 4]), encoding="bytes")
    assert np.array_equal(batch[b"data"], pixels) and batch[b"labels"] == [3, 4]


def make_archive(root: Path, name: str) -> Path:
    archive = root / f"{name.replace('cifar', 'cifar-')}-python.tar.gz"
    folder = CIFAR_FILES[name][0]
    with tarfile.open(archive, "w:gz") as tar:
        for path in sorted((root / folder).iterdir(), reverse=True):
            tar.add(path, f"{folder}/{path.name}")
            path.unlink()
    return archive


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_archives_are_read_exactly(tmp_path: Path, name: str) -> None:
    batches = write_cifar(tmp_path, name)
    make_archive(tmp_path, name)
    assert_cifar(load(name, tmp_path), batches, name)


def test_no_cifar_at_all_names_both_forms(tmp_path: Path) -> None:
    message = error_of("cifar100", tmp_path)
    assert message.startswith(f"{tmp_path}: found neither the files train, test")
    assert message.endswith("nor cifar-100-python.tar.gz")


def test_missing_cifar_batch_is_named(tmp_path: Path) -> None:
    write_cifar(tmp_path, "cifar10")
    path = tmp_path / "cifar-10-batches-py" / "data_batch_3"
    path.unlink()
    assert error_of("cifar10", tmp_path).startswith(f"{path}: cannot be read")


def test_archive_without_a_batch_is_named(tmp_path: Path) -> None:
    write_cifar(tmp_path, "cifar100")
    (tmp_path / "cifar-100-python" / "test").unlink()
    archive = make_archive(tmp_path, "cifar100")
    assert error_of("cifar100", tmp_path) == f"{archive}: the archive holds no test"


@pytest.mark.parametrize("keep", [0.0, 0.01, 0.5, 0.9])
def test_truncated_archive_is_named(tmp_path: Path, keep: float) -> None:
    write_cifar(tmp_path, "cifar100")
    archive = make_archive(tmp_path, "cifar100")
    data = archive.read_bytes()
    archive.write_bytes(data[: int(keep * len(data))])
    assert error_of("cifar100", tmp_path).startswith(f"{archive}: ")


class Hostile:
    def __init__(self, target: Path) -> None:
        self.target = str(target)

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (self.target,)


def test_malicious_pickle_is_refused_by_name_and_not_run(tmp_path: Path) -> None:
    write_cifar(tmp_path, "cifar100")
    path = tmp_path / "cifar-100-python" / "test"
    path.write_bytes(pickle.dumps(Hostile(tmp_path / "made"), 2))
    message = error_of("cifar100", tmp_path)
    assert message.startswith(f"{path}: ") and f"global {os.mkdir.__module__}.mkdir is refused" in message
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("name", ["builtins.eval", "numpy.load", "numpy._core.multiarray.fromfile", "_codecs.lookup"])
def test_globals_beside_the_allowed_ones_are_refused(tmp_path: Path, name: str) -> None:
    write_cifar(tmp_path, "cifar100")
    module, attribute = name.rsplit(".", 1)
    path = tmp_path / "cifar-100-python" / "train"
    path.write_bytes(b"\x80\x02c" + f"{module}\n{attribute}\n".encode() + b".")
    assert f"global {name} is refused" in error_of("cifar100", tmp_path)


def test_numpy_is_never_handed_the_bytes(tmp_path: Path) -> None:
    """An object array made from raw bytes would be pointers into memory; here it is only a wrong dtype."""
    data = python2_pickle(np.zeros((1, 3072), np.uint8), [1]).replace(b"U\x02u1", b"U\x02O8")
    write_cifar(tmp_path, "cifar10")
    (tmp_path / "cifar-10-batches-py" / "test_batch").write_bytes(data)
    assert "not a C-ordered uint8 array" in error_of("cifar10", tmp_path)


GOOD = np.zeros((2, 3072), np.uint8)


@pytest.mark.parametrize(
    ("batch", "fault"),
    [
        ([GOOD, [0, 1]], "expected a pickled dict, found list"),
        ({b"fine_labels": [0, 1]}, "'data' is missing"),
        ({b"data": GOOD}, "'fine_labels' is missing"),
        ({b"data": GOOD.astype(np.int8), b"fine_labels": [0, 1]}, "not a C-ordered uint8 array"),
        ({b"data": np.asfortranarray(GOOD), b"fine_labels": [0, 1]}, "not a C-ordered uint8 array"),
        ({b"data": GOOD[:, :-1].copy(), b"fine_labels": [0, 1]}, "not a C-ordered uint8 array [N, 3072]"),
        ({b"data": GOOD, b"fine_labels": (0, 1)}, "not a list of integers"),
        ({b"data": GOOD, b"fine_labels": [0, 1.5]}, "not a list of integers"),
        ({b"data": GOOD, b"fine_labels": [0, True]}, "not a list of integers"),
        ({b"data": GOOD, b"fine_labels": [0]}, "2 images but 1 labels"),
        ({b"data": GOOD, b"fine_labels": [0, 100]}, "label 100 is outside 0..99"),
        ({b"data": GOOD, b"fine_labels": [-1, 0]}, "label -1 is outside 0..99"),
        ({b"data": GOOD, b"fine_labels": [0, 2**70]}, "does not fit 64 bits"),
    ],
)
@pytest.mark.parametrize("protocol", [2, 5])
def test_cifar_batch_of_the_wrong_content(tmp_path: Path, batch: object, fault: str, protocol: int) -> None:
    write_cifar(tmp_path, "cifar100")
    path = tmp_path / "cifar-100-python" / "test"
    path.write_bytes(pickle.dumps(batch, protocol))
    message = error_of("cifar100", tmp_path)
    assert message.startswith(f"{path}: ") and fault in message


@pytest.mark.parametrize(("rows", "fault"), [(3, "6144 bytes where 3 rows"), (0, "6144 bytes where 0 rows")])
def test_cifar_array_whose_shape_and_bytes_disagree(tmp_path: Path, rows: int, fault: str) -> None:
    write_cifar(tmp_path, "cifar10")
    path = tmp_path / "cifar-10-batches-py" / "test_batch"
    shape = b"M\x00\x0c\x86"
    path.write_bytes(python2_pickle(GOOD, [1, 2]).replace(b"K\x02" + shape, bytes([75, rows]) + shape))
    assert error_of("cifar10", tmp_path).startswith(f"{path}: 'data' has {fault}")


def test_cifar_batch_without_rows(tmp_path: Path) -> None:
    write_cifar(tmp_path, "cifar100")
    path = tmp_path / "cifar-100-python" / "test"
    path.write_bytes(pickle.dumps({b"data": GOOD[:0], b"fine_labels": []}, 5))
    assert error_of("cifar100", tmp_path).startswith(f"{path}: 'data' has 0 bytes where 0 rows")


@pytest.mark.parametrize("keep", [0, 1, 100, -1])
def test_truncated_pickle_is_named(tmp_path: Path, keep: int) -> None:
    write_cifar(tmp_path, "cifar10")
    path = tmp_path / "cifar-10-batches-py" / "data_batch_1"
    path.write_bytes(path.read_bytes()[:keep])
    assert error_of("cifar10", tmp_path).startswith(f"{path}: cannot be unpickled")


# --- image folders ---


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
