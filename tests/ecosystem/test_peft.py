"""Adapters of PEFT, put in before and after the conversion: they are right with an owner, or refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")
pytest.importorskip("peft")

from ecosystem.trainers import Tokens, bert, dense_bert, logits, trainer
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer

from wsn_fast import WSN, ForgottenError, OwnershipError, convert, to_dense

pytestmark = [pytest.mark.ecosystem, pytest.mark.filterwarnings("default", "error:::wsn_fast")]

ADAPTER = "encoder.layer.0.attention.self.query.lora_A.default.weight"
HEAD = "base_model.model.classifier"


def lora(**settings: Any) -> LoraConfig:
    return LoraConfig(r=2, target_modules=["query", "value"], init_lora_weights="gaussian", **settings)


def adapters_per_task(**settings: Any) -> WSN:
    model = inject_adapter_in_model(lora(**settings), convert(dense_bert(), density=0.4, heads="classifier"))
    model.requires_grad_(True)
    return WSN(model, per_task=["lora_A", "lora_B", *(["lora_magnitude_vector"] if settings else [])])


def gated_adapters() -> WSN:
    model = get_peft_model(dense_bert(), lora())
    model = convert(model, density=0.4, heads=HEAD, target_modules=["lora_A", "lora_B"])
    return WSN(model, rest="frozen", reinit_scores=True)


def all_gated() -> WSN:
    model = convert(get_peft_model(dense_bert(), lora()), density=0.4, heads=HEAD)
    return WSN(model, reinit_scores=True)


def wrapped_head() -> WSN:
    model = get_peft_model(dense_bert(), lora(task_type="SEQ_CLS"))
    return WSN(convert(model, density=0.4, heads=f"{HEAD}.modules_to_save.default"), reinit_scores=True)


MODELS = [adapters_per_task, gated_adapters, all_gated, wrapped_head]


def train(wsn: WSN, task: int) -> None:
    """Train a task with a large weight decay, which moves whatever is not protected."""
    wsn.begin_task(task)
    optimizer = wsn.guard(torch.optim.AdamW([p for p in wsn.parameters() if p.requires_grad], 0.02, weight_decay=0.2))
    data = Tokens(task)
    wsn.train()
    for _ in range(4):
        optimizer.zero_grad()
        wsn(input_ids=data.tokens, labels=data.labels).loss.backward()
        optimizer.step()
    wsn.end_task(probe={"input_ids": data.tokens})


def adapters(wsn: WSN) -> dict[str, torch.Tensor]:
    return {name: param.detach().clone() for name, param in wsn.named_parameters() if name.endswith("default.weight")}


@pytest.mark.parametrize("make", [*MODELS, lambda: adapters_per_task(use_dora=True)])
def test_finished_tasks_stay_to_the_bit_and_adapters_learn(make: Any) -> None:
    wsn, then = make(), {}
    for task in (1, 2):
        before = adapters(wsn)
        train(wsn, task)
        assert all(not torch.equal(adapters(wsn)[name], tensor) for name, tensor in before.items() if "lora" in name)
        then[task] = logits(wsn, task)
    assert torch.equal(logits(wsn, 1), then[1])
    assert not torch.equal(then[1], then[2])
    wsn.verify(probe={"input_ids": Tokens(9).tokens})


@pytest.mark.parametrize("make", MODELS)
def test_a_state_is_loaded(make: Any) -> None:
    wsn, fresh = make(), make()
    for task in (1, 2):
        train(wsn, task)
    fresh.load_state_dict(wsn.state_dict())
    assert all(torch.equal(logits(fresh, task), logits(wsn, task)) for task in (1, 2))


@pytest.mark.parametrize("make", [adapters_per_task, gated_adapters])
def test_the_trainer_trains_them(make: Any, tmp_path: Path) -> None:
    wsn, then = make(), {}
    for task in (1, 2):
        one = trainer(wsn, task, tmp_path)
        one.train()
        then[task] = logits(wsn, task)
    assert one.label_names == ["labels"]
    assert torch.equal(logits(wsn, 1), then[1])


def test_the_base_weights_stay_where_adapters_are_gated() -> None:
    wsn = gated_adapters()
    before = {name: param.clone() for name, param in wsn.named_parameters() if "base_layer" in name}
    train(wsn, 1)
    after = dict(wsn.named_parameters())
    assert before
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


# --- what is refused -------------------------------------------------------------------------------------------------
def inject(wsn: WSN) -> None:
    inject_adapter_in_model(lora(), wsn.model)


def wrap(wsn: WSN) -> None:
    get_peft_model(wsn, lora())


@pytest.mark.parametrize("finished", [0, 1])
@pytest.mark.parametrize("add", [inject, wrap])
def test_adapters_that_come_into_a_wsn_are_named_before_the_next_task(add: Any, finished: int) -> None:
    wsn = bert()
    for task in range(finished):
        train(wsn, task)
    add(wsn)
    with pytest.raises(OwnershipError, match=ADAPTER) as caught:
        wsn.begin_task(5)
    assert "per_task" in str(caught.value)
    assert wsn.current_task is None


def test_adapters_that_come_in_the_middle_of_a_task_are_named_at_its_end() -> None:
    wsn = bert()
    wsn.begin_task(1)
    inject(wsn)
    with pytest.raises(OwnershipError, match=ADAPTER):
        wsn.end_task()
    assert wsn.current_task == 1


def test_a_wsn_with_finished_tasks_cannot_be_made_anew_with_adapters() -> None:
    wsn = bert()
    train(wsn, 1)
    inject(wsn)
    with pytest.raises(ValueError, match="1 tasks have ended already"):
        WSN(wsn.model, per_task=["lora_A", "lora_B"])


def test_a_merge_of_adapters_is_found() -> None:
    wsn = adapters_per_task()
    train(wsn, 1)
    for module in wsn.modules():
        if isinstance(module, BaseTunerLayer):
            module.merge()
    with pytest.raises(ForgottenError, match=r"query\.base_layer\.weight"):
        wsn.verify()


def test_a_dense_copy_of_a_task_can_be_merged() -> None:
    wsn = adapters_per_task()
    train(wsn, 1)
    dense: nn.Module = to_dense(wsn, 1).eval()
    with torch.no_grad():
        for module in dense.modules():
            if isinstance(module, BaseTunerLayer):
                module.merge()
        merged = dense(input_ids=Tokens(9).tokens).logits
    torch.testing.assert_close(merged, logits(wsn, 1), atol=1e-4, rtol=1e-4)


def test_the_lines_of_the_page_make_a_wsn() -> None:
    """The last two blocks of docs/how-to/trainer.md, with the names of the first."""
    page = (Path(__file__).parents[2] / "docs" / "how-to" / "trainer.md").read_text("utf-8")
    for block in [part.split("```")[0] for part in page.split("```python\n")[-2:]]:
        names: dict[str, Any] = {"convert": convert, "WSN": WSN, "config": None}
        names["BertForSequenceClassification"] = lambda config: dense_bert()
        exec(block, names)
        wsn = names["wsn"]
        train(wsn, 1)
        assert wsn.tasks == [1]
