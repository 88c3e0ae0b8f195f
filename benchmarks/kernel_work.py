"""From a launch to what the model of ``device_model.py`` has to know: everything is read from the machine code."""

from __future__ import annotations

import functools
import importlib
import math
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

from wsn_fast.kernels import threshold_table

from .device_model import Prediction, Work, predict, value
from .provenance import ROOT
from .real_steps import Launch

sys.path.append(str(ROOT / "tests" / "support"))
compiling, machine_code = importlib.import_module("compiling"), importlib.import_module("machine_code")
machine_paths = importlib.import_module("machine_paths")

LISTED = frozenset(("digit_kernel", "fix_kernel"))
"""The kernels that usually go through the listed keys only; all others go through the tensor."""
COLD = frozenset(("window_kernel",))
"""The kernels that list keys by a window of a sample. Without one before it in the step, a list is of a warm window."""
LATENCIES = machine_paths.Latencies(
    by_name={
        **dict.fromkeys(("LDS", "LDSM", "LDC"), value("shared load")),
        **dict.fromkeys(("SHFL", "REDUX", "VOTE", "VOTEU", "MUFU", "MATCH"), value("exchange")),
        **dict.fromkeys(("S2R", "S2UR", "R2UR"), value("special")),
        **dict.fromkeys(("ATOMG", "ATOM"), value("atomic")),
        "ATOMS": value("shared atomic"),
        "BAR": value("barrier"),
    },
    other=value("arithmetic"),
    tile=value("DRAM"),
    table=value("L2"),
)


class Facts(NamedTuple):
    """What the machine code of a kernel says.

    Attributes:
        registers: of a thread.
        spills: bytes of a thread.
        way: without keys found, and with them.
        before: the part before the main loop.
        tile: a later turn of the main loop, without keys found, and with them.
        after: the part after it.
    """

    registers: int
    spills: int
    way: tuple[Any, Any]
    before: Any
    tile: tuple[Any, Any]
    after: Any


@functools.cache
def _facts(digest: str, listed: bool, kernel: Any) -> Facts:
    del digest
    flow = machine_code.Flow(machine_code.parse(compiling.disassembly(kernel)))
    ways, parts = [], []
    for found in (False, True):
        way = machine_paths.Walker(flow, found=found, listed=listed).way()
        # What is listed was written by the kernel before.
        clock = machine_paths.Clock(LATENCIES._replace(tile=LATENCIES.table) if listed else LATENCIES)
        before, tile = clock.run(way.before), clock.run(way.tile)
        tile = clock.run(way.tile) if way.in_loop else tile
        ways.append(way)
        parts.append((before, tile, clock.run(way.after)))
    registers, spills, _ = compiling.usage(kernel)
    return Facts(registers, spills, (ways[0], ways[1]), parts[0][0], (parts[0][1], parts[1][1]), parts[0][2])


def facts(launch: Launch) -> Facts:
    """Read the machine code of a launch, once for each kernel."""
    return _facts(launch.kernel.hash, launch.name in LISTED, launch.kernel)


class Row(NamedTuple):
    """One launch, and what the model says of it.

    Attributes:
        name: of the kernel.
        form: what tells the variants of a kernel apart.
        key: the same for all launches of a kernel in the same circumstances.
        facts: of its machine code.
        per_thread: elements of a tile for a thread; 0 without tiles.
        found: the probability that a tile holds listed keys.
        work: for the model.
        prediction: of the model.
    """

    name: str
    form: str
    key: tuple[str, float]
    facts: Facts
    per_thread: int
    found: float
    work: Work
    prediction: Prediction

    @property
    def instructions(self) -> float:
        """Instructions of a thread for an element."""
        return self.work.issued / self.per_thread if self.per_thread else 0.0

    @property
    def bytes(self) -> float:
        """Bytes that move for an element."""
        return self.work.moved / self.per_thread / self.work.threads if self.per_thread else 0.0


def _moved(tile: Any, per_thread: int) -> float:
    """Bytes of a thread. Single bytes are parts of packed masks: an element has one bit, however often it is read."""
    single = [opcode for opcode in tile.widths if opcode.endswith(("U8", "S8", ".8"))]
    wide = tile.loaded + tile.stored - sum(tile.widths[opcode] for opcode in single)
    masks = len({opcode.partition(".")[0] for opcode in single})
    return wide + masks * per_thread / 8


def cold_share() -> float:
    """The share of the keys that lie in the window of a sample, at density 0.5."""
    sample = threshold_table.CONFIGS[0].sample
    return threshold_table.SIGMAS / math.sqrt(sample)


def row(launch: Launch, elements: int, cold: bool) -> Row:
    """What the model says of a launch for a tensor of so many elements."""
    known, threads = facts(launch), 32 * launch.kernel.metadata.num_warps
    listed, share = launch.name in LISTED, cold_share() if cold else value("warm share")
    usual, with_keys = known.tile
    block = launch.values.get("BLOCK", 0)
    per_thread = block // threads
    programs = busy = launch.programs
    if listed:
        per_thread = min(per_thread, sum(count for opcode, count in usual.widths.items() if opcode.startswith("LDG")))
        each = (
            1 << launch.values["list_bits"] if "list_bits" in launch.values else math.ceil(share * elements / programs)
        )
        busy = min(programs, math.ceil(share * elements / each))
        tiles = math.ceil(each / max(1, per_thread * threads))
    elif per_thread:
        tiles = math.ceil(elements / programs / (per_thread * threads))
    else:
        tiles = 1
    sides = known.way[0].found_sides
    found = 1 - (1 - share) ** (per_thread * threads) if sides else 0.0
    issued = usual.issued + found * (with_keys.issued - usual.issued)
    stalled = usual.cycles - usual.issued
    stalled += found * (with_keys.cycles - with_keys.issued - stalled)
    work = Work(
        threads=threads,
        registers=known.registers,
        shared=launch.kernel.metadata.shared,
        programs=programs,
        tiles=tiles,
        busy=busy,
        issued=issued,
        stalled=stalled,
        moved=_moved(usual, per_thread) * threads,
        before=known.before.cycles,
        after=known.after.cycles,
    )
    key = (launch.kernel.hash, share if listed or sides else 0.0)
    return Row(launch.name, _form(launch.values), key, known, per_thread, found, work, predict(work))


def rows(launches: list[Launch], elements: int) -> list[Row]:
    """All launches of a step, in order."""
    found, cold = [], False
    for launch in launches:
        cold |= launch.name in COLD
        found.append(row(launch, elements, cold))
    return found


def _form(values: Mapping[str, Any]) -> str:
    """The choices that make a variant of a kernel."""
    chosen = [name.lower() for name in ("GIVEN", "NEXT", "HAS_UNION", "PACK") if values.get(name) is True]
    return ", ".join(chosen)
