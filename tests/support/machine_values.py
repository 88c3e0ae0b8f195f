"""Computes what one thread of a kernel computes, as far as it is known, to tell where a branch leads.

A register is 32 bits, or None where they are not known. The arguments of the launch are known. With ``zeros`` every
element that is loaded from a tile is zero, as most second moments are where a mask drops the gradient, and every other
number is 0.5. That is enough to tell whether zeros reach the slow path of a division or of a square root. ``FCHK`` is
not documented: here it asks for the slow path if an operand is zero, subnormal, infinite or NaN, as the slow path
itself handles these.
"""

from __future__ import annotations

import functools
import itertools
import math
import operator
import re
import struct
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from machine_code import Instruction

Bits = int | None
Part = tuple[int, int]  # bits, and a mask that tells which of them are known
Results = dict[str, Any]  # what is written: bits, a part, or None
ALL = 0xFFFFFFFF
HALF = 0x3F000000  # 0.5
NUMBER = re.compile(r"[+-]?(?:\d+(?:\.\d*)?(?:e[+-]?\d+)?|INF|Q?NAN)$")
CONSTANT = re.compile(r"c\[0x0\]\[(0x[0-9a-f]+)\]$")
COMPARE: Mapping[str, Callable[[float, float], bool]] = {
    "LT": operator.lt, "LE": operator.le, "GT": operator.gt, "GE": operator.ge, "EQ": operator.eq,
    "NE": lambda a, b: a < b or a > b,
    "NUM": lambda a, b: not (math.isnan(a) or math.isnan(b)), "NAN": lambda a, b: math.isnan(a) or math.isnan(b),
}  # fmt: skip
HALVES = frozenset(("X", "HI", "WIDE"))  # of instructions that compute with 64 bits, which is not done here
BOOLEAN = {"AND": operator.and_, "OR": operator.or_, "XOR": operator.xor}
ROOTS: Mapping[str, Callable[[float], float]] = {
    "RCP": lambda x: math.copysign(math.inf, x) if x == 0 else 1 / x,
    "RSQ": lambda x: math.nan if x < 0 else math.inf if x == 0 else 1 / math.sqrt(x),
    "SQRT": lambda x: math.nan if x < 0 else math.sqrt(x),
}


def to_float(bits: int) -> float:
    """The float32 of 32 bits."""
    return struct.unpack("<f", struct.pack("<I", bits & ALL))[0]


def to_bits(number: float) -> int:
    """The bits of a number, rounded to float32."""
    try:
        return struct.unpack("<I", struct.pack("<f", number))[0]
    except OverflowError:
        return to_bits(math.copysign(math.inf, number))


def compare(relation: str, a: float, b: float) -> bool:
    """A comparison as a suffix names it: one that ends with U holds for NaN, too."""
    if relation not in COMPARE and relation.endswith("U"):
        return math.isnan(a) or math.isnan(b) or COMPARE[relation[:-1]](a, b)
    return COMPARE[relation](a, b)


def look_up(table: int, a: int, b: int, c: int) -> int:
    """The bitwise function of three numbers whose value for the bits (1, 1, 1) is the highest of the table's 8 bits."""
    result = 0
    for index in (i for i in range(8) if table >> i & 1):
        result |= (a if index & 4 else ~a) & (b if index & 2 else ~b) & (c if index & 1 else ~c)
    return result & ALL


