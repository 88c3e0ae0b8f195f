"""``python -m wsn_fast.doctor``: what is here; with ``--check``, whether it is right; with ``--tune``, what is fastest;
with ``--report``, a page about all of it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .. import launch
from . import __doc__ as about

if TYPE_CHECKING:
    import torch

MINUTES = {"tune": 5.0, "report": 1.5}
"""How long each command measures if nobody says otherwise."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the findings, check, tune or report. Return 0 if all went well."""
    parser = _parser()
    with launch.said_once():
        options = parser.parse_args(arguments)
        given = [f"--{name}" for name in ("minutes", "out", "device") if getattr(options, name) is not None]
        if given and options.command not in MINUTES:
            instead = f", and not with --{options.command}" if options.command else ""
            parser.error(f"{given[0]} goes with --tune and --report{instead}")
    if options.command == "check" and launch.world_size() > 1:
        from . import processes

        return processes.main()
    if not launch.is_first():
        return 0  # the rest is about one process
    from . import checking, findings  # and PyTorch, which the parser does not need

    if options.command is None:
        return findings.main()
    if options.command == "check":
        return checking.main()
    devices = _devices(parser, options.device)
    minutes = MINUTES[options.command] if options.minutes is None else options.minutes
    if options.command == "tune":
        from .tuning import command as tuning

        return tuning.main(devices, options.out, minutes)
    from .report import command as report

    return report.main(devices, options.out or Path(), minutes)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m wsn_fast.doctor", description=about)
    commands = parser.add_mutually_exclusive_group()
    for name, says in (
        ("check", "compare every operation on every device with PyTorch, in a minute; under torchrun the collectives"),
        ("tune", "measure what is fastest on this machine, and write it into a table that the library reads"),
        ("report", "write a page and a JSON file about this machine, to look at and to send"),
    ):
        commands.add_argument(f"--{name}", dest="command", action="store_const", const=name, help=says)
    defaults = f"default {MINUTES['tune']:g}, for a report {MINUTES['report']:g}"
    parser.add_argument("--minutes", type=_minutes, help=f"how long to measure; {defaults}")
    where = "a folder: of the table, by default in the user's cache; or of the report, by default this one"
    parser.add_argument("--out", type=Path, help=where)
    parser.add_argument("--device", help='what to measure, such as "cpu", "cuda" or "cuda:1"; default "all"')
    return parser


def _minutes(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1e6:
        raise argparse.ArgumentTypeError(f"must be a number of minutes, got {text}")
    return value


def _devices(parser: argparse.ArgumentParser, name: str | None) -> list[torch.device]:
    """The devices of this machine that a name stands for."""
    import torch

    from . import findings

    here = [device for device, _ in findings.devices()]
    if name in (None, "all"):
        return here
    try:
        wanted = torch.device(str(name))
    except RuntimeError:
        parser.error(f"--device: {name!r} is no device")
    found = [one for one in here if one.type == wanted.type and wanted.index in (None, one.index)]
    if not found:
        parser.error(f"--device: there is no {name} here, but {', '.join(map(str, here))}")
    return found


if __name__ == "__main__":
    sys.exit(main())
