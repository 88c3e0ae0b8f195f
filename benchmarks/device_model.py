"""A model of how long a kernel takes on an H200, from what its machine code does. It predicts; it measures nothing.

A processor (SM) is a closed queueing network: the programs that fit on it take turns at two stations, the issue of
instructions and its share of the memory bandwidth. Between the two a program waits for latencies, which
``tests/support/machine_paths.py`` takes from the order of the instructions. Mean value analysis gives the tiles per
second. A kernel takes the floor of a launch, the way to its main loop, its tiles, and the way after them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple


class Constant(NamedTuple):
    """A number of the model, its unit, and where it comes from."""

    value: float
    unit: str
    source: str


HOPPER = "compute capability 9.0, CUDA C++ Programming Guide"
LATENCY = "arXiv:2402.13499 for the H100, quoted from memory and not looked up"
ASSUMED = "assumed"
MEASURED = "measured, docs/results/h200.md"
CONSTANTS: Mapping[str, Constant] = MappingProxyType({
    "SMs": Constant(132, "", "NVIDIA H200, data sheet"),
    "clock": Constant(1980, "MHz", f"{MEASURED}: the clock under load"),
    "bandwidth": Constant(4.239, "TB/s", f"{MEASURED}: a copy, reads and writes; the data sheet has 4.8"),
    "schedulers": Constant(4, "instructions per SM and cycle", HOPPER),
    "threads": Constant(2048, "per SM", HOPPER),
    "programs": Constant(32, "per SM", HOPPER),
    "registers": Constant(65536, "per SM", HOPPER),
    "register step": Constant(8, "registers per thread that are allocated together", HOPPER),
    "shared": Constant(227 * 1024, "bytes per SM", HOPPER),
    "shared reserved": Constant(1024, "bytes per program", HOPPER),
    "launch": Constant(1.7, "us per kernel in a CUDA graph", f"{MEASURED}: the shortest kernels take 1.2, and "
                       "0.5 lie between two kernels of a step"),
    "DRAM": Constant(1485, "cycles: 0.75 us under load", ASSUMED),
    "L2": Constant(263, "cycles", LATENCY),
    "atomic": Constant(1386, "cycles for one that returns, 0.7 us under load", ASSUMED),
    "same address": Constant(0.22, "atomics on one address per cycle, of the whole device", f"{MEASURED}: 2.3 ns"),
    "shared atomic": Constant(60, "cycles", ASSUMED),
    "shared load": Constant(29, "cycles", LATENCY),
    "barrier": Constant(30, "cycles", ASSUMED),
    "exchange": Constant(25, "cycles of SHFL, REDUX, VOTE and MUFU", ASSUMED),
    "special": Constant(20, "cycles of S2R and R2UR", ASSUMED),
    "arithmetic": Constant(4.5, "cycles from an instruction to one that needs its result", ASSUMED),
    "torch": Constant(0.91, "of the bandwidth, by the elementwise kernels of torch", f"{MEASURED}: fused AdamW"),
    "torch least": Constant(1.7, "us per elementwise kernel of torch", f"{MEASURED}: as a launch"),
    "cold share": Constant(0.0703, "of the keys, in the window of a sample", "4.5 deviations of 4096 samples"),
    "warm share": Constant(1 / 2048, "of the keys, in the window of an update", "the least that _window.py allows"),
    "zeros": Constant(0.5, "of the slow calls that zeros reach, made by a warp", "those for the weight: 41 to 98 % of "
                      "its second moments were exactly 0 in training of small nets on a CPU"),
})  # fmt: skip


def value(name: str) -> float:
    """A number of the model."""
    return CONSTANTS[name].value


def microseconds(cycles: float) -> float:
    """The time of clock cycles."""
    return cycles / value("clock")


class Work(NamedTuple):
    """What a kernel does, for the model.

    Attributes:
        threads: of a program.
        registers: of a thread.
        shared: bytes of a program.
        programs: that are launched.
        tiles: that a busy program goes through.
        busy: the programs that have tiles.
        issued: instructions of a warp for a tile.
        stalled: cycles that a warp waits in a tile, if it is alone.
        moved: bytes of a tile that go from or to memory.
        atomics: of a tile, on one address.
        before: cycles of a program before its first tile.
        after: cycles of a program after its last tile.
    """

    threads: int
    registers: int
    shared: int
    programs: int
    tiles: int
    busy: int
    issued: float
    stalled: float
    moved: float
    atomics: float
    before: float
    after: float


class Prediction(NamedTuple):
    """What the model says.

    Attributes:
        us: how long the kernel takes.
        floor: the time of its bytes at the bandwidth.
        bound: what bounds it.
        occupancy: programs that fit on a processor.
        resident: programs that are on a processor.
    """

    us: float
    floor: float
    bound: str
    occupancy: int
    resident: int


def occupancy(work: Work) -> int:
    """How many programs fit on a processor."""
    step = value("register step")
    registers = math.ceil(work.registers / step) * step
    limits = [value("threads") // work.threads, value("registers") // (registers * work.threads), value("programs")]
    limits.append(value("shared") // (work.shared + value("shared reserved")))
    return int(min(limits))


def throughput(programs: int, issue: float, memory: float, waits: float) -> float:
    """Tiles per microsecond of a processor: mean value analysis of a closed network.

    Args:
        programs: on the processor.
        issue: us of the schedulers for a tile.
        memory: us of the bandwidth for a tile.
        waits: us in which a program needs neither.
    """
    queues, rate = [0.0, 0.0], 0.0
    for customers in range(1, programs + 1):
        times = [issue * (1 + queues[0]), memory * (1 + queues[1])]
        rate = customers / (waits + sum(times))
        queues = [rate * time for time in times]
    return rate


def predict(work: Work) -> Prediction:
    """The time of a kernel."""
    sms, fits = value("SMs"), occupancy(work)
    resident = max(1, min(fits, math.ceil(work.busy / sms)))
    issue = microseconds(work.issued * work.threads / 32 / value("schedulers"))
    per_us = value("bandwidth") * 1e6 / sms  # bytes of one processor
    memory, waits = work.moved / per_us, microseconds(work.stalled)
    if work.busy <= sms:
        tiles = work.tiles * (issue + memory + waits)
    else:
        tiles = work.tiles * work.busy / sms / throughput(resident, issue, memory, waits)
    one_by_one = microseconds(work.tiles * work.busy * work.atomics / value("same address"))
    waves = math.ceil(work.programs / sms / fits)
    overhead = value("launch") + microseconds(work.before * waves + work.after)
    floor = work.moved * work.tiles * work.busy / value("bandwidth") / 1e6
    bounds = {"issue": issue, "bandwidth": memory, "latency": (issue + memory + waits) / resident}
    bound = max(bounds, key=bounds.__getitem__)
    if one_by_one > tiles:
        tiles, bound = one_by_one, "atomics"
    bound = "launch and latency" if overhead > tiles else bound
    return Prediction(overhead + tiles, floor, bound, fits, resident)


def torch_kernel(size: float) -> float:
    """Microseconds of an elementwise kernel of torch that moves so many bytes."""
    return max(value("torch least"), size / value("bandwidth") / 1e6 / value("torch"))