class Values:
    """The registers and predicates of one thread."""

    def __init__(self, arguments: Mapping[int, int] = MappingProxyType({}), *, zeros: bool = False) -> None:
        """``arguments`` are the words of the constant bank that are known, by their addresses."""
        self.arguments, self.zeros = arguments, zeros
        self.registers: dict[str, Bits] = {}
        self.parts: dict[str, Part] = {}
        self.predicates: dict[str, bool | None] = {}

    # --- operands
    def predicate(self, text: str) -> bool | None:
        """What a predicate is, or its negation."""
        name = text.strip().lstrip("!")
        value = True if name in ("", "PT", "UPT") else self.predicates.get(name)
        return None if value is None else value is not text.strip().startswith("!")

    def condition(self, one: Instruction) -> bool | None:
        """Whether an instruction is executed; a branch may have a second predicate."""
        first = self.predicate(one.predicate)
        found = re.match(r"!?U?P\w+(?=,)", one.operands) if one.name == "BRA" else None
        second = self.predicate(found[0]) if found else True
        return False if first is False or second is False else None if first is None or second is None else True

    def bits(self, text: str) -> Bits:
        """An operand as it stands, without sign and absolute value."""
        name = text.strip().removesuffix(".reuse").strip("-|~").removesuffix(".reuse")
        if name in ("RZ", "URZ", "SRZ"):
            return 0
        if name.startswith("0x"):
            return int(name, 16)
        if NUMBER.match(name):
            return to_bits(float(name.replace("QNAN", "nan")))
        if constant := CONSTANT.match(name):
            return self.arguments.get(int(constant[1], 16), HALF if self.zeros else None)
        return self.registers.get(name)

    def float(self, text: str) -> float | None:
        """An operand as a number."""
        bits = self.bits(text)
        if bits is None:
            return None
        number = to_float(bits)
        number = abs(number) if "|" in text else number
        return -number if text.strip().startswith("-") else number

    def integer(self, text: str) -> Bits:
        """An operand as an integer modulo 2^32."""
        bits = self.bits(text)
        if bits is None:
            return None
        return -bits & ALL if text.strip().startswith("-") else ~bits & ALL if text.strip().startswith("~") else bits

    def part(self, text: str) -> Part:
        """An operand of which some bits may be known. Compilers keep predicates in single bits."""
        bits = self.integer(text)
        if bits is not None:
            return bits, ALL
        value, mask = self.parts.get(text.strip().removesuffix(".reuse").lstrip("~"), (0, 0))
        return (~value & mask if text.strip().startswith("~") else value), mask

    # --- execution
    def step(self, one: Instruction, is_tile: bool) -> None:
        """Go past an instruction that is not a branch."""
        runs = self.condition(one)
        if runs is False:
            return
        results = self._results(one, is_tile)
        for name in one.writes:
            result = results.get(name)
            value, mask = result if isinstance(result, tuple) else (0, 0) if result is None else (result, ALL)
            if name.startswith(("P", "UP")):
                new = True if value else False if mask == ALL else None
                self.predicates[name] = new if runs or self.predicates.get(name) is new else None
                continue
            if not runs:  # what is the same whether the instruction is executed or not
                before, known = self.part(name)
                mask &= known & ~(value ^ before)
            self.registers[name], self.parts[name] = value if mask == ALL else None, (value & mask, mask)

    def _results(self, one: Instruction, is_tile: bool) -> Results:
        """What is written, as far as it is known."""
        if one.name == "LDG":
            return dict.fromkeys(one.writes, 0 if is_tile else HALF) if self.zeros else {}
        name = one.name[1:] if one.name.startswith("U") and one.name[1:] in OPERATIONS else one.name
        operation, suffixes = OPERATIONS.get(name), one.opcode.split(".")[1:]
        operands = [part.strip() for part in one.operands.split(",")]
        is_part = name in ("IADD3", "IMAD") and not HALVES.isdisjoint(suffixes)
        return {} if operation is None or is_part else operation(self, suffixes, operands)


Operation = Callable[[Values, list[str], list[str]], Results]


def _arithmetic(compute: Callable[..., float]) -> Operation:
    def operation(values: Values, suffixes: list[str], operands: list[str]) -> Results:
        numbers = [values.float(text) for text in operands[1:]]
        return {} if None in numbers else {operands[0]: to_bits(compute(*numbers))}

    return operation


def _integer(compute: Callable[..., int]) -> Operation:
    def operation(values: Values, suffixes: list[str], operands: list[str]) -> Results:
        plain = [text for text in operands if not re.match(r"!?U?P[\dT]", text)]  # carries are not computed
        numbers = [values.integer(text) for text in plain[1:]]
        return {} if None in numbers else {plain[0]: compute(*numbers) & ALL}

    return operation


