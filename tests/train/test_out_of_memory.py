"""Memory that does not suffice for a batch: the step is repeated in parts, or the run stops and can go on."""

from __future__ import annotations

import copy
import math
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from batches_in_order import in_order
from same_end import assert_same_end, metrics
from small_models import batches, logits, mlp, run_tasks
from torch import Tensor, nn

from wsn_fast import WSN, capture_step
from wsn_fast.optim.optimizers import SubnetAdamW, SubnetSGD
from wsn_fast.train import loop, run
from wsn_fast.train.config import TrainConfig, resolve
from wsn_fast.train.report import Console
from wsn_fast.train.run import Run

OPTIMIZERS: dict[str, Callable[[WSN], torch.optim.Optimizer]] = {
    "sgd": lambda wsn: wsn.guard(torch.optim.SGD(wsn.parameters(), 0.1, momentum=0.9)),
    "adamw": lambda wsn: wsn.guard(torch.optim.AdamW(wsn.parameters(), 0.01)),
    "one-pass sgd": lambda wsn: SubnetSGD(wsn, 0.1, momentum=0.9, one_pass=True),
    "one-pass adamw": lambda wsn: SubnetAdamW(wsn, 0.01, one_pass=True),
}


def out_of_memory(*_: object) -> NoReturn:
    raise torch.OutOfMemoryError("CUDA out of memory")


def limit_memory(patch: pytest.MonkeyPatch, samples: int, where: str = "forward") -> list[weakref.ref[Tensor]]:
    """Training has memory for so many samples: with more it fails at the end of forward, or when backward has the
    gradients of all layers but the first. Returns references to what it held then."""
    forward, held = WSN.forward, []

    def fail_in_backward(module: nn.Module, inputs: object, output: Tensor) -> None:
        output.register_hook(out_of_memory)

    def limited(self: WSN, x: Tensor) -> Tensor:
        if not self.training or len(x) <= samples:
            return forward(self, x)
        hook = self.model[2].register_forward_hook(fail_in_backward) if where == "backward" else None
        out: Tensor = forward(self, x)
        held.append(weakref.ref(out))
        if hook is None:
            out_of_memory()
        hook.remove()
        return out

    patch.setattr(WSN, "forward", limited)
    return held


def train(wsn: WSN, optimizer: torch.optim.Optimizer, on_split: Callable[[int], None] = lambda _: None) -> float:
    """An epoch of batches of 10, 10 and 5 samples."""
    x, y = batches(1, 1, 25)[0]
    epoch = in_order(x.to(next(wsn.parameters()).dtype), y, 10)
    return loop.train_epoch(wsn, optimizer, epoch, lambda: None, on_split=on_split)


