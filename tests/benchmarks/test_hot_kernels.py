"""Reads the machine code of the kernels that take most of a training step, for sm_90. No GPU is needed.

A kernel must not spill, may have so many registers that enough programs fit on a processor, moves its elements in wide
accesses, asks for a whole tile before it waits for any of it, and never leaves the fast path of a division or of a root
because an element is zero. What today's code does not keep is marked ``xfail`` with the reason: who mends a kernel
removes the mark.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import counted_steps
import pytest
from stand_in_cuda import StandIn

if importlib.util.find_spec("benchmarks") is None:  # pytest puts no folder of the checkout on the path
    sys.path.insert(0, str(Path(__file__).parents[2]))

SIDE = 1024


class Hot(NamedTuple):
    """A kernel of a step.

    Attributes:
        step: the mode of the step, or "cold select".
        union: whether a task is finished.
        kernel: its name.
        registers: the most that a thread may have.
    """

    step: str
    union: bool
    kernel: str
    registers: int

    def __str__(self) -> str:
        return f"{self.kernel}, {self.step}{', union' * self.union}"


# 80 registers leave room for 6 programs of 128 threads, which have 70 KiB of loads in flight: the bandwidth of a
# processor needs 24 KiB. 64 leave room for 8 programs, 40 for 12, 32 for all threads of a processor.
ONE_PASS, FIRST_TASK = Hot("one-pass", True, "adamw_kernel", 80), Hot("one-pass", False, "adamw_kernel", 80)
GIVEN = Hot("standard", True, "adamw_kernel", 80)
GATE = Hot("guarded", True, "gate_by_guess_kernel", 40)
GRADIENTS = Hot("standard", True, "gate_backward_multi_kernel", 32)
WINDOW = Hot("cold select", False, "window_kernel", 64)
HOT = (ONE_PASS, FIRST_TASK, GIVEN, GATE, GRADIENTS, WINDOW)
TESTED = (ONE_PASS, WINDOW)
"""What the test line compiles; the others are part of .ci/run."""


def cases(**faults: tuple[Hot, ...]) -> pytest.MarkDecorator:
    """The hot kernels. A keyword is a reason why some of them fail today."""
    given = []
    for hot in HOT:
        marks = [] if hot in TESTED else [pytest.mark.ci]
        reasons = [reason.replace("_", " ") for reason, failing in faults.items() if hot in failing]
        marks += [pytest.mark.xfail(strict=True, reason=reason) for reason in reasons]
        given.append(pytest.param(hot, id=str(hot), marks=marks))
    return pytest.mark.parametrize("hot", given)


@pytest.fixture(scope="module")
def kernel_work(stand_in_library: StandIn) -> ModuleType:
    return importlib.import_module("benchmarks.kernel_work")


@pytest.fixture(scope="module")
def read(kernel_work: ModuleType, stand_in_library: StandIn) -> Iterator[Any]:
    """What the machine code of a hot kernel says."""
    real_steps = importlib.import_module("benchmarks.real_steps")
    known: dict[tuple[str, bool], list[Any]] = {}

    with pytest.MonkeyPatch.context() as patch, stand_in_library.active(patch):
        counted_steps.allow_steps(stand_in_library, patch)

        def facts(hot: Hot) -> Any:
            key = hot.step, hot.union
            if key not in known:
                step = (
                    real_steps.cold_select(SIDE, patch)
                    if hot.step == "cold select"
                    else real_steps.training_step(hot.step, SIDE, hot.union, patch)
                )
                known[key] = step.launches
            launch = next(launch for launch in known[key] if launch.name == hot.kernel)
            return kernel_work.facts(launch)

        yield facts


@cases()
def test_no_register_is_spilled(hot: Hot, read: Any) -> None:
    assert read(hot).spills == 0


@cases(a_tile_has_16_keys_a_thread=(WINDOW,))
def test_enough_programs_fit_on_a_processor(hot: Hot, read: Any) -> None:
    assert read(hot).registers <= hot.registers


@cases(each_thread_has_keys_far_apart=(WINDOW,))
def test_elements_are_moved_in_wide_accesses(hot: Hot, read: Any) -> None:
    """Single bytes are those of packed masks: a thread needs no more than one."""
    narrow = [opcode for opcode in read(hot).tile.widths if not opcode.endswith((".64", ".128", ".U8"))]
    assert narrow == []


@cases()
def test_a_tile_is_loaded_before_anything_is_computed(hot: Hot, read: Any) -> None:
    assert read(hot).tile.waits == 1


@cases()
def test_zeros_stay_on_the_fast_path(hot: Hot, read: Any) -> None:
    """Most second moments of weights outside the mask are exactly zero, and then a whole warp takes the slow path."""
    zeros = read(hot).zeros
    assert zeros.undecided == ()
    assert zeros.reached == 0


def test_the_kernels_that_the_model_names_exist(kernel_work: ModuleType) -> None:
    names = {
        name
        for module in importlib.import_module("compile_cases").all_cases()
        for name in vars(importlib.import_module(f"wsn_fast.kernels.{module}"))
    }
    assert names >= kernel_work.LISTED | kernel_work.SAMPLING
