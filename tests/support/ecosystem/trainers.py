"""Tiny models, data and trainers of transformers for the tests of ``WSNTrainer``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    TrainingArguments,
)

from wsn_fast import WSN, convert
from wsn_fast.integrations.transformers import WSNTrainer

VOCABULARY, CLASSES, LENGTH = 40, 3, 8


class Tokens(Dataset[dict[str, Any]]):
    """Random tokens of a task. ``lm``: they are their own labels. No model takes the column "text"."""

    def __init__(self, task: int, *, lm: bool = False, size: int = 32) -> None:
        generator = torch.Generator().manual_seed(100 + task)
        self.tokens = torch.randint(VOCABULARY, (size, LENGTH), generator=generator)
        self.labels = self.tokens if lm else self.tokens[:, 0] % CLASSES

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {"input_ids": self.tokens[i], "labels": self.labels[i], "text": "no model takes this"}


def dense_bert() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = BertConfig(vocab_size=VOCABULARY, max_position_embeddings=LENGTH, num_labels=CLASSES, **sizes)
    return BertForSequenceClassification(config)


def dense_gpt() -> nn.Module:
    """A GPT-2, whose decoder is tied to its embedding."""
    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 2 * LENGTH}
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=1, pad_token_id=0, **sizes))


def bert() -> WSN:
    return WSN(convert(dense_bert(), density=0.4, heads="classifier"))


def gpt() -> WSN:
    return WSN(convert(dense_gpt(), density=0.4))


def arguments(folder: Path, kind: type[TrainingArguments] = TrainingArguments, **options: Any) -> TrainingArguments:
    quiet = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "dataloader_pin_memory": False}
    return kind(str(folder), **({"num_train_epochs": 2, "learning_rate": 0.01} | quiet | options))


def trainer(wsn: WSN, task: int, folder: Path, *, more: dict[str, Any] | None = None, **options: Any) -> WSNTrainer:
    """A trainer of ``task``, with ``options`` for its ``TrainingArguments`` and ``more`` for itself."""
    lm = isinstance(wsn.model, GPT2LMHeadModel)
    data = {"train_dataset": Tokens(task, lm=lm), "eval_dataset": Tokens(task + 50, lm=lm, size=16)}
    return WSNTrainer(wsn, arguments(folder / f"task-{task}", **options), task=task, **(data | (more or {})))


@torch.no_grad()
def logits(wsn: WSN, task: int) -> Tensor:
    with wsn.use_task(task):
        return wsn.eval()(input_ids=Tokens(9).tokens).logits


def same(one: WSN, other: WSN) -> list[str]:
    """The names of the tensors that differ in two WSNs."""
    states = one.state_dict(), other.state_dict()
    assert states[0].keys() == states[1].keys()
    return [name for name, tensor in states[0].items() if not torch.equal(tensor, states[1][name])]
