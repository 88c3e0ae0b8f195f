"""An operation is checked the first time that it is chosen. PyTorch runs what fails, and a warning says why."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import counted_steps as steps
import pytest
import torch
from stand_in_cuda import StandIn
from torch import Tensor, nn

from wsn_fast import WSN, FastSubnetLinear, convert, explain
from wsn_fast.backends import ENVIRONMENT_VARIABLE, cache_folder, choose, comparison, forget, native, run, trust
from wsn_fast.backends import torch as portable
from wsn_fast.optim import SubnetAdamW

CPU = torch.device("cpu")
needs_native = pytest.mark.skipif(native.load().lib is None, reason="the native library is not built")
pytestmark = needs_native


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Checks are on, and nothing is remembered from outside of the test."""
    monkeypatch.setenv(trust.ENVIRONMENT_VARIABLE, "1")
    monkeypatch.setenv(cache_folder.ENVIRONMENT_VARIABLE, str(tmp_path / "cache"))
    _as_in_a_new_process()
    yield tmp_path / "cache"
    _as_in_a_new_process()


def _as_in_a_new_process() -> None:
    forget()
    trust._memory.cache_clear()


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The operations that were compared."""
    made: list[str] = []
    compare = comparison.first_problem

    def first_problem(operation: str, module: Any, where: Any) -> str | None:
        made.append(operation)
        return compare(operation, module, where)

    monkeypatch.setattr(comparison, "first_problem", first_problem)
    return made


def wrong(weight: Tensor, scores: Tensor, tau: Tensor, rule: str, dtype: torch.dtype) -> Tensor:
    return portable.gate(weight, scores, tau, rule, dtype) + 1


def raises(*args: object) -> Tensor:
    raise RuntimeError("an illegal instruction")


def too_far(*args: Any) -> Tensor:
    result = torch.empty_like(args[0], dtype=args[-1]).copy_(portable.gate(*args))
    torch.as_strided(result, (1,), (1,), result.storage_offset() + result.numel()).zero_()
    return result


@pytest.mark.parametrize(
    ("gate", "says"), [(wrong, "differ"), (raises, "an illegal instruction"), (too_far, "beyond the ends")]
)
def test_what_fails_is_run_by_pytorch(
    gate: Callable[..., Tensor], says: str, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    monkeypatch.setattr(native, "gate", gate)
    with pytest.warns(RuntimeWarning, match="native failed the check of gate on cpu.*PyTorch runs it") as seen:
        choice = choose("gate", CPU, torch.float32)
    assert choice.backend is portable and says in choice.reason
    assert len(seen) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run("gate", CPU, torch.float32) is portable, "once, with a warning that comes once"
    layer = FastSubnetLinear(4, 3, density=0.5)
    assert [says in route.reason for route in explain(layer) if route.operation == "gate"] == [True]
    assert "native gate float32" not in _remembered(folder), "what failed is checked again by the next process"


def test_a_wrong_one_is_not_used_because_somebody_asks_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "gate", wrong)
    with pytest.warns(RuntimeWarning, match="failed the check"):
        assert choose("gate", CPU, torch.float32, "native").backend is portable


def test_one_that_is_wrong_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "gate", wrong)
    with pytest.warns(RuntimeWarning, match="failed the check"):
        choose("gate", CPU, torch.float32)
    assert choose("gate_packed", CPU, torch.float32).name == "native"


def _remembered(folder: Path) -> set[str]:
    return {about for path in folder.rglob("*.json") for about in json.loads(path.read_text("utf-8"))["passed"]}


def test_what_passed_is_remembered(checks: list[str], folder: Path) -> None:
    for _ in range(2):
        assert choose("gate", CPU, torch.float32).name == "native"
        assert choose("pack", CPU).name == "native"
    assert checks == ["gate", "pack"]
    assert _remembered(folder) == {"native gate float32", "native pack"}
    _as_in_a_new_process()
    assert choose("gate", CPU, torch.float32).name == "native"
    assert checks == ["gate", "pack"]
    choose("gate", CPU, torch.bfloat16)
    assert checks == ["gate", "pack", "gate"], "another dtype is another kernel"


def test_processes_add_to_what_others_remember(folder: Path) -> None:
    choose("gate", CPU, torch.float32)
    mine = trust._memory("cpu", 0)
    other = trust._Memory(mine.facts)
    other.add("native threshold float32")
    choose("pack", CPU)
    assert _remembered(folder) == {"native gate float32", "native threshold float32", "native pack"}


@pytest.mark.parametrize("fact", ["_code", "_cpu", "_version_of"])
def test_another_machine_or_another_version_is_checked(
    fact: str, checks: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    choose("gate", CPU, torch.float32)
    _as_in_a_new_process()
    monkeypatch.setattr(trust, fact, lambda *_: "another")
    choose("gate", CPU, torch.float32)
    assert checks == ["gate", "gate"]


def test_other_code_is_other_code(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, text in (("a.py", "1"), ("b.py", "2")):
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(trust, "_files", lambda: iter(sorted(tmp_path.glob("*.py"))))
    before = trust._code()
    assert trust._code() == before
    (tmp_path / "b.py").write_text("3")
    assert trust._code() != before


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"passed": 3}', '{"facts": {}, "passed": ["native gate float32"]}']
)
def test_a_damaged_memory_is_empty(content: str, checks: list[str], folder: Path) -> None:
    choose("gate", CPU, torch.float32)
    [path] = folder.rglob("*.json")
    path.write_text(content)
    _as_in_a_new_process()
    assert choose("gate", CPU, torch.float32).name == "native"
    assert checks == ["gate", "gate"]
    assert _remembered(folder) == {"native gate float32"}


def test_without_a_place_to_remember(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(cache_folder.ENVIRONMENT_VARIABLE, str(tmp_path / "file" / "folder"))
    assert choose("gate", CPU, torch.float32).name == "native"


@pytest.mark.parametrize("off", ["0", "off", "FALSE"])
def test_checks_can_be_switched_off(off: str, checks: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(trust.ENVIRONMENT_VARIABLE, off)
    assert choose("gate", CPU, torch.float32).name == "native"
    assert checks == []


def test_a_question_without_a_dtype_checks_nothing(checks: list[str]) -> None:
    assert choose("gate", CPU).name == "native"
    assert checks == []


@pytest.mark.parametrize("where", ["wsn_fast.backends.choice.capturing", "wsn_fast.backends.choice.is_compiling"])
def test_nothing_is_checked_in_a_capture_or_a_compilation(
    where: str, checks: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as inside:
        inside.setattr(where, lambda: True)
        assert run("gate", CPU, torch.float32) is native
        assert checks == []
    assert run("gate", CPU, torch.float32) is native
    assert checks == ["gate"], "a later use checks it"


def test_a_compiled_layer_is_checked_when_it_runs(checks: list[str]) -> None:
    layer = FastSubnetLinear(8, 4, density=0.5)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    compiled(torch.ones(2, 8)).sum().backward()
    assert "threshold" in checks or "gates" in checks


def test_checks_leave_the_training_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def train() -> list[Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(FastSubnetLinear(8, 6, density=0.5), nn.Dropout(0.5), FastSubnetLinear(6, 2, density=0.5))
        for _ in range(2):
            model(torch.randn(4, 8)).sum().backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    checked = train()
    monkeypatch.setenv(trust.ENVIRONMENT_VARIABLE, "0")
    forget()
    assert all(torch.equal(a, b) for a, b in zip(checked, train(), strict=True))


def test_a_new_process_checks_what_it_uses(folder: Path) -> None:
    program = (
        "import torch, wsn_fast\n"
        "layer = wsn_fast.FastSubnetLinear(8, 4, density=0.5)\n"
        "layer(torch.ones(2, 8)).sum().backward()\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True)
    assert any("float32" in about for about in _remembered(folder))


@pytest.mark.parametrize("mode", ["one-pass", "standard"])
def test_a_gpu_that_computes_nothing_is_not_trusted(
    mode: str, stand_in: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton's real launcher, over a driver whose launches succeed and do nothing: PyTorch makes the whole step."""
    x = torch.randn(4, 32)

    def train(fused: bool) -> list[Tensor]:
        torch.manual_seed(0)
        wsn = WSN(convert(nn.Linear(32, 6), density=0.5))
        wsn.begin_task(0)
        optimizer = SubnetAdamW(wsn, 0.1, one_pass=fused)
        for _ in range(2):
            optimizer.zero_grad()
            wsn(x).sum().backward()
            optimizer.step()
        wsn.end_task()
        wsn.verify()
        return [p.detach().clone() for p in wsn.parameters()]

    with pytest.warns(RuntimeWarning, match="triton failed the check"):
        found = train(mode == "one-pass")
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "torch")
    forget()
    expected = train(mode == "one-pass")
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_steps_after_the_checks_launch_what_they_launched(stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where everything passes, a step with checks launches what a step without them does."""

    def launches() -> object:
        forget()
        wsn = steps.subnet(steps.mlp(2))
        wsn.begin_task(0)
        step = steps.training_step("one-pass", wsn, torch.randn(4, 32))
        steps.warm_up(step, stand_in)
        stand_in.forget()
        step()
        return stand_in.kernels()

    monkeypatch.setattr(comparison, "first_problem", lambda *_: None)
    checked = launches()
    monkeypatch.setenv(trust.ENVIRONMENT_VARIABLE, "0")
    assert checked == launches()
