"""Tiny tasks and a quiet trainer for the frameworks' tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision_beside_cpu_torch  # noqa: F401 - first of all
from torch.utils.data import DataLoader, TensorDataset

INPUTS, CLASSES = 20, 3


@pytest.fixture
def loader() -> Callable[[int], DataLoader[Any]]:
    """Task number to batches [16, 4, 5] with labels: the same at every call, and always in the same order."""

    def make(task: int) -> DataLoader[Any]:
        generator = torch.Generator().manual_seed(100 + task)
        x = torch.randn(64, 4, INPUTS // 4, generator=generator, dtype=torch.float32).to(torch.get_default_dtype())
        y = torch.randint(CLASSES, (64,), generator=generator)
        return DataLoader(TensorDataset(x, y), 16)

    return make


@pytest.fixture
def make_trainer(tmp_path: Any) -> Callable[..., Any]:
    """``Trainer`` for the CPU that prints, logs and saves nothing unless told to."""
    from lightning.pytorch import Trainer

    def make(epochs: int = 2, **options: Any) -> Any:
        quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
        settings = dict.fromkeys(quiet, False) | {"accelerator": "cpu", "default_root_dir": tmp_path}
        return Trainer(max_epochs=epochs, **(settings | options))

    return make


@pytest.fixture
def probe() -> torch.Tensor:
    """Inputs that no task was trained on."""
    generator = torch.Generator().manual_seed(7)
    return torch.randn(9, 4, INPUTS // 4, generator=generator, dtype=torch.float32).to(torch.get_default_dtype())
