"""Fuzzes the readers with coverage guidance, with atheris from PyPI. The arguments are those of libFuzzer:

PYTHONPATH=. python tests/support/fuzz_readers.py -max_total_time=3600 -rss_limit_mb=1500 FOUND tests/train/corpus
"""

from __future__ import annotations

import logging
import sys
import tempfile
import warnings
from pathlib import Path

import atheris
import numpy  # noqa: F401  (imported here, so that it is not instrumented)
import torch  # noqa: F401

with atheris.instrument_imports(include=["wsn_fast.train", "wsn_fast.nn.json_text", "wsn_fast.continual.register"]):
    from reader_targets import read


def main() -> None:
    """Fuzz until the time is over or a fault is found."""
    warnings.simplefilter("ignore")
    logging.disable()
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        atheris.Setup(sys.argv, lambda member: read(member, Path(folder)))
        atheris.Fuzz()


if __name__ == "__main__":
    main()
