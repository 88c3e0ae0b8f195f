"""The callback for Lightning, with Lightning's own Trainer."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from wsn_fast import WSN, FastSubnetLinear, ForgottenError, TaskHeads

if find_spec("lightning") is None:
    pytest.skip('needs Lightning: pip install "wsn-fast[lightning]"', allow_module_level=True)

from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, WeightAveraging

from wsn_fast.integrations.lightning import WSNCallback
from wsn_fast.optim.optimizers import SubnetAdamW

pytestmark = pytest.mark.filterwarnings("default", "error:::wsn_fast")  # the frameworks have warnings of their own

Loader = Callable[[int], Any]
MakeTrainer = Callable[..., Any]


class Module(LightningModule):
    """A small WSN under AdamW with weight decay, with a scheduler that is stepped."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        net = nn.Sequential(
            nn.Flatten(), FastSubnetLinear(20, 16, density=0.4), nn.LayerNorm(16), nn.ReLU(), TaskHeads(16, 3)
        )
        self.wsn = WSN(net)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.wsn(batch[0]), batch[1])

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("loss", F.cross_entropy(self.wsn(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        params = [p for p in self.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(params, lr=0.02, weight_decay=0.2)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]


def fit(module: LightningModule, task: int, loader: Loader, trainer: Any, **options: Any) -> None:
    trainer.callbacks.insert(0, WSNCallback(task))
    module.train()
    trainer.fit(module, loader(task), **options)


@torch.no_grad()
def logits(module: Module, task: int, x: Tensor) -> Tensor:
    module.eval()
    with module.wsn.use_task(task):
        return module.wsn(x)


@pytest.mark.parametrize(
    "options",
    [{}, {"gradient_clip_val": 0.5}, {"accumulate_grad_batches": 2}, {"precision": "bf16-mixed"}],
    ids=["plain", "clip", "accumulate", "bf16"],
)
def test_finished_tasks_stay_to_the_bit(
    loader: Loader, make_trainer: MakeTrainer, probe: Tensor, options: dict[str, Any]
) -> None:
    module, then = Module(), {}
    for task in (1, 2, 3):
        fit(module, task, loader, make_trainer(**options))
        then[task] = logits(module, task, probe)
    assert module.wsn.tasks == [1, 2, 3]
    assert all(torch.equal(logits(module, task, probe), before) for task, before in then.items())


class Ours(Module):
    """It is trained by our optimizer."""

    one_pass = True

    def configure_optimizers(self) -> Any:
        return SubnetAdamW(self.wsn, 0.02, weight_decay=0.2, eps=1e-3, one_pass=self.one_pass)


def test_a_one_pass_optimizer_keeps_finished_tasks(loader: Loader, make_trainer: MakeTrainer, probe: Tensor) -> None:
    module = Ours()
    fit(module, 1, loader, make_trainer())
    before = logits(module, 1, probe)
    fit(module, 2, loader, make_trainer())
    assert torch.equal(logits(module, 1, probe), before)


@pytest.mark.parametrize("clip", [0.01, 0.3])
def test_a_one_pass_optimizer_clips_by_the_norm_of_all_gradients(
    loader: Loader, make_trainer: MakeTrainer, clip: float
) -> None:
    trained = []
    for one_pass in (False, True):
        module = Ours()  # it seeds what is drawn from here on
        module.one_pass = one_pass
        for task in (1, 2):
            fit(module, task, loader, make_trainer(gradient_clip_val=clip))
        trained.append(dict(module.named_parameters()))
    torch.testing.assert_close(trained[1], trained[0])


def test_a_one_pass_optimizer_does_not_clip_values(loader: Loader, make_trainer: MakeTrainer) -> None:
    with pytest.raises(ValueError, match='gradient_clip_algorithm must be "norm" with a one-pass optimizer'):
        fit(Ours(), 1, loader, make_trainer(gradient_clip_val=0.5, gradient_clip_algorithm="value"))


def test_a_task_learns(loader: Loader, make_trainer: MakeTrainer) -> None:
    module = Module()
    module.wsn.begin_task(1)
    x, y = loader(1).dataset.tensors
    before = F.cross_entropy(module.wsn(x), y)
    fit(module, 1, loader, make_trainer(5))
    with module.wsn.use_task(1):
        assert F.cross_entropy(module.wsn(x), y) < 0.9 * before


def test_a_checkpoint_has_masks_and_heads(
    loader: Loader, make_trainer: MakeTrainer, probe: Tensor, tmp_path: Path
) -> None:
    module = Module()
    for task in (1, 2):
        trainer = make_trainer()
        fit(module, task, loader, trainer)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    fresh = Module.load_from_checkpoint(tmp_path / "end.ckpt", map_location="cpu")
    assert all(torch.equal(logits(fresh, task, probe), logits(module, task, probe)) for task in (1, 2))


def test_a_fit_resumed_in_mid_task_ends_as_an_undisturbed_one(
    loader: Loader, make_trainer: MakeTrainer, probe: Tensor, tmp_path: Path
) -> None:
    module = Module()
    fit(module, 1, loader, make_trainer())
    keep = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    fit(module, 2, loader, make_trainer(4, callbacks=[keep], enable_checkpointing=True))

    fresh = Module()
    fit(fresh, 2, loader, make_trainer(4), ckpt_path=tmp_path / "epoch=1.ckpt")
    assert fresh.wsn.tasks == [1, 2]
    for name, tensor in module.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], tensor), name


def test_a_checkpoint_with_no_epoch_left_ends_its_task(
    loader: Loader, make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    keep = ModelCheckpoint(tmp_path, "{epoch}")
    fit(Module(), 1, loader, make_trainer(2, callbacks=[keep], enable_checkpointing=True))
    fresh = Module()
    with pytest.warns(RuntimeWarning, match=r"task 1: .* was not checked \(the WSN was not called\)"):
        fit(fresh, 1, loader, make_trainer(2), ckpt_path=tmp_path / "epoch=1.ckpt")
    assert fresh.wsn.tasks == [1]


def test_a_checkpoint_of_another_task_is_refused(loader: Loader, make_trainer: MakeTrainer, tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path, "{epoch}")
    fit(Module(), 1, loader, make_trainer(1, callbacks=[keep], enable_checkpointing=True))
    with pytest.raises(RuntimeError, match="task 2 is to be trained, but the checkpoint has 1 in progress"):
        fit(Module(), 2, loader, make_trainer(2), ckpt_path=tmp_path / "epoch=0.ckpt")


def test_the_task_is_finished_in_the_last_checkpoint(
    loader: Loader, make_trainer: MakeTrainer, probe: Tensor, tmp_path: Path
) -> None:
    module = Module()
    for task in (1, 2):
        keep = ModelCheckpoint(tmp_path / str(task), save_last=True)
        fit(module, task, loader, make_trainer(callbacks=[keep], enable_checkpointing=True))
    fresh = Module.load_from_checkpoint(tmp_path / "2" / "last.ckpt", map_location="cpu")
    assert fresh.wsn.verify().tasks == [1, 2]
    assert all(torch.equal(logits(fresh, task, probe), logits(module, task, probe)) for task in (1, 2))


def test_a_fit_of_a_finished_task_trains_nothing(
    loader: Loader, make_trainer: MakeTrainer, probe: Tensor, tmp_path: Path
) -> None:
    module = Module()
    keep = ModelCheckpoint(tmp_path, save_last=True)
    fit(module, 1, loader, make_trainer(callbacks=[keep], enable_checkpointing=True))
    fresh = Module()
    fit(fresh, 1, loader, make_trainer(), ckpt_path=tmp_path / "last.ckpt")
    assert torch.equal(logits(fresh, 1, probe), logits(module, 1, probe))
    fit(fresh, 2, loader, make_trainer())
    assert fresh.wsn.tasks == [1, 2]
    with pytest.raises(
        RuntimeError, match=r"task 1 is to be trained, but .* None in progress and these finished: \[1\]"
    ):
        fit(Module(), 1, loader, make_trainer(3), ckpt_path=tmp_path / "last.ckpt")


@pytest.mark.parametrize("verify", [True, False])
def test_the_end_of_a_fit_verifies_finished_tasks(loader: Loader, make_trainer: MakeTrainer, verify: bool) -> None:
    class Writes(Module):
        def on_train_end(self) -> None:
            if self.wsn.tasks:  # neither the guard nor the end of a task looks at masks
                self.wsn.model[1].weight_masks[0] ^= 1

    module = Writes()
    make_trainer(callbacks=[WSNCallback(1, verify=verify)]).fit(module, loader(1))
    trainer = make_trainer(callbacks=[WSNCallback(2, verify=verify)])
    if verify:
        with pytest.raises(ForgottenError, match="task 1"):
            trainer.fit(module, loader(2))
    else:
        trainer.fit(module, loader(2))
    with pytest.raises(ForgottenError, match="task 1"):
        module.wsn.verify()


def test_a_fit_cut_short_leaves_the_task_in_progress(loader: Loader, make_trainer: MakeTrainer) -> None:
    class Breaks(Module):
        fails = True

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if self.fails and batch_idx == 2:
                raise ConnectionError("the data are gone")
            return super().training_step(batch, batch_idx)

    module = Breaks()
    with pytest.raises(ConnectionError):
        fit(module, 1, loader, make_trainer())
    assert module.wsn.current_task == 1
    module.fails = False
    fit(module, 1, loader, make_trainer())
    assert module.wsn.tasks == [1]


def test_weights_restored_in_on_train_end_decide_the_mask(loader: Loader, make_trainer: MakeTrainer) -> None:
    class Restores(Module):
        def on_train_start(self) -> None:
            self.first = self.wsn.trainable_state()

        def on_train_end(self) -> None:
            self.moved = self.wsn.model[1].masks_of_scores()["weight"]
            self.wsn.load_trainable_state(self.first)

    module = Restores()
    fit(module, 1, loader, make_trainer())
    scores_then = module.first["1.weight_score"]
    assert torch.equal(module.wsn.model[1].weight_score, scores_then)
    assert torch.equal(module.wsn.model[1].mask("weight", 0), module.wsn.model[1].masks_of_scores()["weight"])
    assert not torch.equal(module.wsn.model[1].mask("weight", 0), module.moved)


def test_the_trainer_tests_a_finished_task(loader: Loader, make_trainer: MakeTrainer) -> None:
    module = Module()
    for task in (1, 2):
        fit(module, task, loader, make_trainer())
    with module.wsn.use_task(1):
        (result,) = make_trainer().test(module, loader(1), verbose=False)
    x, y = loader(1).dataset.tensors
    assert result["loss"] == pytest.approx(F.cross_entropy(logits(module, 1, x), y).item())
    module.wsn.verify()


class Validated(Module):
    """Validation measures the averages: a callback exchanges them with the weights meanwhile."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("loss", F.cross_entropy(self.wsn(batch[0]), batch[1]))


AVERAGES: dict[str, Callable[[], Callback]] = {
    "EMA": lambda: EMAWeightAveraging(decay=0.6),
    "EMA of parameters only": lambda: EMAWeightAveraging(decay=0.6, use_buffers=False),
    "EMA that begins later": lambda: EMAWeightAveraging(decay=0.6, update_starting_at_step=3),
    "equal weights": WeightAveraging,
    "lists": lambda: WeightAveraging(multi_avg_fn=get_ema_multi_avg_fn(0.6)),
}


@pytest.mark.parametrize("name", AVERAGES)
def test_averages_of_weights_keep_finished_tasks(
    loader: Loader, make_trainer: MakeTrainer, probe: Tensor, name: str
) -> None:
    module, then = Validated(), {}
    for task in (1, 2, 3):
        trainer = make_trainer(callbacks=[AVERAGES[name]()])
        trainer.callbacks.insert(0, WSNCallback(task))
        trainer.fit(module.train(), loader(task), loader(task))
        then[task] = logits(module, task, probe)
    assert all(torch.equal(logits(module, task, probe), before) for task, before in then.items())
    module.wsn.verify()


def test_the_average_is_what_the_task_ends_with(loader: Loader, make_trainer: MakeTrainer) -> None:
    plain, averaged = Module(), Module()
    fit(plain, 1, loader, make_trainer())
    callback = EMAWeightAveraging(decay=0.9)
    fit(averaged, 1, loader, make_trainer(callbacks=[callback]))
    layer, mean = averaged.wsn.model[1], callback._average_model.module.wsn.model[1]
    assert not torch.equal(plain.wsn.model[1].weight, layer.weight)
    assert torch.equal(layer.weight, mean.weight)
    assert torch.equal(layer.mask("weight", 0), mean.masks_of_scores()["weight"])


def test_an_average_that_was_copied_before_the_task_began_is_refused(loader: Loader, make_trainer: MakeTrainer) -> None:
    module = Module()
    trainer = make_trainer(callbacks=[EMAWeightAveraging(), WSNCallback(1)])
    with pytest.raises(RuntimeError, match="put WSNCallback before EMAWeightAveraging in the list of callbacks"):
        trainer.fit(module, loader(1))


class TwoModels(LightningModule):
    """A WSN and a dense model, with an optimizer each, stepped by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.wsn, self.dense = Module().wsn, nn.Linear(20, 3)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer, model in zip(self.optimizers(), (self.wsn, self.dense), strict=True):
            optimizer.zero_grad()
            self.manual_backward(F.cross_entropy(model(batch[0].flatten(1)), batch[1]))
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.2) for model in (self.wsn, self.dense)]


def test_an_optimizer_of_another_model_is_left_alone(loader: Loader, make_trainer: MakeTrainer) -> None:
    module = TwoModels()
    for task in (1, 2):
        fit(module, task, loader, make_trainer())
    assert module.wsn.verify().tasks == [1, 2]


def test_a_module_with_two_models_must_say_which(loader: Loader, make_trainer: MakeTrainer) -> None:
    module = Module()
    module.other = Module().wsn
    with pytest.raises(ValueError, match=r"must contain one WSN, found 2"):
        fit(module, 1, loader, make_trainer())
    make_trainer(callbacks=[WSNCallback(1, wsn=module.wsn)]).fit(module, loader(1))
    assert (module.wsn.tasks, module.other.tasks) == ([1], [])


@pytest.mark.parametrize("arguments", [{"task": True}, {"task": 1, "wsn": nn.Linear(2, 2)}, {"task": 1, "verify": 1}])
def test_a_wrong_type_is_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match="must be"):
        WSNCallback(**arguments)
