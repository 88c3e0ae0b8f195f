"""The benchmarks of training steps: their competitors, memory, and how a report shows them."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

if importlib.util.find_spec("benchmarks") is None:  # pytest puts no folder of the checkout on the path
    sys.path.insert(0, str(Path(__file__).parents[2]))

import wsn_fast.optim.capture as capture
from benchmarks import memory
from benchmarks.cases import verify
from benchmarks.competitors import Clarena, Paper
from benchmarks.ours import COMPETITORS, OursCaptured, OursOnePassCaptured
from benchmarks.problem import StepShape, problem_of
from benchmarks.rows import Row
from benchmarks.shapes import TINY
from benchmarks.steps import inference_cases, step_cases
from benchmarks.tables import markdown, summary
from wsn_fast.doctor.measuring.checks import UnavailableError, WrongResultError
from wsn_fast.doctor.measuring.competitors import Competitor, Dense
from wsn_fast.doctor.measuring.ours import Ours, OursOnePass, OursOnePassCoded
from wsn_fast.doctor.measuring.shapes import LinearShape

CPU = torch.device("cpu")
LAYER, NET = TINY.steps[0], TINY.nets[0]


class _KeepsNothing(Ours):
    """A bug: it forgets to protect the weights of earlier tasks."""

    def build(self, net: nn.Module) -> None:
        super().build(net)
        for layer in self.layers.values():
            layer.weight_union = None


class _KeepsNothingInOnePass(_KeepsNothing, OursOnePass):
    """The same bug in the one-pass mode."""


class _KeepsAnotherMask(Ours):
    """A bug: the layers rank scores by another rule than they should."""

    def build(self, net: nn.Module) -> None:
        super().build(net)
        for layer in self.layers.values():
            layer.rule = "value"


class _LosesTheGate(Paper):
    """A bug: the whole weight goes into the product."""

    def build(self, net: nn.Module) -> None:
        super().build(net)
        for layer in self.layers.values():
            layer.masked_weight = lambda layer=layer: layer.weight + 0 * layer.scores


class _ForgetsTheOptimizer(Paper):
    """A bug: nothing learns."""

    def make_optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters.values(), 0.0)


class _ForgetsTheHead(Paper):
    """A bug: the head alone does not learn."""

    def make_optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.Adam([p for name, p in self.parameters.items() if "head" not in name], 1e-6)


@pytest.mark.parametrize("shape", [LAYER, NET], ids=str)
@pytest.mark.parametrize(
    "broken", [_KeepsNothing, _KeepsNothingInOnePass, _KeepsAnotherMask, _LosesTheGate, _ForgetsTheOptimizer]
)
def test_a_broken_competitor_is_found(broken: type[Competitor], shape: StepShape) -> None:
    competitor = broken(problem_of(shape, CPU))
    competitor.step()
    with pytest.raises(WrongResultError):
        competitor.check()


def test_a_head_that_does_not_learn_is_found() -> None:
    competitor = _ForgetsTheHead(problem_of(NET, CPU))
    competitor.step()
    with pytest.raises(WrongResultError, match=r"head\.weight: the optimizer is"):
        competitor.check()


def test_a_missing_gradient_is_found() -> None:
    competitor = Ours(problem_of(NET, CPU))
    competitor.step()
    results = competitor.results()
    del results["head.weight"]
    masks = {name: competitor.mask(name, competitor.problem.start[f"{name}.scores"]) for name in competitor.layers}
    with pytest.raises(WrongResultError, match=r"head\.weight"):
        competitor.problem.check(results, masks, "magnitude")


def test_the_one_pass_competitor_writes_no_gradient_of_the_scores() -> None:
    competitor = OursOnePass(problem_of(LAYER, CPU))
    competitor.step()
    assert competitor.parameters["0.scores"].grad is None
    raw = competitor.parameters["0.weight"].grad
    assert raw is not None and bool((raw[competitor.problem.unions["0"]] != 0).any())


def test_the_standard_competitor_has_gradients_of_the_usual_kind() -> None:
    competitor = Ours(problem_of(LAYER, CPU))
    competitor.step()
    assert competitor.parameters["0.scores"].grad is not None
    dw = competitor.parameters["0.weight"].grad
    assert dw is not None and bool((dw[competitor.problem.unions["0"]] == 0).all())


class _Replayed:
    """A graph that computes everything again; like a real one, it does nothing while it records."""

    def record(self, work: Callable[[], Tensor]) -> Tensor:
        self.work, self.loss = work, torch.zeros(())
        return self.loss

    def replay(self) -> None:
        self.loss.copy_(self.work())


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU counts as a device with graphs."""
    monkeypatch.setattr(capture, "obstacle_of", lambda device: "")
    monkeypatch.setattr(capture, "new_graph", _Replayed)


@pytest.mark.parametrize("shape", [LAYER, NET], ids=str)
@pytest.mark.parametrize("kind", [OursCaptured, OursOnePassCaptured], ids=lambda kind: kind.name)
@pytest.mark.usefixtures("graphs")
def test_a_replay_is_checked_and_stays_one(kind: type[OursCaptured], shape: StepShape) -> None:
    competitor = kind(problem_of(shape, CPU))
    competitor.settle()
    competitor.step()
    assert competitor.run.captured
    competitor.check()
    competitor.step()
    competitor.check_later()


@pytest.mark.usefixtures("graphs")
def test_a_replay_that_forgets_what_is_frozen_is_found() -> None:
    competitor = OursCaptured(problem_of(LAYER, CPU))
    competitor.settle()
    for layer in competitor.layers.values():
        layer.weight_union = None
    competitor.step()
    with pytest.raises(WrongResultError):
        competitor.check()


