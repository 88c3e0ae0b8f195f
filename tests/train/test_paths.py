"""A resumed run takes the backends that it took before, or says what is not as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from stopping_console import Stop, StoppingConsole
from torch import Tensor

from wsn_fast import WSN, FastSubnetLinear
from wsn_fast.backends import ENVIRONMENT_VARIABLE, forget, native, tables
from wsn_fast.optim import SubnetAdamW
from wsn_fast.train import checkpoint, paths
from wsn_fast.train.checkpoint import CheckpointError
from wsn_fast.train.config import resolve
from wsn_fast.train.report import Console
from wsn_fast.train.run import Run

CPU = torch.device("cpu")
SETTINGS: dict[str, Any] = {
    "stream": "permuted", "tasks": 2, "epochs": 2, "batch_size": 64, "one_pass": True, "device": "cpu",
}  # fmt: skip
STEP = "adamw_step float32"
pytestmark = pytest.mark.skipif(native.load().lib is None, reason="the native library is not built")


class Said(Console):
    """Keeps what it is told to say."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


@pytest.fixture(autouse=True)
def _as_in_a_new_process() -> Iterator[None]:
    forget()
    yield
    forget()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """The tensors at the end of a run."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    Run.start(resolve(**SETTINGS, out=str(folder)), Console(quiet=True)).finish()
    return checkpoint.load_from(folder / "checkpoint").tensors


@pytest.fixture
def stopped(tmp_path: Path) -> Path:
    """A run that was killed in its second task, after a checkpoint in that task."""
    with pytest.raises(Stop):
        Run.start(resolve(**SETTINGS, checkpoint_seconds=0.0, out=str(tmp_path / "run")), StoppingConsole(60)).finish()
    forget()
    return tmp_path / "run"


def finish(folder: Path) -> tuple[dict[str, Tensor], list[str]]:
    """What the run ended with, and what it said about differences."""
    console = Said()
    Run.resume(folder, console).finish()
    return checkpoint.load_from(folder / "checkpoint").tensors, [x for x in console.lines if "rounding" in x]


def prefer_torch(monkeypatch: pytest.MonkeyPatch, *operations: str) -> None:
    """A tuning table of this machine says so from now on."""
    entry = {"float32": {"choose": "torch", "times": {}}}
    table = tables.Tables({"backends": dict.fromkeys(operations, entry)}, (), "0123456789ab")
    monkeypatch.setattr(tables.tuned_backend, "__defaults__", (lambda name: table,))
    monkeypatch.setattr(tables, "of", lambda name: table)


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name, t in expected.items() if not torch.equal(found[name], t)] == []


def test_a_checkpoint_names_its_paths(stopped: Path) -> None:
    recorded = checkpoint.load_from(stopped / "checkpoint").state["paths"]
    assert recorded["backends"][STEP] == "native" and recorded["device"] == "cpu"
    assert recorded["table"] == tables.of(tables.device_name(CPU)).digest


def test_a_run_that_goes_on_as_before_says_nothing(stopped: Path, undisturbed: dict[str, Tensor]) -> None:
    found, said = finish(stopped)
    assert said == []
    assert_same(found, undisturbed)


def test_a_run_takes_the_backends_of_before(
    stopped: Path, undisturbed: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though a table that was written since would choose others."""
    prefer_torch(monkeypatch, "adamw_step", "gates", "gradient_squares")
    found, said = finish(stopped)
    assert len(said) == 1 and "no tuning table and now uses the tuning table 0123456789ab" in said[0]
    assert_same(found, undisturbed)