def _select(values: Values, suffixes: list[str], operands: list[str]) -> Results:
    chosen, sides = values.predicate(operands[3]), [values.bits(text) for text in operands[1:3]]
    if chosen is None:
        return {operands[0]: sides[0]} if sides[0] == sides[1] else {}
    return {operands[0]: sides[not chosen]}


def _minimum(values: Values, suffixes: list[str], operands: list[str]) -> Results:
    least, a, b = values.predicate(operands[3]), values.float(operands[1]), values.float(operands[2])
    if least is None or a is None or b is None:
        return {}
    a, b = (b if math.isnan(a) else a), (a if math.isnan(b) else b)
    return {operands[0]: to_bits(min(a, b) if least else max(a, b))}


def _integer_minimum(values: Values, suffixes: list[str], operands: list[str]) -> Results:
    least, a, b = values.predicate(operands[3]), values.integer(operands[1]), values.integer(operands[2])
    if least is None or a is None or b is None:
        return {}
    signed = [x if "U32" in suffixes else _signed(x) for x in (a, b)]
    return {operands[0]: (min(signed) if least else max(signed)) & ALL}


def _signed(bits: int) -> int:
    return (bits ^ 0x80000000) - 0x80000000


def _extend(values: Values, suffixes: list[str], operands: list[str]) -> Results:
    bits, count = values.bits(operands[1]), values.bits(operands[2])
    if bits is None or count is None:
        return {}
    kept = bits & ((1 << count) - 1)
    is_negative = "U32" not in suffixes and count > 0 and kept >> (count - 1)
    return {operands[0]: (kept - (1 << count) if is_negative else kept) & ALL}


def _from_integer(values: Values, suffixes: list[str], operands: list[str]) -> Results:
    bits = values.integer(operands[1])
    if bits is None or "F32" not in suffixes:
        return {}
    return {operands[0]: to_bits(float(bits if "U32" in suffixes else _signed(bits)))}


def _multiply_add(a: float, b: float, c: float) -> float:
    return math.nan if (math.isinf(a) and b == 0) or (math.isinf(b) and a == 0) else a * b + c


def _compare(kind: str) -> Operation:
    def operation(values: Values, suffixes: list[str], operands: list[str]) -> Results:
        single = kind == "FSET"
        a, b = (values.integer(text) if kind == "ISETP" else values.float(text) for text in operands[2 - single :][:2])
        before = values.predicate(operands[4 - single])
        if a is None or b is None:
            return {}
        if kind == "ISETP" and "U32" not in suffixes:
            a, b = _signed(int(a)), _signed(int(b))
        relation = next(s for s in suffixes if s in COMPARE or s.removesuffix("U") in COMPARE)
        join = BOOLEAN[next((s for s in suffixes if s in BOOLEAN), "AND")]
        holds: bool | None = compare(relation, a, b)
        if "EX" in suffixes:  # the upper half of a comparison of 64 bits; the last operand has the lower half
            holds = values.predicate(operands[5]) if a == b else holds
            if holds is None:
                return {}

        def joined(first: bool) -> Bits:
            results = {join(first, one) for one in ((False, True) if before is None else (before,))}
            return int(results.pop()) if len(results) == 1 else None

        if single:
            result = joined(holds)
            return {operands[0]: None if result is None else to_bits(float(result))}
        return {operands[0]: joined(holds), operands[1]: joined(not holds)}

    return operation


def _load_argument(values: Values, suffixes: list[str], operands: list[str]) -> Results:
    found = CONSTANT.match(operands[1])
    if found is None:
        return {}
    kind, number = re.match(r"(U?R)(\d+)", operands[0]).groups()  # type: ignore[union-attr]
    words = 2 if "64" in suffixes else 1
    base = int(found[1], 16)
    return {f"{kind}{int(number) + i}": values.bits(f"c[0x0][{base + 4 * i:#x}]") for i in range(words)}


def _check(values: Values, suffixes: list[str], operands: list[str]) -> Results:
    parts = [values.bits(text) for text in operands[1:]]
    if any(bits is not None and (bits >> 23 & 0xFF) in (0, 0xFF) for bits in parts):
        return {operands[0]: 1}
    return {} if None in parts else {operands[0]: 0}


