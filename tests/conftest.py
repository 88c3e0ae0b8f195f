"""What all tests share: reproducible seeds, no display, and a clear skip where a test needs a GPU."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator

import hypothesis
import pytest
import torch
from stand_in_cuda import StandIn, obstacle, shared_folder

os.environ.setdefault("MPLBACKEND", "Agg")
# Tests that plant faults and count launches would start with checks of the backends; those have tests of their own.
os.environ.setdefault("WSN_FAST_CHECK", "0")
# What somebody measured on this machine is nothing to a test.
_CACHE = tempfile.TemporaryDirectory()
os.environ["WSN_FAST_CACHE"] = _CACHE.name
# The tensors are small: two threads only wait for each other, and on a busy machine for long.
torch.set_num_threads(1)
hypothesis.settings.register_profile("wsn_fast", deadline=None, derandomize=True)
hypothesis.settings.load_profile("wsn_fast")


@pytest.hookimpl(tryfirst=True)  # before pytest selects by markers
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    leave_a_sample([item for item in items if item.get_closest_marker("sample")])
    lacking = {
        "gpu": None if torch.cuda.is_available() else "needs a CUDA GPU",
        "compiler": next((None for c in ("c++", "g++", "clang++") if shutil.which(c)), "needs a C++ compiler"),
    }
    for item in items:
        for marker, reason in lacking.items():
            if reason and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


def leave_a_sample(items: list[pytest.Item]) -> None:
    """Mark all but every n-th case of each test ``ci``."""
    seen: Counter[str] = Counter()
    for item in items:
        test = item.nodeid.partition("[")[0]
        if seen[test] % item.get_closest_marker("sample").args[0]:
            item.add_marker(pytest.mark.ci)
        seen[test] += 1


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
    if "torch._dynamo" in sys.modules:
        # torch.compile gives up a function that was compiled eight times, by whatever tests ran here before.
        torch.compiler.reset()


@pytest.fixture(scope="session")
def stand_in_library() -> StandIn:
    if obstacle():
        pytest.skip(obstacle())
    return StandIn(shared_folder())


@pytest.fixture
def stand_in(stand_in_library: StandIn, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    """A GPU that does nothing: Triton's real launcher on CPU tensors, with launches written down."""
    with stand_in_library.active(monkeypatch) as active:
        active.forget()
        yield active
