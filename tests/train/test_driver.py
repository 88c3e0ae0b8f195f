from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from batches_in_order import in_order
from torch import Tensor, nn

from wsn_fast import ForgottenError
from wsn_fast.continual.wsn import WSN
from wsn_fast.optim.optimizers import SubnetAdamW, SubnetSGD
from wsn_fast.train import checkpoint, loop, pace, run
from wsn_fast.train.config import TrainConfig, resolve
from wsn_fast.train.data import DataError
from wsn_fast.train.report import NUMBERS, Console
from wsn_fast.train.run import Run
from wsn_fast.train.samples import Epoch, Samples, SamplesInMemory
from wsn_fast.train.samples.samples import EVAL_BATCH

SMALL: dict[str, Any] = {"tasks": 3, "epochs": 3, "batch_size": 128, "lr": 0.01, "device": "cpu"}


@pytest.fixture
def settings(tmp_path: Path) -> Callable[..., TrainConfig]:
    return lambda **given: resolve(**{**SMALL, "out": str(tmp_path / "run"), **given})


def start(settings: TrainConfig) -> Run:
    return Run.start(settings, Console(quiet=True))


def logged(folder: str, kind: str) -> list[dict[str, Any]]:
    lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    return [entry for entry in map(json.loads, lines) if entry["kind"] == kind]


def script_validation(monkeypatch: pytest.MonkeyPatch, losses: list[float], samples: int) -> None:
    """Let the validation losses (of a set with so many samples) be these, in this order."""
    upcoming = iter(losses)

    def evaluate(wsn: WSN, given: Samples, *rest: Any) -> tuple[float, float]:
        loss, accuracy = loop.evaluate(wsn, given, *rest)
        return (next(upcoming) if given.count == samples else loss), accuracy

    monkeypatch.setattr(run, "evaluate", evaluate)


def test_a_run_forgets_nothing_and_learns_every_task(settings: Callable[..., TrainConfig]) -> None:
    results = start(settings()).finish()
    matrix = results["accuracy_matrix"]
    assert results["bwt"] == 0.0
    assert results["forgetting"] == [0.0, 0.0, 0.0]
    assert min(matrix[-1]) > 80
    assert [row.count(None) for row in matrix] == [2, 1, 0]
    assert results["acc"] == pytest.approx(sum(matrix[-1]) / 3)


def test_several_datasets_are_tasks_of_one_run(settings: Callable[..., TrainConfig]) -> None:
    s = settings(stream="datasets", data="digits,digits", tasks=None, net="mlp")
    results = start(s).finish()
    assert s.tasks == 2 and results["bwt"] == 0.0 and min(results["accuracy_matrix"][-1]) > 80
    assert results["command"].startswith("wsn-fast train datasets --data digits,digits --preset paper --epochs 3")


def test_a_run_writes_one_folder(settings: Callable[..., TrainConfig]) -> None:
    s = settings(tasks=2)
    results = start(s).finish()
    folder = Path(s.out)
    names = {"config.json", "metrics.jsonl", "results.json", "checkpoint", "accuracy_matrix.png", "capacity.png"}
    assert {path.name for path in folder.iterdir()} == {*names, ".lock"}
    assert json.loads((folder / "results.json").read_text()) == results
    assert {*NUMBERS, "layers", "overlap", "command", "config", "versions", "data_fingerprint"} == results.keys()
    assert json.loads((folder / "config.json").read_text())["config"]["epochs"] == 3
    assert logged(s.out, "epoch")[-1].keys() == {
        "kind",
        "task",
        "epoch",
        "loss",
        "val_loss",
        "val_acc",
        "lr",
        "seconds",
        "processes",
        "captured_steps",
    }
    assert [entry["task"] for entry in logged(s.out, "epoch")] == [0, 0, 0, 1, 1, 1]
    assert [entry["test_acc"][-1] for entry in logged(s.out, "task")] == results["accuracy_matrix"][-1]


def test_capacities_and_reuse_are_those_of_the_masks_in_percent(settings: Callable[..., TrainConfig]) -> None:
    trained = start(settings(tasks=2, density=0.25))
    results = trained.finish()
    masks = []
    for row in range(2):
        masks.append(torch.cat([layer.mask("weight", row).flatten() for layer in trained.wsn.subnet_layers().values()]))
    first, second = masks
    union = 100 * (first | second).double().mean().item()
    assert results["union_density"] == pytest.approx(union)
    assert results["capacity_paper"] == pytest.approx(union + 100 * (1 - 0.78) * 2 / 32)
    assert results["capacity"] == pytest.approx(union + (100 - results["compression"]) * 2 / 32)
    assert results["reuse"][1] == {
        "task": 1,
        "density": pytest.approx(100 * second.double().mean().item()),
        "reuse": pytest.approx(100 * first[second].double().mean().item()),
        "new": pytest.approx(100 * (second & ~first).double().mean().item()),
    }


