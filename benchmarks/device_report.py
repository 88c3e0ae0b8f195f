"""The report of one device: ``python -m benchmarks.device_report``, from a bare checkout; on a GPU in two parts, each
in under ten minutes.

The rows are run by a worker, a process of its own: a fault on a GPU ends whatever uses it, and then the row in progress
gets the blame and a new worker goes on behind it. The worker writes each row to a journal at once; the report is
written anew after every section.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from . import ceilings
from .cases import Case
from .markdown import markdown
from .provenance import ROOT, gpu_state, provenance, slug
from .rows import Row, release, run_case
from .shapes import PROFILES, TINY
from .suite import PARTS, SECTIONS

ROW_SECONDS = 120.0  # a row that takes longer hangs
_POLL_SECONDS = 0.1
_FAULT = 3  # exit status of a worker whose GPU has given up


class Planned(NamedTuple):
    """A row to come: its section, the seconds that the section may take, and its case."""

    section: str
    seconds: float
    case: Case


def plan(shapes_name: str, device: torch.device, compiled: bool, part: str = "all") -> list[Planned]:
    """Every row of a part, in order. Makes no data and does not touch the device."""
    shapes = PROFILES[shapes_name]
    first = [Planned(ceilings.SECTION, 60.0, case) for case in ceilings.ceiling_cases(device, shapes is TINY)]
    sections = [s for s in SECTIONS if (compiled or not s.compiled) and part in ("all", s.part)]
    return first + [Planned(s.name, s.seconds, case) for s in sections for case in s.cases(shapes, device)]


class Journal:
    """What happened, a line of JSON for each event, in a file that survives whoever writes it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def note(self, **entry: Any) -> None:
        """Add an event."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def entries(self) -> Iterator[dict[str, Any]]:
        """Every event whose line is complete."""
        lines = self.path.read_text("utf-8").splitlines(keepends=True) if self.path.exists() else []
        return (json.loads(line) for line in lines if line.endswith("\n"))

    def size(self) -> int:
        """Bytes so far: grows with every event."""
        return self.path.stat().st_size if self.path.exists() else 0

    def begun(self) -> int:
        """The last row that was begun; -1 before the first."""
        return max((entry["begin"] for entry in self.entries() if "begin" in entry), default=-1)

    def rows(self) -> dict[int, Row]:
        """The rows that ended, by their place in the plan."""
        return {entry["end"]: Row.from_dict(entry["row"]) for entry in self.entries() if "end" in entry}

    def facts(self) -> dict[str, Any]:
        """Where the rows come from, and the device's state at the end."""
        facts: dict[str, Any] = {}
        for entry in self.entries():
            facts |= entry.get("facts", {})
        return facts


# --- the worker
def work(options: argparse.Namespace, journal: Journal) -> int:
    """Run the plan from row ``options.first`` on; the exit status."""
    device = torch.device(options.device)
    planned = plan(options.shapes, device, options.compiled, options.part)
    if options.first == 0:
        journal.note(facts={"dry run, times mean nothing": options.shapes == "tiny", **provenance(device)})
    section, deadline, rates = "", 0.0, None
    for index in range(options.first, len(planned)):
        row = planned[index]
        if row.section != section:
            section, deadline = row.section, min(time.time() + row.seconds, options.until)
            rates = ceilings.rates(journal.rows().values())
        journal.note(begin=index)
        remaining = deadline - time.time()
        if remaining > 0:
            result = run_case(section, row.case, device, rates, seconds=options.seconds, remaining=remaining)
        else:
            result = Row.of(
                section, row.case, status="skipped", error=f"the {row.seconds:.0f} s of the section were over"
            )
        journal.note(end=index, row=result.as_dict())
        try:
            release(device)
        except Exception:  # an error of the GPU's, which stays until the process ends
            return _FAULT
    journal.note(facts={f"{name} at the end": value for name, value in gpu_state().items()})
    return 0


# --- its parent, which does not touch the device
def supervise(
    command: Sequence[str], journal: Journal, planned: Sequence[Planned], write: Callable[[], None], until: float
) -> None:
    """Run workers until the plan is done or the time is up.

    Args:
        command: of a worker, to which ``--first N`` is added.
        journal: that it writes.
        planned: the rows; one that a worker does not survive is recorded as failed.
        write: called whenever a section is complete.
        until: seconds since the epoch.

    Raises:
        RuntimeError: a worker ended without beginning a row.
    """
    first = 0
    while first < len(planned):
        with subprocess.Popen([*command, "--first", str(first)], cwd=ROOT) as worker:
            _watch(worker, journal, planned, write, until)
        begun = journal.begun()
        if worker.returncode == 0 or time.time() > until:
            return
        if begun < first:
            raise RuntimeError(f"a worker ended with status {worker.returncode} before its first row")
        if begun not in journal.rows():
            error = f"the process ended with status {worker.returncode} in this row"
            journal.note(end=begun, row=Row.of(planned[begun].section, planned[begun].case, error=error).as_dict())
        first = begun + 1


