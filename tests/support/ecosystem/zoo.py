"""The table of models: each by its package and name."""

from __future__ import annotations

from . import zoo_others, zoo_senses, zoo_text
from .builders import Model


def table() -> dict[str, Model]:
    """All models by package and name."""
    models = [*zoo_others.TORCH, *zoo_others.TORCHVISION, *zoo_others.TIMM, *zoo_text.MODELS, *zoo_senses.MODELS]
    found = {f"{model.package}:{model.kind}": model for model in models}
    if len(found) != len(models):
        raise ValueError("models: two lines of the table have the same name")
    return found
