"""Rows of results: a case is checked, timed and checked again. A wrong result gets no time; a failure is a row too."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from wsn_fast.doctor.measuring.checks import UnavailableError, WrongResultError
from wsn_fast.doctor.measuring.scrub import scrubbed
from wsn_fast.doctor.measuring.timing import MIN_REPEATS, time_calls

from .cases import Case, Prepared, verify

_LONG_FIRST_CALL = 1.0  # seconds: it may have been a compiler's


@dataclass
class Row:
    """One line of a report: a case, and what came of it."""

    section: str
    operation: str
    contender: str
    shape: str
    dtype: str
    status: str = "failed"  # or "ok", "wrong", "unavailable" (does not exist here), "skipped" (no time left)
    check: str = ""  # what the result was compared with
    median_us: float | None = None  # times are None unless the status is "ok"
    p20_us: float | None = None
    p80_us: float | None = None
    repeats: int = 0
    how: str = ""  # see wsn_fast.doctor.measuring.timing.Timing
    bytes: float = 0.0  # what one call must move and compute at least
    flops: float = 0.0
    notes: dict[str, float] = field(default_factory=dict)
    error: str = ""  # why there is no time

    @classmethod
    def of(cls, section: str, case: Case, **fields: Any) -> Row:
        """The row of a case."""
        return cls(section, case.operation, case.contender, case.shape, case.dtype, **fields)

    @property
    def is_fault(self) -> bool:
        """Whether it is wrong or has failed."""
        return self.status in ("wrong", "failed")


def run_case(
    section: str, case: Case, device: torch.device, *, seconds: float, remaining: float, notes: bool = True
) -> Row:
    """Prepare, check, time for about ``seconds``, check again; returns a row whatever happened.

    A case that would take longer than the ``remaining`` seconds is skipped, and the row says so. ``notes`` says whether
    to measure peak memory and the like too.
    """
    row = Row.of(section, case)
    try:
        _run(row, case, device, seconds, remaining, notes)
    except UnavailableError as reason:
        row.status, row.error = "unavailable", scrubbed(reason)
    except WrongResultError as error:
        row.status, row.error = "wrong", scrubbed(error)
    except Exception as error:  # of any kind: the report goes on, and says what happened
        row.status, row.error = "failed", scrubbed(f"{type(error).__name__}: {error}")
    if row.status != "ok":
        row.median_us = row.p20_us = row.p80_us = None
    return row


def release(device: torch.device) -> None:
    """Give back what the last case held, before the next one takes its own."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


def _run(row: Row, case: Case, device: torch.device, seconds: float, remaining: float, notes: bool) -> None:
    """Fill in the check and the times, or that there is too little time left."""
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
    row.bytes, row.flops = prepared.work
    row.notes = prepared.notes() if notes else {}
    row.status = "ok"


def _timed(prepared: Prepared, device: torch.device) -> float:
    begin = time.perf_counter()
    prepared.calls[0]()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin


def store(path: Path, facts: Mapping[str, Any], rows: Sequence[Row]) -> None:
    """Write results as JSON: ``facts`` says where they come from (:mod:`benchmarks.provenance`), ``rows`` has them."""
    path.write_text(json.dumps({"facts": facts, "rows": [asdict(row) for row in rows]}, indent=1) + "\n", "utf-8")


def load(path: Path) -> tuple[dict[str, Any], list[Row]]:
    """The facts and rows that :func:`store` wrote."""
    data = json.loads(path.read_text("utf-8"))
    return data["facts"], [Row(**row) for row in data["rows"]]
