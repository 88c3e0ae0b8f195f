"""The numbers of the paper, and which of them stand beside a run."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from wsn_fast.train.choices import FIVE_DATASETS
from wsn_fast.train.config import resolve

Key = tuple[str, str, int]
"""The stream, the data and the number of tasks of a column of the paper's table."""

# The columns of the paper's table, in its order.
PAPER_COLUMNS: Mapping[Key, str] = MappingProxyType(
    {
        ("permuted", "mnist", 10): "Permuted MNIST",
        ("datasets", FIVE_DATASETS, 5): "5-Datasets",
        ("split", "omniglot", 100): "Omniglot Rotation",
        ("split", "cifar100", 10): "CIFAR-100 Split",
        ("superclass", "cifar100", 20): "CIFAR-100 Superclass",
        ("split", "folder", 40): "TinyImageNet",
    }
)
# The paper, mean over seeds: column -> density -> (ACC, CAP), in percent. BWT is 0 everywhere.
PAPER_RESULTS: Mapping[Key, Mapping[float, tuple[float, float]]] = MappingProxyType(
    {
        ("permuted", "mnist", 10): MappingProxyType(
            {
                0.03: (94.84, 19.87),
                0.05: (95.65, 26.49),
                0.1: (96.14, 40.41),
                0.3: (96.41, 77.73),
                0.5: (96.24, 98.1),
            }
        ),
        ("datasets", FIVE_DATASETS, 5): MappingProxyType(
            {
                0.03: (90.57, 12.11),
                0.05: (91.61, 17.26),
                0.1: (92.67, 28.01),
                0.3: (93.22, 62.3),
                0.5: (93.41, 86.1),
            }
        ),
        ("split", "omniglot", 100): MappingProxyType(
            {
                0.03: (80.68, 75.87),
                0.05: (87.28, 79.85),
                0.1: (83.1, 83.08),
                0.3: (81.89, 102.2),
                0.5: (79.8, 121.2),
            }
        ),
        ("split", "cifar100", 10): MappingProxyType(
            {
                0.03: (70.65, 18.56),
                0.05: (72.44, 25.09),
                0.1: (74.55, 39.87),
                0.3: (75.98, 80.26),
                0.5: (76.38, 99.13),
            }
        ),
        ("superclass", "cifar100", 20): MappingProxyType(
            {
                0.03: (54.99, 22.3),
                0.05: (57.99, 27.37),
                0.1: (60.45, 38.55),
                0.3: (61.47, 63.47),
                0.5: (61.79, 80.93),
            }
        ),
        ("split", "folder", 40): MappingProxyType(
            {
                0.03: (68.72, 37.19),
                0.05: (71.22, 41.98),
                0.1: (71.96, 48.65),
                0.3: (70.92, 73.44),
                0.5: (69.06, 92.03),
            }
        ),
    }
)
PAPER_DENSITIES = (0.03, 0.05, 0.1, 0.3, 0.5)
# What the paper has where a default of ours is another: its batch norms keep no statistics, so that its predictions
# depend on the batch.
_NOT_OUR_DEFAULT: Mapping[tuple[str, str], Mapping[str, Any]] = MappingProxyType(
    {("datasets", FIVE_DATASETS): MappingProxyType({"net": "resnet18_stateless"})}
)
# The settings that make the paper's method. Numbers of a run with others cannot be compared with the paper.
_METHOD = ("rule", "reinit_scores", "score_init")
# The settings that a run may choose and still be compared with the paper.
_FREE = (
    "density",
    "seed",
    "device",
    "threads",
    "one_pass",
    "cuda_graph",
    "memory_format",
    "checkpoint_seconds",
    "preset",
)


def beside_paper(results: Mapping[str, Any]) -> tuple[float, float, str] | None:
    """The paper's (ACC, CAP) for the setting of a finished run, and in what the run differs from it; None if the paper
    has no numbers for the setting."""
    settings = results["config"]
    stream, data, tasks = settings["stream"], settings["data"], settings["tasks"]
    if len(results["accuracy_matrix"]) < tasks:  # the run is not finished
        return None
    row = PAPER_RESULTS.get((stream, data, tasks), {}).get(settings["density"])
    paper = resolve(stream=stream, data=data, **_NOT_OUR_DEFAULT.get((stream, data), {}))
    if row is None or any(settings[name] != getattr(paper, name) for name in _METHOD):
        return None
    other = [
        f"{name} {value} (paper: {getattr(paper, name)})"
        for name, value in settings.items()
        if name not in _FREE and value != getattr(paper, name)
    ]
    if data == "folder":
        other.insert(0, "if the folder is TinyImageNet")
    return *row, ", ".join(other)
