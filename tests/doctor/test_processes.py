"""``python -m wsn_fast.doctor --check`` under torchrun finds a wrong collective, and names it, its dtype and the
process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from processes import needs_gloo
from ranks import Ended, drive

ROOT = Path(__file__).parents[2]
pytestmark = needs_gloo
NAMES = [
    "all-reduce, sum", "all-reduce, sum in the background", "all-reduce, max", "broadcast", "all-gather of parts",
    "objects", "all-gather of shards (FSDP2)", "reduce-scatter (FSDP2)", "gradients with reduce_in_bfloat16",
    "threshold of shards",
]  # fmt: skip


def check(folder: Path, world: int = 2, *words: str, plant: str = "") -> Ended:
    return drive(folder, world, *(words or ["--check"]), prepare=plant, program="wsn_fast.doctor.__main__")


def lines_of(ended: Ended) -> dict[str, str]:
    """What the first process says about each collective, by its name."""
    found = {}
    for line in ended.said[0].splitlines():
        name = max((name for name in NAMES if line.startswith(f"  {name}  ")), key=len, default=None)
        if name is not None:
            found[name] = line[2 + len(name) :].strip()
    return found


@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.ci)])
def test_every_collective_is_right_here(tmp_path: Path, world: int) -> None:
    ended = check(tmp_path, world)
    assert ended.codes == [0] * world and ended.said[1:] == [""] * (world - 1) and not ended.lines, ended
    assert ended.said[0].startswith(f"cpu: {world} processes, gloo\n")
    lines = lines_of(ended)
    assert list(lines) == NAMES and all(says.endswith("  right") for says in lines.values()), lines
    assert lines["all-reduce, sum"].startswith("int32 int64 float32 float64 bfloat16  ")


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Ended:
    return check(tmp_path_factory.mktemp("planted"), plant="collective_cases:all_wrong")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("all-reduce, sum", "bfloat16, rank 1: element 3 of 1003 is "),
        ("all-reduce, sum in the background", "float32, rank 1: element 0 of 1003 is "),
        ("all-reduce, max", "float32, rank 1: element 5 of 1003 is "),
        ("broadcast", "float64, rank 1: element 7 of 1003 is "),
        ("all-gather of parts", "int32, rank 1: element 0 of 37 is "),
        ("objects", "uint8, rank 1: the texts are ['another', "),
        ("all-gather of shards (FSDP2)", "bfloat16, rank 1: element 9 of 2006 is "),
        ("reduce-scatter (FSDP2)", "bfloat16, rank 1: element 9 of 1003 is "),
        ("gradients with reduce_in_bfloat16", "bfloat16, rank 1: the gradient of a gated weight is off by "),
        ("threshold of shards", "float32, rank 1: element 0 of 6 is "),
    ],
)
def test_a_wrong_collective_is_named(planted: Ended, name: str, says: str) -> None:
    assert f"WRONG: {says}" in lines_of(planted)[name]


def test_wrong_collectives_are_counted_and_end_all(planted: Ended) -> None:
    assert planted.codes == [1, 1]
    assert planted.said[0].endswith("10 collectives are wrong; report them with this output\n")


@pytest.mark.ci
def test_sums_that_one_process_rounds_differently_are_named(tmp_path: Path) -> None:
    ended = check(tmp_path, plant="collective_cases:other_bits")
    assert lines_of(ended)["all-reduce, sum"].endswith("WRONG: float64, rank 1: its bits are not those of rank 0")


@pytest.mark.ci
def test_nothing_more_is_checked_when_a_process_raises(tmp_path: Path) -> None:
    ended = check(tmp_path, plant="collective_cases:one_raises")
    lines = lines_of(ended)
    assert list(lines) == NAMES[:1] and lines[NAMES[0]].endswith("rank 1: RuntimeError: no such kernel")
    assert "WRONG: float64, rank 0: RuntimeError: " in lines[NAMES[0]]
    assert f"  not checked after that: {', '.join(NAMES[1:])}\n" in ended.said[0]
    assert ended.codes == [1, 1]


@pytest.mark.ci
def test_a_process_that_does_not_answer_is_named(tmp_path: Path) -> None:
    ended = check(tmp_path, plant="collective_cases:one_is_silent")
    assert lines_of(ended)[NAMES[0]].endswith("rank 1: it has not answered in 6 s")


@pytest.mark.parametrize("words", [["--tune", "--check"], ["--check", "--minutes", "3"]])
def test_a_wrong_option_is_said_once(tmp_path: Path, words: list[str]) -> None:
    ended = check(tmp_path, 2, *words)
    assert 2 in ended.codes and "error: " in ended.errors[0] and ended.errors[1] == "", ended


def test_the_findings_are_those_of_the_first_process(tmp_path: Path) -> None:
    ended = check(tmp_path, 2, "--device", "cpu")
    assert 2 in ended.codes  # no command that measures
    ended = drive(tmp_path, 2, program="wsn_fast.doctor.__main__")
    assert ended.codes == [0, 0] and "native library" in ended.said[0] and ended.said[1] == "", ended


@pytest.mark.ci
def test_torchrun_starts_the_check() -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [*torchrun, "-m", "wsn_fast.doctor", "--check"]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("every collective is right") == 1
