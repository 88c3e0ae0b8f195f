"""The benchmark of launches and host time: its nets have the layers of the models, and it prints what it promises."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import counted_steps as steps
import pytest
import torch
from stand_in_cuda import StandIn
from torch import nn

if importlib.util.find_spec("benchmarks") is None:  # pytest puts no folder of the checkout on the path
    sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks import launches
from benchmarks.launch_nets import MODELS

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet18", {nn.Conv2d: 20, nn.BatchNorm2d: 20, nn.Linear: 1}),
        ("gpt2-small", {nn.Linear: 4 * 12 + 1, nn.LayerNorm: 2 * 12 + 1, nn.Embedding: 2}),
        ("vit-b", {nn.Linear: 4 * 12 + 1, nn.LayerNorm: 2 * 12 + 1, nn.Conv2d: 1}),
    ],
)
def test_a_net_has_the_layers_of_its_model(name: str, expected: dict[type[nn.Module], int]) -> None:
    found = Counter(type(module) for module in MODELS[name].net().modules())
    assert {
        kind: found[kind] for kind in (*expected, nn.Conv2d, nn.BatchNorm2d, nn.Embedding) if found[kind]
    } == expected


@pytest.mark.parametrize("name", [*MODELS])
def test_every_mode_takes_every_model(name: str, stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    steps.allow_steps(stand_in, monkeypatch)
    found = launches.measure(MODELS[name], [*steps.BASELINE_OF], 0, stand_in)["modes"]
    assert found.keys() == {*steps.BASELINE_OF, *steps.BASELINE_OF.values()}
    without = {mode for mode, counts in found.items() if not counts["triton_launches"]["total"]}
    assert without == {"dense", "dense-evaluation", "evaluation"}


def test_slopes_are_fitted_over_nets_of_four_layers_and_more() -> None:
    def net(layers: int, launched: int) -> dict[str, object]:
        totals = {"triton_launches": {"total": launched}, "other_kernels": {"total": 5}}
        return {"modes": {"standard": {**totals, "host_us": {"median": 10.0 * layers}}}}

    found = launches.slopes({1: net(1, 90), 4: net(4, 12), 16: net(16, 36), 48: net(48, 100)})
    assert found == {"standard": {"triton_launches": 2, "other_kernels": 0, "host_us": 10}}


def test_the_modes_take_turns_and_warm_calls_are_timed(stand_in: StandIn) -> None:
    calls: list[str] = []
    made = {name: (lambda name=name: calls.append(name)) for name in ("a", "b")}
    times = launches.host_times(made, 3, stand_in)
    of_a_turn = launches.WARM + launches.MEASURED
    assert calls == (["a"] * of_a_turn + ["b"] * of_a_turn) * 3
    assert {mode: len(taken) for mode, taken in times.items()} == dict.fromkeys("ab", 3 * launches.MEASURED)


@pytest.mark.ci
def test_a_first_run_compiles_only_what_was_not_compiled_before(
    stand_in: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps.allow_steps(stand_in, monkeypatch)
    shape = launches.Shape(lambda: steps.mlp(2), lambda: torch.randn(4, 32), "")
    wsn = steps.subnet(shape.net())
    wsn.begin_task(0)
    steps.warm_up(steps.training_step("one-pass", wsn, shape.batch()), stand_in)  # loads what the first step takes
    parts = launches.compilations(shape, "one-pass", stand_in)
    compiled = {part: counts["compiled"] for part, counts in parts.items()}
    assert {part: counts["modules"] for part, counts in parts.items()} == compiled
    assert compiled["first step"] > 0 and compiled["later steps"] == 0


def test_the_command_prints_json(stand_in: StandIn) -> None:
    options = ["--layers", "1", "4", "--models", "--modes", "one-pass", "evaluation", "--repeats", "2"]
    command = [sys.executable, "-m", "benchmarks.launches", *options]
    printed = json.loads(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout)
    modes = printed["linear_layers"]["4"]["modes"]
    assert modes.keys() == {"dense", "one-pass", "dense-evaluation", "evaluation"}
    assert modes["one-pass"]["ratio"] > 0 and "ratio" not in modes["dense"]
    assert printed["models"] == {} and printed["slopes"] == {}
