"""Data files that somebody made to harm: a DataError, whatever they claim, and no memory for what they only claim."""

from __future__ import annotations

import bz2
import gzip
import io
import os
import pickle
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from data_errors import error_of
from peak_memory import peak_of

from wsn_fast.train.data import image_folder, pickles
from wsn_fast.train.data.pickles import PickleError, loads

GIB = 1 << 30


def program(body: bytes, protocol: int = 4) -> bytes:
    return b"\x80" + bytes([protocol]) + body + b"."


# --- pickles ---------------------------------------------------------------------------------------------------------
NESTED = {
    "tuples of one as a key": b"})" + b"\x85" * 100_000 + b"K\x01s",
    "tuples of two as a key": b"})" + b"K\x01\x86" * 100_000 + b"K\x01s",
    "marked tuples as a key": b"}" + b"(" * 90_000 + b"t" * 90_000 + b"K\x01s",
    "tuples among many items": b"}(" + b")" + b"\x85" * 100_000 + b"K\x01u",
    "a tuple that doubles": b"})" + b"q\x00h\x00\x86" * 60 + b"K\x01s",
    "a nested dict as a key": b"}" * 100_000 + b"K\x01" + b"s" * 50_000,
}


@pytest.mark.parametrize("body", NESTED.values(), ids=NESTED)
def test_a_key_that_is_no_name_is_refused_and_never_hashed(body: bytes) -> None:
    with pytest.raises(PickleError, match="a key is no name"):
        loads(program(body))


@pytest.mark.parametrize("body", [b")" + b"\x85" * 100_000, b"]" * 9, b"(" * 5_000 + b"l" * 5_000 + b"0"])
def test_nesting_that_is_no_key_is_harmless(tmp_path: Path, body: bytes) -> None:
    for name in ("train", "test"):
        (tmp_path / name).write_bytes(program(body))
    assert error_of("cifar100", tmp_path).startswith(f"{tmp_path / 'train'}: ")


SIZES = {
    "bytearray": b"\x96" + struct.pack("<Q", 8 * GIB),
    "bytes": b"\x8e" + struct.pack("<Q", 2**63),
    "short bytes": b"B" + struct.pack("<I", 2**32 - 1),
    "text": b"\x8d" + struct.pack("<Q", 2**64 - 1),
    "old text": b"T" + struct.pack("<i", -1),
    "integer": b"\x8b" + struct.pack("<i", 2**31 - 1),
    "frame": b"\x95",
}


@pytest.mark.parametrize("body", SIZES.values(), ids=SIZES)
def test_a_size_beyond_the_file_is_refused_before_memory_is_taken(body: bytes) -> None:
    with pytest.raises(PickleError, match="truncated"):
        loads(program(body))


ENCODE = b"c_codecs\nencode\n"
FLOODS = {
    "empty dicts": b"}" * 1_000_000,
    "empty lists": b"]" * 1_000_000,
    "marks": b"(" * 1_000_000,
    "memo": b"N" + b"\x94" * 1_000_000,
    "memo of any index": b"N" + b"".join(b"r" + struct.pack("<I", i * 1000) for i in range(400_000)),
    "one text encoded again and again": b"X"
    + struct.pack("<I", 1 << 20)
    + b"x" * (1 << 20)
    + b"q\x00"
    + (ENCODE + b"h\x00X\x06\x00\x00\x00latin1\x86R") * 20_000,
}


@pytest.mark.parametrize("body", FLOODS.values(), ids=FLOODS)
def test_many_small_objects_have_a_bound_together(body: bytes) -> None:
    with pytest.raises(PickleError, match="takes more than"):
        loads(program(body, 2))


@pytest.mark.ci
def test_a_flood_takes_no_more_memory_than_it_may(tmp_path: Path) -> None:
    for number, body in enumerate((*FLOODS.values(), *NESTED.values())):
        (tmp_path / f"{number}").write_bytes(program(body))
    assert peak_of("pickle", tmp_path) < GIB


@pytest.mark.parametrize("text", [b"I" + b"9" * 5000, b"L" + b"9" * 5000, b"F" + b"x" * 5000, b"g" + b"y" * 5000])
def test_the_message_about_a_long_line_is_short(text: bytes) -> None:
    with pytest.raises(PickleError) as caught:
        loads(program(text + b"\n", 0))
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("codec", ["idna", "punycode", "utf-32"])
def test_only_the_codec_of_such_files_runs(codec: str) -> None:
    name = codec.encode()
    with pytest.raises(PickleError, match="only latin1"):
        loads(program(ENCODE + b"X\x01\x00\x00\x00a" + b"X" + struct.pack("<I", len(name)) + name + b"\x86R", 2))


