"""What all tests share: reproducible seeds, no display, and a clear skip where a test needs a GPU."""

from __future__ import annotations

import os
import shutil

import hypothesis
import pytest
import torch

os.environ.setdefault("MPLBACKEND", "Agg")
# The tensors are small: two threads only wait for each other, and on a busy machine for long.
torch.set_num_threads(1)
hypothesis.settings.register_profile("wsn_fast", deadline=None, derandomize=True)
hypothesis.settings.load_profile("wsn_fast")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    lacking = {
        "gpu": None if torch.cuda.is_available() else "needs a CUDA GPU",
        "compiler": next((None for c in ("c++", "g++", "clang++") if shutil.which(c)), "needs a C++ compiler"),
    }
    for item in items:
        for marker, reason in lacking.items():
            if reason and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
