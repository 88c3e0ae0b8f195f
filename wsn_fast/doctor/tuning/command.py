"""``python -m wsn_fast.doctor --tune``: measures what is fastest on this machine, and writes it into a table.

A table holds the tiles of the Triton kernels, the shapes at which a fused product is faster than the way by memory, and
the operations that PyTorch does faster than the backend that is usual on the device. Every candidate is checked before
it is timed. Nothing is tuned while a model trains: a process reads the tables once.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ...backends import tables
from ...backends.cache_folder import write_text
from ...backends.table_format import FORMAT, LISTS
from ..measuring import machine
from ..measuring.attempts import Say, say_at_once
from ..measuring.timing import Call, time_calls
from . import crossovers
from .entries import measure_products, measure_tiles
from .sweeps import FULL, Sweep
from .trials import Trials

SHARE = 0.4
"""Of the time on a GPU, for choosing between backends; the products take the rest."""
SHOWN = 20
"""Lines that are printed of what was not measured. The table has all of them."""


class Table:
    """A table while it grows. Each entry is written to its file at once, so that a killed run leaves a whole table.

    Args:
        device: what is measured.
        folder: of the file. What holds in a table that is there stays, until it is measured again.
        say: takes lines of progress.
        facts: where the numbers come from; None means what the machine says.
    """

    def __init__(self, device: torch.device, folder: Path, say: Say, facts: Mapping[str, object] | None = None) -> None:
        self.name = tables.device_name(device)
        self.path, self.say = folder.absolute() / tables.file_name(self.name), say
        self.measured: dict[str, Any] = dict(tables.read(self.name, None, folder).data)
        self.about = {"format": FORMAT, "device": self.name, "versions": tables.versions(device)}
        self.facts = dict(machine.facts(device) if facts is None else facts)
        self.not_measured: list[str] = []
        self.count = 0
        self.obstacle = ""

    def found(self, table: str, entry: Any) -> None:
        """Take an entry of a table."""
        self.count += 1
        self.measured = tables.merged(self.measured, {table: [entry] if table in LISTS else entry})
        self.say(f"  {table}: {_in_words(table, entry)}")
        self.write()

    def write(self) -> None:
        """Write the file; :attr:`obstacle` says why that failed."""
        parts = {"not_measured": self.not_measured, **self.measured}
        text = json.dumps({**self.about, "facts": self.facts, **parts}, indent=1)
        self.obstacle = write_text(self.path, text + "\n")


def _in_words(table: str, entry: Any) -> str:
    if table == "elementwise":
        return ", ".join(f"{name} {tile}" for name, tile in entry.items())
    if table == "backends":
        return "; ".join(
            f"{operation} {dtype}: {one['choose']} ("
            + "; ".join(f"{n}: {', '.join(f'{who} {us:.4g} us' for who, us in t.items())}" for n, t in _times(one))
            + ")"
            for operation, by in entry.items()
            for dtype, one in by.items()
        )
    way = f"{entry['dtype']} {entry['precision']} {entry['source']}{', dx' * entry['backward']}"
    if table == "conv":
        return f"{way}: {'faster' if entry['wins'] else 'slower'} ({entry['us']} us, by memory {entry['us_dense']} us)"
    return f"{way} {entry['n']}x{entry['k']}: fused up to {entry['max_rows']} rows"


def _times(entry: Mapping[str, Any]) -> list[tuple[str, Mapping[str, float]]]:
    return list(entry["times"].items())


def measure(device: torch.device, table: Table, deadline: float, sweep: Sweep, seconds: float = 0.25) -> None:
    """Fill a table until ``deadline``, of ``time.monotonic``."""

    def clock(calls: Sequence[Call]) -> float:
        return time_calls(calls, device, seconds=seconds / 12).median_us

    def trials(until: float) -> Trials:
        made = Trials(device, clock, until)
        made.not_measured = table.not_measured
        return made

    if device.type != "cuda":
        crossovers.measure(trials(deadline), table.found, seconds=seconds)
        return
    measure_tiles(trials(deadline), sweep, table.found)
    begin = time.monotonic()
    crossovers.measure(trials(begin + SHARE * (deadline - begin)), table.found, seconds=seconds)
    measure_products(trials(deadline), sweep, table.found)


def tune(
    device: torch.device,
    folder: Path,
    minutes: float,
    *,
    say: Say = say_at_once,
    facts: Mapping[str, object] | None = None,
    sweep: Sweep = FULL,
) -> int:
    """Measure one device and write its table.

    Args:
        device: a CPU or an NVIDIA GPU.
        folder: where the table goes.
        minutes: after which nothing new is begun.
        say: takes lines of progress.
        facts: see :class:`Table`.
        sweep: what to measure of the Triton kernels.

    Returns:
        0; 1 if the table cannot be written; 130 if the user stopped it.
    """
    table = Table(device, folder, say, facts)
    table.write()  # a folder that cannot be written to is no surprise after five minutes
    if table.obstacle:
        say(f"nothing was measured: {table.obstacle}")
        return 1
    say(f"{device}: {table.name}, for at most {minutes:.3g} min")
    status = 0
    try:
        with machine.current(device):
            measure(device, table, time.monotonic() + 60 * minutes, sweep)
    except KeyboardInterrupt:
        table.not_measured.append("what comes after this line: the tuner was stopped")
        status = 130
    table.write()
    for line in table.not_measured[:SHOWN]:
        say(f"  not measured: {line}")
    if len(table.not_measured) > SHOWN:
        say(f"  not measured: {len(table.not_measured) - SHOWN} more, see the table")
    digest = tables.digest_of(table.measured)
    say(table.obstacle or f"{table.count} entries in {table.path}" + (f" (table {digest})" if digest else ""))
    return status or int(bool(table.obstacle))


def main(devices: Sequence[torch.device], folder: Path | None, minutes: float, say: Say = say_at_once) -> int:
    """Tune devices one after the other, in ``minutes`` all together. Return the status of the first that failed."""
    deadline = time.monotonic() + 60 * minutes
    for i, device in enumerate(devices):
        left = max(0.0, deadline - time.monotonic()) / 60 / (len(devices) - i)
        status = tune(device, folder or tables.users_folder(), left, say=say)
        if status:
            return status
    return 0
