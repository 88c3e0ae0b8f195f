"""``python -m benchmarks.device_report`` writes the report of one device; on a GPU in two parts of under ten minutes.

A worker, a process of its own, runs the rows and sends each one to its parent. A fault on a GPU ends the process that
uses it: then the row in progress is recorded as failed, and a new worker goes on with the next row. The parent writes
the report anew whenever a section is complete.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from wsn_fast.backends.tables import file_name
from wsn_fast.doctor.measuring.machine import gpu_state, model_of

from .provenance import ROOT, provenance
from .rows import Row, release, run_case, store
from .shapes import PROFILES
from .suite import PARTS, Planned, plan
from .tables import markdown

ROW_SECONDS = 120.0  # a row that takes longer hangs
FAULT = 3  # exit status of a worker whose GPU does not answer any more, between two rows


class Report:
    """What has been measured so far."""

    def __init__(self, planned: Sequence[Planned]) -> None:
        self.planned, self.rows, self.facts = planned, list[Row](), {"complete": False}

    def fill(self, status: str, error: str, count: int = 1) -> None:
        """Say of the next rows why they have no time."""
        for row in self.planned[len(self.rows) :][:count]:
            self.rows.append(Row.of(row.section, row.case, status=status, error=error))

    def write(self, out: Path) -> None:
        """``report.json`` and ``report.md``."""
        out.mkdir(parents=True, exist_ok=True)
        store(out / "report.json", self.facts, self.rows)
        title = f"Device report: {self.facts.get('device')}"
        (out / "report.md").write_text(markdown(title, self.facts, self.rows), "utf-8")


def work(options: argparse.Namespace, first: int, parent: Connection) -> None:
    """The worker: it runs the plan from row ``first`` on, and sends rows and facts."""
    if options.threads:
        torch.set_num_threads(options.threads)
    device, section, deadline = torch.device(options.device), "", 0.0
    parent.send({"dry run, times mean nothing": options.shapes == "tiny", **provenance(device)})
    for row in _plan(options)[first:]:
        if row.section != section:
            section, deadline = row.section, options.until
            if options.seconds:  # a dry run may take its time
                deadline = min(deadline, time.time() + row.seconds)
        remaining = deadline - time.time()
        if remaining > 0:
            result = run_case(section, row.case, device, seconds=options.seconds, remaining=remaining)
        else:
            error = f"the {row.seconds:.0f} s of the section were over"
            result = Row.of(section, row.case, status="skipped", error=error)
        parent.send(result)
        try:
            release(device)
        except Exception:  # an error of the GPU's, which stays until the process ends
            sys.exit(FAULT)
    parent.send({f"{name} at the end": value for name, value in gpu_state().items()})


def supervise(worker: Callable[[int, Connection], None], report: Report, out: Path, until: float) -> None:
    """Run workers until the plan is done or ``until``, in seconds since the epoch, without touching the device.

    A new process calls ``worker`` with the place of its first row and a connection to send rows to. Raises
    ``RuntimeError`` if it ends before it can begin a row.
    """
    context = multiprocessing.get_context("spawn")
    while len(report.rows) < len(report.planned) and time.time() < until:
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=worker, args=(len(report.rows), theirs))
        process.start()
        theirs.close()
        begun = _receive(ours, report, out, until)
        process.join(5)
        process.kill()
        process.join()
        if not begun:
            raise RuntimeError(f"a worker ended with status {process.exitcode} before its first row")
        if time.time() < until and process.exitcode != FAULT:
            report.fill("failed", f"the process ended with status {process.exitcode} in this row")


def _receive(connection: Connection, report: Report, out: Path, until: float) -> bool:
    """Take what a worker sends until it ends, hangs in a row or is out of time; returns whether it sent anything."""
    begun = False
    while connection.poll(max(0.0, min(ROW_SECONDS, until + ROW_SECONDS / 4 - time.time()))):
        try:
            message = connection.recv()
        except EOFError:
            break
        begun = True
        if isinstance(message, dict):
            report.facts |= message
            continue
        if report.rows and report.rows[-1].section != message.section:
            report.write(out)
        report.rows.append(message)
    return begun


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; exit status 1 if a row was wrong."""
    options = _options(arguments)
    report = Report(_plan(options))
    try:
        supervise(partial(work, options), report, options.out, options.until)
    finally:
        report.facts["complete"] = len(report.rows) == len(report.planned)
        report.fill("skipped", "not reached in time", len(report.planned))
        report.write(options.out)
    print((options.out / "report.md").read_text("utf-8"))
    return int(any(row.status == "wrong" for row in report.rows))


def _plan(options: argparse.Namespace) -> list[Planned]:
    shapes, device = PROFILES[options.shapes], torch.device(options.device)
    return plan(shapes, device, compiled=options.compiled, part=options.part, only=options.only)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.device_report", description=__doc__)
    add = parser.add_argument
    add("--out", type=Path, help="folder of the report; default benchmarks/results/<date>-<device>")
    add("--dry", action="store_true", help="run all code on the CPU, at tiny shapes: no measurement")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    add("--shapes", choices=sorted(PROFILES), help="default: gpu on a GPU, large on a CPU")
    add("--part", choices=("all", *PARTS), default="all", help="whole training steps, or the rest")
    add("--only", default="", metavar="TEXT", help="rows whose name contains it")
    add("--minutes", type=float, default=7.2, help="all in all")
    add("--seconds", type=float, default=0.12, help="of measuring, for a row")
    add("--no-compiled", dest="compiled", action="store_false", help="leave torch.compile out")
    add("--threads", type=int, default=0, help="torch.set_num_threads; 0 leaves torch's own choice")
    options = parser.parse_args(arguments)
    if options.dry:
        options.device, options.shapes, options.seconds, options.minutes = "cpu", "tiny", 0.0, 60.0
    options.shapes = options.shapes or ("gpu" if options.device.startswith("cuda") else "large")
    options.until = time.time() + 60 * options.minutes
    if options.out is None:
        name = f"{time.strftime('%Y-%m-%d')}-{Path(file_name(model_of(torch.device(options.device)))).stem}"
        options.out = ROOT / "benchmarks" / "results" / (name + f"-{options.part}" * (options.part != "all"))
    return options


if __name__ == "__main__":
    sys.exit(main())
