"""The model of device times: its constants are frozen, it follows from them, and the command calls it a model."""

from __future__ import annotations

import importlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import counted_steps
import pytest
import torch
from stand_in_cuda import StandIn, obstacle
from triton_versions import spills_when_old

if importlib.util.find_spec("benchmarks") is None:  # pytest puts no folder of the checkout on the path
    sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks import device_model as model

ROOT = Path(__file__).parents[2]
WORK = model.Work(
    threads=128, registers=32, shared=0, programs=132 * 64, tiles=1, busy=132 * 64, issued=100, stalled=1000.0,
    moved=16384.0, atomics=0.0, before=0.0, after=0.0,
)  # fmt: skip


# --- the model
def test_the_constants_are_frozen() -> None:
    """Predictions can only be compared as long as nobody turns a knob."""
    assert {name: one.value for name, one in model.CONSTANTS.items()} == {
        "SMs": 132, "clock": 1980, "bandwidth": 4.239, "schedulers": 4, "threads": 2048, "programs": 32,
        "registers": 65536, "register step": 8, "shared": 232448, "shared reserved": 1024, "launch": 1.7,
        "DRAM": 1485, "L2": 263, "atomic": 1386, "same address": 0.22, "shared atomic": 60, "shared load": 29,
        "barrier": 30, "exchange": 25, "special": 20, "arithmetic": 4.5, "torch": 0.91, "torch least": 1.7,
        "cold share": 0.0703, "warm share": 1 / 2048, "zeros": 0.5,
    }  # fmt: skip
    assert all(one.source for one in model.CONSTANTS.values())


@pytest.mark.parametrize(
    ("changed", "expected"),
    [({}, 16), ({"registers": 33}, 12), ({"registers": 144}, 3), ({"shared": 100_000}, 2), ({"threads": 32}, 32)],
)
def test_programs_fit_as_their_threads_registers_and_memory_allow(changed: dict[str, int], expected: int) -> None:
    assert model.occupancy(WORK._replace(**changed)) == expected


def test_one_program_takes_all_its_times_and_many_are_bound_by_a_station() -> None:
    assert model.throughput(1, issue=1.0, memory=2.0, waits=5.0) == pytest.approx(1 / 8)
    rates = [model.throughput(count, issue=1.0, memory=2.0, waits=5.0) for count in range(1, 40)]
    assert rates == sorted(rates) and rates[-1] == pytest.approx(1 / 2, rel=1e-3)


def test_a_kernel_with_enough_programs_is_bound_by_the_bandwidth() -> None:
    found = model.predict(WORK)
    assert found.bound == "bandwidth" and found.floor == pytest.approx(132 * 64 * 16384 / 4.239e6)
    assert found.floor < found.us - model.value("launch") < 1.05 * found.floor


@pytest.mark.parametrize(
    ("changed", "bound"),
    [
        ({"issued": 3000}, "issue"),
        ({"registers": 255}, "latency"),
        ({"programs": 1, "busy": 1}, "launch and latency"),
        ({"atomics": 128.0}, "atomics"),
    ],
)
def test_what_bounds_a_kernel_is_told_and_makes_it_slower(changed: dict[str, float], bound: str) -> None:
    assert model.predict(WORK._replace(**changed)).bound == bound
    assert model.predict(WORK._replace(**changed)).us > model.predict(WORK._replace(programs=1, busy=1)).us - 1e-9


def test_the_ways_before_and_after_the_tiles_are_added() -> None:
    more = model.predict(WORK._replace(before=1980.0, after=3960.0)).us - model.predict(WORK).us
    assert more == pytest.approx(2 + 4 * 1)  # the programs come in four waves


def test_a_kernel_of_torch_takes_its_bytes_and_at_least_the_least() -> None:
    assert model.torch_kernel(4.239e6 * 91) == pytest.approx(100)
    assert model.torch_kernel(1000) == 1.7


