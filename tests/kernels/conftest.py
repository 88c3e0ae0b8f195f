"""These tests run on a CUDA GPU, or anywhere in Triton's interpreter: ``TRITON_INTERPRET=1`` in a process of
their own, since Triton reads it when a kernel is defined. Otherwise nothing here is collected."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

collect_ignore_glob = [] if INTERPRETED or torch.cuda.is_available() else ["*"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # The interpreter turns a loop's bounds from arrays of one element into integers.
    filtered = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning")
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(filtered)
            if not INTERPRETED:
                item.add_marker(pytest.mark.gpu)


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the kernels run: the CPU in the interpreter, else the GPU."""
    return torch.device("cpu" if INTERPRETED else "cuda")
