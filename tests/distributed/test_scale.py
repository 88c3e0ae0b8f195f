"""The formulas of ``benchmarks.scale``, beside what processes hold and send."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from processes import needs_gloo, run_cases
from scale_cases import CASES, MODEL, TASKS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks import scale
from wsn_fast.backends import digits

WORLD = 2
PAGE = Path(__file__).parents[2] / "docs" / "results" / "scale.md"


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_cases("scale_cases", WORLD, tmp_path_factory.mktemp("two"))


@needs_gloo
@pytest.mark.parametrize("case", CASES)
def test_the_fullest_process_holds_what_the_formula_says(case: str, seen: list[dict[str, Any]]) -> None:
    compute, _, mode = case.split(maxsplit=2)
    said = scale.memory(MODEL, WORLD, TASKS, compute=int(compute), one_pass=mode == "one pass")
    held = {kind: max(one[case][0][kind] for one in seen) for kind in seen[0][case][0]}
    assert held.pop("masks and their union") == pytest.approx(said["masks and their union"], abs=8 * TASKS)
    assert held == {kind: said[kind] for kind in held}


@needs_gloo
@pytest.mark.parametrize("case", CASES)
def test_a_step_sends_what_the_formula_says(case: str, seen: list[dict[str, Any]]) -> None:
    compute, reduce, _ = case.split(maxsplit=2)
    said = sum(scale.on_the_wire(MODEL, WORLD, compute=int(compute), reduce=int(reduce)).values())
    for one in seen:
        assert one[case][1] == pytest.approx(said, rel=0.01)


class Moved(TorchDispatchMode):
    """Counts the bytes of operands and results of all operations that compute."""

    bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if not function.is_view:
            self.bytes += sum(t.nbytes for t in tree_leaves((args, kwargs, result)) if isinstance(t, torch.Tensor))
        return result


def test_the_search_for_a_threshold_moves_what_the_constant_says() -> None:
    scores, known = torch.randn(1 << 15), 0
    with Moved() as moved:
        for width in digits.WIDTHS[4]:
            counts = torch.zeros(1 << width, dtype=torch.int32)
            digits.count(scores, "magnitude", torch.tensor(0), known, width, counts)
            known += width
    assert moved.bytes / len(scores) == pytest.approx(scale.CONSTANTS["search bytes"].value, rel=0.01)


def test_the_page_has_the_tables_of_the_program(capsys: pytest.CaptureFixture[str]) -> None:
    page = PAGE.read_text("utf-8")
    assert scale.main([]) == 0
    for part in capsys.readouterr().out.strip().split("\n\n"):
        assert part in page, part


def test_the_tables_can_be_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert scale.main(["--gpus", "3", "--tasks", "7", "--tokens", "5"]) == 0
    printed = capsys.readouterr().out
    assert "6,476,005,376 gated weights in 224 tensors, 7 finished tasks, 5 tokens" in printed and "3 GPUs" in printed
