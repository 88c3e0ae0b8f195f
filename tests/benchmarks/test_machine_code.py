"""Reads small pieces of machine code: instructions, loops, the way that is taken, what is computed, and the time."""

from __future__ import annotations

import math
from collections.abc import Sequence

import machine_code
import pytest
from machine_code import Flow, Instruction
from machine_paths import BITS, Clock, Latencies, Timeline, Walker, main_loop
from machine_values import HALF, Values, compare, look_up, to_bits, to_float

LATENCIES = Latencies(by_name={"BAR": 30, "ATOMG": 500}, other=4, tile=1000, table=200)


def program(text: str) -> machine_code.Program:
    """One instruction in a line, with labels between them, as nvdisasm prints them."""
    lines = []
    for place, line in enumerate(text.strip().splitlines()):
        line = line.strip()
        is_code = not line.startswith(".")
        lines.append(f"        /*{16 * place:04x}*/                   {line} ;" if is_code else line)
    return machine_code.parse("\n".join(lines))


def names(code: Sequence[Instruction]) -> list[str]:
    return [one.name for one in code]


# Every thread adds up numbers of a tile. The last tile has a loop of its own.
LOOP = """
S2R R0, SR_TID.X
LDG.E.64 R2, desc[UR4][R8.64]
IMAD.WIDE R4, R0, 0x4, R2
@P2 BRA `(.L_x_2)
.L_x_1:
LDG.E.128 R12, desc[UR4][R4.64]
FADD R6, R6, R12
IADD3 R7, R7, 0x1, RZ
ISETP.GE.AND P0, PT, R7, R9, PT
@!P0 BRA `(.L_x_1)
.L_x_2:
@P3 BRA `(.L_x_3)
@P4 LDG.E R12, desc[UR4][R4.64]
FADD R6, R6, R12
.L_x_3:
STG.E desc[UR4][R4.64], R6
EXIT
"""


# --- instructions
@pytest.mark.parametrize(
    ("opcode", "operands", "writes", "reads"),
    [
        ("LDG.E.128", "R8, desc[UR4][R6.64]", "R8 R9 R10 R11", "R6 R7 UR4"),
        ("STG.E.64", "desc[UR4][R6.64+0x10], R8", "", "R6 R7 R8 R9 UR4 UR5"),
        ("IADD3", "R4, P2, R105, UR6, RZ", "R4 P2", "R105 UR6"),
        ("IADD3.X", "R89, R57, UR47, RZ, P2, !PT", "R89", "R57 UR47 P2"),
        ("ISETP.GT.U32.AND", "P4, PT, R4, 0x7f, P1", "P4", "R4 P1"),
        ("LOP3.LUT", "P3, RZ, R0, 0x1, RZ, 0xc0, !PT", "P3", "R0"),
        ("FCHK", "P4, R61, UR29", "P4", "R61 UR29"),
        ("SEL", "R0, R1, 0x100, P2", "R0", "R1 P2"),
        ("ATOMG.E.ADD.64.STRONG.GPU", "PT, R4, desc[UR24][R6.64+0x28], R2", "R4 R5", "R6 R7 R2 UR24"),
        ("REDUX.SUM.S32", "UR6, R40", "UR6", "R40"),
        ("BAR.SYNC.DEFER_BLOCKING", "0x0", "", ""),
    ],
)
def test_an_instruction_tells_what_it_writes_and_reads(opcode: str, operands: str, writes: str, reads: str) -> None:
    one = Instruction("", opcode, operands)
    assert (one.writes, one.reads) == ({*writes.split()}, {*reads.split()})


def test_the_predicate_of_an_instruction_is_read() -> None:
    assert Instruction("!P0", "MOV", "R0, R1").reads == {"P0", "R1"}


@pytest.mark.parametrize(("opcode", "width"), [("LDG.E", 4), ("LDG.E.U8", 1), ("STG.E.U16", 2), ("LDG.E.128", 16)])
def test_a_memory_instruction_has_a_width(opcode: str, width: int) -> None:
    assert Instruction("", opcode, "R0, desc[UR4][R2.64]").width == width


def test_subroutines_are_apart_from_the_kernel() -> None:
    found = program("CALL.REL.NOINC `($root)\nEXIT\n.type $root,@function\nMUFU.RSQ R0, R0\nRET.REL.NODEC R2 `(k)")
    assert names(found.kernel) == ["CALL", "EXIT"]
    assert {name: names(code) for name, code in found.subroutines.items()} == {"$root": ["MUFU", "RET"]}


# --- loops and ways
def test_the_main_loop_is_the_one_with_plain_loads() -> None:
    flow = Flow(program(LOOP).kernel)
    loop = main_loop(flow, listed=False)
    assert loop is not None and loop == flow.loops[0]
    assert names(flow.instructions(loop.blocks)) == ["LDG", "FADD", "IADD3", "ISETP", "BRA"]


