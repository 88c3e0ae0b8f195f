"""Our algorithm in CLArena's framework: its callbacks, Lightning's Trainer, resume."""

from __future__ import annotations

import csv
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wsn_fast import convert

if find_spec("clarena") is None:
    pytest.skip('needs CLArena: pip install "wsn-fast[clarena]"', allow_module_level=True)

import clarena.heads
from clarena.backbones import WSNMaskMLP
from clarena.callbacks import SaveModels
from clarena.heads import HeadsCIL, HeadsTIL
from clarena.metrics import CLAccuracy, CLLoss
from clarena_problem import Stream, Tasks, train_task
from lightning.pytorch.callbacks import ModelCheckpoint

from wsn_fast.integrations.clarena import FastSubnetBackbone, FastSubnetMLP, FastWSN

pytestmark = pytest.mark.filterwarnings("default", "error:::wsn_fast")  # the frameworks have warnings of their own

ADAMW = partial(torch.optim.AdamW, lr=0.02, weight_decay=0.2)
MakeTrainer = Callable[..., Any]


def mlp(**options: Any) -> FastWSN:
    torch.manual_seed(5)
    return FastWSN(FastSubnetMLP(20, [16], 12), HeadsTIL(12), 0.37, **options)


def with_norms() -> FastWSN:
    """A backbone with values per task, and with BatchNorm, which CLArena's cannot have."""
    torch.manual_seed(5)
    net = nn.Sequential(nn.Flatten(), nn.Linear(20, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 12))
    return FastWSN(FastSubnetBackbone(convert(net, rule="value"), 12), HeadsTIL(12), 0.37)


@torch.no_grad()
def logits(algorithm: FastWSN, task: int, x: Tensor) -> Tensor:
    algorithm.eval()
    result = algorithm.forward(x, "test", task)[0]
    algorithm.train()
    return result


@pytest.mark.parametrize("make", [mlp, with_norms])
@pytest.mark.parametrize(
    "options",
    [{}, {"gradient_clip_val": 0.5, "accumulate_grad_batches": 2}, {"precision": "bf16-mixed"}],
    ids=["plain", "clip and accumulate", "bf16"],
)
def test_finished_tasks_stay_to_the_bit(
    loader: Tasks, make_trainer: MakeTrainer, probe: Tensor, make: Callable[[], FastWSN], options: dict[str, Any]
) -> None:
    algorithm, then = make(), {}
    for task in (7, 3, 12):  # the first need not be 1
        train_task(algorithm, task, ADAMW, loader, make_trainer(**options))
        then[task] = logits(algorithm, task, probe)
    assert algorithm.backbone.wsn.verify().tasks == [7, 3, 12]
    assert all(torch.equal(logits(algorithm, task, probe), before) for task, before in then.items())


