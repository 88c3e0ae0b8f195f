"""``pytest benchmarks``: the options, and the cases that they choose."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from .provenance import provenance
from .shapes import PROFILES
from .suite import cases

# Triton's interpreter turns a loop's bounds from arrays of one element into integers, and computes with what is not
# finite as it comes; torch.compile speaks of its own use of what it deprecates.
_FILTERS = ("ignore:Conversion of an array with ndim:DeprecationWarning", "ignore:.*encountered in:RuntimeWarning")


def pytest_addoption(parser: pytest.Parser) -> None:
    """What to measure."""
    group = parser.getgroup("wsn_fast benchmarks")
    group.addoption("--shapes", choices=sorted(PROFILES), default="small", help="which shapes to measure")
    group.addoption("--device", default=None, help="cpu or cuda; the GPU if there is one")
    group.addoption("--compile", action="store_true", help="also what goes through torch.compile, which takes a while")
    group.addoption("--threads", type=int, default=None, help="torch.set_num_threads")


def _device(config: pytest.Config) -> torch.device:
    return torch.device(config.getoption("--device") or ("cuda" if torch.cuda.is_available() else "cpu"))


def pytest_configure(config: pytest.Config) -> None:
    """Threads, before anything computes."""
    if config.getoption("--threads"):
        torch.set_num_threads(config.getoption("--threads"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test per case."""
    if "case" in metafunc.fixturenames:
        config = metafunc.config
        shapes = PROFILES[config.getoption("--shapes")]
        found = list(cases(shapes, _device(config), compiled=config.getoption("--compile")))
        metafunc.parametrize("case", found, ids=str)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The interpreter's warnings are not ours."""
    for item in items:
        if "case" in getattr(item, "fixturenames", ()):
            for text in _FILTERS:
                item.add_marker(pytest.mark.filterwarnings(text))


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where the cases run."""
    return _device(request.config)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """Stored results say where they come from, and not how the machine is called in its network."""
    machine_info.clear()
    machine_info.update(provenance(_device(config)), interpreted=os.environ.get("TRITON_INTERPRET") == "1")
