"""``WSNTrainer`` with the real Trainer: what it trains, and how it ends a task."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")

from ecosystem.trainers import Tokens, arguments, bert, dense_gpt, gpt, logits, same, trainer
from safetensors.torch import load_file
from transformers import (
    EarlyStoppingCallback,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainerCallback,
)

from wsn_fast import WSN, ForgottenError, UnmaskedReadError, convert, to_dense
from wsn_fast.integrations.transformers import WSNCallback, WSNTrainer

pytestmark = [pytest.mark.ecosystem, pytest.mark.filterwarnings("default", "error:::wsn_fast")]

EPOCHS = {"eval_strategy": "epoch", "save_strategy": "epoch"}


@pytest.mark.parametrize("make", [bert, gpt])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weight_decay": 0.2, "optim": "sgd", "optim_args": "momentum=0.9"},
        {"weight_decay": 0.2, "optim": "adafactor"},
        {"bf16": True},
        {"gradient_accumulation_steps": 3},
        {"gradient_checkpointing": True},
        {"label_smoothing_factor": 0.1},
        {"neftune_noise_alpha": 5.0},
        EPOCHS | {"load_best_model_at_end": True, "save_total_limit": 1},
    ],
    ids=["defaults", "sgd", "adafactor", "bf16", "accumulate", "checkpointing", "smoothing", "neftune", "best"],
)
def test_finished_tasks_stay_to_the_bit(make: Any, options: dict[str, Any], tmp_path: Path) -> None:
    wsn, then = make(), {}
    for task in (1, 2):
        trainer(wsn, task, tmp_path, **options).train()
        then[task] = logits(wsn, task)
    assert wsn.tasks == [1, 2]
    assert torch.equal(logits(wsn, 1), then[1])
    assert not torch.equal(then[1], then[2])


def test_a_task_learns(tmp_path: Path) -> None:
    wsn = bert()
    one = trainer(wsn, 1, tmp_path, num_train_epochs=8)
    one.train()
    with wsn.use_task(1):
        assert one.evaluate(Tokens(1))["eval_loss"] < 0.9


# --- what Trainer finds out about a model ----------------------------------------------------------------------------
class Plain(nn.Module):
    """A model of the user's own: its forward method takes no other arguments than its own."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.out = nn.Embedding(40, 8), nn.Linear(8, 3)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Any:
        out = self.out(self.table(input_ids).mean(1))
        return {"logits": out} if labels is None else {"loss": nn.functional.cross_entropy(out, labels), "logits": out}


def plain() -> WSN:
    torch.manual_seed(0)
    return WSN(convert(Plain(), density=0.4, heads="out"))


@pytest.mark.parametrize("make", [bert, gpt, plain])
@pytest.mark.parametrize(
    "found",
    ["label_names", "can_return_loss", "model_accepts_loss_kwargs", "_loss_shifts_labels", "_signature_columns"],
)
def test_it_finds_what_trainer_finds_of_the_model(make: Any, found: str, tmp_path: Path) -> None:
    ours = trainer(make(), 1, tmp_path)
    theirs = Trainer(ours.wsn.model, ours.args, train_dataset=ours.train_dataset)
    theirs._set_signature_columns_if_needed()
    values = getattr(ours, found), getattr(theirs, found)
    assert values[0] == values[1] if found != "_signature_columns" else {*values[0]} == {*values[1]}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_accumulation_steps": 2},
        {"label_smoothing_factor": 0.2},
        {"gradient_accumulation_steps": 2, "bf16": True},
    ],
    ids=["defaults", "accumulate", "smoothing", "bf16"],
)
def test_at_density_1_it_trains_as_trainer_trains_the_dense_model(options: dict[str, Any], tmp_path: Path) -> None:
    """Without clipping, because scores have gradients too, and without ties, which change nothing here."""
    wsn = WSN(convert(dense_gpt(), density=1.0))
    ours = trainer(wsn, 1, tmp_path, max_grad_norm=0.0, **options)
    ours.train()
    dense = dense_gpt()
    Trainer(dense, ours.args, train_dataset=Tokens(1, lm=True)).train()
    trained = dict(wsn.model.named_parameters())
    for name, param in dense.named_parameters():
        torch.testing.assert_close(trained[name], param, atol=1e-4, rtol=1e-3, msg=lambda m, name=name: f"{name}: {m}")


def test_an_own_model_without_keyword_arguments_trains(tmp_path: Path) -> None:
    one = trainer(plain(), 1, tmp_path, gradient_accumulation_steps=2)
    one.train()
    assert "eval_loss" in one.evaluate()


