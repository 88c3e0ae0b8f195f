"""The measurements of a run, taken again from its checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from wsn_fast.train import checkpoint
from wsn_fast.train.folder import read_config
from wsn_fast.train.report import Console
from wsn_fast.train.run import Run


def evaluate_run(
    folder: Path, *, name: str | None = None, data_dir: str | None = None, device: str | None = None
) -> dict[str, Any]:
    """Measure a run again from its checkpoint. Nothing is written.

    The last row of the accuracy matrix, the accuracies at random initialisation, capacity and reuse are measured.
    Earlier rows of the matrix come from the checkpoint. Every finished task is verified.

    Returns:
        What ``results.json`` should hold.

    Raises:
        CheckpointError: the checkpoint cannot be read.
        FileNotFoundError: the folder holds no run.
        ForgottenError: a task is not what it was when it ended.
        UnmaskedReadError: a task reads something outside of its mask.
        ValueError: the data are not those of the run, or no task has been finished yet.
    """
    run = Run(read_config(folder, data_dir=data_dir, device=device), folder, Console(quiet=True))
    random_init = run.measure_random_init()
    run.restore(checkpoint.load_from(folder / "checkpoint", name))
    if not run.progress.matrix:
        raise ValueError(f"{folder}: no task has been finished yet; go on with `wsn-fast train --resume {folder}`")
    run.verify()
    run.progress.random_init = random_init
    run.progress.matrix[-1] = run.measure_last_row()
    return run.results()
