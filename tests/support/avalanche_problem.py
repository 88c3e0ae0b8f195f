"""Small benchmarks and strategies of Avalanche, and a WSN for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import quiet_avalanche  # noqa: F401 - first of all
import torch
from avalanche.benchmarks import benchmark_from_datasets, task_incremental_benchmark
from avalanche.benchmarks.utils import as_classification_dataset
from avalanche.evaluation.metrics import accuracy_metrics
from avalanche.training import Naive
from avalanche.training.plugins import EvaluationPlugin
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from wsn_fast import WSN, convert
from wsn_fast.integrations.avalanche import WSNPlugin
from wsn_fast.optim import SubnetAdamW

INPUTS, CLASSES, TASKS = 20, 3, 3
Optimizers = dict[str, Callable[[WSN], torch.optim.Optimizer]]
OPTIMIZERS: Optimizers = {
    "AdamW": lambda wsn: torch.optim.AdamW(wsn.parameters(), 0.02, weight_decay=0.2),
    "SGD": lambda wsn: torch.optim.SGD(wsn.parameters(), 0.1, momentum=0.9, weight_decay=0.1),
    "one pass": lambda wsn: SubnetAdamW(wsn, 0.02, one_pass=True),
    "one pass, two groups": lambda wsn: SubnetAdamW(wsn, 0.02, weight_decay=0.2, one_pass=True),
}


def tensors(task: int, rows: int = 64, seed: int = 0, classes: int = CLASSES) -> TensorDataset:
    """Inputs [rows, 20] of a task, and their classes [rows]."""
    x = torch.randn(rows, INPUTS, generator=torch.Generator().manual_seed(10 * task + seed))
    dataset = TensorDataset(x, x[:, task : task + classes].argmax(1))
    dataset.targets = dataset.tensors[1]
    return dataset


def plain(tasks: int = TASKS) -> Any:
    """A benchmark without task labels."""
    streams = {"train": 0, "test": 5}
    made = {name: [as_classification_dataset(tensors(t, seed=s)) for t in range(tasks)] for name, s in streams.items()}
    return benchmark_from_datasets(**made)


def labelled(tasks: int = TASKS) -> Any:
    """A benchmark whose experiences have the task labels 0, 1, 2."""
    return task_incremental_benchmark(plain(tasks))


def model() -> WSN:
    """Two layers and a norm, with a head of three outputs for each task."""
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(INPUTS, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, CLASSES))
    return WSN(convert(net, density=0.4, heads="3"))


def strategy_of(
    wsn: nn.Module, optimizer: str = "AdamW", plugins: Sequence[Any] = (), kind: Any = Naive, **options: Any
) -> Any:
    """A strategy that trains ``wsn``. Unless there is one among ``plugins``, it gets a ``WSNPlugin`` at their end."""
    settings = {"train_mb_size": 16, "train_epochs": 2, "eval_mb_size": 16} | options
    evaluator = EvaluationPlugin(accuracy_metrics(experience=True, stream=True), loggers=[])
    made = OPTIMIZERS[optimizer](wsn)
    plugins = list(plugins) if any(isinstance(one, WSNPlugin) for one in plugins) else [*plugins, WSNPlugin()]
    return kind(model=wsn, optimizer=made, plugins=plugins, evaluator=evaluator, **settings)


@torch.no_grad()
def logits(wsn: WSN, task: int) -> Tensor:
    """What a finished task computes of inputs that no task was trained on."""
    wsn.eval()
    with wsn.use_task(task):
        return wsn(tensors(0, 9, seed=7).tensors[0])


def kept(strategy: Any, experiences: Any, **options: Any) -> bool:
    """Train the experiences. Does every task compute at the end what it did when it had ended, to the bit?"""
    then = {}
    for experience in experiences:
        strategy.train(experience, **options)
        then[strategy.model.tasks[-1]] = logits(strategy.model, strategy.model.tasks[-1])
    assert len(then) == len(experiences)
    return all(torch.equal(logits(strategy.model, task), before) for task, before in then.items())