def test_evaluation_during_training_is_of_the_task_in_progress(tmp_path: Path) -> None:
    wsn = bert()
    trainer(wsn, 1, tmp_path).train()
    seen: list[tuple[Any, bool]] = []

    class Look(TrainerCallback):
        def on_evaluate(self, *_: Any, metrics: dict[str, float], **__: Any) -> None:
            seen.append((wsn._view.head, "eval_loss" in metrics))

    trainer(wsn, 2, tmp_path, more={"callbacks": [Look()]}, eval_strategy="epoch").train()
    assert seen == [(2, True)] * 2


def test_predictions_of_a_finished_task_are_its_logits(tmp_path: Path) -> None:
    wsn = bert()
    for task in (1, 2):
        one = trainer(wsn, task, tmp_path, per_device_eval_batch_size=32)
        one.train()
    with wsn.use_task(1):
        predicted = one.predict(Tokens(9)).predictions
    assert torch.equal(torch.from_numpy(predicted), logits(wsn, 1))


def test_a_finished_task_generates(tmp_path: Path) -> None:
    wsn = gpt()
    for task in (1, 2):
        trainer(wsn, task, tmp_path).train()
    prompt = Tokens(9, lm=True).tokens[:4, :3]
    with wsn.use_task(1):
        tokens = wsn.eval().generate(prompt, max_new_tokens=5, do_sample=False)
    assert torch.equal(tokens, to_dense(wsn, 1).eval().generate(prompt, max_new_tokens=5, do_sample=False))


def test_a_subclass_of_trainer_serves_too(tmp_path: Path) -> None:
    class Mine(WSNTrainer, Seq2SeqTrainer):
        """Predicts with ``generate``."""

    wsn, predicted = gpt(), []
    for task in (1, 2):
        args = arguments(tmp_path, Seq2SeqTrainingArguments, predict_with_generate=True, generation_max_length=12)
        one = Mine(wsn, args, task=task, train_dataset=Tokens(task, lm=True))
        one.train()
        with wsn.use_task(1):
            predicted.append(one.predict(Tokens(9, lm=True)).predictions)
    assert (predicted[0] == predicted[1]).all()


def test_the_precision_is_that_of_each_trainer(tmp_path: Path) -> None:
    """accelerate does not prepare a model a second time."""
    wsn, seen = bert(), []
    wsn.model.classifier.register_forward_pre_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    for task, bf16 in ((1, True), (2, False), (3, True)):
        seen.clear()
        trainer(wsn, task, tmp_path, bf16=bf16, max_steps=2).train()
        assert set(seen) == {bf16}


# --- the end of a task -----------------------------------------------------------------------------------------------
def test_the_mask_is_that_of_the_best_state(tmp_path: Path) -> None:
    values = iter((3.0, 9.0, 2.0, 1.0))
    wsn = bert()
    one = trainer(
        wsn,
        1,
        tmp_path,
        more={"compute_metrics": lambda _: {"quality": next(values)}},
        **EPOCHS,
        num_train_epochs=4,
        load_best_model_at_end=True,
        metric_for_best_model="quality",
        greater_is_better=True,
    )
    one.train()
    best = bert()
    best.load_state_dict(load_file(tmp_path / "task-1" / "checkpoint-8" / "model.safetensors"))
    best.end_task()
    assert same(wsn, best) == []


def test_early_stopping_ends_the_task(tmp_path: Path) -> None:
    values = iter((3.0, 2.0, 1.0, 0.0))
    more = {"compute_metrics": lambda _: {"quality": next(values)}, "callbacks": [EarlyStoppingCallback(1)]}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "quality", "greater_is_better": True}
    wsn = bert()
    one = trainer(wsn, 1, tmp_path, more=more, **EPOCHS, **best, num_train_epochs=4)
    one.train()
    assert (one.state.epoch, wsn.tasks) == (2, [1])


def test_the_task_ends_after_all_callbacks(tmp_path: Path) -> None:
    wsn, seen = bert(), []

    class Look(TrainerCallback):
        def on_train_end(self, *_: Any, **__: Any) -> None:
            seen.append(wsn.current_task)

    one = trainer(wsn, 1, tmp_path, max_steps=1)
    one.add_callback(Look())
    one.train()
    assert (seen, wsn.tasks) == ([1], [1])


@pytest.mark.parametrize("event", ["on_train_begin", "on_step_end"])
def test_after_an_error_the_task_goes_on(event: str, tmp_path: Path) -> None:
    wsn = bert()

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    fail = TrainerCallback()
    setattr(fail, event, interrupt)
    with pytest.raises(KeyboardInterrupt):
        trainer(wsn, 1, tmp_path, more={"callbacks": [fail]}).train()
    assert wsn.current_task == 1
    assert not wsn._forward_pre_hooks
    trainer(wsn, 1, tmp_path).train()
    assert wsn.tasks == [1]


