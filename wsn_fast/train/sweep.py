"""A sweep: the runs of a grid of densities and seeds, each a process of its own, as one command that can be repeated
until all runs are finished."""

from __future__ import annotations

import os
import shlex
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wsn_fast import launch
from wsn_fast.train import config, machine
from wsn_fast.train.children import Job, Pool
from wsn_fast.train.config import TrainConfig
from wsn_fast.train.folder import write_json
from wsn_fast.train.lock import FolderLock
from wsn_fast.train.safe_files import read_json
from wsn_fast.train.sweep_display import Display, Log

_EVERY = 0.3  # seconds between two looks at the runs
_GRID = ("density", "seed")
# They may differ when the sweep is started again.
_FREE = (*_GRID, *config.PLACES)


@dataclass(frozen=True)
class Sweep:
    """The runs of a sweep.

    Attributes:
        folder: holds ``sweep.json``, and the folder and the log of each run.
        densities: those of the grid, each once.
        seeds: likewise.
        runs: the settings of each run, by the name of its folder.
    """

    folder: Path
    densities: Sequence[float]
    seeds: Sequence[int]
    runs: Mapping[str, TrainConfig]

    @property
    def settings(self) -> TrainConfig:
        """The settings of the first run. The others have other densities, seeds and folders."""
        return next(iter(self.runs.values()))


def make_sweep(
    given: Mapping[str, Any], densities: Sequence[float] | None = None, seeds: Sequence[int] | None = None
) -> Sweep:
    """The sweep over a grid. Nothing is written.

    Args:
        given: settings as :func:`wsn_fast.train.config.resolve` takes them; ``out`` is the folder of the sweep.
        densities: those of the grid; None means the one in ``given``, or its default.
        seeds: likewise.

    Raises:
        ValueError: a setting is wrong, a value of the grid stands there twice, or is given as a setting as well.
    """
    for name, values in (("density", densities), ("seed", seeds)):
        plural = "densities" if name == "density" else "seeds"
        if values is not None and given.get(name) is not None:
            raise ValueError(f"{name}: expected no --{name} beside --{plural}, got {given[name]!r}")
        if values is not None and (not values or len({*values}) < len(values)):
            raise ValueError(f"{plural}: expected each value once, got {','.join(map(str, values))}")
    first = config.resolve(**given)
    settings = f"{first.stream}-{config.short_name(first.data)}-{first.preset}"
    folder = Path(given.get("out") or Path("sweeps", settings))
    densities, seeds = densities or [first.density], seeds or [first.seed]
    runs = {}
    for density in densities:
        for seed in seeds:
            name = f"density{density!r}-seed{seed}"
            runs[name] = config.resolve(**{**given, "density": density, "seed": seed, "out": str(folder / name)})
    return Sweep(folder, densities, seeds, runs)


def run_sweep(sweep: Sweep, jobs: int | None = None, *, quiet: bool = False) -> dict[str, str]:
    """Bring every run of a sweep to its end: finished ones are left alone, others resumed or started.

    Args:
        sweep: the sweep.
        jobs: how many runs may train at the same time; None means one for each GPU, or as many as there are CPU cores
            for the threads of each.
        quiet: whether nothing is shown.

    Returns:
        For each run that failed, by its name, the last line of its error.

    Raises:
        KeyboardInterrupt: the sweep was interrupted or terminated. No process of it is left.
        RunInUseError: another process runs the sweep.
        ValueError: the folder holds another sweep, or is that of a run.
    """
    if launch.world_size() > 1:
        raise ValueError(
            "sweep: expected one process, which starts the runs itself, and this one was started by torchrun"
        )
    if jobs is not None and jobs < 1:
        raise ValueError(f"jobs: expected an integer of at least 1, got {jobs!r}")
    sweep.folder.mkdir(parents=True, exist_ok=True)
    lock = FolderLock(sweep.folder)
    with lock.held_unless_failed(), _interrupted_by_signals(sweep.folder):
        _check_or_write(sweep)
        failed = _train(sweep, jobs, quiet)
    lock.release()
    return failed


