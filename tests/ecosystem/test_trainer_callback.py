"""``WSNCallback`` with transformers' own Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")

from ecosystem.trainers import Tokens, arguments, bert, logits, same, trainer
from transformers import Trainer, TrainerCallback

from wsn_fast import WSN, ForgottenError, UnmaskedReadError, convert
from wsn_fast.integrations.transformers import WSNCallback
from wsn_fast.optim import SubnetAdamW

pytestmark = [pytest.mark.ecosystem, pytest.mark.filterwarnings("default", "error:::wsn_fast")]

NEEDED = {"label_names": ["labels"], "remove_unused_columns": False}


class Columns(Tokens):
    """Without the column that no model takes, since Trainer cannot leave it out."""

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {"input_ids": self.tokens[i], "labels": self.labels[i]}


def plain(wsn: WSN, task: int, folder: Path, *, callbacks: Any = None, more: Any = None, **options: Any) -> Trainer:
    """Trainer with the callback."""
    return Trainer(
        wsn,
        arguments(folder / f"plain-{task}", **(NEEDED | options)),
        train_dataset=Columns(task),
        eval_dataset=Columns(task + 50, size=16),
        callbacks=[WSNCallback(task)] if callbacks is None else callbacks,
        **(more or {}),
    )


@pytest.mark.parametrize(
    "options",
    [{}, {"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True}],
    ids=["defaults", "best"],
)
def test_it_trains_as_our_trainer_does(options: dict[str, Any], tmp_path: Path) -> None:
    with_callback, with_trainer = bert(), bert()
    for task in (1, 2):
        torch.manual_seed(task)
        plain(with_callback, task, tmp_path, **options).train()
        torch.manual_seed(task)
        trainer(with_trainer, task, tmp_path, **options).train()
    assert with_callback.tasks == [1, 2]
    assert same(with_callback, with_trainer) == []


def test_finished_tasks_stay_to_the_bit(tmp_path: Path) -> None:
    wsn = bert()
    plain(wsn, 1, tmp_path, weight_decay=0.2).train()
    before = logits(wsn, 1)
    plain(wsn, 2, tmp_path, weight_decay=0.2, optim="adafactor").train()
    assert torch.equal(logits(wsn, 1), before)


class Stops(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        if state.global_step == 6:
            raise ConnectionError("the data are gone")


def test_a_training_that_was_cut_short_is_resumed_to_the_bit(tmp_path: Path) -> None:
    undisturbed, resumed = bert(), bert()
    plain(undisturbed, 1, tmp_path / "undisturbed", save_steps=3).train()
    with pytest.raises(ConnectionError):
        plain(resumed, 1, tmp_path, callbacks=[WSNCallback(1), Stops()], save_steps=3).train()
    again = bert()
    plain(again, 1, tmp_path, save_steps=3).train(resume_from_checkpoint=True)
    assert again.tasks == [1] and same(again, undisturbed) == []


def test_a_checkpoint_of_another_task_is_refused(tmp_path: Path) -> None:
    plain(bert(), 1, tmp_path, save_steps=3).train()
    folder = next((tmp_path / "plain-1").glob("checkpoint-*"))
    with pytest.raises(RuntimeError, match="task 2 is to be trained, but 1 is in progress"):
        plain(bert(), 2, tmp_path).train(resume_from_checkpoint=str(folder))


def test_a_one_pass_optimizer_is_guarded_and_its_clipping_refused(tmp_path: Path) -> None:
    wsn = bert()
    plain(wsn, 1, tmp_path).train()
    before = logits(wsn, 1)
    wsn.begin_task(2)
    optimizer = SubnetAdamW(wsn, 0.01, one_pass=True)
    with pytest.raises(ValueError, match=r"max_grad_norm must be 0 with a one-pass optimizer, got 1\.0"):
        plain(wsn, 2, tmp_path, more={"optimizers": (optimizer, None)}).train()
    assert wsn.current_task == 2
    plain(wsn, 2, tmp_path, max_grad_norm=0.0, more={"optimizers": (optimizer, None)}).train()
    assert wsn.tasks == [1, 2] and torch.equal(logits(wsn, 1), before)


@pytest.mark.parametrize("options", [{"label_names": None}, {"remove_unused_columns": True}])
def test_what_trainer_cannot_see_has_to_be_said(options: dict[str, Any], tmp_path: Path) -> None:
    wsn = bert()
    with pytest.raises(ValueError, match=r"TrainingArguments need label_names .* and remove_unused_columns=False"):
        plain(wsn, 1, tmp_path, **options)
    assert wsn.current_task is None


def test_it_must_be_there_from_the_beginning(tmp_path: Path) -> None:
    late = plain(bert(), 1, tmp_path, callbacks=[])
    late.add_callback(WSNCallback(1))
    with pytest.raises(RuntimeError, match="WSNCallback must be there when the trainer is made"):
        late.train()


@pytest.mark.parametrize("verify", [True, False])
def test_the_end_verifies_finished_tasks(verify: bool, tmp_path: Path) -> None:
    wsn = bert()
    plain(wsn, 1, tmp_path).train()
    layer = next(iter(wsn.subnet_layers().values()))
    one = plain(wsn, 2, tmp_path, callbacks=[WSNCallback(2, verify=verify)])
    layer.weight_masks[0] ^= 1  # neither the guard nor the end of a task looks at masks
    if verify:
        with pytest.raises(ForgottenError, match="task 1"):
            one.train()
    else:
        one.train()
    assert wsn.tasks == [1, 2]


@pytest.mark.parametrize("arguments", [{"task": 1.5}, {"task": 1, "verify": 1}])
def test_a_wrong_type_is_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match="must be"):
        WSNCallback(**arguments)


class PastItsLayer(nn.Module):
    """It reads the weight of its table without the mask."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.out = nn.Embedding(40, 8), nn.Linear(8, 3)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **others: Any) -> Any:
        out = self.out(self.table(input_ids).mean(1)) + self.table._parameters["weight"].mean()
        return {"logits": out} if labels is None else {"loss": nn.functional.cross_entropy(out, labels), "logits": out}


def test_a_reader_past_its_layer_is_found(tmp_path: Path) -> None:
    wsn = WSN(convert(PastItsLayer(), density=0.4, heads="out"))
    with pytest.raises(UnmaskedReadError):
        plain(wsn, 1, tmp_path).train()
    assert wsn.current_task == 1


def test_each_trainer_has_its_own_precision(tmp_path: Path) -> None:
    wsn = bert()
    seen: set[torch.dtype] = set()
    for one in wsn.subnet_layers().values():
        one.register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
    plain(wsn, 1, tmp_path, bf16=True).train()
    assert torch.bfloat16 in seen
    seen.clear()
    plain(wsn, 2, tmp_path).train()
    assert seen == {torch.float32}


def test_what_rounds_finished_tasks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="bf16_full_eval=True rounds the weights of finished tasks"):
        plain(bert(), 1, tmp_path, bf16_full_eval=True)
