"""The measurements of a run, taken again from its checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from wsn_fast.train.folder import config_to_go_on
from wsn_fast.train.processes import ALONE, Processes
from wsn_fast.train.report import Console
from wsn_fast.train.run import Run


def evaluate_run(
    folder: Path,
    processes: Processes = ALONE,
    *,
    name: str | None = None,
    **other: str | None,
) -> dict[str, Any]:
    """Measure a run again from its checkpoint. Nothing is written.

    The last row of the accuracy matrix, the accuracies at random initialisation, capacity and reuse are measured.
    Earlier rows of the matrix come from the checkpoint. Every finished task is verified. Several processes share the
    batches, and the measurements are those of one.

    Returns:
        What ``results.json`` should hold.

    Raises:
        CheckpointError: the checkpoint cannot be read.
        FileNotFoundError: the folder holds no run.
        StoppedError: another one of the ``processes`` has failed.
        ForgottenError: a task is not what it was when it ended.
        UnmaskedReadError: a task reads something outside of its mask.
        ValueError: the data are not those of the run, or no task has been finished yet.
    """
    settings = processes.first(lambda: config_to_go_on(folder, **other))
    run = Run(settings, folder, Console(quiet=True), processes=processes)
    random_init = run.measure_random_init()
    if not run.restore_newest(name) or not run.progress.matrix:
        raise ValueError(f"{folder}: no task has been finished yet; go on with `wsn-fast train --resume {folder}`")
    run.verify()
    run.progress.random_init = random_init
    run.progress.matrix[-1] = run.measure_last_row()
    return run.results()