def _root(values: Values, suffixes: list[str], operands: list[str]) -> Results:
    x, function = values.float(operands[1]), ROOTS.get(suffixes[0])
    return {} if x is None or function is None else {operands[0]: to_bits(function(x))}


def _logic(values: Values, suffixes: list[str], operands: list[str]) -> Results:
    targets = operands[: len(operands) - 5]
    parts = [values.part(text) for text in operands[len(targets) : len(targets) + 3]]
    table, results = int(operands[-2], 16), []
    for fills in itertools.product((0, ALL), repeat=3):  # whatever the unknown bits are
        results.append(
            look_up(table, *(value | (fill & ~mask) for (value, mask), fill in zip(parts, fills, strict=True)))
        )
    mask = functools.reduce(lambda mask, result: mask & ~(result ^ results[0]), results, ALL)
    return dict.fromkeys(targets, (results[0] & mask, mask))


def _predicate_logic(values: Values, suffixes: list[str], operands: list[str]) -> Results:
    inputs = [values.predicate(text) for text in operands[2:5]]
    if None in inputs:
        return {}
    first, second = (look_up(int(text, 16), *(ALL * bool(one) for one in inputs)) & 1 for text in operands[5:7])
    return {operands[0]: first, operands[1]: second}


def _permute(values: Values, suffixes: list[str], operands: list[str]) -> Results:
    a, selector, b = (values.bits(text) for text in operands[1:4])
    if selector is None:
        return {}
    picks = [selector >> 4 * i & 0xF for i in range(4)]
    if any(pick & 8 for pick in picks) or any((b if pick & 4 else a) is None for pick in picks):
        return {}
    both = ((b or 0) << 32) | (a or 0)
    return {operands[0]: sum((both >> 8 * (pick & 7) & 0xFF) << 8 * i for i, pick in enumerate(picks))}


def _shift(values: Values, suffixes: list[str], operands: list[str]) -> Results:
    low, by, high = (values.bits(text) for text in operands[1:4])
    if low == high == 0:
        return {operands[0]: 0}
    if by is None:
        return {}
    if suffixes[0] == "R" and "HI" in suffixes and high is not None and low == 0:
        high = _signed(high) if "S32" in suffixes else high
        return {operands[0]: high >> by & ALL}
    if suffixes[0] == "L" and "HI" not in suffixes and low is not None:
        return {operands[0]: low << by & ALL}
    return {}


def _predicates(values: Values, suffixes: list[str], operands: list[str]) -> Results:
    mask = values.bits(operands[3])
    picks = [i for i in range(7) if mask is not None and mask >> i & 1]
    known = [values.predicates.get(f"P{i}") for i in picks]
    if operands[1] != "PR" or None in known or mask is None:
        return {}
    return {operands[0]: sum(bool(one) << i for i, one in zip(picks, known, strict=True))}


def _pack(values: Values, suffixes: list[str], operands: list[str]) -> Results:
    high, low = values.bits(operands[1]), values.bits(operands[2])
    return {} if "BF16" not in suffixes or high is None or low is None else {operands[0]: high & ~0xFFFF | low >> 16}


OPERATIONS: Mapping[str, Operation] = {
    "FADD": _arithmetic(operator.add), "FMUL": _arithmetic(lambda a, b: _multiply_add(a, b, -0.0)),
    "FFMA": _arithmetic(_multiply_add), "FSEL": _select, "SEL": _select, "FMNMX": _minimum,
    "FSETP": _compare("FSETP"), "FSET": _compare("FSET"), "ISETP": _compare("ISETP"), "FCHK": _check, "MUFU": _root,
    "IADD3": _integer(lambda a, b, c=0: a + b + c), "VIADD": _integer(operator.add), "MOV": _integer(lambda a: a),
    "IMAD": _integer(lambda a, b, c: a * b + c), "R2UR": _integer(lambda a: a), "CS2R": _integer(lambda a: a),
    "LDC": _load_argument, "LOP3": _logic, "PLOP3": _predicate_logic, "PRMT": _permute, "SHF": _shift, "F2FP": _pack,
    "SGXT": _extend, "I2FP": _from_integer, "VIMNMX": _integer_minimum, "P2R": _predicates,
}  # fmt: skip
