"""From a launch to what the model of ``device_model.py`` has to know: everything is read from the machine code."""

from __future__ import annotations

import functools
import importlib
import math
import re
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

from .device_model import Prediction, Work, predict, value
from .provenance import ROOT
from .real_steps import Launch

sys.path.append(str(ROOT / "tests" / "support"))
compiling, machine_code = importlib.import_module("compiling"), importlib.import_module("machine_code")
machine_paths = importlib.import_module("machine_paths")

LISTED = frozenset(("search_kernel", "settle_kernel"))
"""The kernels that usually go through the listed keys only; all others go through the tensor."""
SAMPLING = frozenset(("sample_kernel",))
"""The kernels that make a window from a sample. Without one before it in the step, a window is a warm one."""
FIRST_ARGUMENT = 0x210
"""Where the arguments of a kernel begin in its constant bank, on sm_90."""
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
        way: the usual one.
        zeros: that of a tile of zeros.
        before: the part before the main loop.
        tile: a later turn of the main loop.
        found: such a turn with keys found.
        slow: such a turn with zeros.
        after: the part after it.
    """

    registers: int
    spills: int
    way: Any
    zeros: Any
    before: Any
    tile: Any
    found: Any
    slow: Any
    after: Any


def _timelines(way: Any, found: bool, listed: bool) -> tuple[Any, Any, Any]:
    """Before the main loop, a later turn of it, and after it. What is listed was written by the kernel before."""
    latencies = LATENCIES._replace(tile=LATENCIES.table) if listed else LATENCIES
    clock = machine_paths.Clock(latencies, found=found)
    before, tile = clock.run(way.before), clock.run(way.tile)
    return before, clock.run(way.tile) if way.in_loop else tile, clock.run(way.after)


@functools.cache
def _program(cubin: bytes) -> tuple[Any, int, int]:
    """The instructions of a compiled kernel, its registers and what it spills."""
    registers, spills, _ = compiling.usage(cubin)
    return machine_code.parse(compiling.disassembly(cubin)), registers, spills


@functools.cache
def _facts(cubin: bytes, arguments: frozenset[tuple[int, int]], listed: bool) -> Facts:
    program, registers, spills = _program(cubin)

    def way(**choice: bool) -> Any:
        return machine_paths.Walker(program, dict(arguments), listed=listed, **choice).way()

    usual, zeros = way(), way(zeros=True)
    before, tile, after = _timelines(usual, False, listed)
    found, slow = _timelines(way(found=True), True, listed)[1], _timelines(zeros, False, listed)[1]
    return Facts(registers, spills, usual, zeros, before, tile, found, slow, after)


def facts(launch: Launch) -> Facts:
    """Read the machine code of a launch, with the way that its arguments decide."""
    arguments = machine_arguments(launch.kernel.src.signature, launch.values)
    return _facts(launch.kernel.asm["cubin"], frozenset(arguments.items()), launch.name in LISTED)


def machine_arguments(signature: Mapping[str, Any], values: Mapping[str, Any]) -> dict[int, int]:
    """The words of the constant bank that hold the integers among the arguments, by their addresses.

    Args:
        signature: types of a kernel's arguments as Triton names them, in order, such as "*fp32" or "i64".
        values: of the arguments that are known.
    """
    words: dict[int, int] = {}
    at = FIRST_ARGUMENT
    for name, kind in signature.items():
        for one in kind if isinstance(kind, tuple) else (kind,):
            if one == "constexpr":
                continue
            size = 8 if one.startswith("*") else max(1, int(re.sub(r"\D", "", one)) // 8)
            at = -(-at // size) * size
            value = values.get(name)
            if isinstance(value, int) and not one.startswith("*") and size >= 4:
                words |= {at + 4 * i: value >> 32 * i & 0xFFFFFFFF for i in range(size // 4)}
            at += size
    return words


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
    key: tuple[str, float, bool]
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


def _moved(tile: Any, per_thread: int, share: float) -> float:
    """Bytes of a thread. Single bytes are parts of packed masks: an element has one bit, however often it is read."""
    single = [opcode for opcode in tile.widths if opcode.endswith(("U8", "S8", ".8"))]
    wide = tile.moved - sum(tile.widths[opcode] for opcode in single)
    masks = len({opcode.partition(".")[0] for opcode in single})
    return wide - (1 - share) * tile.scattered + masks * per_thread / 8


EIGHT_BITS = 2
"""The number of this storage in the launches of ``wsn_fast/kernels/coded_step.py``."""


def _scales(values: Mapping[str, Any], block: int) -> float:
    """Bytes of a program for the scales of running means in a tile of ``block`` elements. A tile has one scale for each
    mean, so that the code has one address for all threads, as for a table."""
    states = (("WEIGHT_STORAGE", "WEIGHT_STATES"), ("SCORE_STORAGE", "SCORE_STATES"))
    scales = sum(values[count] for storage, count in states if values.get(storage) == EIGHT_BITS)
    return scales * 2 * 4 * block / 256


class _Tiles(NamedTuple):
    """How a tensor is shared among programs: elements of a thread in a tile, programs with tiles, and their tiles."""

    per_thread: int
    busy: int
    each: int


def _tiles(launch: Launch, elements: int, share: float, tile: Any) -> _Tiles:
    """The tiles of a launch for so many elements, of which ``share`` are listed."""
    threads = 32 * launch.kernel.metadata.num_warps
    per_thread, programs = launch.values.get("FIX", launch.values.get("BLOCK", 0)) // threads, launch.programs
    if per_thread == 0:
        return _Tiles(0, programs, 1)
    if launch.name not in LISTED:
        return _Tiles(per_thread, programs, math.ceil(elements / programs / (per_thread * threads)))
    loads = sum(count for opcode, count in tile.widths.items() if opcode.startswith("LDG"))
    per_thread, keys = min(per_thread, loads), math.ceil(share * elements)
    each = max(math.ceil(keys / programs), per_thread * threads)
    return _Tiles(per_thread, min(programs, math.ceil(keys / each)), math.ceil(each / (per_thread * threads)))


def row(launch: Launch, elements: int, *, cold: bool = False, idle: bool = False) -> Row:
    """What the model says of a launch for a tensor of so many elements.

    Args:
        launch: of a kernel.
        elements: of the tensor.
        cold: whether the window is that of a sample.
        idle: whether every program ends before its first tile.
    """
    known, threads = facts(launch), 32 * launch.kernel.metadata.num_warps
    listed, share = launch.name in LISTED, value("cold share" if cold else "warm share")
    per_thread, busy, each = _tiles(launch, elements, share, known.tile)
    looks = known.way.found_sides + known.found.lane_atomics + known.found.spread_atomics > 0
    # Where threads wait for each other, the keys of one of them concern all.
    together = threads if known.found.barriers > known.tile.barriers else 32
    found = 1 - (1 - share) ** (per_thread * together) if looks else 0.0
    zeros = value("zeros") if known.zeros.reached else 0.0
    issued, stalled = (
        of(known.tile) + found * (of(known.found) - of(known.tile)) + zeros * (of(known.slow) - of(known.tile))
        for of in (lambda part: part.issued, lambda part: part.cycles - part.issued)
    )
    in_lanes = threads * (1 - (1 - share) ** per_thread)
    work = Work(
        threads=threads,
        registers=known.registers,
        shared=launch.kernel.metadata.shared,
        programs=launch.programs,
        tiles=0 if idle else each,
        busy=busy,
        issued=issued,
        stalled=stalled,
        moved=_moved(known.tile, per_thread, 1.0 if listed else share) * threads
        + _scales(launch.values, per_thread * threads),
        atomics=found * known.found.atomics + in_lanes * known.found.lane_atomics,
        before=known.before.cycles,
        after=0.0 if idle else known.after.cycles,
    )
    key = (launch.kernel.hash, share if listed or looks else 0.0, idle)
    return Row(launch.name, _form(launch.values, idle), key, known, per_thread, found, work, predict(work))


def rows(launches: list[Launch], elements: int) -> list[Row]:
    """All launches of a step of one layer, in order. A kernel that reads the whole tensor and is launched again is a
    second attempt, which usually finds nothing to do."""
    found: list[Row] = []
    cold = False
    for launch in launches:
        cold |= launch.name in SAMPLING
        is_whole = launch.name not in LISTED and "BLOCK" in launch.values
        again = any(one.name == launch.name for one in found)
        found.append(row(launch, elements, cold=cold, idle=is_whole and again))
    return found


def _form(values: Mapping[str, Any], idle: bool) -> str:
    """The choices that make a variant of a kernel."""
    chosen = [name.lower() for name in ("GIVEN", "NEXT", "HAS_UNION", "PACK") if values.get(name) is True]
    return ", ".join((*chosen, *(["again"] if idle else [])))
