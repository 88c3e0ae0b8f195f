"""``python -m benchmarks.tune`` measures the table of this GPU for the package: a file of ``kernels/tuning``.

It is ``python -m wsn_fast.doctor --tune`` with another folder, and the table names the commit.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from wsn_fast.doctor.tuning.command import tune

from .provenance import ROOT, provenance


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune", description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "kernels" / "tuning", help="folder of the file")
    parser.add_argument("--minutes", type=float, default=4.5, help="after which nothing new is begun")
    options = parser.parse_args(arguments)
    device = torch.device("cuda")
    return tune(device, options.out, options.minutes, facts=provenance(device))


if __name__ == "__main__":
    sys.exit(main())