def _watch(
    worker: subprocess.Popen[bytes],
    journal: Journal,
    planned: Sequence[Planned],
    write: Callable[[], None],
    until: float,
) -> None:
    """Wait for a worker; end one that hangs in a row, or that is out of time."""
    size, changed, section = -1, time.time(), ""
    while worker.poll() is None:
        time.sleep(_POLL_SECONDS)
        if journal.size() != size:
            size, changed = journal.size(), time.time()
            now = planned[max(journal.begun(), 0)].section
            if now != section:
                section = now
                write()
        if time.time() - changed > ROW_SECONDS or time.time() > until + ROW_SECONDS / 4:
            worker.kill()


def write_report(out: Path, journal: Journal, planned: Sequence[Planned], *, finished: bool) -> list[Row]:
    """``report.json`` and ``report.md`` from what the journal has; the rows."""
    done = journal.rows()
    rates = ceilings.rates(done.values())
    facts = journal.facts() | {"complete": finished and len(done) == len(planned)}
    if rates is not None:
        facts["copy bandwidth, GB/s"] = round(rates.bandwidth / 1e9, 1)
        facts |= {f"{dtype} products, TFLOP/s": round(rate / 1e12, 2) for dtype, rate in rates.flops.items()}
    rows = [done[index] for index in sorted(done)]
    if finished:
        missing = (row for index, row in enumerate(planned) if index not in done)
        rows += [Row.of(row.section, row.case, status="skipped", error="not reached in time") for row in missing]
    data = {"facts": facts, "rows": [row.as_dict() for row in rows]}
    (out / "report.json").write_text(json.dumps(data, indent=1) + "\n", "utf-8")
    (out / "report.md").write_text(markdown(f"Device report: {facts.get('device')}", facts, rows), "utf-8")
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; exit status 1 if a row was wrong."""
    options = _options(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    journal = Journal(options.out / "journal.jsonl")
    if options.first is not None:
        if options.threads:
            torch.set_num_threads(options.threads)
        return work(options, journal)
    journal.path.unlink(missing_ok=True)
    planned = plan(options.shapes, torch.device(options.device), options.compiled, options.part)
    command = [
        sys.executable,
        "-m",
        "benchmarks.device_report",
        "--out",
        str(options.out),
        "--until",
        str(options.until),
    ]
    for name in ("device", "shapes", "part", "seconds", "threads"):
        command += [f"--{name}", str(getattr(options, name))]
    command += [] if options.compiled else ["--no-compiled"]

    def write() -> None:
        write_report(options.out, journal, planned, finished=False)

    try:
        supervise(command, journal, planned, write, options.until)
    finally:
        rows = write_report(options.out, journal, planned, finished=True)
    print((options.out / "report.md").read_text("utf-8"))
    return int(any(row.status == "wrong" for row in rows))


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.device_report", description=__doc__)
    parser.add_argument("--out", type=Path, help="folder of the report; default benchmarks/results/<date>-<device>")
    parser.add_argument(
        "--dry", action="store_true", help="every code path, on the CPU, at tiny shapes: no measurement"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    parser.add_argument("--shapes", choices=sorted(PROFILES), help="default: gpu on a GPU, large on a CPU")
    parser.add_argument("--part", choices=("all", *PARTS), default="all", help="whole training steps, or the rest")
    parser.add_argument("--minutes", type=float, default=7.2, help="all in all")
    parser.add_argument("--seconds", type=float, default=0.12, help="of measuring, for a row")
    parser.add_argument("--no-compiled", dest="compiled", action="store_false", help="leave torch.compile out")
    parser.add_argument("--threads", type=int, default=0, help="torch.set_num_threads; 0 leaves torch's own choice")
    parser.add_argument("--first", type=int, help=argparse.SUPPRESS)  # of a worker: the row to begin with
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.dry:
        options.device, options.shapes, options.seconds = "cpu", "tiny", 0.0
    options.shapes = options.shapes or ("gpu" if options.device.startswith("cuda") else "large")
    options.until = options.until or time.time() + 60 * options.minutes
    if options.out is None:
        name = str(provenance(torch.device("cpu"))["cpu"])
        if options.device.startswith("cuda"):
            name = torch.cuda.get_device_name(options.device)
        ending = "" if options.part == "all" else f"-{options.part}"
        options.out = ROOT / "benchmarks" / "results" / f"{time.strftime('%Y-%m-%d')}-{slug(name)}{ending}"
    options.out = options.out.resolve()
    return options


if __name__ == "__main__":
    sys.exit(main())
