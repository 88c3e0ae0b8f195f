"""Checkpoints of ``WSNTrainer``: what resumes, to the bit, and what is refused before anything is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from ecosystem.trainers import bert, gpt, logits, same, trainer
from safetensors.torch import load_file
from transformers import Trainer

from wsn_fast import WSN
from wsn_fast.optim import SubnetAdamW

pytestmark = [pytest.mark.ecosystem, pytest.mark.filterwarnings("default", "error:::wsn_fast")]

ONE_PASS = {"optimizer_cls_and_kwargs": (SubnetAdamW, {"lr": 0.01, "one_pass": True})}
STEPS = {"save_strategy": "steps", "save_steps": 3}


@pytest.mark.parametrize("make", [bert, gpt])
@pytest.mark.parametrize("task", [1, 2])
@pytest.mark.parametrize("more", [{}, ONE_PASS], ids=["adamw", "one-pass"])
def test_a_task_that_is_resumed_ends_as_one_that_was_not_interrupted(
    make: Any, task: int, more: dict[str, Any], tmp_path: Path
) -> None:
    wsn = make()
    for earlier in range(1, task):
        trainer(wsn, earlier, tmp_path, more=more).train()
    trainer(wsn, task, tmp_path, more=more, **STEPS, weight_decay=0.1).train()
    fresh = make()
    trainer(fresh, task, tmp_path, more=more, **STEPS, weight_decay=0.1).train(
        str(tmp_path / f"task-{task}/checkpoint-3")
    )
    assert same(wsn, fresh) == []
    assert torch.equal(logits(fresh, 1), logits(wsn, 1))


def test_true_takes_the_last_complete_checkpoint(tmp_path: Path) -> None:
    wsn = bert()
    trainer(wsn, 1, tmp_path, **STEPS).train()
    folder = tmp_path / "task-1"
    (folder / "checkpoint-8" / "trainer_state.json").unlink()  # as after a kill while it is written
    fresh = bert()
    one = trainer(fresh, 1, tmp_path, **STEPS)
    one.train(resume_from_checkpoint=True)
    assert one._initial_global_step == 6
    assert same(wsn, fresh) == []


def test_the_wsn_itself_may_go_on(tmp_path: Path) -> None:
    """The WSN that knows task 1 resumes task 2, which it has not begun."""
    wsn, state = bert(), {}
    for task in (1, 2):
        trainer(wsn, task, tmp_path, **STEPS).train()
        state[task] = wsn.state_dict() | {}
    again = bert()
    trainer(again, 1, tmp_path, **STEPS).train()
    trainer(again, 2, tmp_path, **STEPS).train(str(tmp_path / "task-2" / "checkpoint-6"))
    assert same(wsn, again) == []


def test_without_a_checkpoint_nothing_begins(tmp_path: Path) -> None:
    wsn = bert()
    with pytest.raises(ValueError, match="no complete checkpoint in"):
        trainer(wsn, 1, tmp_path).train(resume_from_checkpoint=True)
    assert (wsn.current_task, list(wsn.heads)) == (None, [])


def test_a_checkpoint_of_another_task_is_refused(tmp_path: Path) -> None:
    trainer(bert(), 1, tmp_path, **STEPS).train()
    wsn = bert()
    before = {name: tensor.clone() for name, tensor in wsn.state_dict().items()}
    with pytest.raises(ValueError, match=r"task 2 is to be trained, but .*checkpoint-3 has 1 in progress"):
        trainer(wsn, 2, tmp_path).train(str(tmp_path / "task-1" / "checkpoint-3"))
    assert all(torch.equal(tensor, before[name]) for name, tensor in wsn.state_dict().items())
    assert wsn.current_task is None


def test_a_checkpoint_that_lacks_a_finished_task_is_refused(tmp_path: Path) -> None:
    wsn = bert()
    trainer(bert(), 2, tmp_path, **STEPS).train()
    trainer(wsn, 1, tmp_path, max_steps=1).train()
    with pytest.raises(ValueError, match=r"has the finished tasks \[\], and this WSN has \[1\]"):
        trainer(wsn, 2, tmp_path).train(str(tmp_path / "task-2" / "checkpoint-3"))
    assert (wsn.tasks, wsn.current_task) == ([1], None)


def test_a_checkpoint_of_no_wsn_is_refused(tmp_path: Path) -> None:
    one = trainer(bert(), 1, tmp_path)
    from ecosystem.trainers import dense_bert

    Trainer(dense_bert(), one.args).save_model(str(tmp_path / "dense"))
    with pytest.raises(ValueError, match="not the state of a WSN"):
        one.train(str(tmp_path / "dense"))
    assert one.wsn.current_task is None


def test_old_checkpoints_go(tmp_path: Path) -> None:
    trainer(bert(), 1, tmp_path, save_steps=2, save_total_limit=2).train()
    assert sorted(path.name for path in (tmp_path / "task-1").iterdir()) == ["checkpoint-6", "checkpoint-8"]


@pytest.mark.parametrize("make", [bert, gpt])
@pytest.mark.parametrize("tasks", [1, 2])
def test_save_model_saves_the_whole_state(make: Any, tasks: int, tmp_path: Path) -> None:
    wsn: WSN = make()
    for task in range(1, tasks + 1):
        one = trainer(wsn, task, tmp_path, max_steps=2)
        one.train()
    one.save_model(str(tmp_path / "end"))
    fresh = make()
    fresh.load_state_dict(load_file(tmp_path / "end" / "model.safetensors"))
    assert same(wsn, fresh) == []
    assert fresh.verify().tasks == wsn.tasks
