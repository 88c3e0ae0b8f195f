"""The examples run, say what they are to say, and compute the same with activation checkpointing as without."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from wsn_fast import WSN, convert
from wsn_fast.optim.optimizers import SubnetAdamW

EXAMPLES = Path(__file__).parents[2] / "examples"


def example(name: str) -> ModuleType:
    """An example as a module. It belongs to no package, so it is loaded from its file."""
    spec = importlib.util.spec_from_file_location(f"examples_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for themselves
    spec.loader.exec_module(module)
    return module


large = example("large")


def commands() -> list[list[str]]:
    """The words of each command on the page of the examples."""
    text = (EXAMPLES / "README.md").read_text("utf-8")
    blocks = re.findall(r"^```sh\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return [shlex.split(line, comments=True) for block in blocks for line in block.splitlines()]


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_the_commands_of_the_page_are_understood(words: list[str]) -> None:
    assert words[0] == ".venv/bin/python"
    if words[1] == "-m":
        assert (EXAMPLES.parent / words[2].replace(".", "/")).with_suffix(".py").is_file()
    else:
        assert words[1] == "examples/large.py" and large._options(words[2:]).density == 0.3


def test_every_example_is_on_the_page() -> None:
    page = (EXAMPLES / "README.md").read_text("utf-8")
    assert [path.name for path in EXAMPLES.glob("*.py") if path.name not in page] == []


# --- large.py
@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], dict[str, Any]]:
    """Those of every program on small models, as they are in the JSON."""
    path = tmp_path_factory.mktemp("large") / "results.json"
    arguments = ["--weights", "1e5", "--steps", "1", "--batch", "2", "--device", "cpu", "--checkpointing"]
    assert large.main([*arguments, "--programs", *large.PROGRAMS, "--json", str(path)]) == 0
    found = json.loads(path.read_text("utf-8"))
    assert found["settings"]["checkpointing"] == "non-reentrant"
    return {(result["model"], result["program"]): result for result in found["results"]}


def test_every_program_runs_on_every_model(results: dict[tuple[str, str], dict[str, Any]]) -> None:
    assert set(results) == {(model, program) for model in large.MODELS for program in large.PROGRAMS}
    assert all(1e5 <= result["gated_weights"] < 2e5 for result in results.values())
    assert all(result["step_ms"] > 0 and len(result["losses"]) == 2 for result in results.values())


def test_the_promise_is_verified_for_both_tasks(results: dict[tuple[str, str], dict[str, Any]]) -> None:
    promises = [result["promise"] for (_, program), result in results.items() if program != "dense"]
    assert len(promises) == 4
    assert all(promise.startswith("verified") and "first, second" in promise for promise in promises)


@pytest.mark.parametrize(("program", "expected"), [
    ("dense", {"parameters": 4, "moments": 8, "gradients": 4}),
    ("standard", {"parameters": 4, "scores": 4, "moments": 16, "gradients": 8, "masks": 0.25, "gates made ahead": 0}),
    ("one-pass", {"parameters": 4, "scores": 4, "moments": 16, "gradients": 2, "masks": 0.25, "gates made ahead": 2}),
])  # fmt: skip
@pytest.mark.parametrize("model", sorted(large.MODELS))
def test_the_bytes_of_each_part_are_what_the_design_says(
    results: dict[tuple[str, str], dict[str, Any]], model: str, program: str, expected: dict[str, float]
) -> None:
    found = results[model, program]["bytes_per_weight"]
    total = found.pop("sum of these")
    assert total == pytest.approx(sum(found.values()))
    # What is not a gated weight (norms, biases, positions, heads) is up to a tenth of so small a model.
    assert found == pytest.approx(expected, rel=0.12, abs=0.02)


def test_the_table_has_a_column_for_each_program(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", "mlp", "--weights", "1e4", "--steps", "1", "--batch", "1", "--device", "cpu"]
    large.main(arguments)
    first, *lines = capsys.readouterr().out.splitlines()
    assert first.split() == ["mlp", "dense", "one-pass"]
    (beside,) = (line.split()[-2:] for line in lines if line.startswith("beside the first"))
    assert beside[0] == "1.00x"
    assert beside[1].endswith("x")


@pytest.mark.parametrize("weights", [1e4, 2e6, 1e9])
@pytest.mark.parametrize("model", sorted(large.MODELS))
def test_models_are_as_large_as_asked_and_not_much_larger(model: str, weights: float) -> None:
    with torch.device("meta"):
        blocks = large.MODELS[model](weights, 16).blocks
    total = sum(p.numel() for p in blocks.parameters() if p.ndim == 2)
    assert weights <= total <= max(1.13 * weights, 50_000)


@pytest.mark.parametrize("arguments", [["--steps", "0"], ["--weights", "0"], ["--model", "convnet"]])
def test_bad_arguments_are_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        large.main([*arguments, "--device", "cpu"])


def trained(checkpointing: str, one_pass: bool, autocast: bool) -> dict[str, Tensor]:
    """All that a transformer is after two tasks."""
    torch.manual_seed(0)
    wsn = WSN(
        convert(large.transformer(1e5, 4, checkpointing), 0.3, heads="head", exclude_modules="position"),
        per_task="position",
    )
    for task in range(2):
        wsn.begin_task(task)
        optimizer = SubnetAdamW(wsn, 1e-3, one_pass=one_pass)
        for _ in range(3):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = F.cross_entropy(wsn(torch.randn(3, 4, large.FEATURES)), torch.tensor([0, 1, 2]))
            loss.backward()
            optimizer.step()
        wsn.end_task()
    return wsn.state_dict()


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("one_pass", [False, True], ids=["standard", "one-pass"])
def test_checkpointing_changes_no_bit(one_pass: bool, autocast: bool) -> None:
    plain = trained("none", one_pass, autocast)
    for mode in ("non-reentrant", "reentrant"):
        other = trained(mode, one_pass, autocast)
        assert other.keys() == plain.keys()
        assert [name for name, tensor in plain.items() if not torch.equal(tensor, other[name])] == [], mode
