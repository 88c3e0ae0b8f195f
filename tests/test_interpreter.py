"""Runs tests/kernels in Triton's interpreter, in a process of its own, since Triton fixes the mode when it is
imported."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

KERNEL_TESTS = Path(__file__).parent / "kernels"


pytestmark = [
    pytest.mark.timeout(1200),
    pytest.mark.skipif(torch.cuda.is_available(), reason="tests/kernels run on the GPU itself here"),
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
]


PARTS = 2
each_part = pytest.mark.parametrize("part", range(PARTS))


def run_interpreted(part: int, *options: str) -> None:
    files = map(str, sorted(KERNEL_TESTS.glob("test_*.py"))[part::PARTS])
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files, *options],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=KERNEL_TESTS.parents[1],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


@each_part
def test_kernels_in_the_interpreter(part: int) -> None:
    run_interpreted(part)


@pytest.mark.ci
@each_part
def test_the_rest_of_the_kernel_tests_in_the_interpreter(part: int) -> None:
    run_interpreted(part, "-m", "ci and not slow")
