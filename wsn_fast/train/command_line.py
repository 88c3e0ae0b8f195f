"""The command ``wsn-fast``: train, sweep, eval, report. ``python -m wsn_fast.train`` and the program of that name start
it."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any

from wsn_fast import __version__, launch
from wsn_fast.choices import RULES, SCORE_INITS, STORAGES
from wsn_fast.train import config
from wsn_fast.train.choices import (
    AUGMENT,
    CUDA_GRAPH,
    DATASETS,
    DEVICES,
    MEMORY_FORMATS,
    NETS,
    OPTIMIZERS,
    STREAMS,
)

_TRAIN = """\
Train one network on a stream of tasks without forgetting any of them. Everything is written into one folder:
config.json, metrics.jsonl, results.json, checkpoint/ and two plots. To continue a run that was killed, use
--resume."""
_SWEEP = """\
Train a run for each density and each seed, several at a time, and report on all of them. Each run has a folder and a
log in the folder of the sweep. Started again, the same command leaves finished runs alone and continues the others. The
exit code is 1 if a run fails; the others go on."""
_EVAL = "Measure a run again from its checkpoint. The exit code is 1 if a number differs from results.json."
_REPORT = """\
Compare runs, finished or not. Prints a table beside the paper's numbers, and means with standard deviations of runs
that differ in the seed alone. Draws the plots of finished runs again, and writes one HTML page that needs neither
network nor script. The exit code is 2 if a folder cannot be read; the other runs are still reported."""
_CODE = "FILE.py:FUNCTION"
_EXAMPLES = """\
examples:
  wsn-fast train permuted                                  the vendored digits, 5 tasks, under two minutes
  wsn-fast train permuted --data mnist --data-dir mnist/   the paper's Permuted MNIST, 10 tasks
  wsn-fast train split --data cifar100 --data-dir cifar/ --density 0.1
  wsn-fast train superclass --data cifar100 --data-dir cifar/       the paper's CIFAR-100 Superclass, 20 tasks
  torchrun --nproc-per-node 2 -m wsn_fast.train train permuted   two processes
  wsn-fast train own --data my_tasks.py:make_tasks         tasks with data of your own
  wsn-fast train --resume runs/permuted-digits-paper-seed0
  wsn-fast sweep permuted --densities 0.1,0.3 --seeds 1,2,3
  wsn-fast eval runs/permuted-digits-paper-seed0
  wsn-fast report runs/*
  wsn-fast report runs/* --paper --csv runs.csv --latex table.tex
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code.

    0: the command succeeded. 1: a loss is not finite, a task was forgotten, or a number of ``eval`` differs. 2: the
    arguments, the files or the data are wrong, or another process of the run has failed. 130: the command was
    interrupted. 141: what reads the output has gone.
    """
    try:
        try:
            with launch.said_once():
                args = _parser().parse_args(argv)
            from wsn_fast.train import commands  # PyTorch with it, which the parser does not need

            return commands.run(args)
        finally:
            sys.stdout.flush()
    except KeyboardInterrupt as interrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second one would interrupt this line
        if launch.is_first():
            print("; ".join(("wsn-fast: interrupted", *map(str, interrupt.args))), file=sys.stderr)
        return 130
    except BrokenPipeError:  # `| head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python writes there again when it ends
        return 141


# --- arguments --------------------------------------------------------------------------------------------
def _parser() -> argparse.ArgumentParser:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="wsn-fast",
        description="Forget-free continual learning with winning subnetworks (WSN).",
        epilog=_EXAMPLES,
        formatter_class=style,
    )
    parser.add_argument("--version", action="version", version=f"wsn-fast {__version__}")
    commands = parser.add_subparsers(required=True, metavar="{train,sweep,eval,report}")
    about = "train a stream of tasks, or continue a run"
    train = commands.add_parser(
        "train",
        usage="wsn-fast train [STREAM] [option ...]\n       wsn-fast train --resume RUN [option ...]",
        help=about,
        description=_TRAIN,
        epilog=_EXAMPLES,
        formatter_class=style,
    )
    train.set_defaults(command="train")
    _add_settings(train)
    one = train.add_argument_group("one run")
    folder = "runs/STREAM-DATA-PRESET-seedN"
    one.add_argument("--out", metavar="RUN", help=f"folder of the run, new or empty (default: {folder})")
    only = f"only --data-dir and --device may change, and a stream own needs --data {_CODE} again"
    one.add_argument("--resume", metavar="RUN", help=f"continue the run in this folder; {only}")
    one.add_argument(
        "--checkpoint", metavar="NAME", help="with --resume: a file in RUN/checkpoint (default: the newest)"
    )
    _add_sweep(commands)
    evaluation = commands.add_parser("eval", help="measure a run again from its checkpoint", description=_EVAL)
    evaluation.set_defaults(command="eval")
    evaluation.add_argument("run", metavar="RUN", help="folder of the run")
    evaluation.add_argument("--checkpoint", metavar="NAME", help="file in RUN/checkpoint (default: the newest)")
    evaluation.add_argument("--data", metavar="CODE", help=f"of a run of the stream own: {_CODE} again")
    evaluation.add_argument("--data-dir", metavar="DIR", help="folder of the data (default: as in the run)")
    evaluation.add_argument("--device", choices=DEVICES, help="device (default: as in the run)")
    reporting = commands.add_parser("report", help="compare runs and draw their plots", description=_REPORT)
    reporting.set_defaults(command="report")
    reporting.add_argument("runs", metavar="RUN", nargs="+", help="folder of a run")
    places = "file of the page (default: report.html in RUN; for several runs, wsn-fast-report.html in this folder)"
    reporting.add_argument("--html", metavar="FILE", help=places)
    reporting.add_argument("--csv", metavar="FILE", help="also write a line for each run, with its settings, as CSV")
    latex = "also write a LaTeX table (booktabs) of means over seeds beside the paper's numbers"
    reporting.add_argument("--latex", metavar="FILE", help=latex)
    paper = "print the paper's table instead, with the means over seeds of these runs beside its numbers"
    reporting.add_argument("--paper", action="store_true", help=paper)
    for command in commands.choices.values():
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _add_sweep(commands: Any) -> None:
    sweep = commands.add_parser(
        "sweep",
        usage="wsn-fast sweep [STREAM] [--densities C,C,...] [--seeds N,N,...] [option of train ...]",
        help="train a grid of densities and seeds",
        description=_SWEEP,
    )
    sweep.set_defaults(command="sweep")
    _add_settings(sweep)
    add = sweep.add_argument_group("sweep").add_argument
    add("--densities", type=_listed(float), metavar="C,C,...", help="densities of the grid (default: --density)")
    add("--seeds", type=_listed(int), metavar="N,N,...", help="seeds of the grid (default: --seed)")
    several = "runs at the same time (default: one for each GPU, or CPU cores divided by --threads)"
    add("--jobs", type=int, metavar="N", help=several)
    add("--out", metavar="DIR", help="folder of the sweep (default: sweeps/STREAM-DATA-PRESET)")


def _listed(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    def numbers(text: str) -> list[Any]:
        return [kind(word) for word in text.split(",")]

    numbers.__name__ = f"list of {kind.__name__}"  # argparse says it of a text that is none
    return numbers


def _or_auto(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    def number(text: str) -> Any:
        return text if text == "auto" else kind(text)

    number.__name__ = f"{kind.__name__} or auto"
    return number


def _add_settings(parser: argparse.ArgumentParser) -> None:
    """The options that are settings of a run."""
    _add_tasks(parser.add_argument_group("tasks"))
    _add_method(parser.add_argument_group("method"))
    _add_training(parser.add_argument_group("training of each task"))
    _add_run(parser.add_argument_group("run"))


def _default(name: str) -> str:
    """The default of a setting in words, with the data for which it is another one."""
    special = [("digits", config.DIGITS), *((" ".join(key), table) for key, table in config.PAPER.items())]
    usual = config.FALLBACK[name]
    words = [f"{table[name]:g} for {key}" for key, table in special if table.get(name, usual) != usual]
    return f"(default: {'; '.join([f'{usual:g}', *words])})"


def _add_tasks(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    kinds = f"how tasks are made: {', '.join(STREAMS)} (default: permuted)"
    add("stream", nargs="?", choices=STREAMS, metavar="STREAM", help=kinds)
    names = (
        f"dataset, of {', '.join(DATASETS)} (default: digits, which needs no files); for the stream datasets several"
    )
    own = f"for own {_CODE}, code that returns the tasks"
    add("--data", metavar="NAME[,NAME...]", help=f"{names}, or folders of images, one for each task; {own}")
    add("--data-dir", metavar="DIR", help="folder with the files of the data; for each of several a folder in it")
    add("--tasks", type=int, metavar="T", help=f"number of tasks {_default('tasks')}")
    order = "order in which tasks of split take classes, and those of superclass superclasses: random, given or numbers"
    add("--class-order", metavar="N,N,...", help=f"{order} (default: random; given for superclass and omniglot)")
    each = "number of classes of each task of split; 0 deals all of them evenly"
    add("--classes-per-task", type=int, metavar="N", help=f"{each} {_default('classes_per_task')}")
    loading = f"processes that load data of the stream own; 0: the run itself {_default('workers')}"
    add("--workers", type=int, metavar="N", help=loading)
    held_out = f"fraction of the training samples for validation {_default('val_fraction')}"
    add("--val-fraction", type=float, metavar="F", help=held_out)
    add("--net", choices=NETS, help="network (default: the paper's for the data; mlp for digits)")


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
    add("--augment", choices=AUGMENT, help="crops: crop and mirror training images at random (default: none)")
    add("--optimizer", choices=OPTIMIZERS, help="sgd has momentum 0.9 (default: adam)")
    add("--lr", type=float, metavar="X", help=f"learning rate at the start of a task {_default('lr')}")
    add("--weight-decay", type=float, metavar="X", help=f"weight decay {_default('weight_decay')}")
    add(
        "--cuda-graph",
        choices=CUDA_GRAPH,
        help="auto captures the training step in a CUDA graph where possible (default: auto)",
    )
    faster = "order of images in memory; channels_last is often faster on a CPU, and auto measures it, like --threads"
    add("--memory-format", choices=(*MEMORY_FORMATS, "auto"), help=f"{faster} (default: contiguous)")
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
    add("--device", choices=DEVICES, help="auto takes a GPU if there is one (default: auto)")
    add(
        "--threads",
        type=_or_auto(int),
        metavar="N",
        help="number of CPU threads, or auto: measure which is fastest before the run starts, for train alone "
        "(default: 1 for mlp, else the number that torch chooses)",
    )
    seconds = "least time in seconds between two checkpoints of a task; auto: they take a few percent (default: auto)"
    add("--checkpoint-seconds", type=_or_auto(float), metavar="S", help=seconds)
    add("--quiet", action="store_true", help="print nothing but errors")
