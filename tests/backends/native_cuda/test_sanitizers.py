"""The CUDA selection on the CPU under the sanitizers: no data race, no access out of bounds, no undefined behaviour."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from .conftest import CSRC, emulation_flags

SOURCE = CSRC / "tests" / "cuda_on_cpu" / "select_test.cpp"


@pytest.mark.parametrize("sanitizer", ["thread", pytest.param("address,undefined", marks=pytest.mark.ci)])
def test_clean(tmp_path: Path, sanitizer: str) -> None:
    sanitize = [f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all", "-O1"]
    empty = tmp_path / "empty.cpp"
    empty.write_text("int main() {}\n")
    probe = [*emulation_flags(threads=64), *sanitize, empty, "-o", tmp_path / "empty"]
    if subprocess.run(probe, capture_output=True).returncode or subprocess.run([tmp_path / "empty"]).returncode:
        pytest.skip(f"no -fsanitize={sanitizer} here")
    program = tmp_path / "select_test"
    subprocess.run([*emulation_flags(threads=64), *sanitize, SOURCE, "-o", program], check=True)
    result = subprocess.run([program], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
