"""What the presets have in common: which parameters a task trains."""

from __future__ import annotations

from torch import nn

from ..nn import per_task
from ..nn.gated import SubnetLayer
from ..nn.heads import TaskHeads


def is_bias(name: str) -> bool:
    """Whether a gated tensor of this name is a bias. The published programs mask weights only."""
    return "bias" in name


def freeze(model: nn.Module, norms: bool) -> None:
    """Stop the training of all parameters of a converted model but heads and the scores of weights; of normalisation
    layers only if ``norms``."""
    layers = [module for module in model.modules() if isinstance(module, SubnetLayer)]
    trained = {id(gate.score) for layer in layers for gate in layer.gated() if not is_bias(gate.name)}
    for module in model.modules():
        if isinstance(module, TaskHeads) or (per_task.is_norm(module) and not norms):
            trained |= {id(param) for param in module.parameters()}
    for param in model.parameters():
        if id(param) not in trained:
            param.requires_grad_(False)
