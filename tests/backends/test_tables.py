"""Tables of measurements: which hold, which go first, and what becomes of a table that is damaged or foreign."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from wsn_fast import convert, explain
from wsn_fast.backends import tables
from wsn_fast.doctor import findings

CPU = torch.device("cpu")
NAME = "NVIDIA Test 1"


def tile(rows: int) -> dict[str, Any]:
    return {"rows": rows, "config": [16, 4], "splits": 1, "us": 1.0, "us_dense": 2.0}


def linear(n: int = 64, rows: int = 8) -> dict[str, Any]:
    way = {"dtype": "bfloat16", "precision": "tf32", "source": "packed", "backward": False}
    return way | {"n": n, "k": 32, "max_rows": rows, "tiles": [tile(rows)]}


def conv(channels: int = 3, wins: bool = True) -> dict[str, Any]:
    way = {"dtype": "bfloat16", "precision": "tf32", "source": "packed", "backward": False}
    return way | {"shape": {"channels": channels}, "config": [1], "us": 1.0, "us_dense": 2.0, "wins": wins}


def prefers(choose: str = "torch") -> dict[str, Any]:
    return {"choose": choose, "times": {"1000": {"native": 20.0, "torch": 10.0}}}


def sound(name: str = NAME, **parts: Any) -> dict[str, Any]:
    return {"format": 1, "device": name, "versions": tables.versions(CPU), **parts}


def put(folder: Path, data: object, name: str = NAME) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / tables.file_name(name)).write_text(data if isinstance(data, str) else json.dumps(data))
    return folder


# --- names
@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("NVIDIA H200", "nvidia-h200.json"),
        ("AMD EPYC 7B13, 2 threads", "amd-epyc-7b13-2-threads.json"),
        ("Intel(R) Xeon(R) @ 2.0GHz/../x", "intel-r-xeon-r-2.0ghz-..-x.json"),
        ("プロセッサ", "unnamed.json"),
    ],
)
def test_a_file_name_is_safe(name: str, file: str) -> None:
    assert tables.file_name(name) == file


def test_the_number_of_threads_is_part_of_the_name_of_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    one = tables.device_name(CPU)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 16)
    assert one.endswith(", 1 thread") and tables.device_name(CPU) == one.replace("1 thread", "16 threads")


def test_other_devices_have_no_tables() -> None:
    assert tables.of(tables.device_name(torch.device("meta"))) == tables.Tables({}, (), "")


# --- precedence
def test_the_users_entries_go_before_those_of_the_package(tmp_path: Path) -> None:
    ours = sound(
        elementwise={"gate": [1, 1], "gate_backward": [2, 2]}, linear=[linear(64, 8), linear(128, 8)],
        conv=[conv(3), conv(4)], backends={"gate": {"float32": prefers(), "float16": prefers()}},
    )  # fmt: skip
    theirs = sound(
        elementwise={"gate": [9, 9]}, linear=[linear(128, 99)], conv=[conv(4, False)],
        backends={"gate": {"float32": prefers("triton")}, "pack": {"bits": prefers()}},
    )  # fmt: skip
    found = tables.read(NAME, put(tmp_path / "a", ours), put(tmp_path / "b", theirs))
    assert found.data == {
        "elementwise": {"gate": [9, 9], "gate_backward": [2, 2]},
        "linear": [linear(128, 99), linear(64, 8)],
        "conv": [conv(4, False), conv(3)],
        "backends": {
            "gate": {"float32": prefers("triton"), "float16": prefers()}, "pack": {"bits": prefers()},
        },
    }  # fmt: skip
    assert found.notes == (
        "the package's table nvidia-test-1.json is used", "your table nvidia-test-1.json is used",
    )  # fmt: skip


def test_a_table_of_the_package_holds_for_any_version(tmp_path: Path) -> None:
    old = sound(linear=[linear()]) | {"versions": {"wsn_fast": "0.0.1", "torch": "1.0"}}
    assert tables.read(NAME, put(tmp_path, old)).data == {"linear": [linear()]}


def test_nothing_is_found_where_nothing_is(tmp_path: Path) -> None:
    assert tables.read(NAME, tmp_path, tmp_path / "missing") == tables.Tables({}, (), "")


# --- the digest
def test_the_digest_names_the_content_and_nothing_else(tmp_path: Path) -> None:
    def digest(**parts: Any) -> str:
        return tables.read(NAME, None, put(tmp_path, sound(**parts))).digest

    first = digest(linear=[linear()], facts={"date": "2026"})
    assert len(first) == 12 and int(first, 16) >= 0
    assert digest(linear=[linear()], facts={"date": "2027"}) == first
    assert digest(linear=[linear(rows=9)]) != first
    assert digest(facts={"date": "2026"}) == ""


# --- what does not hold
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"device": "NVIDIA Test 2"}, "it is for NVIDIA Test 2"),
        ({"format": 2}, "its format is 2, and this version reads format 1"),
        ({"versions": {"torch": "1.0"}}, f"it was measured with torch 1.0, and this is {torch.__version__}"),
        ({"versions": {"wsn_fast": "0.0.1"}}, "it was measured with wsn_fast 0.0.1"),
        ({"versions": {"triton": "0.1"}}, "it was measured with triton 0.1"),
        ({"versions": None}, "its entry 'versions' has not the form"),
        ({"novel": 1}, "it has an unknown key, 'novel'"),
        ({"linear": [linear() | {"novel": 1}]}, "its entry 'linear' has not the form"),
        ({"linear": [{"n": 1}]}, "its entry 'linear' has not the form"),
        ({"linear": [linear() | {"n": 0}]}, "its entry 'linear' has not the form"),
        ({"linear": [linear() | {"k": True}]}, "its entry 'linear' has not the form"),
        ({"linear": [linear() | {"tiles": [tile(8) | {"splits": 0}]}]}, "its entry 'linear' has not the form"),
        ({"linear": {"a": 1}}, "its entry 'linear' has not the form"),
        ({"conv": [conv() | {"wins": 1}]}, "its entry 'conv' has not the form"),
        ({"elementwise": {"gate": "fast"}}, "its entry 'elementwise' has not the form"),
        ({"backends": {"gate": {"float32": {"choose": "torch"}}}}, "its entry 'backends' has not the form"),
        ({"backends": {"gate": {"float32": prefers() | {"choose": 1}}}}, "its entry 'backends' has not the form"),
    ],
)  # fmt: skip
def test_a_table_that_does_not_hold_is_ignored_and_says_why(
    tmp_path: Path, change: dict[str, Any], reason: str
) -> None:
    found = tables.read(NAME, None, put(tmp_path, sound(elementwise={"gate_backward": [1, 1]}) | change))
    assert found.data == {} and found.digest == ""
    (note,) = found.notes
    assert note.startswith("your table nvidia-test-1.json is ignored: ") and reason in note


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "it is no JSON"),
        ('{"format": 1, "device": "NVID', "it is no JSON"),
        ("[" * 100_000, "it is no JSON"),
        ("\0\0", "it is no JSON"),
        ("[1]", "it is no JSON object"),
        ('{"device": "NVIDIA Test 1"}', "its format is None"),
        ('{"format": 1}', "it lacks device"),
        (json.dumps(sound(linear=[linear()])).replace("2.0", "NaN"), "a number is NaN"),
        (json.dumps(sound(linear=[linear()])).replace("2.0", "1e999"), "its entry 'linear' has not the form"),
        (json.dumps(sound(linear=[linear()])).replace("64", "9" * 5000), "it is no JSON"),
    ],
)
def test_a_damaged_table_is_ignored_and_says_why(tmp_path: Path, text: str, reason: str) -> None:
    found = tables.read(NAME, None, put(tmp_path, text))
    assert found.data == {} and reason in found.notes[0]


def test_bytes_that_are_no_text_are_ignored(tmp_path: Path) -> None:
    (tmp_path / tables.file_name(NAME)).write_bytes(b"\xff\xfe\x00{")
    assert "it is no JSON" in tables.read(NAME, None, tmp_path).notes[0]


def test_a_folder_in_place_of_a_table_is_ignored(tmp_path: Path) -> None:
    (tmp_path / tables.file_name(NAME)).mkdir()
    assert "it cannot be read" in tables.read(NAME, None, tmp_path).notes[0]


def test_an_endless_table_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "MOST_BYTES", 10)
    assert "it has more than 10 bytes" in tables.read(NAME, None, put(tmp_path, sound())).notes[0]


def test_a_damaged_table_of_the_user_leaves_that_of_the_package(tmp_path: Path) -> None:
    found = tables.read(NAME, put(tmp_path / "a", sound(linear=[linear()])), put(tmp_path / "b", "{"))
    assert found.data == {"linear": [linear()]}
    assert [("ignored" in note) for note in found.notes] == [False, True]


# --- who asks
def lookup(**backends: Any) -> tables.Lookup:
    return lambda name: tables.Tables({"backends": backends}, (), "0123456789ab")


def test_a_backend_that_was_measured_to_be_faster_comes_with_its_times() -> None:
    found = tables.tuned_backend(CPU, "gate", torch.float32, lookup(gate={"float32": prefers()}))
    assert found == (
        "torch",
        f"measured to be faster on {tables.device_name(CPU)} (1000 elements: native 20 us, torch 10 us; "
        "table 0123456789ab)",
    )


@pytest.mark.parametrize(
    ("operation", "dtype", "device"),
    [
        ("gate", torch.float16, CPU),
        ("threshold", torch.float32, CPU),
        ("gate", None, CPU),
        ("pack", None, CPU),
    ],
)
def test_where_the_usual_backend_wins_or_nobody_measured_nothing_is_said(
    operation: str, dtype: torch.dtype | None, device: torch.device
) -> None:
    known = lookup(gate={"float32": prefers()}, pack={"bits": prefers("native")})
    assert tables.tuned_backend(device, operation, dtype, known) is None


def test_an_operation_on_bits_has_an_entry_without_a_dtype() -> None:
    found = tables.tuned_backend(CPU, "pack", None, lookup(pack={"bits": prefers()}))
    assert found is not None and found[0] == "torch"


def test_explain_and_doctor_say_why_a_table_is_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WSN_FAST_CACHE", str(tmp_path))
    put(tmp_path / "tuning", "{", tables.device_name(CPU))
    tables.of.cache_clear()
    try:
        model = convert(nn.Sequential(nn.Linear(4, 3)))
        assert "is ignored: it is no JSON" in str(explain(model)).splitlines()[-1]
        assert "is ignored: it is no JSON" in findings.report()
    finally:
        tables.of.cache_clear()