def test_a_penalty_on_all_heads_moves_no_finished_one(
    loader: Tasks, make_trainer: MakeTrainer, probe: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    algorithm = mlp()

    def penalized(logits: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(logits, y) + sum(p.square().sum() for p in algorithm.heads.parameters())

    monkeypatch.setattr(algorithm.criterion, "forward", penalized)
    train_task(algorithm, 1, ADAMW, loader, make_trainer())
    before = logits(algorithm, 1, probe)
    train_task(algorithm, 2, ADAMW, loader, make_trainer())
    assert torch.equal(logits(algorithm, 1, probe), before)


def test_a_task_learns(loader: Tasks, make_trainer: MakeTrainer) -> None:
    algorithm = mlp()
    train_task(algorithm, 1, ADAMW, loader, make_trainer(20))
    x, y = loader(1).dataset.tensors
    assert F.cross_entropy(logits(algorithm, 1, x), y) < 0.8 * F.cross_entropy(torch.zeros(len(y), 3), y)


def test_the_density_is_the_one_asked_for(loader: Tasks, make_trainer: MakeTrainer) -> None:
    algorithm = mlp()
    train_task(algorithm, 1, ADAMW, loader, make_trainer())
    (stats,) = algorithm.backbone.wsn.task_stats()
    assert stats.density == pytest.approx(0.37, abs=0.01)


@pytest.mark.parametrize(("reinit", "kept"), [(True, False), (False, True)])
def test_scores_begin_anew_or_are_kept(loader: Tasks, make_trainer: MakeTrainer, reinit: bool, kept: bool) -> None:
    algorithm = mlp(reinit_scores=reinit)
    train_task(algorithm, 1, ADAMW, loader, make_trainer())
    scores = algorithm.backbone.get_layer_by_name("fc/0").weight_score
    before = scores.detach().clone()
    algorithm.setup_task_id(2, 3, ADAMW)
    assert torch.equal(scores, before) is kept


def test_the_scheduler_is_stepped(loader: Tasks, make_trainer: MakeTrainer) -> None:
    """The published algorithm optimizes by hand, and never steps it."""
    algorithm = mlp()
    halved = partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5)
    train_task(algorithm, 1, ADAMW, loader, make_trainer(3), lr_scheduler=halved)
    assert algorithm.optimizers().param_groups[0]["lr"] == pytest.approx(0.02 / 8)


# --- one head for all tasks
class HeadDIL(nn.Module):
    """The head that CLArena has after its version 1.1.0: what is used of it."""

    def __init__(self, input_dim: int) -> None:
        super().__init__()
        self.head: nn.Linear | None = None
        self.input_dim = input_dim

    def if_head_setup(self) -> bool:
        return self.head is not None

    def get_head(self, task_id: int | None = None) -> nn.Linear | None:
        return self.head

    def setup_task(self, num_classes: int) -> None:
        self.head = nn.Linear(self.input_dim, num_classes)

    def setup_task_id(self, task_id: int, num_classes: int) -> None:
        """The base class of version 1.1.0 calls this, where that of later ones calls ``setup_task`` once."""
        if not self.if_head_setup():
            self.setup_task(num_classes)

    def forward(self, feature: Tensor, task_id: int | None = None) -> Tensor:
        return self.head(feature)


@pytest.fixture
def one_head(monkeypatch: pytest.MonkeyPatch) -> Callable[[], FastWSN]:
    """Makes an algorithm with the head of CLArena itself, if it has one."""
    kind = getattr(clarena.heads, "HeadDIL", HeadDIL)
    monkeypatch.setattr(clarena.heads, "HeadDIL", kind, raising=False)

    def make() -> FastWSN:
        torch.manual_seed(5)
        return FastWSN(FastSubnetMLP(20, [16], 12), kind(12), 0.37)

    return make


def test_one_head_for_all_tasks_is_fixed_after_the_first(
    loader: Tasks, make_trainer: MakeTrainer, probe: Tensor, one_head: Callable[[], FastWSN]
) -> None:
    algorithm, then = one_head(), {}
    for task in (4, 5):
        train_task(algorithm, task, ADAMW, loader, make_trainer())
        then[task] = logits(algorithm, task, probe), algorithm.heads.get_head().weight.clone()
    assert torch.equal(logits(algorithm, 4, probe), then[4][0]) and not torch.equal(then[5][0], then[4][0])
    assert torch.equal(then[4][1], then[5][1])


def test_one_head_is_trained_in_the_first_task(
    loader: Tasks, make_trainer: MakeTrainer, one_head: Callable[[], FastWSN]
) -> None:
    algorithm = one_head()
    algorithm.setup_task_id(1, 3, ADAMW)
    before = algorithm.heads.get_head().weight.clone()
    train_task(algorithm, 1, ADAMW, loader, make_trainer())
    assert not torch.equal(algorithm.heads.get_head().weight, before)


def test_a_fit_with_one_head_is_resumed_in_mid_task(
    loader: Tasks, make_trainer: MakeTrainer, one_head: Callable[[], FastWSN], tmp_path: Path
) -> None:
    keep = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    undisturbed = one_head()
    train_task(undisturbed, 1, ADAMW, loader, make_trainer())
    train_task(undisturbed, 2, ADAMW, loader, make_trainer(4, callbacks=[keep], enable_checkpointing=True))
    fresh = one_head()
    train_task(fresh, 2, ADAMW, loader, make_trainer(4), ckpt_path=tmp_path / "epoch=1.ckpt")
    assert fresh.backbone.wsn.tasks == [1, 2]
    for name, tensor in undisturbed.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], tensor), name


def test_one_head_has_one_width(loader: Tasks, make_trainer: MakeTrainer, one_head: Callable[[], FastWSN]) -> None:
    algorithm = one_head()
    train_task(algorithm, 1, ADAMW, loader, make_trainer())
    with pytest.raises(ValueError, match="num_classes must be that of the one head of all tasks, 3, got 4"):
        algorithm.setup_task_id(2, 4, ADAMW)
    assert algorithm.backbone.wsn.current_task is None


