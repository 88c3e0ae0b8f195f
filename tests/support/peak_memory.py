"""The peak memory of a process that reads hostile files."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
_CHILD = """
import re, sys, tempfile
from pathlib import Path
import reader_targets
read = getattr(reader_targets, sys.argv[1])
with tempfile.TemporaryDirectory() as folder:
    for path in sorted(Path(sys.argv[2]).iterdir()):
        read(path.read_bytes(), Path(folder))
print(1024 * int(re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1]))
"""


def peak_of(target: str, folder: Path) -> int:
    """The largest resident size, in bytes, of a process that reads every file of ``folder`` with a function of
    ``reader_targets``. A crash of the process is an error."""
    if not Path("/proc/self/status").is_file():
        pytest.skip("only Linux tells the peak of one program")
    search = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "support")])
    names = {"idx": "idx_", "pickle": "pickle_", "json": "json_"}
    words = [sys.executable, "-c", _CHILD, names.get(target, target), str(folder)]
    done = subprocess.run(words, env={**os.environ, "PYTHONPATH": search}, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return int(done.stdout)