def test_the_backends_of_before_do_not_round_as_others_do(
    tmp_path: Path, undisturbed: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the test before this one would show nothing."""
    prefer_torch(monkeypatch, "adamw_step")
    Run.start(resolve(**SETTINGS, out=str(tmp_path / "run")), Console(quiet=True)).finish()
    found = checkpoint.load_from(tmp_path / "run" / "checkpoint").tensors
    assert any(not torch.equal(found[name], t) for name, t in undisturbed.items() if not name.startswith("rng"))


def _without_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "supports", lambda *_: "it was not built")


def _wished(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "adamw_step=torch")


@pytest.mark.parametrize(
    ("change", "reason"), [(_without_library, "it was not built"), (_wished, "WSN_FAST_BACKEND=adamw_step=torch")]
)
def test_what_cannot_be_as_before_is_said(
    change: Callable[[pytest.MonkeyPatch], None], reason: str, stopped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change(monkeypatch)
    _, said = finish(stopped)
    about = [x for x in said if x.startswith("adamw_step ")]
    assert len(about) == 1 and f"was computed by native and is by torch ({reason}" in about[0]


def test_what_other_models_of_the_process_use_is_not_recorded(tmp_path: Path) -> None:
    given = resolve(**SETTINGS, out=str(tmp_path / "run"))
    run = Run.start(given, Console(quiet=True))
    run.finish()
    other = _wsn()
    other.model.backend = "torch"
    other.begin_task(0)
    optimizer = SubnetAdamW(other, lr=1e-3, one_pass=True)
    other(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    assert paths.in_use(other, CPU)["backends"][STEP] == "torch"
    assert paths.in_use(run.wsn, CPU)["backends"][STEP] == "native"


def test_a_resumed_run_records_what_it_took(stopped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prefer_torch(monkeypatch, "adamw_step")
    finish(stopped)
    assert checkpoint.load_from(stopped / "checkpoint").state["paths"]["backends"][STEP] == "native"


def test_another_device_is_said() -> None:
    recorded = {"backends": {"gates float32": "triton"}, "device": "cuda", "table": ""}
    assert paths.take(_wsn(), recorded, CPU) == [
        "this run was on 'cuda' and goes on with 'cpu': results may differ by rounding"
    ]


def test_another_number_of_processes_is_said() -> None:
    recorded = paths.in_use(_wsn(), CPU, 2)
    assert paths.take(_wsn(), recorded, CPU, 2) == []
    assert paths.take(_wsn(), recorded, CPU) == [
        "this run was trained by 2 processes and goes on with 1 process: results may differ by rounding"
    ]


def test_checkpoints_from_before_there_were_processes_are_of_one() -> None:
    recorded = {name: value for name, value in paths.in_use(_wsn(), CPU).items() if name != "processes"}
    assert paths.take(_wsn(), recorded, CPU) == []
    assert len(paths.take(_wsn(), recorded, CPU, 2)) == 1


@pytest.mark.parametrize("processes", [0, -1, True, 1.5, "two", None])
def test_a_number_of_processes_that_is_none_is_refused(processes: object) -> None:
    with pytest.raises(ValueError, match="expected a number of processes"):
        paths.take(_wsn(), {**paths.in_use(_wsn(), CPU), "processes": processes}, CPU)


def test_a_fused_product_is_not_forced_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    wsn = _wsn()
    recorded = {
        "backends": {"masked_linear float32": "triton"},
        "device": "cpu",
        "table": paths.in_use(wsn, CPU)["table"],
    }
    [said] = paths.take(wsn, recorded, CPU)
    assert said.startswith("masked_linear was computed by triton and is by torch")
    assert all(layer.backend is None for layer in wsn.subnet_layers().values())


def _wsn() -> WSN:
    return WSN(FastSubnetLinear(4, 3, density=0.5))


@pytest.mark.parametrize(
    "content",
    [
        None,
        [],
        {},
        {"backends": [], "device": "cpu", "table": ""},
        {"backends": {"sort float32": "torch"}, "device": "cpu", "table": ""},
        {"backends": {"gates nn": "native"}, "device": "cpu", "table": ""},
        {"backends": {"gates float32": "gpu"}, "device": "cpu", "table": ""},
        {"backends": {"gates float32": 3}, "device": "cpu", "table": ""},
    ],
)
def test_a_damaged_record_is_an_error(content: object, stopped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = checkpoint.load_from

    def damaged(*args: Any) -> checkpoint.Checkpoint:
        loaded = load(*args)
        loaded.state["paths"] = content
        return loaded

    monkeypatch.setattr(checkpoint, "load_from", damaged)
    with pytest.raises(CheckpointError, match="cannot be restored"):
        Run.resume(stopped, Console(quiet=True))


def test_a_checkpoint_of_before_says_nothing(stopped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = checkpoint.load_from

    def older(*args: Any) -> checkpoint.Checkpoint:
        loaded = load(*args)
        del loaded.state["paths"]
        return loaded

    monkeypatch.setattr(checkpoint, "load_from", older)
    assert finish(stopped)[1] == []
