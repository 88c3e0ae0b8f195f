"""What the commands ``train``, ``sweep``, ``eval`` and ``report`` do."""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from wsn_fast import ForgottenError, launch
from wsn_fast.train import config, exports, page, records, tables
from wsn_fast.train.checkpoint import CheckpointError
from wsn_fast.train.evaluation import evaluate_run
from wsn_fast.train.fastest import MEASURED, with_fastest
from wsn_fast.train.folder import check_unused
from wsn_fast.train.processes import ALONE, PeerLostError, Processes, StoppedError, Terminated, is_lost, join
from wsn_fast.train.report import NUMBERS, Console, differences, in_words, plot
from wsn_fast.train.run import Run
from wsn_fast.train.safe_files import read_json, write_atomic
from wsn_fast.train.seeds import Row, over_seeds
from wsn_fast.train.sweep import make_sweep, run_sweep

_FAILURES = (
    ValueError, OSError, ImportError, CheckpointError, FloatingPointError, ForgottenError, torch.OutOfMemoryError,
    MemoryError,
)  # fmt: skip
_LOST = "another process of this run has failed or was killed; what started the processes says which"
# The options of `train` that are not settings.
_NO_SETTINGS = ("command", "debug", "quiet", "resume", "checkpoint")


def run(args: argparse.Namespace) -> int:
    """Run a command; returns its exit code. A failure that a user can understand is one line, not a traceback, and of
    several processes one prints it.

    Args:
        args: what the parser of ``wsn-fast`` made; ``command`` is the name of the command.
    """
    processes = ALONE
    try:
        if args.command == "report":
            return _report(args) if launch.rank() == 0 else 0
        if args.command == "sweep":
            return _sweep(args)
        processes = join()
        code = _COMMANDS[args.command](args, processes)
        processes.leave()
        return code
    except BrokenPipeError:
        raise
    except StoppedError:
        processes.give_up()
        return 2
    except (Exception, Terminated) as error:
        processes.give_up()
        if not processes.speaks():
            return 2
        # PyTorch has no class of its own for a CPU without memory.
        known = isinstance(error, _FAILURES) or (isinstance(error, RuntimeError) and "allocate memory" in str(error))
        if args.debug or not (known or is_lost(error)):
            raise
        says = _LOST if is_lost(error) and not isinstance(error, PeerLostError) else str(error) or type(error).__name__
        print(f"wsn-fast: error: {says}", file=sys.stderr)
        return 1 if isinstance(error, (FloatingPointError, ForgottenError)) else 2


def _train(args: argparse.Namespace, processes: Processes) -> int:
    console = Console(quiet=args.quiet or not processes.is_first)
    settings = processes.first(lambda: _settings(args, console, processes))
    if settings is not None:
        run = Run.start(settings, console, processes)
    else:
        other = {"data": args.data, "data_dir": args.data_dir, "device": args.device}
        run = Run.resume(Path(args.resume), console, processes, name=args.checkpoint, **other)
    settings = run.settings
    together = f" ({processes.size} processes)" if processes.size > 1 else ""
    console.say(
        f"{settings.stream} {settings.data}: {settings.tasks} tasks, {settings.net}, "
        f"density {settings.density:g}, rule {settings.rule}, {run.device}{together}, in {run.folder}"
    )
    try:
        results = run.finish()
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"`wsn-fast train --resume {run.folder}` continues") from None
    except (RuntimeError, Terminated) as error:
        if not is_lost(error):
            raise
        raise PeerLostError(f"{_LOST}. `wsn-fast train --resume {run.folder}` continues") from error
    finally:
        console.close()
    console.say(in_words(results))
    return 0


def _settings(args: argparse.Namespace, console: Console, processes: Processes = ALONE) -> config.TrainConfig | None:
    """The settings of a new run; None for one that is resumed, which has its own."""
    given = {name: value for name, value in vars(args).items() if name not in _NO_SETTINGS}
    if args.resume is None:
        if args.checkpoint is not None:
            raise ValueError("--checkpoint: expected together with --resume RUN")
        unknown = [name for name in MEASURED if given.get(name) == "auto"]
        return _measured(given, unknown, console) if unknown and processes.size == 1 else config.resolve(**given)
    extra = [name for name, value in given.items() if value is not None and name not in ("data", "data_dir", "device")]
    if extra:
        raise ValueError(f"--resume: the settings are those of the run, got {', '.join(extra)} as well")
    return None


def _sweep(args: argparse.Namespace) -> int:
    grid = {"densities": args.densities, "seeds": args.seeds}
    other = (*_NO_SETTINGS, *grid, "jobs")
    sweep = make_sweep({name: value for name, value in vars(args).items() if name not in other}, **grid)
    failed = run_sweep(sweep, args.jobs, quiet=args.quiet)
    begun = [run.out for run in sweep.runs.values() if (Path(run.out) / "config.json").is_file()]
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere if args.quiet else sys.stdout):
        if begun:
            from wsn_fast.train.command_line import main  # it imports this file

            main(["report", *begun, "--html", str(sweep.folder / "report.html")])
    for name, line in failed.items():
        print(f"wsn-fast: error: {sweep.folder / name}: {line}", file=sys.stderr)
    return 1 if failed else 0