@pytest.mark.usefixtures("graphs")
def test_a_step_that_is_no_replay_any_more_is_found() -> None:
    competitor = OursOnePassCaptured(problem_of(LAYER, CPU))
    competitor.settle()
    with torch.no_grad():
        competitor.parameters["0.weight"].add_(0.0)  # changed from outside: the next step runs as it is
    competitor.step()
    with pytest.raises(WrongResultError, match="no replay"):
        competitor.check_later()


def test_what_does_not_capture_is_not_there() -> None:
    with pytest.raises(UnavailableError, match="cpu"):
        OursCaptured(problem_of(LAYER, CPU)).settle()


@pytest.mark.parametrize("shape", [LinearShape(30, 41, 7), NET], ids=str)
@pytest.mark.parametrize("kind", [c for c in COMPETITORS if not c.compiled], ids=lambda c: c.name)
def test_a_competitor_is_right_at_first_and_keeps_frozen_weights(kind: type[Competitor], shape: StepShape) -> None:
    competitor = kind(problem_of(shape, CPU))
    competitor.step()
    competitor.check()
    for _ in range(20):
        competitor.step()
    competitor.check_later()


def test_who_has_no_convolutions_is_not_among_the_competitors_of_one() -> None:
    of = {shape: {c.contender for c in step_cases([shape], CPU, False)} for shape in (*TINY.conv_steps, *TINY.nets)}
    assert [Clarena.name in names for names in of.values()] == [False, True, False]


# --- memory, inference
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the kernel cannot reset a peak")
def test_the_memory_of_a_dense_step_is_weight_gradient_and_moments() -> None:
    shape = LinearShape(2048, 2048, 8)
    peak = memory.on_cpu(Dense, shape)[memory.NOTE]
    batch = 4 * 8 * (2048 + 2048) * 2 / 2048**2  # input and result, and their gradients
    assert peak == pytest.approx(4 * 4 + batch, abs=0.7)


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the kernel cannot reset a peak")
def test_a_step_with_means_in_8_bits_takes_20_bytes_and_a_bit_of_a_scale_and_a_mask() -> None:
    """Weight, scores, masked weight and its gradient in 4 bytes each, and the four codes. The target is 21."""
    shape = LinearShape(2048, 2048, 8)
    peak = memory.on_cpu(OursOnePassCoded, shape)[memory.NOTE]
    batch = 4 * 8 * (2048 + 2048) * 2 / 2048**2  # input and result, and their gradients
    assert peak - batch <= 21
    assert peak == pytest.approx(4 * 4 + 4 * (1 + 4 / 256) + 1 / 8 + batch, abs=0.7)


def test_small_layers_have_no_measured_memory() -> None:
    assert memory.on_cpu(Dense, LAYER) == {}


def test_a_wrong_inference_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    case = next(c for c in inference_cases([NET], CPU) if c.contender == "ours")
    verify(case.prepare())
    right = Ours.infer
    monkeypatch.setattr(Ours, "infer", lambda self: right(self) * 1.01)
    with pytest.raises(WrongResultError):
        verify(case.prepare())


# --- the report
FACTS = {"device": "a CPU", "threads": 2, "torch": "2.13", "commit": "abcdef012", "dirty": False, "date": "2030-01-02"}


def rows_of_a_step(*times: tuple[str, float], shape: str = "2048x2048 b64") -> list[Row]:
    key = {"section": "Steps", "operation": "linear step", "shape": shape, "dtype": "float32"}
    return [Row(**key, contender=name, status="ok", check="right", median_us=us, bytes=1e5) for name, us in times]


def test_markdown_shows_losses() -> None:
    failed = Row("Steps", "linear step", "CLArena", "2048x2048 b64", "float32", "failed", error="too | large")
    text = markdown("Report", {"device": "none"}, [*rows_of_a_step(("ours", 50.0), ("paper", 100.0)), failed])
    assert "| 50.00 |  |  | 1.00 | 2.00 |  |" in text
    assert "| 100 |  |  | 2.00 | 1.00 |  |" in text
    assert "**failed**: too / large" in text


# --- the compact table
def test_a_table_has_ratios_to_the_librarys_own_row() -> None:
    rows = rows_of_a_step(("dense", 1e3), ("ours", 2e3), ("ours, guarded", 3e3), shape="64x64 b8")
    rows += rows_of_a_step(("paper", 9e5), ("ours, one pass", 1e5), shape="64x64 b9")
    rows += [Row("s", "linear step", "CLArena", "64x64 b9", "float32", "wrong", error="3 differ")]
    text = "\n".join(summary(FACTS, rows))
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    assert cells[0][1:] == ["ours, one pass", "ours", "ours, guarded", "dense", "paper"]
    assert cells[1] == ["linear step 64x64 b8", "", "2.00 1.00x", "3.00 1.50x", "1.00 0.500x", ""]
    assert cells[2] == ["linear step 64x64 b9", "100 1.00x", "", "", "", "900 9.00x"]
    assert text.startswith("a CPU, 2 threads, torch 2.13, commit abcdef0, 2030-01-02")
    assert text.endswith("no time for CLArena, linear step 64x64 b9: wrong, 3 differ")


def test_a_table_shows_memory_where_it_was_measured() -> None:
    rows = rows_of_a_step(("ours", 1e3), shape="64x64 b8") + rows_of_a_step(("dense", 1e3), ("ours", 1e3))
    rows[1].notes, rows[2].notes = {memory.NOTE: 16.0}, {memory.NOTE: 32.0}
    lines = summary(FACTS, rows)
    assert [line for line in lines if memory.NOTE in line]
    assert "32.0 1.00x" in lines[-1] and "16.0 0.500x" in lines[-1] and "2048x2048" in lines[-1]
