"""CLArena's own experiment pipeline, with our classes named in its config as its own are."""

from __future__ import annotations

import csv
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

if find_spec("clarena") is None:
    pytest.skip('needs CLArena: pip install "wsn-fast[clarena]"', allow_module_level=True)

from clarena.pipelines import CLMainExperiment
from omegaconf import OmegaConf

pytestmark = pytest.mark.filterwarnings("default", "error:::wsn_fast")


def config(algorithm: str, folder: Path) -> Any:
    ours = "wsn_fast.integrations.clarena"
    return OmegaConf.create(
        {
            "pipeline": "CL_MAIN_EXPR",
            "expr_name": "tiny",
            "cl_paradigm": "TIL",
            "train_tasks": 3,
            "eval_after_tasks": 3,
            "global_seed": 1,
            "cl_dataset": {"_target_": "clarena_problem.TinyDataset", "num_tasks": 3, "batch_size": 16},
            "cl_algorithm": {"_target_": algorithm, "mask_percentage": 0.37},
            "backbone": {
                "_target_": f"{ours}.FastSubnetMLP",
                "input_dim": 20,
                "hidden_dims": [32],
                "output_dim": 16,
                "activation_layer": {"_target_": "hydra.utils.get_class", "path": "torch.nn.Tanh"},
            },
            "optimizer": {"_target_": "torch.optim.AdamW", "_partial_": True, "lr": 0.02, "weight_decay": 0.2},
            "lr_scheduler": {"_target_": "torch.optim.lr_scheduler.StepLR", "_partial_": True, "step_size": 5},
            "trainer": {
                "_target_": "lightning.Trainer",
                "max_epochs": 5,
                "accelerator": "cpu",
                "enable_checkpointing": False,
                "enable_progress_bar": False,
                "enable_model_summary": False,
                "default_root_dir": str(folder),
            },
            "metrics": [{"_target_": "clarena.metrics.CLAccuracy", "save_dir": str(folder)}],
            "lightning_loggers": {"csv": {"_target_": "lightning.pytorch.loggers.CSVLogger", "save_dir": str(folder)}},
            "callbacks": [{"_target_": "clarena.callbacks.CLPylogger"}],
            "output_dir": str(folder),
            "misc": {"note": "required"},
        }
    )


def write_mnist(folder: Path) -> None:
    """Small idx files where torchvision looks for MNIST: the label is the number of bright rows."""
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for prefix, count in (("train", 400), ("t10k", 100)):
        labels = torch.arange(count) % 10
        images = 250 * (torch.arange(28)[None, :, None] < 2 * labels[:, None, None]).expand(-1, -1, 28).to(torch.uint8)
        for name, array in (("images-idx3", images), ("labels-idx1", labels.to(torch.uint8))):
            sizes = b"".join(n.to_bytes(4, "big") for n in array.shape)
            content = bytes([0, 0, 8, array.ndim]) + sizes + array.contiguous().numpy().tobytes()
            (raw / f"{prefix}-{name}-ubyte").write_bytes(content)


def test_the_config_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = Path(__file__).parents[2] / "docs" / "how-to" / "clarena.md"
    (text,) = re.findall(r"```yaml\n(.*?)```", page.read_text("utf-8"), re.DOTALL)
    settings = OmegaConf.create(text)
    del settings.hydra  # hydra takes it out
    settings.train_tasks = settings.eval_after_tasks = 2
    settings.trainer.accelerator = "cpu"
    write_mnist(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    experiment = CLMainExperiment(settings)
    experiment.run()
    first, second = csv.DictReader((tmp_path / "outputs/permuted_mnist/acc.csv").read_text().splitlines())
    assert first["test_on_task_1"] == second["test_on_task_1"] and float(first["test_on_task_1"]) > 0.5
    assert experiment.backbone.wsn.tasks == [1, 2]


@pytest.mark.parametrize("algorithm", ["clarena.cl_algorithms.WSN", "wsn_fast.integrations.clarena.FastWSN"])
def test_an_experiment_never_forgets(algorithm: str, tmp_path: Path) -> None:
    experiment = CLMainExperiment(config(algorithm, tmp_path))
    experiment.run()
    rows = list(csv.DictReader((tmp_path / "acc.csv").read_text().splitlines()))
    assert len(rows) == 3
    for task in (1, 2, 3):
        measured = {row[f"test_on_task_{task}"] for row in rows[task - 1 :]}
        assert len(measured) == 1, f"the accuracy on task {task} changed: {measured}"
        assert float(measured.pop()) > 0.5
    experiment.backbone.wsn.verify()
