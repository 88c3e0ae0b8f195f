"""A tiny stream of tasks for CLArena's algorithms and for its pipeline. Needs CLArena."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from clarena.cl_datasets import CLDataset
from lightning.pytorch import LightningDataModule
from torch.utils.data import TensorDataset

CLASSES = 3
Tasks = Callable[[int], Any]


class Stream(LightningDataModule):
    """The data of the last of ``tasks`` to train on, and of all of them to test on."""

    def __init__(self, loader: Tasks, tasks: list[int]) -> None:
        super().__init__()
        self.loader = loader
        self.dataset_test = {task: loader(task).dataset for task in tasks}

    def train_dataloader(self) -> Any:
        return self.loader([*self.dataset_test][-1])

    val_dataloader = train_dataloader

    def test_dataloader(self) -> Any:
        return [self.loader(task) for task in self.dataset_test]


def train_task(
    algorithm: Any, task: int, optimizer: Any, loader: Tasks, trainer: Any, lr_scheduler: Any = None, **options: Any
) -> None:
    """What CLArena's pipeline does with a task, up to its test."""
    algorithm.setup_task_id(task, CLASSES, optimizer, lr_scheduler)
    trainer.fit(algorithm, datamodule=Stream(loader, [task]), **options)


class TinyDataset(CLDataset):
    """For CLArena's pipeline, which makes it from its name: vectors [20] in three classes."""

    def __init__(self, num_tasks: int, batch_size: int) -> None:
        super().__init__(root="", num_tasks=num_tasks, batch_size=batch_size)

    def get_cl_class_map(self, task_id: int) -> dict[str | int, int]:
        return {label: label for label in range(CLASSES)}

    def prepare_data(self) -> None:
        """Nothing to download."""

    def _draw(self, part: int) -> TensorDataset:
        generator = torch.Generator().manual_seed(10 * self.task_id + part)
        x = torch.randn(64, 20, generator=generator)
        return TensorDataset(x, x[:, :CLASSES].argmax(1))

    def train_and_val_dataset(self) -> tuple[Any, Any]:
        return self._draw(0), self._draw(1)

    def test_dataset(self) -> Any:
        return self._draw(2)
