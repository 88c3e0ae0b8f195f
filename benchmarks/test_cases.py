"""Every case once: checked, timed only if it is right, and checked again."""

from __future__ import annotations

import pytest

from .conftest import ROWS, device_of
from .rows import run_case
from .suite import Planned

_LONGEST = 120.0  # seconds that a case may take


def test_case(planned: Planned, pytestconfig: pytest.Config) -> None:
    """The row of the case goes into the table at the end of the run."""
    seconds, notes = pytestconfig.getoption("--seconds"), pytestconfig.getoption("--memory")
    device = device_of(pytestconfig)
    row = run_case(planned.section, planned.case, device, seconds=seconds, remaining=_LONGEST, notes=notes)
    pytestconfig.stash[ROWS].append(row)
    if row.is_fault:
        pytest.fail(f"{row.status}: {row.error}", pytrace=False)
    if row.status != "ok":
        pytest.skip(f"{row.status}: {row.error}")
