"""``pytest benchmarks``: the options, the cases that they choose, and the table at the end."""

from __future__ import annotations

import os
from collections.abc import Generator
from pathlib import Path

import pytest
import torch

from .provenance import provenance
from .rows import Row, store
from .shapes import PROFILES
from .suite import plan
from .tables import summary

ROWS = pytest.StashKey[list[Row]]()

# Triton's interpreter turns a loop's bounds from arrays of one element into integers, and computes with values that are
# not finite.
_FILTERS = ("ignore:Conversion of an array with ndim:DeprecationWarning", "ignore:.*encountered in:RuntimeWarning")


def pytest_addoption(parser: pytest.Parser) -> None:
    """What to measure."""
    add = parser.getgroup("wsn_fast benchmarks").addoption
    add("--shapes", choices=sorted(PROFILES), default="small", help="which shapes to measure")
    add("--device", default=None, help="cpu or cuda; the GPU if there is one")
    add("--threads", type=int, default=None, help="torch.set_num_threads")
    add("--seconds", type=float, default=0.3, help="of measuring per case; 0 checks and times a single call")
    add("--compile", action="store_true", help="also what goes through torch.compile, which takes a while")
    add("--memory", action="store_true", help="also the peak memory of steps of large layers")
    add("--results", type=Path, default=None, help="a JSON file to write the results to")


def device_of(config: pytest.Config) -> torch.device:
    """Where the cases run."""
    return torch.device(config.getoption("--device") or ("cuda" if torch.cuda.is_available() else "cpu"))


def pytest_configure(config: pytest.Config) -> None:
    """Threads, before anything computes."""
    config.stash[ROWS] = []
    if config.getoption("--threads"):
        torch.set_num_threads(config.getoption("--threads"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test per case."""
    if "planned" in metafunc.fixturenames:
        config = metafunc.config
        shapes, compiled = PROFILES[config.getoption("--shapes")], config.getoption("--compile")
        rows, marks = plan(shapes, device_of(config), compiled=compiled), [*map(pytest.mark.filterwarnings, _FILTERS)]
        metafunc.parametrize("planned", [pytest.param(row, id=str(row.case), marks=marks) for row in rows])


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> Generator[None, None, None]:
    """Print the table after everything else, and write the results."""
    yield
    rows = config.stash[ROWS]
    if not rows:
        return
    facts = {**provenance(device_of(config)), "interpreted": os.environ.get("TRITON_INTERPRET") == "1"}
    terminalreporter.section("benchmarks")
    if not config.getoption("--seconds"):
        terminalreporter.write_line("A single call of each was timed: these times mean nothing.")
    for line in summary(facts, rows):
        terminalreporter.write_line(line)
    if config.getoption("--results"):
        store(config.getoption("--results"), facts, rows)