def test_a_batch_size_that_is_too_large_begins_the_task_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wsn = bert()
    trainer(wsn, 1, tmp_path).train()
    before = logits(wsn, 1)
    one = trainer(wsn, 2, tmp_path, auto_find_batch_size=True)
    step, sizes = one.training_step, []

    def training_step(model: nn.Module, inputs: dict[str, Tensor], *rest: Any) -> Tensor:
        sizes.append(len(inputs["labels"]))
        if len(sizes) == 3:
            raise RuntimeError("CUDA out of memory.")
        return step(model, inputs, *rest)

    monkeypatch.setattr(one, "training_step", training_step)
    one.train()
    assert sizes[:3] == [8] * 3
    assert sizes[3] < 8
    assert wsn.tasks == [1, 2]
    assert torch.equal(logits(wsn, 1), before)


class PastItsLayer(Plain):
    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Any:
        out = super().forward(input_ids, labels)
        return out | {"logits": out["logits"] + self.table._parameters["weight"].mean()}


def test_a_reader_past_its_layer_is_found(tmp_path: Path) -> None:
    wsn = WSN(convert(PastItsLayer(), density=0.4, heads="out"))
    with pytest.raises(UnmaskedReadError, match="table"):
        trainer(wsn, 1, tmp_path, max_steps=1).train()
    assert wsn.current_task == 1


@pytest.mark.parametrize("verify", [True, False])
def test_finished_tasks_are_verified_if_asked(verify: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wsn, calls = bert(), []
    monkeypatch.setattr(wsn, "verify", lambda: calls.append(wsn.tasks))
    trainer(wsn, 1, tmp_path, more={"verify": verify}, max_steps=1).train()
    assert calls == ([[1]] if verify else [])


def test_a_callback_that_changes_a_finished_task_is_found(tmp_path: Path) -> None:
    wsn = bert()
    trainer(wsn, 1, tmp_path, max_steps=1).train()

    class Change(TrainerCallback):
        def on_train_end(self, *_: Any, **__: Any) -> None:
            with torch.no_grad():
                next(gate for _, gate in wsn.gated()).param.add_(1)

    with pytest.raises(ForgottenError):
        trainer(wsn, 2, tmp_path, more={"callbacks": [Change()]}, max_steps=1).train()


# --- what is refused -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["fp16_full_eval", "bf16_full_eval", "fsdp", "deepspeed"])
def test_a_setting_that_is_wrong_for_a_wsn_is_named(name: str, tmp_path: Path) -> None:
    one = trainer(bert(), 1, tmp_path)
    setattr(one.args, name, True)
    with pytest.raises(ValueError, match=name):
        WSNTrainer(one.wsn, one.args, task=1) if name.endswith("eval") else _checked(one.args)


def _checked(args: Any) -> None:
    from wsn_fast.integrations.transformers import _check_settings

    _check_settings(args)


def test_data_parallel_is_refused(tmp_path: Path) -> None:
    one = trainer(bert(), 1, tmp_path)
    one.args._n_gpu = 2
    with pytest.raises(ValueError, match=r"DataParallel on 2 GPUs.*torchrun"):
        WSNTrainer(one.wsn, one.args, task=1)


@pytest.mark.parametrize("makes", ["trainer", "callback"])
def test_processes_that_would_train_alone_are_refused(
    makes: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = trainer(bert(), 1, tmp_path)
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match=r"3 processes were started.*use_cpu=True"):
        WSNTrainer(one.wsn, one.args, task=1) if makes == "trainer" else _begin_with_callback(one)


def _begin_with_callback(one: WSNTrainer) -> None:
    WSNCallback(1).on_init_end(one.args, one.state, one.control, model=one.wsn)


def test_model_init_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="model_init"):
        trainer(bert(), 1, tmp_path, more={"model_init": bert})


@pytest.mark.parametrize("wrong", [{"model": nn.Linear(2, 2)}, {"task": 1.5}, {"verify": 1}])
def test_wrong_arguments_are_refused(wrong: dict[str, Any], tmp_path: Path) -> None:
    right = {"model": bert(), "task": 1}
    with pytest.raises(TypeError, match=next(iter(wrong))):
        WSNTrainer(**(right | wrong))


def test_a_task_that_has_ended_is_refused(tmp_path: Path) -> None:
    one = trainer(bert(), 1, tmp_path, max_steps=1)
    one.train()
    with pytest.raises(ValueError, match="1"):
        one.train()