def test_a_way_goes_through_the_loop_and_not_through_the_last_tile() -> None:
    way = Walker(program(LOOP)).way()
    assert names(way.before) == ["S2R", "LDG", "IMAD", "BRA"]
    assert names(way.tile) == ["LDG", "FADD", "IADD3", "ISETP", "BRA"]
    assert names(way.after) == ["BRA", "STG", "EXIT"]
    assert way.in_loop


def test_a_kernel_without_a_loop_is_one_tile() -> None:
    way = Walker(program("LDG.E R0, desc[UR4][R2.64]\nSTG.E desc[UR4][R2.64], R0\nEXIT")).way()
    assert names(way.tile) == ["LDG", "STG", "EXIT"] and not way.in_loop and not way.before


def test_masked_loads_are_the_usual_ones_of_a_list() -> None:
    text = LOOP.replace("@P4 LDG.E R12", "LDG.E R12").replace("LDG.E.128 R12", "@!P1 LDG.E R12")
    flow = Flow(program(text).kernel)
    assert main_loop(flow, listed=True) == flow.loops[0]
    way = Walker(program(text), listed=True).way()
    assert names(way.after) == ["BRA", "STG", "EXIT"]  # a plain load is what a whole tensor needs


def test_a_search_by_bits_is_gone_through_for_each_of_them() -> None:
    text = "MOV R0, R1\n.L_x_0:\nBAR.SYNC 0x0\nIADD3 R0, R0, 0x1, RZ\n@P0 BRA `(.L_x_0)\nEXIT"
    way = Walker(program(text)).way()
    assert names(way.tile).count("BAR") == BITS


KEYS = """
S2R R0, SR_TID.X
IMAD.WIDE R4, R0, 0x4, R2
LDG.E.128 R12, desc[UR4][R4.64]
REDUX.SUM.S32 UR6, R12
ISETP.GE.AND P5, PT, R1, UR6, PT
@!P5 BRA `(.L_x_1)
ATOMG.E.ADD.64.STRONG.GPU PT, R6, desc[UR4][R2.64], R8
IMAD.WIDE R8, R6, 0x4, R2
@P1 STG.E desc[UR4][R8.64], R12
.L_x_1:
EXIT
"""


@pytest.mark.parametrize("found", [False, True])
def test_keys_are_found_or_not(found: bool) -> None:
    way = Walker(program(KEYS), found=found).way()
    assert ("ATOMG" in names(way.tile)) is found and way.found_sides == 1


def test_an_atomic_behind_a_branch_that_no_data_decide_is_always_executed() -> None:
    way = Walker(program(KEYS.replace("R1, UR6, PT", "R1, UR7, PT"))).way()
    assert "ATOMG" in names(way.tile) and way.found_sides == 0


ARGUMENT = """
LDC.64 R4, c[0x0][0x210]
ULDC UR4, c[0x0][0x218]
ISETP.GT.U32.AND P0, PT, R4, UR4, PT
ISETP.GT.AND.EX P0, PT, R5, RZ, PT, P0
@P0 BRA `(.L_x_1)
MOV R6, R7
MOV R6, R7
.L_x_1:
@P0 EXIT
STG.E desc[UR4][R2.64], R6
EXIT
"""


@pytest.mark.parametrize(
    ("arguments", "path"),
    [
        ({}, ["MOV", "MOV", "EXIT", "STG", "EXIT"]),
        ({0x210: 7, 0x214: 0, 0x218: 3}, ["EXIT"]),
        ({0x210: 2, 0x214: 0, 0x218: 3}, ["MOV", "MOV", "EXIT", "STG", "EXIT"]),
        ({0x210: 2, 0x214: 1, 0x218: 3}, ["EXIT"]),
    ],
)
def test_the_arguments_of_the_launch_decide(arguments: dict[int, int], path: list[str]) -> None:
    assert names(Walker(program(ARGUMENT), arguments).way().tile)[5:] == path


# --- slow paths
def root(operand: str) -> machine_code.Program:
    """A root of ``operand``, as the compiler makes it, in a tile whose only element is R12."""
    return program(f"""
S2R R0, SR_TID.X
IMAD.WIDE R4, R0, 0x4, R2
LDG.E R12, desc[UR4][R4.64]
FSETP.EQ.AND P1, PT, R12, RZ, PT
FSEL R13, R12, 1, !P1
VIADD R6, {operand}, 0xf3000000
ISETP.GT.U32.AND P4, PT, R6, 0x727fffff, PT
@!P4 BRA `(.L_x_1)
CALL.REL.NOINC `($root_slowpath)
BRA `(.L_x_2)
.L_x_1:
MUFU.RSQ R8, {operand}
.L_x_2:
STG.E desc[UR4][R4.64], R8
EXIT
.type $root_slowpath,@function
FSETP.GEU.FTZ.AND P4, PT, R12, RZ, PT
@!P4 BRA `(.L_x_3)
MOV R8, R12
.L_x_3:
RET.REL.NODEC R20 `(kernel)
""")


