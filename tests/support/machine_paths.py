"""Finds the way of a program through the machine code of a kernel, and what it does on it.

A way is found by rules that know no kernel, so that it survives a change of the kernels. The loop that loads most is
the main one; without a loop that loads, the whole kernel is what happens to a tile. At a branch, the first rule that
tells its two sides apart decides:

1. What the arguments of the launch decide goes as they say.
2. The shortest way to the main loop is taken, and the main loop is gone through once. So are other loops, except for
   one that loads nothing and has a barrier: it searches a key bit by bit, and is gone through once for each of its
   ``BITS``.
3. A side that calls a subroutine (the slow path of a division or of a square root) is not taken, or with ``zeros`` if
   and only if the elements of a tile are zero.
4. In a tile, a branch on data with a global atomic on one side tells whether keys were found: that side is taken if
   ``found``.
5. A side whose loads are masked belongs to the last tile of a tensor. It is not taken if the other side or the main
   loop has plain loads. In a kernel that goes through a list it is the other way round, as the length of a list is no
   multiple of a tile: there masked loads are the usual ones.
6. A side that is for numbers of at least 2^127, infinities and NaN is not taken. It is known by a comparison with the
   bits of 2^127 or of infinity right before the branch.
7. The side with more instructions is taken.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NamedTuple

from machine_code import ATOMICS, Flow, Instruction, Loop, Program
from machine_values import Values

THREAD = ("SR_TID", "SR_LANEID")
LARGE = re.compile(r"0x7f[08]00000\b")  # the bits of infinity, and of 2^127
BITS = 15  # that a sample of uniform magnitudes needs of a key: 8 of the exponent, and 7 for half a percent of them


@dataclass
class Origins:
    """Which registers differ between the threads, and which depend on data, after the instructions so far."""

    thread: set[str] = field(default_factory=set)
    data: set[str] = field(default_factory=set)

    def is_tile_access(self, one: Instruction) -> bool:
        """Whether it moves elements of a tile. Other accesses go to tables: all threads use one address."""
        return one.name in ("LDG", "STG") and not self.thread.isdisjoint(_address(one))

    def is_scattered(self, one: Instruction) -> bool:
        """Whether data say where a tile access goes. Only the few elements that were looked for are accessed so."""
        return self.is_tile_access(one) and not self.data.isdisjoint(_address(one))

    def depends_on_data(self, one: Instruction) -> bool:
        """Whether data say if it is executed."""
        return bool(one.predicate) and one.predicate.lstrip("!") in self.data

    def step(self, one: Instruction) -> None:
        """Go past an instruction."""
        fetched = one.name in ("LDS", "ATOMS", "ATOMG", "ATOM") or self.is_tile_access(one)
        for marked, starts in (
            (self.thread, fetched or any(name in one.operands for name in THREAD)),
            (self.data, fetched),
        ):
            if starts or not marked.isdisjoint(one.reads):
                marked |= one.writes
            elif not one.predicate:
                marked -= one.writes


def _address(one: Instruction) -> frozenset[str]:
    """The registers of the address of a global access."""
    inside = one.operands.rpartition("[")[2].partition("]")[0]
    return Instruction("", "ST", inside).reads


def _subroutine(call: Instruction) -> str:
    return call.operands.strip("`()")


class Way(NamedTuple):
    """What a program executes.

    Attributes:
        before: the instructions up to the main loop.
        tile: those of one turn of it.
        after: those after it.
        found_sides: how many branches the fourth rule decided.
        slow_calls: of each subroutine that the tile may call, how many calls there are.
        reached: how many of these calls zeros reach.
        undecided: branches to such a call, of which it is not known where zeros lead.
        in_loop: whether ``tile`` is the turn of a loop.
    """

    before: tuple[Instruction, ...]
    tile: tuple[Instruction, ...]
    after: tuple[Instruction, ...]
    found_sides: int
    slow_calls: Mapping[str, int]
    reached: int
    undecided: tuple[Instruction, ...]
    in_loop: bool


def global_loads(code: Iterable[Instruction]) -> list[Instruction]:
    """The loads from global memory."""
    return [one for one in code if one.name == "LDG"]


def main_loop(flow: Flow, listed: bool) -> Loop | None:
    """The innermost loop that loads most bytes. If the kernel goes through a list, masked loads count first."""
    loops = [loop for loop in flow.loops if not any(other.blocks < loop.blocks for other in flow.loops)]

    def weight(loop: Loop) -> tuple[int, int]:
        found = global_loads(flow.instructions(loop.blocks))
        return sum(one.width for one in found if bool(one.predicate) is listed), sum(one.width for one in found)

    return max((loop for loop in loops if weight(loop)[1]), key=weight, default=None)


class Walker:
    """Goes through a kernel by the rules."""

    def __init__(
        self,
        program: Program,
        arguments: Mapping[int, int] = MappingProxyType({}),
        *,
        found: bool = False,
        listed: bool = False,
        zeros: bool = False,
    ) -> None:
        self.flow, self.subroutines = Flow(program.kernel), program.subroutines
        self.found, self.listed = found, listed
        self.main = main_loop(self.flow, listed)
        self.origins, self.values = Origins(), Values(arguments, zeros=zeros)
        self._forget()
        reference = self.main.blocks if self.main else self.flow.reached
        self.has_usual = self._has_usual(self.flow.instructions(reference))

    def _forget(self) -> None:
        self.found_sides = self.reached = 0
        self.slow_calls: Counter[str] = Counter()
        self.undecided: list[Instruction] = []

    def way(self) -> Way:
        """The whole way."""
        before = self._walk(0, self.main.head) if self.main else []
        self._forget()
        tile = self._walk(self.main.head if self.main else 0, None, self.main)
        seen = self.found_sides, dict(self.slow_calls), self.reached, tuple(self.undecided)
        exit_ = self._exit(self.main) if self.main else None
        after = [] if exit_ is None else self._walk(exit_, None)
        return Way(tuple(before), tuple(tile), tuple(after), *seen, self.main is not None)

    def _step(self, one: Instruction) -> list[Instruction]:
        """Execute an instruction. Returns it, and the subroutine that it calls."""
        is_tile = self.origins.is_tile_access(one)
        self.origins.step(one)
        if one.name == "CALL" and self.values.zeros:
            return [one, *self._call(self.subroutines[_subroutine(one)], self.values)]
        self.values.step(one, is_tile)
        return [one]

    def _call(self, code: list[Instruction], values: Values) -> list[Instruction]:
        """The instructions of a subroutine that are executed."""
        path, at = [], 0
        while code[at].name != "RET":
            one = code[at]
            path.append(one)
            taken = one.target is not None and values.condition(one)
            if taken is None:
                self.undecided.append(one)
            if one.target is None:
                values.step(one, is_tile=False)
            at = one.target if taken and one.target is not None else at + 1
        return [*path, code[at]]

    def _exit(self, loop: Loop) -> int | None:
        """Where a loop is left: from the block that begins it again if that block can."""
        ordered = sorted(loop.blocks, key=lambda block: loop.head not in self.flow.following[block])
        ways = [s for block in ordered for s in self.flow.following[block] if s not in loop.blocks]
        return ways[0] if ways else None

    def _walk(self, block: int, stop: int | None, within: Loop | None = None) -> list[Instruction]:
        """The instructions from a block to ``stop``, to the end, or once through a loop."""
        path: list[Instruction] = []
        visited: dict[int, int] = {}  # where a block begins in the path
        while block != stop:
            visited[block] = len(path)
            for one in self.flow.instructions([block]):
                leaves = one.name == "EXIT" and not self.values.zeros and self.values.condition(one)
                path += self._step(one)
                if leaves:
                    return path
            again = [loop for loop in self.flow.loops if loop.head in self.flow.following[block]]
            again = [loop for loop in again if loop.head in visited and loop != within]
            for loop in again:
                path += path[visited[loop.head] :] * (self._turns(loop) - 1)
            choices = [s for s in self.flow.following[block] if s not in visited]
            if within:
                choices = [s for s in choices if s in within.blocks and s != within.head]
            if not choices:
                exit_ = self._exit(again[0]) if again and not within else None
                if exit_ is None or exit_ in visited:
                    return path
                choices = [exit_]
            block = choices[0] if len(choices) == 1 else self._choose(block, (choices[0], choices[1]), stop, within)
        return path

    def _turns(self, loop: Loop) -> int:
        code = self.flow.instructions(loop.blocks)
        return BITS if not global_loads(code) and any(one.name == "BAR" for one in code) else 1

    def _choose(self, block: int, ways: tuple[int, int], stop: int | None, within: Loop | None) -> int:
        """The side that is taken."""
        flow, join = self.flow, self.flow.joins[block]
        last = flow.code[flow.blocks[block] - 1]
        if not self.values.zeros and (taken := self.values.condition(last)) is not None:
            return ways[taken]
        sides = [flow.side(way, join, within.blocks if within else None) for way in ways]
        code = [flow.instructions(side) for side in sides]
        leads = [stop == way or stop in side for way, side in zip(ways, sides, strict=True)]
        if leads[0] != leads[1]:
            return ways[leads.index(True)]
        called = [[_subroutine(one) for one in side if one.name == "CALL"] for side in code]
        if bool(called[0]) != bool(called[1]):
            return ways[self._slow_side(last, called)]
        atomic = [any(one.name in ATOMICS for one in side) for side in code]
        if atomic[0] != atomic[1] and (within or not self.main) and not self.origins.data.isdisjoint(last.reads):
            self.found_sides += 1
            return ways[atomic.index(self.found)]
        unusual = [self._is_unusual(side) for side in code]
        if unusual[0] != unusual[1] and (self.has_usual or any(self._has_usual(side) for side in code)):
            return ways[unusual.index(False)]
        if (special := self._special_side(block)) is not None:
            return ways[1 - special]
        longer = len(code[0]) >= len(code[1])
        return ways[0] if longer is (stop is None) else ways[1]

    def _slow_side(self, branch: Instruction, called: list[list[str]]) -> int:
        """Whether the fall-through (0) or the target (1) of a branch is taken, one of which calls a subroutine."""
        slow = 0 if called[0] else 1
        self.slow_calls.update(called[slow])
        taken = self.values.condition(branch) if self.values.zeros else not slow
        if taken is None:
            self.undecided.append(branch)
            return 1 - slow
        self.reached += taken == slow
        return int(taken)

    def _special_side(self, block: int) -> int | None:
        """Whether the fall-through (0) or the target (1) of the branch that ends a block is for large numbers only."""
        *others, last = self.flow.instructions([block])
        flag = last.predicate.lstrip("!")
        makers = [one for one in others if flag in one.writes]
        if not makers or not makers[-1].opcode.startswith("ISETP.G") or not LARGE.search(makers[-1].operands):
            return None
        return int(not last.predicate.startswith("!"))

    def _has_usual(self, code: list[Instruction]) -> bool:
        return any(bool(one.predicate) is self.listed for one in global_loads(code))

    def _is_unusual(self, code: list[Instruction]) -> bool:
        """Whether most loads are masked, or in a kernel that goes through a list, plain. The compiler may mask a load
        by a branch around it."""
        found = global_loads(code)
        return sum(bool(one.predicate) is not self.listed for one in found) > len(found) / 2


class Timeline(NamedTuple):
    """What one warp does on a part of its way.

    Attributes:
        issued: instructions.
        cycles: until the last of them is issued, if the warp is alone on its processor.
        moved: bytes of a tile that a thread loads and stores.
        scattered: those among them whose places data tell.
        in_flight: bytes of a tile that a thread has asked for when it first waits for one of them.
        waits: how often it waits for elements of a tile, for at least half the latency of their memory.
        widths: how many accesses to the tile there are, by opcode, without the scattered ones.
        barriers: barriers.
        atomics: atomics on an address of global memory that are executed once in a program.
        lane_atomics: those that are executed for each thread whose data ask for it.
        spread_atomics: atomics whose addresses data tell.
    """

    issued: int
    cycles: float
    moved: int
    scattered: int
    in_flight: int
    waits: int
    widths: Mapping[str, int]
    barriers: int
    atomics: int
    lane_atomics: int
    spread_atomics: int


class Latencies(NamedTuple):
    """Cycles from the issue of an instruction to the first use of its result.

    Attributes:
        by_name: by the name of the instruction.
        other: of all others.
        tile: of a load of elements of a tile, from DRAM.
        table: of a load from a table, from the L2 cache.
    """

    by_name: Mapping[str, float]
    other: float
    tile: float
    table: float


class Clock:
    """Issues the instructions of one warp in order, each when what it reads is there. Without ``found``, no thread of
    the warp has data that ask for an atomic."""

    def __init__(self, latencies: Latencies, *, found: bool) -> None:
        self.latencies, self.found, self.origins = latencies, found, Origins()
        self.now = 0.0
        self.ready: dict[str, float] = {}
        self.pending: dict[str, tuple[float, int]] = {}  # loads of a tile: when they are there, and their bytes

    def run(self, code: Iterable[Instruction]) -> Timeline:
        """Go through a part of the way."""
        start, widths, sums = self.now, Counter[str](), Counter[str]()
        for one in code:
            self._wait(one.reads | one.writes, sums)
            self.now += 1
            is_tile, by_data = self.origins.is_tile_access(one), self.origins.depends_on_data(one)
            if is_tile:
                is_scattered = self.origins.is_scattered(one)
                widths[one.opcode] += not is_scattered
                sums["moved"] += one.width
                sums["scattered"] += one.width * is_scattered
            sums["issued"] += 1
            sums["barriers"] += one.name == "BAR"
            if one.name in ATOMICS and self.origins.data.isdisjoint(_address(one)):
                sums["lane_atomics" if by_data else "atomics"] += 1
            sums["spread_atomics"] += one.name in ATOMICS and not self.origins.data.isdisjoint(_address(one))
            if self.found or not by_data or one.name not in ATOMICS:
                self._result(one, is_tile)
            self.origins.step(one)
        counts = {name: sums[name] for name in Timeline._fields if name not in ("cycles", "widths")}
        return Timeline(cycles=self.now - start, widths=dict(+widths), **counts)

    def _wait(self, needed: frozenset[str], sums: Counter[str]) -> None:
        """Wait for registers."""
        at = max((self.ready.get(name, 0.0) for name in needed), default=0.0)
        if at > self.now and not self.pending.keys().isdisjoint(needed):
            outstanding = sum(size for ready, size in set(self.pending.values()) if ready > self.now)
            sums["in_flight"] = sums["in_flight"] or outstanding
            sums["waits"] += at - self.now > self.latencies.tile / 2
        self.now = max(self.now, at)

    def _result(self, one: Instruction, is_tile: bool) -> None:
        """When the result of an instruction is there."""
        is_tile = is_tile and not self.origins.is_scattered(one)  # where data tell the place, there is a small table
        if one.name == "LDG":
            latency = self.latencies.tile if is_tile else self.latencies.table
        else:
            latency = self.latencies.by_name.get(one.name, self.latencies.other)
        if one.name == "BAR":
            self.now += latency
        for name in one.writes:
            self.ready[name] = self.now + latency
            self.pending.pop(name, None)
            if is_tile:
                self.pending[name] = (self.now + latency, one.width)
