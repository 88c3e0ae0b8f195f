"""Where a number comes from: commit, machine, versions, clocks."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from wsn_fast.doctor.measuring import machine

COMMIT_VARIABLE = "WSN_FAST_COMMIT"
"""Names the commit on a machine that has the files without their history; ``+dirty`` at its end for changed files."""

ROOT = Path(__file__).parents[1]


def provenance(device: torch.device) -> dict[str, object]:
    """Everything that a stored result has to name; only queries, nothing is set."""
    commit, dirty = _commit()
    return {"commit": commit, "dirty": dirty, **machine.facts(device)}


def _commit() -> tuple[str, bool | None]:
    """The commit and whether files differ from it; ``("unknown", None)`` where nothing tells."""
    if named := os.environ.get(COMMIT_VARIABLE):
        return named.removesuffix("+dirty"), named.endswith("+dirty")
    commit = machine.output("git", "rev-parse", "HEAD", cwd=ROOT)
    return (commit, bool(machine.output("git", "status", "--porcelain", cwd=ROOT))) if commit else ("unknown", None)