def test_the_optimizer_is_guarded(settings: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    harsh = {"tasks": 2, "optimizer": "adamw", "weight_decay": 0.1}
    assert start(settings(**harsh)).finish()["bwt"] == 0.0
    monkeypatch.setattr(WSN, "guard", lambda self, optimizer: optimizer)
    with pytest.raises(ForgottenError):
        start(settings(**harsh, out=settings().out + "2")).finish()


@pytest.mark.parametrize(
    ("name", "kind", "decay"),
    [("adam", torch.optim.Adam, 0.0), ("adamw", torch.optim.AdamW, 0.1), ("sgd", torch.optim.SGD, 0.2)],
)
def test_the_optimizer_is_the_one_asked_for(
    settings: Callable[..., TrainConfig], name: str, kind: type[torch.optim.Optimizer], decay: float
) -> None:
    s = settings(optimizer=name, weight_decay=decay, one_pass=False)
    optimizer = loop.make_optimizer(start(s).wsn, s)
    assert type(optimizer) is kind
    assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["weight_decay"]) == (0.01, decay)
    assert optimizer.param_groups[0].get("momentum", 0.9) == 0.9


@pytest.mark.parametrize(("name", "kind"), [("adam", SubnetAdamW), ("adamw", SubnetAdamW), ("sgd", SubnetSGD)])
def test_a_one_pass_run_learns_the_same_and_forgets_nothing(
    settings: Callable[..., TrainConfig], name: str, kind: type[torch.optim.Optimizer]
) -> None:
    s = settings(tasks=2, optimizer=name, weight_decay=0.01, one_pass=True)
    one_pass = start(s)
    assert type(loop.make_optimizer(one_pass.wsn, s)) is kind
    torchs = start(settings(tasks=2, optimizer=name, weight_decay=0.01, one_pass=False, out=s.out + "2")).finish()
    found = one_pass.finish()
    assert found["bwt"] == 0.0
    assert found["acc"] == pytest.approx(torchs["acc"], abs=10)


@pytest.mark.parametrize(("name", "kind"), [("adam", "SubnetAdamW"), ("sgd", "SubnetSGD")])
def test_a_run_with_means_in_8_bits_forgets_nothing_and_says_what_it_stores(
    settings: Callable[..., TrainConfig], name: str, kind: str
) -> None:
    s = settings(tasks=2, optimizer=name, weight_decay=0.01, moments="8bit")
    assert start(s).finish()["bwt"] == 0.0
    entries = [json.loads(line) for line in (Path(s.out) / "metrics.jsonl").read_text().splitlines()]
    begun = [entry for entry in entries if entry["kind"] == "begin"]
    assert {entry["optimizer"] for entry in begun} == {f"wsn_fast {kind}, moments 8bit"}
    assert "one-pass step, moments 8bit" in {path["operation"] for path in begun[0]["paths"]}