def test_a_slow_path_is_not_the_usual_way() -> None:
    way = Walker(root("R12")).way()
    assert "CALL" not in names(way.tile) and way.slow_calls == {"$root_slowpath": 1} and way.reached == 0


def test_zeros_reach_the_slow_path_of_a_root() -> None:
    way = Walker(root("R12"), zeros=True).way()
    assert way.reached == 1 and not way.undecided
    assert names(way.tile)[8:13] == ["CALL", "FSETP", "BRA", "MOV", "RET"]


def test_a_select_keeps_zeros_from_the_slow_path() -> None:
    way = Walker(root("R13"), zeros=True).way()
    assert (way.slow_calls, way.reached, way.undecided) == ({"$root_slowpath": 1}, 0, ())


@pytest.mark.parametrize(("bits", "predicate", "path"), [
    ("0x7f800000", "!P3", ["MOV", "STG"]), ("0x7f000000", "!P3", ["MOV", "STG"]),
    ("0x7f800000", "P3", ["FADD", "FMUL"]), ("0x40000000", "!P3", ["FADD", "FMUL"]),
])  # fmt: skip
def test_what_only_large_numbers_need_is_not_the_usual_way(bits: str, predicate: str, path: list[str]) -> None:
    text = f"""
    S2R R0, SR_TID.X
    IMAD.WIDE R4, R0, 0x4, R2
    LDG.E R12, desc[UR4][R4.64]
    ISETP.GE.AND P3, PT, R12, {bits}, PT
    @{predicate} BRA `(.L_x_1)
    FADD R8, R12, R12
    FMUL R8, R8, R8
    BRA `(.L_x_2)
    .L_x_1:
    MOV R8, R12
    STG.E desc[UR4][R4.64], R8
    .L_x_2:
    EXIT
    """
    assert [name for name in names(Walker(program(text)).way().tile) if name in {"MOV", "STG", "FADD", "FMUL"}] == path


def test_what_is_not_known_is_told() -> None:
    way = Walker(root("R99"), zeros=True).way()
    assert [one.name for one in way.undecided] == ["BRA"] and way.reached == 0


# --- values
@pytest.mark.parametrize(
    ("opcode", "operands", "expected"),
    [
        ("FFMA", "R9, R1, R1, -R2", 0.25 - 3.0),
        ("FADD", "R9, -|R3|, 1", -1.0),
        ("FMUL", "R9, R1, 4", 2.0),
        ("MUFU.RCP", "R9, R1", 2.0),
        ("MUFU.RSQ", "R9, RZ", math.inf),
        ("FMNMX", "R9, R1, R2, !PT", 3.0),
        ("FSEL", "R9, R1, R2, P1", 3.0),
        ("I2FP.F32.U32", "R9, 0x5", 5.0),
        ("FSET.BF.GT.AND", "R9, R2, R1, PT", 1.0),
    ],
)
def test_numbers_are_computed(opcode: str, operands: str, expected: float) -> None:
    values = Values()
    values.registers = {"R1": HALF, "R2": to_bits(3.0), "R3": to_bits(-2.0)}
    values.predicates = {"P1": False}
    values.step(Instruction("", opcode, operands), is_tile=False)
    bits = values.registers["R9"]
    assert bits is not None and to_float(bits) == expected


@pytest.mark.parametrize(
    ("opcode", "operands", "expected"),
    [
        ("IADD3", "R9, R1, -R2, 0x1", 0xFFFFFFFF),
        ("LOP3.LUT", "R9, R1, R2, RZ, 0x3c, !PT", 2 ^ 4),
        ("SHF.R.U32.HI", "R9, RZ, 0x1, R2", 2),
        ("PRMT", "R9, R1, 0x5410, R2", 0x00040002),
        ("SGXT", "R9, R1, 0x2", 0xFFFFFFFE),
        ("IMAD.SHL.U32", "R9, R1, 0x8, RZ", 16),
        ("VIMNMX", "R9, R1, -0x1, PT", 0xFFFFFFFF),
        ("LOP3.LUT", "R9, R7, RZ, RZ, 0xc0, !PT", 0),
        ("MOV", "R9, R7", None),
    ],
)
def test_integers_are_computed(opcode: str, operands: str, expected: int | None) -> None:
    values = Values()
    values.registers = {"R1": 2, "R2": 4}
    values.step(Instruction("", opcode, operands), is_tile=False)
    assert values.registers["R9"] == expected


