"""Rows of a report: a case run, and what came of it. A wrong result never gets a time; a failure is a row as well."""

from __future__ import annotations

import gc
import re
import time
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from .cases import Case, Kernel, Prepared, Rates, UnavailableError, WrongResultError, floor_us, verify
from .timing import MIN_REPEATS, time_calls

_LONG_FIRST_CALL = 1.0  # seconds: it may have been a compiler's


@dataclass
class Row:
    """One line of a report.

    Attributes:
        section, operation, contender, shape, dtype: which case.
        status: "ok", "wrong", "failed", "unavailable" (does not exist here) or "skipped" (no time left).
        check: what the result was compared with, and how closely it agreed.
        median_us, p20_us, p80_us, repeats, how: see :class:`benchmarks.timing.Timing`; None unless "ok".
        floor_us: from the bytes and operations that the case must do and the rates of this device, this run.
        notes: further numbers.
        kernels: the profile of a call, for rows that have one.
        error: why there is no time.
    """

    section: str
    operation: str
    contender: str
    shape: str
    dtype: str
    status: str = "failed"
    check: str = ""
    median_us: float | None = None
    p20_us: float | None = None
    p80_us: float | None = None
    repeats: int = 0
    how: str = ""
    floor_us: float | None = None
    notes: dict[str, float] = field(default_factory=dict)
    kernels: list[Kernel] = field(default_factory=list)
    error: str = ""

    @classmethod
    def of(cls, section: str, case: Case, **fields: Any) -> Row:
        """The row of a case."""
        return cls(section, case.operation, case.contender, case.shape, case.dtype, **fields)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Row:
        """The inverse of :meth:`as_dict`."""
        fields = {name: value for name, value in data.items() if name != "ratio"}
        return cls(**fields | {"kernels": [Kernel(*kernel) for kernel in fields.get("kernels", ())]})

    @property
    def group(self) -> tuple[str, str, str]:
        """Rows of one group do the same work."""
        return self.operation, self.shape, self.dtype

    @property
    def ratio(self) -> float | None:
        """Time over floor."""
        return self.median_us / self.floor_us if self.median_us and self.floor_us else None

    def as_dict(self) -> dict[str, Any]:
        """For JSON: the fields and the ratio."""
        return {**asdict(self), "ratio": self.ratio}


def run_case(
    section: str, case: Case, device: torch.device, rates: Rates | None, *, seconds: float, remaining: float
) -> Row:
    """Prepare, check, time, check again.

    Args:
        section: the heading.
        case: what to run.
        device: where.
        rates: of the device, for the floor.
        seconds: about how long to measure.
        remaining: seconds that the section has left; a case that would take longer is skipped, and the row says so.

    Returns:
        The row, whatever happened.
    """
    row = Row.of(section, case)
    try:
        _run(row, case, device, rates, seconds, remaining)
    except UnavailableError as reason:
        row.status, row.error = "unavailable", scrubbed(reason)
    except WrongResultError as error:
        row.status, row.error = "wrong", scrubbed(error)
    except Exception as error:  # of any kind: the report goes on, and says what happened
        row.status, row.error = "failed", scrubbed(f"{type(error).__name__}: {error}")
    if row.status != "ok":
        row.median_us = row.p20_us = row.p80_us = row.floor_us = None
    return row


def release(device: torch.device) -> None:
    """Give back what the last case held, before the next one takes its own."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


def _run(row: Row, case: Case, device: torch.device, rates: Rates | None, seconds: float, remaining: float) -> None:
    begin = time.perf_counter()
    torch.manual_seed(0)
    prepared = case.prepare()
    once = time.perf_counter()
    row.check = verify(prepared)
    once = time.perf_counter() - once
    if once > _LONG_FIRST_CALL:
        once = _timed(prepared, device)
    if once * (MIN_REPEATS + 1) > remaining - (time.perf_counter() - begin):
        row.status, row.error = "skipped", f"one call took {once:.1f} s, and {remaining:.0f} s of the section were left"
        return
    timing = time_calls(prepared.calls, device, seconds=seconds, capture=prepared.capture, loop=prepared.loop)
    row.median_us, row.p20_us, row.p80_us, row.repeats, row.how = timing
    again = prepared.recheck() if prepared.recheck is not None else verify(prepared)
    row.check += "" if again == row.check else f"; after timing {again}"
    row.notes = prepared.notes()
    row.kernels = [] if prepared.kernels is None else prepared.kernels()
    row.floor_us = None if rates is None else floor_us(prepared.work, rates, case.dtype)
    row.status = "ok"


def _timed(prepared: Prepared, device: torch.device) -> float:
    begin = time.perf_counter()
    prepared.calls[0]()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin


def scrubbed(text: object) -> str:
    """A message as it may be published: paths down to file names, and not endless."""
    return re.sub(r"(?:/[\w.+@-]+)+/(?=[\w.+-])", "", str(text)).strip()[:600]
