"""A checkpoint can be read by docs/checkpoint-format.md alone: this reader knows the page and not the library."""

from __future__ import annotations

import hashlib
import json
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "checkpoint-format.md"
RUN = ROOT / "tests" / "golden" / "run"
CUT = ROOT / "tests" / "golden" / "cut"
NUMPY = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "U8": "u1"}
NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "I64": "int64", "U8": "uint8"}


class Read:
    """A checkpoint file: its metadata, and its tensors with masks decompressed."""

    def __init__(self, path: Path) -> None:
        raw = path.read_bytes()
        (length,) = struct.unpack("<Q", raw[:8])
        assert 8 + length <= len(raw)
        header = json.loads(raw[8 : 8 + length])
        self.metadata: dict[str, str] = header.pop("__metadata__")
        self.blanked = raw.replace(f'"digest":"{self.metadata["digest"]}"'.encode(), b'"digest":"' + b"0" * 64 + b'"')
        self.tensors: dict[str, np.ndarray[Any, Any]] = {}
        self.dtypes: dict[str, str] = {}
        for name, about in header.items():
            start, end = (8 + length + offset for offset in about["data_offsets"])
            self.tensors[name] = np.frombuffer(raw[start:end], NUMPY[about["dtype"]]).reshape(about["shape"])
            self.dtypes[name] = NAMES[about["dtype"]]
        for name, shape in json.loads(self.metadata["compressed"]).items():
            frame = self.tensors[name].tobytes()
            assert zstandard.frame_content_size(frame) == np.prod(shape, dtype=int)
            content = zstandard.ZstdDecompressor().decompress(frame)
            self.tensors[name] = np.frombuffer(content, np.uint8).reshape(shape)

    def json(self, name: str) -> dict[str, Any]:
        return json.loads(self.tensors[name].tobytes())

    def mask(self, name: str, row: int) -> np.ndarray[Any, Any]:
        weight = self.tensors[name]
        bits = np.unpackbits(self.tensors[f"{name}_masks"][row], bitorder="little")
        assert not bits[weight.size :].any() and len(bits) == -(-weight.size // 8) * 8
        return bits[: weight.size].astype(bool).reshape(weight.shape)


@pytest.fixture(scope="module")
def read() -> Read:
    return Read(max((RUN / "checkpoint").glob("*.safetensors"), key=lambda path: int(path.stem)))


def test_the_digest_is_that_of_the_blanked_file(read: Read) -> None:
    assert read.metadata["format"] == "wsn-fast checkpoint 1"
    assert hashlib.blake2b(read.blanked, digest_size=32).hexdigest() == read.metadata["digest"]


def test_every_density_is_that_of_the_results(read: Read) -> None:
    results = json.loads((RUN / "results.json").read_text("utf-8"))
    register = read.json("model/_extra_state")
    assert register["version"] == 1 and register["current"] is None
    for layer in results["layers"]:
        name = f"model/model.{layer['name']}"
        assert layer["elements"] == read.tensors[name].size
        assert read.json(name.replace(".weight", "._extra_state"))["tasks"] == [r["task"] for r in register["records"]]
        for row, task in enumerate(layer["tasks"]):
            assert task["task"] == register["records"][row]["task"]
            assert 100 * read.mask(name, row).mean() == pytest.approx(task["density"], abs=1e-12)
    masks = np.concatenate([read.mask(f"model/model.{one['name']}", 0).ravel() for one in results["layers"]])
    assert 100 * masks.mean() == pytest.approx(results["reuse"][0]["density"], abs=1e-12)


def test_every_fingerprint_is_that_of_the_tensors(read: Read) -> None:
    checked = 0
    for row, record in enumerate(read.json("model/_extra_state")["records"]):
        for name, digest in record["fingerprint"].items():
            tensor = f"model/model.{name.removesuffix(' (mask)')}"
            if name.endswith(" (mask)"):
                data, dtype = read.tensors[f"{tensor}_masks"][row], "uint8"
            elif f"{tensor}_masks" in read.tensors:
                data, dtype = read.tensors[tensor][read.mask(tensor, row)], read.dtypes[tensor]
            else:
                path, _, parameter = tensor.rpartition(".")
                tensor = f"{path}.heads.i{record['task']}.{parameter}"
                data, dtype = read.tensors[tensor], read.dtypes[tensor]
            assert digest == f"{dtype} {hashlib.blake2b(data.tobytes(), digest_size=16).hexdigest()}", name
            checked += 1
    assert checked == 10  # two tasks of two masked weights and a head


def _names(value: Any) -> set[str]:
    """The keys of an object."""
    assert isinstance(value, dict)
    return set(value)


def test_the_page_names_every_field_that_is_written(read: Read) -> None:
    inside = Read(max((CUT / "checkpoint").glob("*.safetensors"), key=lambda path: int(path.stem)))
    written = _names(read.metadata) | _names(json.loads((RUN / "results.json").read_text("utf-8")))
    written |= _names(json.loads((RUN / "config.json").read_text("utf-8")))
    for line in (RUN / "metrics.jsonl").read_text("utf-8").splitlines():
        entry = json.loads(line)
        written |= _names(entry) | {entry["kind"]}
    state = json.loads(inside.metadata["state"])
    written |= _names(state) | _names(state["progress"]) | _names(state["optimizer"])
    written |= _names(read.json("model/_extra_state")) | _names(read.json("model/_extra_state")["records"][0])
    written |= _names(read.json("model/model.features.1._extra_state"))
    written |= {f"{name.split('/')[0]}/" for name in inside.tensors}
    named = set(re.findall(r"`([^`\s]+)`", PAGE.read_text("utf-8")))
    assert written - named == set()