def _measured(given: Mapping[str, Any], unknown: Sequence[str], console: Console) -> config.TrainConfig:
    """The settings, where the unknown ones are those that are fastest on this machine."""
    settings = config.resolve(**{**given, **dict.fromkeys(unknown)})
    check_unused(Path(settings.out))  # before anything is measured for it
    settings, seconds = with_fastest(settings, unknown, console.loading)
    chosen = ", ".join(f"{name}: {getattr(settings, name)}" for name in unknown)
    measured = ", ".join(
        f"{1000 * taken:.2f} ms with {' '.join(str(getattr(way, name)) for name in unknown)}"
        for way, taken in seconds.items()
    )
    console.say(chosen + (f" (a step takes {measured})" if measured else ""))
    return settings


def _eval(args: argparse.Namespace, processes: Processes) -> int:
    folder = Path(args.run)
    other = {"data": args.data, "data_dir": args.data_dir, "device": args.device}
    measured = evaluate_run(folder, processes, name=args.checkpoint, **other)
    return processes.first(lambda: _compare(folder, measured))


def _compare(folder: Path, measured: Mapping[str, Any]) -> int:
    """Print what was measured, and compare it with ``results.json``."""
    tasks = len(measured["reuse"])
    print(f"{tasks} of {measured['config']['tasks']} tasks finished, all verified to the bit")
    for task, accuracy in zip(measured["reuse"], measured["accuracy_matrix"][-1], strict=True):
        print(
            f"task {task['task']}: test accuracy {accuracy:.2f} %, density {task['density']:.2f} %, "
            f"reuse {task['reuse']:.2f} %, new {task['new']:.2f} %"
        )
    print(in_words(measured))
    path = folder / "results.json"
    if not path.is_file():
        print(f"nothing to compare with: there is no {path}")
        return 0
    lines = differences(_read_results(folder), measured)
    for line in lines:
        print(f"wsn-fast: differs: {line}", file=sys.stderr)
    if not lines:
        print(f"every number is that of {path}")
    return 1 if lines else 0


def _report(args: argparse.Namespace) -> int:
    runs, problems = _read_runs(args.runs)
    for line in problems:
        print(f"wsn-fast: error: {line}", file=sys.stderr)
    if not runs:
        return 2
    for run in runs:
        for note in run.notes:
            print(f"wsn-fast: note: {note}", file=sys.stderr)
    measured = {run.name: run.results for run in runs if run.results is not None}
    rows = over_seeds(measured)
    columns = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    for table in _tables(measured, rows, columns, paper=args.paper):
        print(table)
    for run in runs:
        if run.results is None:
            print(f"{run.name}: no task has been finished yet")
    path = Path(args.html or (Path(runs[0].name) / "report.html" if len(args.runs) == 1 else "wsn-fast-report.html"))
    page.write(path, runs, problems)
    print(f"all of it in {path}")
    if args.csv is not None:
        write_atomic(Path(args.csv), exports.csv_of_runs(runs))
        print(f"a line for each run in {args.csv}")
    if args.latex is not None:
        write_atomic(Path(args.latex), exports.latex_of_seeds(rows))
        print(f"a LaTeX table over seeds in {args.latex}")
    return 2 if problems else 0


def _read_runs(names: Sequence[str]) -> tuple[list[records.Record], list[str]]:
    """The runs that can be read, with their plots drawn again, and what is wrong with the others."""
    runs, problems = [], []
    for name in dict.fromkeys(names):
        try:
            runs.append(records.read(name))
        except Exception as error:  # whatever is wrong with one run, the others are reported
            problems.append(str(error) if isinstance(error, (OSError, ValueError)) else f"{name}: {error!r}")
    for run in runs:
        try:
            if run.finished and run.results is not None:
                plot(run.results, Path(run.name))
        except Exception as error:
            problems.append(f"{run.name}: its plots cannot be drawn: {error}")
    return runs, problems


def _tables(
    measured: Mapping[str, Mapping[str, Any]], rows: Sequence[Row], columns: int | None, *, paper: bool
) -> Iterator[str]:
    """The paper's table, or the tables of runs and, if several runs differ in the seed alone, of means over seeds."""
    if paper:
        yield tables.of_paper(rows, columns)
        return
    if measured:
        yield tables.of_runs(measured, columns)
    if any(row.seeds > 1 for row in rows):
        yield f"\n{tables.of_seeds(rows, columns)}"


def _read_results(folder: Path) -> dict[str, Any]:
    path = folder / "results.json"
    if not path.is_file():
        way_on = f"; `wsn-fast train --resume {folder}` finishes it" if (folder / "config.json").is_file() else ""
        raise FileNotFoundError(f"{folder} holds no finished run: there is no {path}{way_on}")
    try:
        results: dict[str, Any] = read_json(path)
        missing = {"config", *NUMBERS} - results.keys()
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if missing:
        raise ValueError(f"{path} is damaged: it has no {', '.join(sorted(missing))}")
    return results


_COMMANDS: Mapping[str, Callable[[argparse.Namespace, Processes], int]] = MappingProxyType(
    {"train": _train, "eval": _eval}
)
