"""The benchmarks of training steps: their competitors, memory and profiles, and how a report shows them."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

if importlib.util.find_spec("benchmarks") is None:  # pytest puts no folder of the checkout on the path
    sys.path.insert(0, str(Path(__file__).parents[1]))

import wsn_fast.capture as capture
from benchmarks import memory
from benchmarks import profile as profiles
from benchmarks.baselines import (
    COMPETITORS,
    Clarena,
    Competitor,
    Dense,
    Ours,
    OursCaptured,
    OursOnePass,
    OursOnePassCaptured,
    Paper,
)
from benchmarks.cases import Kernel, UnavailableError, WrongResultError
from benchmarks.markdown import markdown
from benchmarks.problem import Problem, StepShape
from benchmarks.rows import Row
from benchmarks.shapes import TINY, LinearShape
from benchmarks.steps import step_cases

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
    competitor = broken(Problem(shape, CPU))
    competitor.step()
    with pytest.raises(WrongResultError):
        competitor.check()


def test_a_head_that_does_not_learn_is_found() -> None:
    competitor = _ForgetsTheHead(Problem(NET, CPU))
    competitor.step()
    with pytest.raises(WrongResultError, match=r"head\.weight: the optimizer is"):
        competitor.check()


def test_a_missing_gradient_is_found() -> None:
    competitor = Ours(Problem(NET, CPU))
    competitor.step()
    results = competitor.results()
    del results["head.weight"]
    masks = {name: competitor.mask(name, competitor.problem.start[f"{name}.scores"]) for name in competitor.layers}
    with pytest.raises(WrongResultError, match=r"head\.weight"):
        competitor.problem.check(results, masks, "magnitude")


def test_the_one_pass_competitor_writes_no_gradient_of_the_scores() -> None:
    competitor = OursOnePass(Problem(LAYER, CPU))
    competitor.step()
    assert competitor.parameters["0.scores"].grad is None
    raw = competitor.parameters["0.weight"].grad
    assert raw is not None and bool((raw[competitor.problem.unions["0"]] != 0).any())


def test_the_standard_competitor_has_gradients_of_the_usual_kind() -> None:
    competitor = Ours(Problem(LAYER, CPU))
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
    competitor = kind(Problem(shape, CPU))
    competitor.settle()
    competitor.step()
    assert competitor.run.captured
    competitor.check()
    competitor.step()
    competitor.check_later()


@pytest.mark.usefixtures("graphs")
def test_a_replay_that_forgets_what_is_frozen_is_found() -> None:
    competitor = OursCaptured(Problem(LAYER, CPU))
    competitor.settle()
    for layer in competitor.layers.values():
        layer.weight_union = None
    competitor.step()
    with pytest.raises(WrongResultError):
        competitor.check()


@pytest.mark.usefixtures("graphs")
def test_a_step_that_is_no_replay_any_more_is_found() -> None:
    competitor = OursOnePassCaptured(Problem(LAYER, CPU))
    competitor.settle()
    with torch.no_grad():
        competitor.parameters["0.weight"].add_(0.0)  # changed from outside: the next step runs as it is
    competitor.step()
    with pytest.raises(WrongResultError, match="no replay"):
        competitor.check_later()


def test_what_does_not_capture_is_not_there() -> None:
    with pytest.raises(UnavailableError, match="cpu"):
        OursCaptured(Problem(LAYER, CPU)).settle()


@pytest.mark.parametrize("shape", [LinearShape(30, 41, 7), NET], ids=str)
@pytest.mark.parametrize("kind", [c for c in COMPETITORS if not c.compiled], ids=lambda c: c.name)
def test_a_competitor_is_right_at_first_and_keeps_frozen_weights(kind: type[Competitor], shape: StepShape) -> None:
    competitor = kind(Problem(shape, CPU))
    competitor.step()
    competitor.check()
    for _ in range(20):
        competitor.step()
    competitor.check_later()


def test_who_has_no_convolutions_is_not_among_the_competitors_of_one() -> None:
    of = {shape: {c.contender for c in step_cases([shape], CPU, False)} for shape in (*TINY.conv_steps, *TINY.nets)}
    assert [Clarena.name in names for names in of.values()] == [False, True, False]


# --- memory, profiles
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the kernel cannot reset a peak")
def test_the_memory_of_a_dense_step_is_weight_gradient_and_moments() -> None:
    shape = LinearShape(2048, 2048, 8)
    peak = memory.on_cpu(Dense, shape)[memory.NOTE]
    batch = 4 * 8 * (2048 + 2048) * 2 / 2048**2  # input and result, and their gradients
    assert peak == pytest.approx(4 * 4 + batch, abs=0.7)


def test_small_layers_have_no_measured_memory() -> None:
    assert memory.on_cpu(Dense, LAYER) == {}


def test_kernels_are_added_up_and_explained() -> None:
    problem = Problem(LinearShape(24, 40, 5), CPU)
    runs = [("void at::native::sort<float>(x)", 5.0), ("adamw_kernel", 60.0), ("adamw_kernel", 30.0), ("odd", 5.0)]
    update, sort, odd = profiles.kernels(runs * profiles.STEPS, problem, one_pass=False)
    assert update == Kernel("adamw_kernel", 2, 90.0, pytest.approx(0.9), update.role, pytest.approx(2 * 56.125 * 960))
    assert (sort.name, sort.role, sort.bytes) == ("at::native::sort", "torch's selection", None)
    assert (odd.role, odd.us) == ("", 5.0)


def test_a_profile_of_a_gpu_has_its_kernels_alone() -> None:
    def event(name: str, device: str, annotation: bool = False) -> SimpleNamespace:
        span = SimpleNamespace(elapsed_us=lambda: 7.0)
        kind = SimpleNamespace(name=device)
        return SimpleNamespace(name=name, device_type=kind, is_user_annotation=annotation, time_range=span)

    events = [event("aten::mm", "CPU"), event("gemm", "CUDA"), event("Optimizer.step", "CUDA", annotation=True)]
    assert profiles._found(events, on_gpu=True) == [("gemm", 7.0)]


def test_a_large_kernel_that_nobody_knows_stands_out() -> None:
    row = Row("Profile", "linear step profile", "ours", "", "float32", "ok", median_us=2.0)
    row.kernels = [Kernel("update", 1, 1.0, 0.9, "our update", 2e6), Kernel("odd", 2, 0.1, 0.1, "", None)]
    text = markdown("Report", {}, [row])
    assert "| update | 1 | 1.00 | 90.0% | our update | 2.00 | 2000 |" in text
    assert "| odd | 2 | 0.10 | 10.0% | **not known** |  |  |" in text


# --- the report
def rows_of_a_step(*times: tuple[str, float], shape: str = "2048x2048 b64") -> list[Row]:
    key = {"section": "Steps", "operation": "linear step", "shape": shape, "dtype": "float32"}
    return [Row(**key, contender=name, status="ok", check="right", median_us=us, floor_us=10.0) for name, us in times]


def test_markdown_shows_losses() -> None:
    failed = Row("Steps", "linear step", "CLArena", "2048x2048 b64", "float32", "failed", error="too | large")
    text = markdown("Report", {"device": "none"}, [*rows_of_a_step(("ours", 50.0), ("paper", 100.0)), failed])
    assert "| 50.00 |  |  | 10.00 | 5.00 | 1.00 |" in text
    assert "| 100 |  |  | 10.00 | 10.00 | 2.00 |" in text
    assert "**failed**: too / large" in text


def test_targets_are_of_the_one_pass_step_and_stand_beside_every_row() -> None:
    rows = rows_of_a_step(("dense", 10.0), ("ours", 50.0), ("ours, one pass", 16.0), ("paper", 100.0))
    text = markdown("Report", {"device": "none"}, rows)
    ratio = "ours, one pass (linear step 2048x2048 b64) / dense (linear step 2048x2048 b64)"
    assert f"| {ratio} | 1.60 | at most 1.8 | met | 5.00 |" in text
    assert "dense: 5.00, at most 1.8, **missed** by 178%; paper: 2.00, at least 5, **missed** by 150% |" in text
    assert "dense: 1.60, at most 1.8, met; paper: 6.25, at least 5, met |" in text


def test_memory_has_a_target() -> None:
    (row,) = rows_of_a_step(("ours, one pass", 16.0), shape="4096x4096 b32")
    row.notes[memory.NOTE] = 33.0
    text = markdown("Report", {}, [row])
    assert "/ 30 B | 1.10 | at most 1 | **missed** by 10% |" in text
    assert "memory over 30 B: 1.10, at most 1, **missed** by 10% |" in text
