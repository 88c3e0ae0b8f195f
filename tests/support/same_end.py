"""Two runs of the driver that are to have ended alike."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from wsn_fast.train import checkpoint


def assert_same_end(folder: Path, undisturbed: Path) -> None:
    """The same results.json byte for byte, the same tensors to the bit, the same metrics but for the times."""
    assert (folder / "results.json").read_bytes() == (undisturbed / "results.json").read_bytes()
    ours, theirs = (checkpoint.load_from(path / "checkpoint") for path in (folder, undisturbed))
    assert ours.number == theirs.number
    assert ours.tensors.keys() == theirs.tensors.keys()
    for name, tensor in theirs.tensors.items():
        assert ours.tensors[name].reshape(-1).view(torch.uint8).equal(tensor.reshape(-1).view(torch.uint8)), name
    assert metrics(folder) == metrics(undisturbed)


def metrics(folder: Path) -> list[dict[str, Any]]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{name: value for name, value in line.items() if name not in ("seconds", "time")} for line in lines]