def second_task() -> tuple[WSN, Tensor]:
    """A model with its first task finished and the second begun, and the first one's logits."""
    wsn = WSN(mlp())
    run_tasks(wsn, [0], lambda p: torch.optim.AdamW(p, 0.01))
    first = logits(wsn, 0)
    wsn.begin_task(1)
    return wsn, first


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_in_parts_are_those_of_whole_batches(name: str, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = second_task()[0].double()
    parts = copy.deepcopy(whole)
    whole_loss = train(whole, OPTIMIZERS[name](whole))
    splits: list[int] = []
    optimizer = OPTIMIZERS[name](parts)
    limit_memory(monkeypatch, 3, where)
    assert train(parts, optimizer, splits.append) == pytest.approx(whole_loss, rel=1e-12)
    assert splits == [2, 4]
    for (key, left), right in zip(parts.named_parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-12, msg=lambda text, key=key: f"{key}: {text}")


def test_finished_tasks_stay_the_same_to_the_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    wsn, first = second_task()
    limit_memory(monkeypatch, 3)
    train(wsn, OPTIMIZERS["adamw"](wsn))
    wsn.end_task()
    assert torch.equal(logits(wsn, 0), first)
    wsn.verify()


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_what_a_failed_attempt_held_is_free_before_the_next(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wsn, _ = second_task()
    held = limit_memory(monkeypatch, 3, where)
    alive: list[bool] = []
    train(wsn, OPTIMIZERS["adamw"](wsn), lambda _: alive.append(any(ref() is not None for ref in held)))
    assert alive == [False, False]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_no_memory_even_for_one_sample_leaves_a_usable_model(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wsn, first = second_task()
    optimizer, before = OPTIMIZERS[name](wsn), wsn.trainable_state()
    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
        limit_memory(patch, 0)
        train(wsn, optimizer)
    assert all(torch.equal(tensor, before[key]) for key, tensor in wsn.trainable_state().items())
    train(wsn, optimizer)
    wsn.end_task()
    assert torch.equal(logits(wsn, 0), first)


# --- in a run --------------------------------------------------------------------------------------------------------
def settings(folder: Path, **given: Any) -> TrainConfig:
    return resolve(tasks=2, epochs=3, batch_size=128, device="cpu", out=str(folder), **given)


def test_a_run_in_parts_says_so_once_and_forgets_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    limit_memory(monkeypatch, 40)
    results = Run.start(settings(tmp_path / "run"), Console()).finish()
    assert results["bwt"] == 0.0
    assert min(results["accuracy_matrix"][-1]) > 50
    noted = [entry for entry in metrics(tmp_path / "run") if entry["kind"] == "split"]
    assert noted == [{"kind": "split", "task": 0, "epoch": 1, "parts": parts} for parts in (2, 4)]
    said = [line for line in capsys.readouterr().out.splitlines() if "out of memory" in line]
    assert [line.rsplit(" in ")[-1] for line in said] == ["2 parts", "4 parts"]


@pytest.mark.parametrize("one_pass", [False, True])
def test_no_memory_for_the_optimizers_step_stops_a_run_that_can_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_pass: bool
) -> None:
    straight, stopped = (settings(tmp_path / name, one_pass=one_pass) for name in ("straight", "stopped"))
    Run.start(straight, Console(quiet=True)).finish()
    steps: list[int] = []

    def make_optimizer(wsn: WSN, given: TrainConfig) -> torch.optim.Optimizer:
        optimizer = loop.make_optimizer(wsn, given)

        def fail_once(*_: object) -> None:  # with part of its work done
            steps.append(1)
            if len(steps) == 50:  # in the second epoch of the second task
                out_of_memory()

        optimizer.register_step_post_hook(fail_once)
        return optimizer

    with monkeypatch.context() as patch:
        patch.setattr(run, "make_optimizer", make_optimizer)
        trained = Run.start(stopped, Console(quiet=True))
        with pytest.raises(torch.OutOfMemoryError, match=r"task 1: CUDA out of memory.*000006, is kept"):
            trained.finish()
    assert len(steps) == 50, "a step is not repeated"
    Run.resume(Path(stopped.out), Console(quiet=True)).finish()
    assert_same_end(Path(stopped.out), Path(straight.out))


@pytest.mark.parametrize("in_update", [False, True])
def test_a_captured_step_is_repeated_only_before_its_update(in_update: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """After it the batch would be trained on twice."""
    wsn, _ = second_task()
    optimizer = OPTIMIZERS["one-pass adamw"](wsn)
    step = capture_step(wsn, optimizer, lambda x, y: torch.nn.functional.cross_entropy(wsn(x), y))
    x, y = batches(1, 1, 25)[0]
    splits: list[int] = []
    if in_update:
        monkeypatch.setattr(optimizer, "step", out_of_memory)
    else:
        limit_memory(monkeypatch, 5)

    def epoch() -> float:
        return loop.train_epoch(wsn, optimizer, in_order(x, y, 10), lambda: None, step, splits.append)

    if in_update:
        with pytest.raises(torch.OutOfMemoryError):
            epoch()
        assert splits == []
    else:
        assert math.isfinite(epoch()) and splits == [2]
