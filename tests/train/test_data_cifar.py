"""CIFAR: read exactly from folders and archives, every fault named with its file, and no code of a pickle run."""

from __future__ import annotations

import os
import pickle
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
from data_errors import error_of

from wsn_fast.train.data import Dataset, load

RNG = np.random.default_rng(0)


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


def write_superclasses(root: Path, coarse: dict[str, list[int]]) -> None:
    """CIFAR-100 with three images of the classes 5, 2 and 5."""
    folder = root / "cifar-100-python"
    folder.mkdir()
    for member, labels in coarse.items():
        batch = cifar_batch("cifar100", 3) | {b"fine_labels": [5, 2, 5], b"coarse_labels": labels}
        (folder / member).write_bytes(pickle.dumps(batch, 2))


def test_superclasses_come_from_the_coarse_labels(tmp_path: Path) -> None:
    write_superclasses(tmp_path, {"train": [1, 19, 1], "test": [1, 19, 1]})
    superclasses = load("cifar100", tmp_path).superclasses
    assert superclasses is not None and superclasses.shape == (100,)
    assert superclasses[5] == 1 and superclasses[2] == 19 and superclasses.sum() == 20 - 98


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_without_coarse_labels_there_are_no_superclasses(tmp_path: Path, name: str) -> None:
    write_cifar(tmp_path, name)
    assert load(name, tmp_path).superclasses is None


@pytest.mark.parametrize(
    ("coarse", "message"),
    [
        ([1, 19, 2], "train: images of class 5 have different superclasses"),
        ([1, 19], "train: 3 labels, but 2 superclasses"),
        ([1, 19, "1"], "train: 'coarse_labels' is missing or not a list of integers"),
        ([1, 19, 1 << 70], "train: a label in 'coarse_labels' does not fit 64 bits"),
    ],
)
def test_wrong_coarse_labels_are_named(tmp_path: Path, coarse: list[int], message: str) -> None:
    write_superclasses(tmp_path, {"train": coarse, "test": [1, 19, 1]})
    assert message in error_of("cifar100", tmp_path)


@pytest.mark.parametrize("protocol", range(6))
def test_empty_bytes_as_python_3_writes_them(tmp_path: Path, protocol: int) -> None:
    batches = write_cifar(tmp_path, "cifar100", protocol)
    for member, batch in batches.items():
        (tmp_path / "cifar-100-python" / member).write_bytes(pickle.dumps(batch | {b"filenames": [b"", b""]}, protocol))
    assert_cifar(load("cifar100", tmp_path), batches, "cifar100")


def test_only_empty_bytes_are_made(tmp_path: Path) -> None:
    write_cifar(tmp_path, "cifar100")
    path = tmp_path / "cifar-100-python" / "test"
    path.write_bytes(b"\x80\x02c__builtin__\nbytes\nJ\xff\xff\xff\x7f\x85R.")  # bytes(2**31 - 1)
    assert f"{path}: cannot be unpickled (only empty bytes are made)" in error_of("cifar100", tmp_path)


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