def test_lr_is_halved_after_the_patience_and_ends_the_task(
    settings: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    used = []

    def train_epoch(wsn: WSN, optimizer: torch.optim.Optimizer, *arguments: Any) -> float:
        used.append(optimizer.param_groups[0]["lr"])
        return loop.train_epoch(wsn, optimizer, *arguments)

    monkeypatch.setattr(run, "train_epoch", train_epoch)
    s = settings(tasks=1, epochs=20, lr=1e-3, lr_patience=2, lr_min=3e-4)
    trained = start(s)
    script_validation(monkeypatch, [1.0, 0.9, 0.95, 0.8, 0.8, 0.9, 0.81, 0.79, 0.8, 0.8], len(trained.stream[0].val_y))
    trained.finish()
    # Better in epochs 1, 2, 4 and 8; two without (5, 6) and again (9, 10) halve it, and 2.5e-4 is below the least.
    assert used == [1e-3] * 6 + [5e-4] * 4
    assert [entry["lr"] for entry in logged(s.out, "epoch")] == used
    assert logged(s.out, "task")[0]["best_epoch"] == 8


def test_the_mask_is_taken_from_the_best_epochs_scores(
    settings: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = start(settings(tasks=1, epochs=4, lr=0.1))
    script_validation(monkeypatch, [1.0, 0.5, 2.0, 3.0], len(trained.stream[0].val_y))
    masks, weights = [], []

    def note(*_: object) -> None:
        layers = trained.wsn.subnet_layers().values()
        masks.append([layer.masks_of_scores()["weight"] for layer in layers])
        weights.append([layer.weight.detach().clone() for layer in layers])

    monkeypatch.setattr(trained.console, "epoch_ended", note)
    trained.finish()
    for i, layer in enumerate(trained.wsn.subnet_layers().values()):
        assert torch.equal(layer.mask("weight", 0), masks[1][i])
        assert not torch.equal(layer.mask("weight", 0), masks[3][i])
        assert torch.equal(layer.weight, weights[1][i])


def test_every_task_starts_with_a_fresh_optimizer_and_lr(
    settings: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []

    def make_optimizer(wsn: WSN, s: TrainConfig) -> torch.optim.Optimizer:
        made.append(wsn.current_task)
        return loop.make_optimizer(wsn, s)

    monkeypatch.setattr(run, "make_optimizer", make_optimizer)
    s = settings(tasks=2, epochs=4, lr_patience=1)
    trained = start(s)
    script_validation(monkeypatch, [1.0] * 8, len(trained.stream[0].val_y))
    trained.finish()
    assert made == [0, 1]
    assert [entry["lr"] for entry in logged(s.out, "epoch")] == [0.01, 0.01, 0.005, 0.0025] * 2


@pytest.mark.parametrize("preset", ["paper", "clarena"])
def test_accuracies_for_forward_transfer_are_taken_before_a_task_begins(
    settings: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch, preset: str
) -> None:
    used, use_head = [], WSN.use_head

    def noted(self: WSN, task: Any) -> Any:
        used.append((task, self.current_task, list(self.tasks)))
        return use_head(self, task)

    monkeypatch.setattr(WSN, "use_head", noted)
    results = start(settings(preset=preset)).finish()
    at_random = [(0, None, []), (1, None, []), (2, None, [])]
    assert used == [*at_random, (1, None, [0]), (2, None, [0, 1])]
    gains = [b - r for b, r in zip(results["before_training"], results["random_init"], strict=True)]
    assert gains[0] == 0.0
    assert results["fwt"] == pytest.approx((gains[1] + gains[2]) / 2)


def test_every_row_is_measured_with_the_tasks_own_masks(
    settings: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    used, use_task = [], WSN.use_task

    def noted(self: WSN, task: Any) -> Any:
        used.append((task, len(self.tasks)))
        return use_task(self, task)

    monkeypatch.setattr(WSN, "use_task", noted)
    start(settings()).finish()
    rows = [[(task, k) for task in range(k)] for k in (1, 2, 3)]
    probed = [(k - 1, k) for k in (1, 2, 3)]  # when the task ends
    assert used == [probed[0], *rows[0], probed[1], *rows[1], probed[2], *rows[2], *rows[2]], "the last are verify's"


def test_the_presets_reach_the_model(settings: Callable[..., TrainConfig]) -> None:
    paper, clarena = start(settings()), start(settings(preset="clarena", out=settings().out + "2"))
    assert (paper.wsn.reinit_scores, clarena.wsn.reinit_scores) == (False, True)
    assert {layer.rule for layer in paper.wsn.subnet_layers().values()} == {"magnitude"}
    assert {layer.rule for layer in clarena.wsn.subnet_layers().values()} == {"value"}
    assert {layer.density for layer in paper.wsn.subnet_layers().values()} == {0.3}


def test_score_init_is_that_of_the_first_task_and_of_later_ones(settings: Callable[..., TrainConfig]) -> None:
    wsn = start(settings(score_init="U01")).wsn
    assert all((layer.weight_score >= 0).all() for layer in wsn.subnet_layers().values())
    assert wsn.score_init == "U01"


def test_the_number_of_threads_is_that_of_the_config(settings: Callable[..., TrainConfig]) -> None:
    start(settings(threads=3))
    assert torch.get_num_threads() == 3
    start(settings(out=settings().out + "2"))
    assert torch.get_num_threads() == 1


def test_split_tasks_have_heads_of_their_own_width(settings: Callable[..., TrainConfig]) -> None:
    results = start(settings(stream="split", tasks=5, epochs=2)).finish()
    assert min(results["accuracy_matrix"][-1]) > 80
    assert results["bwt"] == 0.0


def test_the_order_of_samples_depends_on_seed_task_and_epoch() -> None:
    orders = [Epoch(*key).order(50).tolist() for key in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]]
    assert orders[0] == Epoch(0, 0, 0).order(50).tolist()
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len(set(map(tuple, orders))) == 4


def test_batches_are_trained_without_a_number_for_the_host(
    settings: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    s = settings(optimizer="sgd")
    wsn = start(s).wsn
    wsn.begin_task(0)
    optimizer = loop.make_optimizer(wsn, s)
    calls, item = [], Tensor.item
    monkeypatch.setattr(Tensor, "item", lambda self: calls.append(1) or item(self))
    batches = in_order(torch.randn(60, 1, 8, 8), torch.zeros(60).long(), 10)
    loop.train_epoch(wsn, optimizer, batches, lambda: None)
    assert len(calls) == 1


def test_dropout_is_on_in_training_and_off_in_measurements(settings: Callable[..., TrainConfig]) -> None:
    s = settings()
    wsn = start(s).wsn
    wsn.begin_task(0)
    x, y = torch.randn(20, 1, 8, 8), torch.zeros(20).long()
    loop.evaluate(wsn, SamplesInMemory(x, y))
    assert not any(module.training for module in wsn.modules())
    loop.train_epoch(wsn, loop.make_optimizer(wsn, s), in_order(x, y, 20), lambda: None)
    assert all(module.training for module in wsn.modules())


def test_evaluate_agrees_with_the_whole_set_at_once() -> None:
    class Identity(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    samples = EVAL_BATCH + 7
    logits, labels = torch.randn(samples, 3), torch.randint(3, (samples,))
    loss, accuracy = loop.evaluate(Identity(), SamplesInMemory(logits, labels))  # type: ignore[arg-type]
    assert loss == pytest.approx(nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)
    assert accuracy == 100 * (logits.argmax(1) == labels).sum().item() / samples


def test_a_loss_that_is_not_finite_stops_with_the_layer_and_keeps_the_checkpoint(
    settings: Callable[..., TrainConfig],
) -> None:
    s = settings(optimizer="sgd", lr=1e30)
    with pytest.raises(FloatingPointError, match=r"task 0, epoch 1: features\.\d\.weight.*000001"):
        start(s).finish()
    kept = checkpoint.load_from(Path(s.out) / "checkpoint")
    assert kept.number == 1
    assert all(t.isfinite().all() for t in kept.tensors.values())


def test_a_loss_that_is_not_finite_alone_is_named_too(
    settings: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = start(settings())
    script_validation(monkeypatch, [1.0, float("nan")], len(trained.stream[0].val_y))
    with pytest.raises(FloatingPointError, match=r"task 0, epoch 2: the loss .*000002"):
        trained.finish()


def test_a_folder_in_use_is_refused(settings: Callable[..., TrainConfig]) -> None:
    s = settings()
    Path(s.out).mkdir()
    (Path(s.out) / "mine.txt").touch()
    with pytest.raises(ValueError, match=r"out: expected an empty or new folder.*--resume"):
        start(s)
    assert [path.name for path in Path(s.out).iterdir()] == ["mine.txt"]


def test_bad_data_leave_no_folder(settings: Callable[..., TrainConfig], tmp_path: Path) -> None:
    s = settings(data="mnist", data_dir=str(tmp_path))
    with pytest.raises(DataError, match="train-images"):
        start(s)
    assert not Path(s.out).exists()


def test_a_device_that_is_not_there_is_refused(
    settings: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"device: .*'cuda'"):
        start(settings(device="cuda"))


def test_fewer_checkpoints_change_no_number(settings: Callable[..., TrainConfig]) -> None:
    often, seldom = settings(), settings(checkpoint_seconds=1e9, out=settings().out + "2")
    first, second = start(often).finish(), start(seldom).finish()
    assert {name: first[name] for name in NUMBERS} == {name: second[name] for name in NUMBERS}
    assert checkpoint.load_from(Path(often.out) / "checkpoint").number == 1 + 3 * (3 + 1)
    assert checkpoint.load_from(Path(seldom.out) / "checkpoint").number == 1 + 3


def test_checkpoints_take_a_small_part_of_the_time(
    settings: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a checkpoint of 1 s and epochs of 4 s, ten seconds pass before the next one: after the epochs 3, 6, 9."""
    now, save, train_epoch = [0.0], checkpoint.save, loop.train_epoch

    def saved(*arguments: Any) -> Path:
        now[0] += 1
        return save(*arguments)

    def trained(*arguments: Any) -> float:
        now[0] += 4
        return train_epoch(*arguments)

    monkeypatch.setattr(checkpoint, "save", saved)
    monkeypatch.setattr(run, "train_epoch", trained)
    monkeypatch.setattr(pace, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(pace, "RARELY", 10)
    s = settings(tasks=1, epochs=10)
    assert s.checkpoint_seconds == "auto"
    start(s).finish()
    assert checkpoint.load_from(Path(s.out) / "checkpoint").number == 1 + 3 + 1