# --- compressed files ------------------------------------------------------------------------------------------------
def idx_header(*shape: int) -> bytes:
    return bytes([0, 0, 8, len(shape)]) + struct.pack(f">{len(shape)}I", *shape)


def write_mnist(root: Path, name: str, content: bytes) -> None:
    good = {
        "train-images-idx3-ubyte": idx_header(2, 2, 2) + bytes(8),
        "train-labels-idx1-ubyte": idx_header(2) + bytes(2),
        "t10k-images-idx3-ubyte": idx_header(2, 2, 2) + bytes(8),
        "t10k-labels-idx1-ubyte": idx_header(2) + bytes(2),
    }
    for file, data in {**good, name: content}.items():
        (root / file).write_bytes(data)


MANY = 100 << 20
BOMBS: dict[str, tuple[str, Callable[[], bytes]]] = {
    "images": ("train-images-idx3-ubyte", lambda: gzip.compress(idx_header(MANY // 784, 28, 28) + bytes(MANY))),
    "one image": ("t10k-images-idx3-ubyte", lambda: gzip.compress(idx_header(1, MANY // 784, 784) + bytes(MANY))),
    "labels": ("train-labels-idx1-ubyte", lambda: gzip.compress(idx_header(MANY) + bytes(MANY))),
    "a few labels": ("t10k-labels-idx1-ubyte", lambda: gzip.compress(idx_header(8 << 20) + bytes(8 << 20))),
    "bzip2": ("train-images-idx3-ubyte", lambda: bz2.compress(idx_header(MANY // 784, 28, 28) + bytes(MANY))),
    "only the header": ("train-images-idx3-ubyte", lambda: gzip.compress(idx_header(*[2**32 - 1] * 3))),
}


@pytest.mark.parametrize(("name", "make"), BOMBS.values(), ids=BOMBS)
def test_an_idx_file_that_expands_too_far_is_refused_by_its_header(
    tmp_path: Path, name: str, make: Callable[[], bytes]
) -> None:
    write_mnist(tmp_path, name, make())
    message = error_of("mnist", tmp_path)
    assert message.startswith(f"{tmp_path / name}: shape [") and "decompress it before use" in message


def test_a_compressed_batch_that_expands_too_far_is_refused(tmp_path: Path) -> None:
    for name in ("train", "test"):
        (tmp_path / name).write_bytes(gzip.compress(bytes(MANY)))
    assert "its content takes" in error_of("cifar100", tmp_path)


def tar(*members: tuple[tarfile.TarInfo, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as file:
        for entry, content in members:
            entry.size = len(content)
            file.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def header(name: str, size: int, kind: bytes = b"0") -> bytes:
    entry = tarfile.TarInfo(name)
    entry.size, entry.type = size, kind
    return entry.tobuf(tarfile.GNU_FORMAT)


# The header of the first member, and the number of zeros after it.
ARCHIVES = {
    "a wanted member": (header("train", MANY), MANY),
    "another member": (header("other", MANY), MANY),
    "an extended header": (header("pax", MANY, b"x"), MANY),
    "a long name": (header("name", MANY, b"L"), MANY),
    "a size beyond 64 bits": (header("train", 2**70), 0),
    "a sparse file": (header("train", 50 * GIB, b"S"), 0),
}


@pytest.mark.parametrize(("first", "zeros"), ARCHIVES.values(), ids=ARCHIVES)
def test_an_archive_that_expands_too_far_is_refused(tmp_path: Path, first: bytes, zeros: int) -> None:
    (tmp_path / "cifar-100-python.tar.gz").write_bytes(gzip.compress(first + bytes(zeros), 1))
    name = first[:100].rstrip(b"\0").decode()
    assert f"the archive up to the end of {name!r} takes" in error_of("cifar100", tmp_path)


@pytest.mark.parametrize("kind", [b"1", b"2", b"5", b"S", b"x"])
def test_only_regular_members_are_read(tmp_path: Path, kind: bytes) -> None:
    content = b"".join(header(name, 0 if kind in b"125" else 512, kind) for name in ("train", "test"))
    (tmp_path / "cifar-100-python.tar.gz").write_bytes(content + bytes(1024))
    assert "holds no" in error_of("cifar100", tmp_path)


@pytest.mark.parametrize("at", [0, 124, 156, 300])
def test_a_header_of_an_archive_with_a_wrong_byte_is_found(tmp_path: Path, at: int) -> None:
    content = bytearray(tar((tarfile.TarInfo("train"), b"x"), (tarfile.TarInfo("test"), b"y")))
    content[at] ^= 1
    (tmp_path / "cifar-100-python.tar.gz").write_bytes(content)
    assert "does not match its checksum" in error_of("cifar100", tmp_path)


@pytest.mark.ci
def test_bombs_take_no_more_memory_than_they_may(tmp_path: Path) -> None:
    for target in ("idx_gz", "archive"):
        (tmp_path / target).mkdir()
    for number, (_, make) in enumerate(BOMBS.values()):
        (tmp_path / "idx_gz" / f"{number}").write_bytes(make())
    for number, (first, zeros) in enumerate(ARCHIVES.values()):
        (tmp_path / "archive" / f"{number}").write_bytes(gzip.compress(first + bytes(zeros), 1))
    assert max(peak_of("idx", tmp_path / "idx_gz"), peak_of("archive", tmp_path / "archive")) < GIB


# --- images ----------------------------------------------------------------------------------------------------------
def write_images(root: Path, names: list[str], size: tuple[int, int], format: str = "PNG") -> None:
    image = pytest.importorskip("PIL.Image")
    buffer = io.BytesIO()
    image.new("L" if format == "PNG" else "RGB", size).save(buffer, format)
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(buffer.getvalue())


@pytest.mark.parametrize("size", [(4097, 4097), (1, 1 << 25), (20_000, 10_000), (14_000, 14_000)])
def test_an_image_of_too_many_pixels_is_refused_before_it_is_decoded(tmp_path: Path, size: tuple[int, int]) -> None:
    write_images(tmp_path, ["train/a/0.png", "val/a/0.png"], size)
    assert "pixels are more than" in error_of("folder", tmp_path) or "bomb" in error_of("folder", tmp_path)


def test_many_images_that_expand_too_far_are_refused_together(tmp_path: Path) -> None:
    write_images(tmp_path, [f"train/a/{i}.png" for i in range(9)] + ["val/a/0.png"], (1500, 1500))
    assert "9 images of (height, width) (1500, 1500) take" in error_of("folder", tmp_path)


def test_one_image_that_is_listed_often_counts_once(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)
    for name in ("train/a/0.png", "val/images/0.png"):
        write_images(tmp_path, [name], (1, 1))
        pytest.importorskip("PIL.Image").fromarray(noise).save(tmp_path / name)
    (tmp_path / "val" / "val_annotations.txt").write_text("0.png\ta\n" * 400)
    assert "400 images of (height, width)" in error_of("folder", tmp_path)


@pytest.mark.parametrize("name", ["../../../train/a/0.png", "/etc/hostname", "a/../0.png"])
def test_an_annotation_names_a_file_beside_it(tmp_path: Path, name: str) -> None:
    write_images(tmp_path, ["train/a/0.png", "val/images/0.png"], (2, 2))
    (tmp_path / "val" / "val_annotations.txt").write_text(f"{name}\ta\n")
    assert "line 1: no file" in error_of("folder", tmp_path)


@pytest.mark.parametrize("format", ["EPS", "GIF", "TIFF", "BMP"])
def test_other_formats_are_not_decoded_whatever_their_name(tmp_path: Path, format: str) -> None:
    write_images(tmp_path, ["train/a/0.png", "val/a/0.png"], (2, 2), format)
    assert "not a readable image" in error_of("folder", tmp_path)


def test_what_ordinary_images_expand_to_is_allowed() -> None:
    """A PNG of Omniglot (105 x 105, black on white, about 250 bytes) takes 132 bytes of RGB for each of its own."""
    assert image_folder._EXPANDS >= 105 * 105 * 3 / 250
    assert pickles.ALWAYS + pickles.TIMES * 155_000_000 > 3 * 155_000_000


# --- what is no file -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("dataset", "name"),
    [("cifar100", "test"), ("folder", "train/a/1.png"), ("mnist", "train-images-idx3-ubyte")],
)
def test_a_pipe_is_not_waited_for(tmp_path: Path, dataset: str, name: str) -> None:
    write_images(tmp_path, ["train/a/0.png", "val/a/0.png"], (2, 2))
    write_mnist(tmp_path, "none", b"")
    if dataset == "cifar100":
        tmp_path = tmp_path / "cifar"
        tmp_path.mkdir()
        batch = {b"data": np.zeros((1, 3072), np.uint8), b"fine_labels": [7]}
        (tmp_path / "train").write_bytes(pickle.dumps(batch))
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    assert str(tmp_path) in error_of(dataset, tmp_path)


def test_labels_of_a_plain_file_are_read_in_full(tmp_path: Path) -> None:
    labels = np.arange(1000) % 10
    write_mnist(tmp_path, "train-labels-idx1-ubyte", idx_header(1000) + labels.astype(np.uint8).tobytes())
    assert "2 images but 1000 labels" in error_of("mnist", tmp_path)