def _train(sweep: Sweep, jobs: int | None, quiet: bool) -> dict[str, str]:
    display, failed = Display([*sweep.runs], quiet=quiet), {}
    logs = {name: Log(Path(run.out), run.tasks, run.epochs) for name, run in sweep.runs.items()}
    waiting = []
    for name, run in sweep.runs.items():
        if (Path(run.out) / "results.json").is_file():
            display.changed(name, _result(Path(run.out)))
        else:
            waiting.append(Job(name, Path(run.out), _words(run), sweep.folder / f"{name}.log"))
    gpus = _gpus(sweep.settings.device)
    size = jobs or len(gpus) or max(1, machine.cores() // sweep.settings.threads)
    environments = [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in gpus] or [{}]
    with Pool(waiting, min(size, max(1, len(waiting))), environments) as pool:
        while True:
            ended, begun = pool.advance()
            for job in begun:
                display.changed(job.name, "continues" if job.words[1] == "--resume" else "begins")
            for job in [*ended, *pool.running]:
                for state in logs[job.name].read():
                    display.changed(job.name, state)
            for job in ended:
                if job.code:
                    failed[job.name] = job.last_line()
                display.changed(job.name, f"failed: {failed[job.name]}" if job.code else _result(job.folder))
            display.draw({job.name: logs[job.name].says or "begins" for job in pool.running})
            if not pool.running:
                return failed
            time.sleep(_EVERY)


def _words(run: TrainConfig) -> list[str]:
    """What ``wsn-fast`` is called with to begin a run, or to continue it."""
    if (Path(run.out) / "config.json").is_file():
        words = ["train", "--resume", run.out, *(["--data", run.data] if run.stream == "own" else [])]
    else:
        words = [*shlex.split(config.command_line(run))[1:], "--out", run.out]
    return words if run.data_dir is None else [*words, "--data-dir", run.data_dir]


def _result(folder: Path) -> str:
    try:
        return f"finished, ACC {read_json(folder / 'results.json')['acc']:.2f} %"
    except (OSError, ValueError, TypeError, LookupError):
        return "finished, but its results.json is damaged"


def _check_or_write(sweep: Sweep) -> None:
    """Write ``sweep.json``; if it is there, check that it is the same sweep."""
    path = sweep.folder / "sweep.json"
    own = {name: value for name, value in config.portable(sweep.settings).items() if name not in _FREE}
    if (sweep.folder / "config.json").exists():
        raise ValueError(f"out: expected a folder for a sweep, and {str(sweep.folder)!r} is that of a run")
    if not path.is_file():
        write_json(path, {"densities": sweep.densities, "seeds": sweep.seeds, "config": own})
        return
    try:
        stored = read_json(path)
        whole = config.from_dict({**stored["config"], "density": 1.0, "seed": 0, "data_dir": None, "out": "run"})
        found = {name: value for name, value in config.portable(whole).items() if name not in _FREE}
        grid = {"densities": stored["densities"], "seeds": stored["seeds"]}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    changed = [name for name, value in own.items() if found[name] != value]
    changed += [name for name, values in grid.items() if [*getattr(sweep, name)] != values]
    if changed:
        raise ValueError(
            f"out: expected the settings of {path}, but these are others: {', '.join(changed)}. Take another --out for "
            "another sweep"
        )


def _gpus(device: str) -> list[str]:
    """The names of the GPUs that runs on this device would use."""
    import torch

    if device == "cpu" or not torch.cuda.is_available():
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    names = [name for name in visible.split(",") if name]
    return names[: torch.cuda.device_count()] or [str(number) for number in range(torch.cuda.device_count())]


@contextmanager
def _interrupted_by_signals(folder: Path) -> Iterator[None]:
    """SIGTERM and SIGHUP interrupt the block as Ctrl-C does, and a second signal does not disturb its end."""

    def interrupt(number: int, frame: object) -> None:
        for each in before:
            signal.signal(each, signal.SIG_IGN)
        raise KeyboardInterrupt(f"the same command continues the sweep in {folder}")

    names = ("SIGINT", "SIGTERM", "SIGHUP")  # Windows has no SIGHUP
    known = [getattr(signal, name) for name in names if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in known}
    for number in before:
        if before[number] is not signal.SIG_IGN:  # else whoever started the command ignores it (nohup)
            signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
