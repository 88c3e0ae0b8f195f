"""Reads the machine code of a kernel (SASS): its instructions, blocks and loops.

Nothing here knows a kernel. ``machine_paths.py`` finds the way that a program takes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

LINE = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
LABEL = re.compile(r"^\s*(\.L_x_\d+):")
TARGET = re.compile(r"`\((\.L_x_\d+)\)")
SUBROUTINE = re.compile(r"^\s*\.type\s+(\$[^,]+),")  # stands before what a kernel calls
REGISTER = re.compile(r"\b(U?R)(\d+)(\.64)?")
PREDICATE = re.compile(r"\bU?P[\dT]\b")
CONSTANT = frozenset(("PT", "UPT"))
WIDTH = {"8": 1, "U8": 1, "S8": 1, "16": 2, "U16": 2, "S16": 2, "64": 8, "128": 16}  # bytes; 4 if nothing is said
ONE_RESULT = frozenset(("SEL", "FSEL", "USEL", "FMNMX", "VOTE", "VOTEU"))  # a predicate after it is read
SECOND_RESULT = frozenset(("LOP3", "ULOP3", "SHFL", "ATOM", "ATOMG", "LDG"))  # a register after a predicate
ATOMICS = frozenset(("ATOMG", "ATOM", "RED", "REDG"))  # on global memory
# Instructions whose first operand is not written.
NO_RESULT = frozenset(
    ("ST", "STG", "STS", "STL", "STSM", "RED", "REDG", "BAR", "BRA", "EXIT", "BSSY", "BSYNC", "CALL", "RET")
)  # fmt: skip
WIDE_RESULT = re.compile(r"IMAD\.WIDE|^D(ADD|MUL|FMA)|^F2F\.F64|^I2F\.F64|^SHF.*\.U64|^CS2R")


class Instruction(NamedTuple):
    """One instruction.

    Attributes:
        predicate: "P0", "!P0" or "".
        opcode: with its suffixes, such as "LDG.E.128".
        operands: as they are printed.
        target: where a branch leads, as an index into the instructions of the kernel; None for all others.
    """

    predicate: str
    opcode: str
    operands: str
    target: int | None = None

    @property
    def name(self) -> str:
        """The opcode without suffixes."""
        return self.opcode.partition(".")[0]

    @property
    def width(self) -> int:
        """Bytes that a memory instruction moves for a thread."""
        found = [WIDTH[suffix] for suffix in self.opcode.split(".")[1:] if suffix in WIDTH]
        return found[0] if found else 4

    def _split(self) -> tuple[str, str]:
        """The operands that are written, and those that are read."""
        parts = self.operands.split(",")
        count = 0 if self.name in NO_RESULT else 1
        if count and self.name not in ONE_RESULT:
            while count < len(parts) and PREDICATE.fullmatch(parts[count].strip()):  # carries, or the negated result
                count += 1
            count += count == 1 and self.name in SECOND_RESULT and PREDICATE.fullmatch(parts[0].strip()) is not None
        return ",".join(parts[:count]), ",".join(parts[count:])

    @property
    def writes(self) -> frozenset[str]:
        """Registers and predicates that are written."""
        written = self._split()[0]
        count = max(1, self.width // 4) if self.name.startswith(("LD", "ATOM")) else 1
        count = 2 if WIDE_RESULT.search(self.opcode) else count
        return frozenset((*_registers(written, count), *PREDICATE.findall(written))) - CONSTANT

    @property
    def reads(self) -> frozenset[str]:
        """Registers and predicates that are read, the own predicate among them."""
        rest = self._split()[1]
        count = max(1, self.width // 4) if self.name.startswith("ST") else 1
        found = (*_registers(rest, count), *PREDICATE.findall(rest), *PREDICATE.findall(self.predicate))
        return frozenset(found) - CONSTANT


def _registers(text: str, count: int) -> Iterator[str]:
    for kind, number, pair in REGISTER.findall(text):
        yield from (f"{kind}{int(number) + i}" for i in range(2 if pair else count))


class Program(NamedTuple):
    """The instructions of a kernel, and those of the subroutines that it calls, by their names."""

    kernel: list[Instruction]
    subroutines: dict[str, list[Instruction]]


def parse(text: str) -> Program:
    """The instructions in the output of ``nvdisasm -c``."""
    parts: dict[str, list[str]] = {"": []}
    name = ""
    for line in text.splitlines():
        if subroutine := SUBROUTINE.match(line):
            name = subroutine[1]
            parts[name] = []
        parts[name].append(line)
    found = {name: _instructions(lines) for name, lines in parts.items()}
    return Program(found.pop(""), found)


def _instructions(lines: Iterable[str]) -> list[Instruction]:
    labels: dict[str, int] = {}
    found: list[tuple[str, str, str]] = []
    for line in lines:
        if label := LABEL.match(line):
            labels[label[1]] = len(found)
        if instruction := LINE.search(line):
            found.append((instruction[1] or "", instruction[2], instruction[3]))

    def target(opcode: str, operands: str) -> int | None:
        label = TARGET.search(operands) if opcode.startswith("BRA") else None
        return labels.get(label[1]) if label else None

    return [Instruction(*parts, target(*parts[1:])) for parts in found]


class Loop(NamedTuple):
    """A natural loop: its first block, and all its blocks."""

    head: int
    blocks: frozenset[int]


@dataclass(frozen=True)
class Flow:
    """The flow of control of a kernel, over its instructions. A block has the index of its first instruction."""

    code: list[Instruction]

    @cached_property
    def blocks(self) -> dict[int, int]:
        """The end of every block, by its first instruction."""
        starts = {0}
        for index, one in enumerate(self.code):
            if one.target is not None:
                starts |= {one.target, index + 1}
            elif one.name in ("EXIT", "BRA"):
                starts.add(index + 1)
        ordered = sorted(start for start in starts if start < len(self.code))
        return dict(zip(ordered, [*ordered[1:], len(self.code)], strict=True))

    @cached_property
    def following(self) -> dict[int, tuple[int, ...]]:
        """The blocks after a block: where it falls through to first, then where it jumps to."""
        found = {}
        for start, end in self.blocks.items():
            last, after = self.code[end - 1], [end] if end in self.blocks else []
            if last.name == "EXIT":
                # Threads may leave one by one. Where all of them leave, the rest of the kernel has nothing to do.
                found[start] = tuple(after) if last.predicate else ()
            elif last.name == "BRA" and last.target is not None:
                conditional = last.predicate or PREDICATE.search(last.operands)
                found[start] = tuple(dict.fromkeys([*(after if conditional else []), last.target]))
            else:
                found[start] = tuple(after)
        return found

    @cached_property
    def reached(self) -> list[int]:
        """All blocks that can be reached, in reverse postorder."""
        order: list[int] = []
        seen: set[int] = set()
        stack: list[tuple[int, Iterator[int]]] = [(0, iter(self.following[0]))]
        seen.add(0)
        while stack:
            block, rest = stack[-1]
            for successor in rest:
                if successor not in seen:
                    seen.add(successor)
                    stack.append((successor, iter(self.following[successor])))
                    break
            else:
                order.append(block)
                stack.pop()
        return order[::-1]

    @cached_property
    def dominators(self) -> dict[int, frozenset[int]]:
        """The blocks that lie on every way from the entry to a block."""
        before: dict[int, list[int]] = {block: [] for block in self.reached}
        for block in self.reached:
            for successor in self.following[block]:
                before[successor].append(block)
        return _dominators(self.reached, before)

    @cached_property
    def joins(self) -> dict[int, int | None]:
        """The first block that lies on every way from a block to the end, back edges aside."""
        forward = {block: [s for s in self.following[block] if not self.is_back(block, s)] for block in self.reached}
        after = _dominators(self.reached[::-1], forward)
        place = {block: index for index, block in enumerate(self.reached)}
        found: dict[int, int | None] = {}
        for block in self.reached:
            others = after[block] - {block}
            found[block] = min(others, key=place.__getitem__) if others else None
        return found

    def is_back(self, block: int, successor: int) -> bool:
        """Whether a loop begins again."""
        return successor in self.dominators[block]

    @cached_property
    def loops(self) -> list[Loop]:
        """The natural loops; those with the same head are one. A block that jumps to itself for ever is none."""
        found: dict[int, set[int]] = {}
        before: dict[int, list[int]] = {block: [] for block in self.reached}
        for block in self.reached:
            for successor in self.following[block]:
                before[successor].append(block)
        for block in self.reached:
            for head in (s for s in self.following[block] if self.is_back(block, s)):
                body, work = found.setdefault(head, {head}), [block]
                while work:
                    one = work.pop()
                    if one not in body:
                        body.add(one)
                        work += before[one]
        return [Loop(head, frozenset(body)) for head, body in found.items()]

    def instructions(self, blocks: Iterable[int]) -> list[Instruction]:
        """Those of some blocks."""
        return [one for block in blocks for one in self.code[block : self.blocks[block]]]

    def side(self, start: int, end: int | None, within: frozenset[int] | None) -> frozenset[int]:
        """The blocks from ``start`` on, before ``end``, back edges aside, in a loop if ``within`` is one."""
        seen: set[int] = set()
        work = [start]
        while work:
            block = work.pop()
            if block == end or block in seen or (within is not None and block not in within):
                continue
            seen.add(block)
            work += [s for s in self.following[block] if not self.is_back(block, s)]
        return frozenset(seen)


def _dominators(order: list[int], before: dict[int, list[int]]) -> dict[int, frozenset[int]]:
    """For every block, in an order in which most of what comes before it does so too: the blocks on all its ways."""
    found: dict[int, frozenset[int]] = {}
    changed = True
    while changed:
        changed = False
        for block in order:
            known = [found[one] for one in before[block] if one in found]
            new = (frozenset.intersection(*known) if known else frozenset()) | {block}
            if found.get(block) != new:
                found[block], changed = new, True
    return found