# --- CLArena's callbacks
def test_the_published_metrics_measure_it(loader: Tasks, make_trainer: MakeTrainer, tmp_path: Path) -> None:
    algorithm = mlp()
    callbacks = [CLAccuracy(str(tmp_path)), CLLoss(str(tmp_path)), SaveModels(str(tmp_path))]
    for task in (1, 2):
        train_task(algorithm, task, ADAMW, loader, make_trainer(callbacks=callbacks))
        make_trainer(callbacks=callbacks).test(algorithm, datamodule=Stream(loader, [1, 2][:task]), verbose=False)
    first, second = csv.DictReader((tmp_path / "acc.csv").read_text().splitlines())
    x, y = loader(1).dataset.tensors
    accuracy = (logits(algorithm, 1, x).argmax(1) == y).float().mean().item()
    assert float(first["test_on_task_1"]) == pytest.approx(accuracy)
    assert float(second["test_on_task_1"]) == pytest.approx(accuracy)


def test_the_model_that_clarena_saves_has_the_finished_task(
    loader: Tasks, make_trainer: MakeTrainer, probe: Tensor, tmp_path: Path
) -> None:
    algorithm = mlp()
    callbacks = [SaveModels(str(tmp_path))]
    train_task(algorithm, 1, ADAMW, loader, make_trainer(callbacks=callbacks))
    if not (tmp_path / "cl_model.pth").exists():  # after its version 1.1.0 CLArena saves when the test ends
        make_trainer(callbacks=callbacks).test(algorithm, datamodule=Stream(loader, [1]), verbose=False)
    saved = torch.load(tmp_path / "cl_model.pth", weights_only=False)
    assert saved.backbone.wsn.tasks == [1]
    assert torch.equal(logits(saved, 1, probe), logits(algorithm, 1, probe))


# --- checkpoints
def run_and_keep(loader: Tasks, make_trainer: MakeTrainer, folder: Path, epochs: int = 4) -> FastWSN:
    """Task 1, then task 2 with a checkpoint of each epoch."""
    algorithm = mlp()
    train_task(algorithm, 1, ADAMW, loader, make_trainer())
    keep = ModelCheckpoint(folder, "{epoch}", save_top_k=-1)
    train_task(algorithm, 2, ADAMW, loader, make_trainer(epochs, callbacks=[keep], enable_checkpointing=True))
    return algorithm