def test_an_instruction_that_may_not_be_executed_leaves_only_what_is_the_same_either_way() -> None:
    values = Values()
    values.registers = {"R1": 7, "R2": 7, "R3": 8}
    values.step(Instruction("P0", "MOV", "R1, R2"), is_tile=False)
    values.step(Instruction("P0", "MOV", "R2, R3"), is_tile=False)
    assert values.registers == {"R1": 7, "R2": None, "R3": 8}


def test_a_bit_may_be_known_where_the_others_are_not() -> None:
    values = Values()
    for one in (
        Instruction("", "MOV", "R1, R7"),
        Instruction("", "LOP3.LUT", "R1, R1, 0x8, RZ, 0xfc, !PT"),  # sets a bit
        Instruction("P6", "LOP3.LUT", "R1, R1, 0x4, RZ, 0xfc, !PT"),  # perhaps
        Instruction("", "LOP3.LUT", "R1, R1, 0xfffffffe, RZ, 0xc0, !PT"),  # clears one
        *(Instruction("", "LOP3.LUT", f"P{i}, RZ, R1, {1 << i:#x}, RZ, 0xc0, !PT") for i in range(4)),
    ):
        values.step(one, is_tile=False)
    assert values.registers["R1"] is None
    assert [values.predicates[f"P{i}"] for i in range(4)] == [False, None, None, True]


@pytest.mark.parametrize(("bits", "slow"), [(0, True), (HALF, False), (to_bits(math.inf), True), (1, True)])
def test_a_division_is_checked(bits: int, slow: bool) -> None:
    values = Values()
    values.registers = {"R1": bits, "R2": HALF}
    values.step(Instruction("", "FCHK", "P0, R1, R2"), is_tile=False)
    assert values.predicates["P0"] is slow


def test_comparisons_of_nan_and_tables_of_bits() -> None:
    assert compare("NEU", math.nan, 1) and not compare("NE", math.nan, 1) and compare("GEU", 2, 1)
    assert look_up(0xE8, 0b1100, 0b1010, 0b1001) & 0xF == 0b1000 | 0b1010 & 0b1100  # the majority


# --- time
def run(text: str, found: bool = False) -> Timeline:
    return Clock(LATENCIES, found=found).run(program(text).kernel)


THREAD = "S2R R0, SR_TID.X\nIMAD.WIDE R4, R0, 0x4, R2\n"


def test_loads_wait_together_or_one_after_the_other() -> None:
    load, other = "LDG.E.128 R12, desc[UR4][R4.64]\n", "LDG.E.128 R16, desc[UR4][R4.64]\n"
    use, use_other = "FADD R6, R6, R12\n", "FADD R7, R7, R16\n"
    together, apart = run(THREAD + load + other + use + use_other), run(THREAD + load + use + other + use_other)
    assert (together.waits, together.in_flight) == (1, 32) and (apart.waits, apart.in_flight) == (2, 16)
    assert 1000 < together.cycles < 1030 and 2000 < apart.cycles < 2030
    assert together.moved == apart.moved == 32 and together.widths == {"LDG.E.128": 2}


def test_an_address_that_all_threads_share_is_that_of_a_table() -> None:
    found = run("LDG.E.128 R12, desc[UR4][R4.64]\nFADD R6, R6, R12")
    assert (found.moved, found.waits) == (0, 0) and 200 < found.cycles < 210


def test_what_goes_where_data_tell_is_scattered() -> None:
    found = run(KEYS.replace("@!P5 BRA `(.L_x_1)\n", ""), found=True)
    assert (found.moved, found.scattered, found.widths) == (20, 4, {"LDG.E.128": 1})


def test_a_small_table_is_in_a_cache() -> None:
    """Data tell the place, so that the load does not take its time from DRAM."""
    code = THREAD + "LDG.E R12, desc[UR4][R4.64]\nLEA R6, P0, R12, UR8, 0x2\nLDG.E R14, desc[UR4][R6.64]\nMOV R7, R14"
    found = run(code)
    assert (found.waits, found.moved, found.scattered) == (1, 8, 4) and 1200 < found.cycles < 1220


@pytest.mark.parametrize("found", [False, True])
def test_a_warp_waits_for_an_atomic_only_if_a_thread_asks_for_it(found: bool) -> None:
    text = """
    LDG.E R12, desc[UR4][R4.64]
    ISETP.GE.AND P5, PT, R12, 0x1, PT
    @P5 ATOMG.E.ADD.64.STRONG.GPU PT, R6, desc[UR4][R2.64], R8
    MOV R7, R6
    """
    one = run(THREAD + text, found)
    assert (one.atomics, one.lane_atomics, one.spread_atomics) == (0, 1, 0)
    assert (one.cycles > 1500) is found


def test_a_barrier_takes_its_time() -> None:
    found = run("BAR.SYNC.DEFER_BLOCKING 0x0\nMOV R1, R2")
    assert (found.cycles, found.barriers) == (32, 1)
