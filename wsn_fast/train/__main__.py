"""The command ``wsn-fast``: train, eval, report."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from wsn_fast import ForgottenError, __version__
from wsn_fast.backends.moments import STORAGES
from wsn_fast.nn.scores import SCORE_INITS
from wsn_fast.ops import RULES
from wsn_fast.train import config, page, records
from wsn_fast.train.checkpoint import CheckpointError
from wsn_fast.train.data import DATASETS
from wsn_fast.train.evaluation import evaluate_run
from wsn_fast.train.nets import NETS
from wsn_fast.train.report import NUMBERS, Console, differences, in_words, plot, table
from wsn_fast.train.run import Run
from wsn_fast.train.safe_files import read_json
from wsn_fast.train.streams import KINDS

_TRAIN = """\
Train one network on a stream of tasks without forgetting any of them. Everything is written into one folder:
config.json, metrics.jsonl, results.json, checkpoint/ and two plots. To continue a run that was killed, use
--resume."""
_EVAL = "Measure a run again from its checkpoint. The exit code is 1 if a number differs from results.json."
_REPORT = """\
Compare runs, finished or not. Prints a table beside the paper's numbers, draws the plots of finished runs again, and
writes one HTML page that needs neither network nor script. The exit code is 2 if a folder cannot be read; the other
runs are still reported."""
_EXAMPLES = """\
examples:
  wsn-fast train permuted                                  the vendored digits, 5 tasks, under two minutes
  wsn-fast train permuted --data mnist --data-dir mnist/   the paper's Permuted MNIST, 10 tasks
  wsn-fast train split --data cifar100 --data-dir cifar/ --density 0.1
  wsn-fast train --resume runs/permuted-digits-paper-seed0
  wsn-fast eval runs/permuted-digits-paper-seed0
  wsn-fast report runs/*
"""

_FAILURES = (
    ValueError, OSError, ImportError, CheckpointError, FloatingPointError, ForgottenError, torch.OutOfMemoryError,
    MemoryError,
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code.

    0: the command succeeded. 1: a loss is not finite, a task was forgotten, or a number of ``eval`` differs. 2: the
    arguments, the files or the data are wrong. 130: the command was interrupted.
    """
    args = _parser().parse_args(argv)
    try:
        code: int = args.command(args)
        return code
    except KeyboardInterrupt:
        print("wsn-fast: interrupted", file=sys.stderr)
        return 130
    except (*_FAILURES, RuntimeError) as error:
        # PyTorch has no class of its own for a CPU without memory.
        if args.debug or not (isinstance(error, _FAILURES) or "allocate memory" in str(error)):
            raise
        print(f"wsn-fast: error: {error}", file=sys.stderr)
        return 1 if isinstance(error, (FloatingPointError, ForgottenError)) else 2


def _train(args: argparse.Namespace) -> int:
    console = Console(quiet=args.quiet)
    given = {name: value for name, value in vars(args).items() if name not in _NO_SETTINGS}
    if args.resume is None:
        if args.checkpoint is not None:
            raise ValueError("--checkpoint: expected together with --resume RUN")
        run = Run.start(config.resolve(**given), console)
    else:
        places = {"data_dir": given.pop("data_dir"), "device": given.pop("device")}
        extra = [name for name, value in given.items() if value is not None]
        if extra:
            raise ValueError(f"--resume: the settings are those of the run, got {', '.join(extra)} as well")
        run = Run.resume(Path(args.resume), console, name=args.checkpoint, **places)
    settings = run.settings
    console.say(
        f"{settings.stream} {settings.data}: {settings.tasks} tasks, {settings.net}, "
        f"density {settings.density:g}, rule {settings.rule}, {run.device}, in {run.folder}"
    )
    try:
        results = run.finish()
    except KeyboardInterrupt:
        print(f"wsn-fast: interrupted; `wsn-fast train --resume {run.folder}` continues", file=sys.stderr)
        return 130
    finally:
        console.close()
    console.say(in_words(results))
    return 0


def _eval(args: argparse.Namespace) -> int:
    folder = Path(args.run)
    measured = evaluate_run(folder, name=args.checkpoint, data_dir=args.data_dir, device=args.device)
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
    runs, problems = [], []
    for name in dict.fromkeys(args.runs):
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
    for line in problems:
        print(f"wsn-fast: error: {line}", file=sys.stderr)
    if not runs:
        return 2
    measured = {run.name: run.results for run in runs if run.results is not None}
    for run in runs:
        for note in run.notes:
            print(f"wsn-fast: note: {note}", file=sys.stderr)
    if measured:
        print(table(measured))
    for run in runs:
        if run.results is None:
            print(f"{run.name}: no task has been finished yet")
    path = Path(args.html or (Path(runs[0].name) / "report.html" if len(args.runs) == 1 else "wsn-fast-report.html"))
    page.write(path, runs, problems)
    print(f"all of it in {path}")
    return 2 if problems else 0


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


# --- arguments --------------------------------------------------------------------------------------------
# The options of `train` that are not settings.
_NO_SETTINGS = ("command", "debug", "quiet", "resume", "checkpoint")


def _parser() -> argparse.ArgumentParser:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="wsn-fast",
        description="Forget-free continual learning with winning subnetworks (WSN).",
        epilog=_EXAMPLES,
        formatter_class=style,
    )
    parser.add_argument("--version", action="version", version=f"wsn-fast {__version__}")
    commands = parser.add_subparsers(required=True, metavar="{train,eval,report}")
    about = "train a stream of tasks, or continue a run"
    train = commands.add_parser(
        "train",
        usage="wsn-fast train [STREAM] [option ...]\n       wsn-fast train --resume RUN [option ...]",
        help=about,
        description=_TRAIN,
        epilog=_EXAMPLES,
        formatter_class=style,
    )
    train.set_defaults(command=_train)
    _add_tasks(train.add_argument_group("tasks"))
    _add_method(train.add_argument_group("method"))
    _add_training(train.add_argument_group("training of each task"))
    _add_run(train.add_argument_group("run"))
    evaluation = commands.add_parser("eval", help="measure a run again from its checkpoint", description=_EVAL)
    evaluation.set_defaults(command=_eval)
    evaluation.add_argument("run", metavar="RUN", help="folder of the run")
    evaluation.add_argument("--checkpoint", metavar="NAME", help="file in RUN/checkpoint (default: the newest)")
    evaluation.add_argument("--data-dir", metavar="DIR", help="folder of the data (default: as in the run)")
    evaluation.add_argument("--device", choices=config.DEVICES, help="device (default: as in the run)")
    reporting = commands.add_parser("report", help="compare runs and draw their plots", description=_REPORT)
    reporting.set_defaults(command=_report)
    reporting.add_argument("runs", metavar="RUN", nargs="+", help="folder of a run")
    places = "file of the page (default: report.html in RUN; for several runs, wsn-fast-report.html in this folder)"
    reporting.add_argument("--html", metavar="FILE", help=places)
    for command in (train, evaluation, reporting):
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _default(name: str) -> str:
    """The default of a setting in words, with the data for which it is another one."""
    special = [("digits", config.DIGITS), *((" ".join(key), table) for key, table in config.PAPER.items())]
    usual = config.FALLBACK[name]
    words = [f"{table[name]:g} for {key}" for key, table in special if table.get(name, usual) != usual]
    return f"(default: {'; '.join([f'{usual:g}', *words])})"


def _add_tasks(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    kinds = "how tasks are made: permuted pixels, split classes or rotated images (default: permuted)"
    add("stream", nargs="?", choices=KINDS, metavar="STREAM", help=kinds)
    add("--data", choices=DATASETS, help="dataset (default: digits, which needs no files)")
    add("--data-dir", metavar="DIR", help="folder with the dataset's files")
    add("--tasks", type=int, metavar="T", help=f"number of tasks {_default('tasks')}")
    held_out = f"fraction of the training samples for validation {_default('val_fraction')}"
    add("--val-fraction", type=float, metavar="F", help=held_out)
    add("--net", choices=tuple(NETS), help="network (default: the paper's for the data; mlp for digits)")


def _add_method(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    presets = "paper: rule magnitude, tasks keep the scores of the task before; clarena: rule value, new scores"
    add("--preset", choices=tuple(config.PRESETS), help=f"{presets} (default: paper)")
    kept = f"fraction of the weights that each task keeps, 0 < C <= 1 {_default('density')}"
    add("--density", type=float, metavar="C", help=kept)
    add("--rule", choices=RULES, help="keep the scores of largest magnitude or of largest value")
    again = "draw new scores for every task (no: start with the scores of the task before)"
    add("--reinit-scores", action=argparse.BooleanOptionalAction, help=again)
    add(
        "--score-init",
        choices=SCORE_INITS,
        help="distribution of new scores: uniform as torch draws weights, N(0,1) or U(0,1)",
    )


def _add_training(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--epochs", type=int, metavar="N", help=f"largest number of epochs per task {_default('epochs')}")
    add("--batch-size", type=int, metavar="N", help=f"samples per step {_default('batch_size')}")
    add("--optimizer", choices=config.OPTIMIZERS, help="sgd has momentum 0.9 (default: adam)")
    add("--lr", type=float, metavar="X", help=f"learning rate at the start of a task {_default('lr')}")
    add("--weight-decay", type=float, metavar="X", help=f"weight decay {_default('weight_decay')}")
    add(
        "--cuda-graph",
        choices=config.CUDA_GRAPH,
        help="auto captures the training step in a CUDA graph where possible (default: auto)",
    )
    add(
        "--one-pass",
        action=argparse.BooleanOptionalAction,
        help="update weights and scores in one pass over memory, which is faster (default: yes)",
    )
    stored = "how running means of weights and scores are stored; the last two need --one-pass (default: float32)"
    add("--moments", choices=STORAGES, help=stored)
    patience = f"epochs without a better validation loss after which lr is divided {_default('lr_patience')}"
    add("--lr-patience", type=int, metavar="N", help=patience)
    add("--lr-factor", type=float, metavar="X", help=f"number that lr is then divided by {_default('lr_factor')}")
    add("--lr-min", type=float, metavar="X", help=f"a task ends when lr is below {_default('lr_min')}")


def _add_run(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--seed", type=int, metavar="N", help=f"seed of everything random {_default('seed')}")
    add("--device", choices=config.DEVICES, help="auto takes a GPU if there is one (default: auto)")
    add(
        "--threads",
        type=int,
        metavar="N",
        help="number of CPU threads (default: 1 for mlp, else the number that torch chooses)",
    )
    folder = "runs/STREAM-DATA-PRESET-seedN"
    add("--out", metavar="RUN", help=f"folder of the run, new or empty (default: {folder})")
    add("--resume", metavar="RUN", help="continue the run in this folder; only --data-dir and --device may change")
    add("--checkpoint", metavar="NAME", help="with --resume: a file in RUN/checkpoint (default: the newest)")
    seconds = f"least time in seconds between two checkpoints of a task {_default('checkpoint_seconds')}"
    add("--checkpoint-seconds", type=float, metavar="S", help=seconds)
    add("--quiet", action="store_true", help="print nothing but errors")


if __name__ == "__main__":
    sys.exit(main())