# --- what steps launch
@pytest.fixture
def real_steps(stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    counted_steps.allow_steps(stand_in, monkeypatch)
    return importlib.import_module("benchmarks.real_steps")


def test_a_dense_step_moves_40_bytes_for_a_weight(real_steps: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    step = real_steps.dense_step(64, monkeypatch)
    assert step.launches == [] and sum(size for _, size in step.operators) == 40 * 64**2


def test_a_one_pass_step_is_all_triton(real_steps: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    step = real_steps.training_step("one-pass", 64, True, monkeypatch)
    assert step.operators == [] and "adamw_kernel" in {launch.name for launch in step.launches}


def test_arguments_lie_in_the_constant_bank_as_their_types_say() -> None:
    arguments = importlib.import_module("benchmarks.kernel_work").machine_arguments
    signature = {"x_ptr": "*fp32", "BLOCK": "constexpr", "a": "i32", "n": "i64", "lr": "fp32", "pair": ("i64", "i1")}
    signature |= {"b": "i32"}
    values = {"BLOCK": 64, "a": 5, "n": (7 << 32) + 1, "lr": 0.5, "b": -1}
    expected = {0x218: 5, 0x220: 1, 0x224: 7, 0x23C: 0xFFFFFFFF}
    assert arguments(signature, values) == expected  # lr: 0x228, the pair: 0x230 and 0x238


def test_the_bytes_of_an_update_are_read_from_its_machine_code(
    real_steps: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G in bf16, weights, scores and four moments in float32, the masked weight in bf16, and a bit of the union."""
    launches = real_steps.training_step("one-pass", 1024, True, monkeypatch).launches
    work = importlib.import_module("benchmarks.kernel_work")
    update = max(work.rows(launches, 1024**2), key=lambda row: row.prediction.floor)
    assert update.name == "adamw_kernel" and update.bytes == pytest.approx(2 + 6 * 8 + 2 + 1 / 8, abs=0.05)
    covered = update.work.tiles * update.work.busy * update.per_thread * update.work.threads
    assert 1024**2 <= covered < 1024**2 * 1.01


@spills_when_old
@pytest.mark.parametrize(
    ("mode", "claimed"),
    # G, the weight, the scores, four means, their scales for 256 elements, the masked weight, a bit of the union
    [
        pytest.param("one-pass, 8bit", 2 + 2 * 8 + 4 * 2 + 4 * 8 / 256 + 2 + 1 / 8, id="8bit"),
        pytest.param("one-pass, bfloat16", 2 + 2 * 8 + 4 * 4 + 2 + 1 / 8, id="bfloat16", marks=pytest.mark.ci),
        # dW and dS in float32 in place of G
        pytest.param(
            "standard, 8bit", 2 * 4 + 2 * 8 + 4 * 2 + 4 * 8 / 256 + 2 + 1 / 8, id="standard", marks=pytest.mark.ci
        ),
    ],
)
def test_an_update_of_coded_means_moves_the_bytes_that_it_claims(
    real_steps: ModuleType, monkeypatch: pytest.MonkeyPatch, mode: str, claimed: float
) -> None:
    """In wide accesses, and with one wait for memory in a tile; no register is spilled."""
    launches = real_steps.training_step(mode, 1024, True, monkeypatch).launches
    work = importlib.import_module("benchmarks.kernel_work")
    update = max(work.rows(launches, 1024**2), key=lambda row: row.prediction.floor)
    assert update.name == "adamw_coded_kernel" and update.bytes == pytest.approx(claimed, rel=0.03)
    assert update.facts.spills == 0 and update.facts.tile.barriers == 0 and update.facts.tile.waits == 1
    assert not update.facts.way.slow_calls, "zeros would be slow"
    # Four codes of a thread are 32 bits; single bytes are those of the union.
    assert {opcode.partition(".E")[2] for opcode in update.facts.tile.widths} <= {"", ".64", ".128", ".U8"}


# --- the report
def test_a_target_is_met_from_the_right_side() -> None:
    predict = importlib.import_module("benchmarks.predict")
    assert predict.Verdict("time", 10, False, 10).is_met and not predict.Verdict("time", 10, False, 10.1).is_met
    assert predict.Verdict("share", 0.9, True, 0.91).is_met and not predict.Verdict("share", 0.9, True, 0.89).is_met


@pytest.mark.ci
@pytest.mark.skipif(bool(obstacle()), reason=obstacle())
def test_the_command_prints_a_model(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.predict", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert "model" in told["about"] and told["constants"].keys() == model.CONSTANTS.keys()
    for kernel in told["kernels"]:
        assert all(us >= model.value("launch") for us in kernel["us"].values()), kernel["kernel"]
        assert all(us >= floor for us, floor in zip(kernel["us"].values(), kernel["floor us"].values(), strict=True))
    assert {one["step"] for one in told["steps"]} >= {"dense", "one-pass", "standard", "guarded", "one-pass, 8bit"}
    dense = [one["us"]["torch"] for one in told["steps"] if one["step"] == "dense" and "4096" in one["shape"]]
    assert dense == [pytest.approx(40 * 4096**2 / 4.239e6 / 0.91)] * 3
    lines = importlib.import_module("benchmarks.predict").markdown(told)
    assert "a model, not a measurement" in lines[0]
    assert len(told["targets"]) == sum(line.endswith(("| met    |", "| MISSED |")) for line in lines)
    assert torch.__version__ in "\n".join(lines)
