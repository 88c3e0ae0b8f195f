"""``WSNTrainer`` with optimizers of this library and of the user."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from ecosystem.trainers import Tokens, bert, gpt, logits, trainer

from wsn_fast import WSN
from wsn_fast.optim import SubnetAdamW, SubnetSGD

pytestmark = [pytest.mark.ecosystem, pytest.mark.filterwarnings("default", "error:::wsn_fast")]


@pytest.fixture
def float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def made_by(kind: type[Any], **settings: Any) -> dict[str, Any]:
    return {"optimizer_cls_and_kwargs": (kind, {"lr": 0.01, "weight_decay": 0.1} | settings)}


def trained(make: Any, folder: Path, more: dict[str, Any], **options: Any) -> tuple[WSN, list[float]]:
    """A WSN after a task, and the norms of gradients that were logged."""
    wsn = make()
    one = trainer(wsn, 1, folder, more=more, logging_steps=1, **options)
    one.train()
    return wsn, [log["grad_norm"] for log in one.state.log_history if "grad_norm" in log]


@pytest.mark.parametrize("make", [bert, gpt])
@pytest.mark.parametrize("kind", [SubnetAdamW, SubnetSGD])
@pytest.mark.parametrize("options", [{}, {"bf16": True, "gradient_accumulation_steps": 2}], ids=["defaults", "bf16"])
def test_a_one_pass_optimizer_keeps_finished_tasks(make: Any, kind: Any, options: Any, tmp_path: Path) -> None:
    wsn, then = make(), {}
    for task in (1, 2):
        trainer(wsn, task, tmp_path, more=made_by(kind, one_pass=True), **options).train()
        then[task] = logits(wsn, task)
    assert torch.equal(logits(wsn, 1), then[1])
    assert not torch.equal(then[1], then[2])


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("max_grad_norm", [0.05, 0.0])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_one_pass_clips_as_the_standard_mode_does(max_grad_norm: float, accumulate: int, tmp_path: Path) -> None:
    options = {"max_grad_norm": max_grad_norm, "gradient_accumulation_steps": accumulate}
    one, norms = trained(bert, tmp_path / "a", made_by(SubnetSGD, one_pass=True), **options)
    other, others = trained(bert, tmp_path / "b", made_by(SubnetSGD), **options)
    assert norms == pytest.approx(others, rel=1e-9)
    for name, tensor in one.state_dict().items():
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor, other.state_dict()[name], rtol=1e-9, atol=1e-12)


@pytest.mark.usefixtures("float64")
def test_clipping_in_one_pass_changes_the_steps(tmp_path: Path) -> None:
    more = made_by(SubnetSGD, one_pass=True)
    clipped, _ = trained(bert, tmp_path / "a", more, max_grad_norm=0.05)
    free, _ = trained(bert, tmp_path / "b", more, max_grad_norm=0.0)
    assert (logits(clipped, 1) - logits(free, 1)).abs().max() > 1e-4


@pytest.mark.parametrize("one_pass", [True, False])
def test_an_optimizer_of_the_user_keeps_finished_tasks(one_pass: bool, tmp_path: Path) -> None:
    wsn, then = bert(), {}
    for task in (1, 2):
        wsn.begin_task(task)
        optimizer = SubnetAdamW(wsn, 0.01, weight_decay=0.1, one_pass=one_pass)
        trainer(wsn, task, tmp_path, more={"optimizers": (optimizer, None)}).train()
        then[task] = logits(wsn, task)
    assert torch.equal(logits(wsn, 1), then[1])
    assert not torch.equal(then[1], then[2])


def test_an_optimizer_from_before_the_task_is_refused(tmp_path: Path) -> None:
    wsn = bert()
    optimizer = torch.optim.AdamW(wsn.parameters())
    with pytest.raises(RuntimeError, match="build optimizers after begin_task"):
        trainer(wsn, 1, tmp_path, more={"optimizers": (optimizer, None)}).train()
    assert wsn.current_task == 1


def test_the_lines_of_the_page_train(tmp_path: Path) -> None:
    """The second block of docs/how-to/trainer.md, with the names of the first."""
    page = (Path(__file__).parents[2] / "docs" / "how-to" / "trainer.md").read_text("utf-8")
    block = page.split("```python\n")[2].split("```")[0]
    from ecosystem.trainers import arguments

    from wsn_fast.integrations.transformers import WSNTrainer

    names: dict[str, Any] = {"wsn": bert(), "args": arguments(tmp_path), "Sentences": Tokens, "WSNTrainer": WSNTrainer}
    exec(block, names)
    names["trainer"].train()
    assert names["wsn"].tasks == [3]