def test_a_fit_resumed_in_mid_task_ends_as_an_undisturbed_one(
    loader: Tasks, make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    undisturbed = run_and_keep(loader, make_trainer, tmp_path)
    fresh = mlp()
    train_task(fresh, 2, ADAMW, loader, make_trainer(4), ckpt_path=tmp_path / "epoch=1.ckpt")
    assert (fresh.backbone.wsn.tasks, fresh.processed_task_ids) == ([1, 2], [1, 2])
    expected = undisturbed.state_dict()
    assert expected.keys() == fresh.state_dict().keys()
    for name, tensor in fresh.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_a_checkpoint_with_no_epoch_left_ends_its_task(
    loader: Tasks, make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    run_and_keep(loader, make_trainer, tmp_path, epochs=2)
    fresh = mlp()
    train_task(fresh, 2, ADAMW, loader, make_trainer(2), ckpt_path=tmp_path / "epoch=1.ckpt")
    assert fresh.backbone.wsn.tasks == [1, 2]


def test_a_resumed_task_may_be_followed_by_another(
    loader: Tasks, make_trainer: MakeTrainer, probe: Tensor, tmp_path: Path
) -> None:
    algorithm = run_and_keep(loader, make_trainer, tmp_path)
    fresh = mlp()
    train_task(fresh, 2, ADAMW, loader, make_trainer(4), ckpt_path=tmp_path / "epoch=1.ckpt")
    train_task(fresh, 3, ADAMW, loader, make_trainer())
    assert all(torch.equal(logits(fresh, task, probe), logits(algorithm, task, probe)) for task in (1, 2))


def test_a_checkpoint_has_masks_and_heads(
    loader: Tasks, make_trainer: MakeTrainer, probe: Tensor, tmp_path: Path
) -> None:
    """The published algorithm keeps masks outside its state: a checkpoint loses them."""
    algorithm, trainer = mlp(), make_trainer()
    for task in (1, 2):
        trainer = make_trainer()
        train_task(algorithm, task, ADAMW, loader, trainer)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    fresh = FastWSN.load_from_checkpoint(
        tmp_path / "end.ckpt", backbone=FastSubnetMLP(20, [16], 12), heads=HeadsTIL(12)
    )
    assert fresh.hparams.mask_percentage == 0.37
    assert all(torch.equal(logits(fresh, task, probe), logits(algorithm, task, probe)) for task in (1, 2))


def test_a_checkpoint_of_another_task_is_refused(loader: Tasks, make_trainer: MakeTrainer, tmp_path: Path) -> None:
    run_and_keep(loader, make_trainer, tmp_path, epochs=1)
    with pytest.raises(RuntimeError, match="task 3 was set up last, but 2 is in progress"):
        train_task(mlp(), 3, ADAMW, loader, make_trainer(2), ckpt_path=tmp_path / "epoch=0.ckpt")


def test_a_checkpoint_of_another_class_is_refused() -> None:
    with pytest.raises(ValueError, match="not one of FastWSN"):
        mlp().on_load_checkpoint({"state_dict": {}})


# --- the life of a task
def test_a_fit_cut_short_goes_on(loader: Tasks, make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch) -> None:
    algorithm = mlp()

    def fail(batch: Any) -> None:
        raise ConnectionError("the data are gone")

    with monkeypatch.context() as patch, pytest.raises(ConnectionError):
        patch.setattr(algorithm, "training_step", fail)
        train_task(algorithm, 1, ADAMW, loader, make_trainer())
    head = algorithm.heads.get_head(1)
    train_task(algorithm, 1, ADAMW, loader, make_trainer())
    assert (algorithm.backbone.wsn.tasks, algorithm.processed_task_ids) == ([1], [1])
    assert algorithm.heads.get_head(1) is head


def test_another_task_must_wait(loader: Tasks) -> None:
    algorithm = mlp()
    algorithm.setup_task_id(1, 3, ADAMW)
    with pytest.raises(RuntimeError, match="task 1 is in progress"):
        algorithm.setup_task_id(2, 3, ADAMW)
    assert algorithm.processed_task_ids == [1]


def test_a_task_is_trained_once(loader: Tasks, make_trainer: MakeTrainer) -> None:
    algorithm = mlp()
    train_task(algorithm, 1, ADAMW, loader, make_trainer())
    with pytest.raises(ValueError, match="task 1 has been trained already"):
        algorithm.setup_task_id(1, 3, ADAMW)


def test_a_second_fit_of_a_finished_task_is_refused(loader: Tasks, make_trainer: MakeTrainer) -> None:
    algorithm = mlp()
    train_task(algorithm, 1, ADAMW, loader, make_trainer())
    with pytest.raises(RuntimeError, match="task 1 was set up last, but None is in progress"):
        make_trainer().fit(algorithm, datamodule=Stream(loader, [1]))


def test_only_logits_if_asked(probe: Tensor) -> None:
    algorithm = mlp()
    algorithm.setup_task_id(1, 3, ADAMW)
    algorithm.set_forward_func_return_logits_only(True)
    assert algorithm.forward(probe, "train").shape == (9, 3)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"backbone": WSNMaskMLP(20, [16], 12)}, "backbone must be a FastSubnetBackbone"),
        ({"heads": HeadsCIL(12)}, "heads must be a HeadsTIL or a HeadDIL, got HeadsCIL"),
    ],
)
def test_a_wrong_type_is_named(arguments: dict[str, Any], match: str) -> None:
    with pytest.raises(TypeError, match=match):
        FastWSN(
            **({"backbone": FastSubnetMLP(20, [16], 12), "heads": HeadsTIL(12), "mask_percentage": 0.5} | arguments)
        )


@pytest.mark.parametrize(
    ("arguments", "match"),
    [({"mask_percentage": 0.0}, "mask_percentage"), ({"parameter_score_init_mode": "xavier"}, "score_init")],
)
def test_a_wrong_value_is_named(arguments: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        FastWSN(FastSubnetMLP(20, [16], 12), HeadsTIL(12), **({"mask_percentage": 0.5} | arguments))
