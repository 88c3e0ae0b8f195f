"""SupSup (Wortsman et al., NeurIPS 2020)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..continual.wsn import WSN
from ..convert import convert
from ..convert.slices import Density
from ..nn import per_task
from ..nn.gated import SubnetLayer
from ..nn.heads import TaskHeads
from ..nn.scores import ScoreInit
from .frozen import freeze, is_bias


def supsup(
    model: nn.Module,
    density: float | Mapping[str, Density] = 0.5,
    *,
    score_init: ScoreInit = "default",
    **options: Any,
) -> WSN:
    """Learn a mask for each task over random weights, which never change (Wortsman et al., "Supermasks in
    Superposition", NeurIPS 2020).

    The weights are drawn anew from the signed Kaiming constant: -c or c with equal probability, where ``c = sqrt(2 /
    fan_in)`` is the standard deviation of Kaiming's normal distribution. Biases are 0, normalisation layers have no
    affine parameters that are trained. The scores of every task are drawn anew, and a mask keeps those of largest
    magnitude in each tensor (edge-popup, Ramanujan et al., CVPR 2020).

    Args:
        model: the model; its weights are overwritten, and it is converted in place.
        density: the fraction of each tensor that a mask keeps, as for :func:`wsn_fast.convert`.
        score_init: how scores are drawn; see :meth:`SubnetLayer.reset_scores`.
        options: ``heads`` and other arguments of :func:`wsn_fast.convert`, but not ``rule``. Without ``heads`` all
            tasks share the outputs, and the last layer is masked too.

    Returns:
        A WSN, whose tasks are begun, trained and ended as ever. :meth:`wsn_fast.WSN.infer_task` finds the task of
        inputs by the methods of the paper.

    Raises:
        TypeError, ValueError: as :func:`wsn_fast.convert` says. Then nothing has been changed.
    """
    convert(model, density, rule="magnitude", score_init=score_init, **options)
    draw_signed_constants(model)
    freeze(model, norms=True)
    return WSN(model, rest="frozen", reinit_scores=True, score_init=score_init)


@torch.no_grad()
def draw_signed_constants(model: nn.Module) -> None:
    """Draw the weights of a converted model from the signed Kaiming constant. Set its biases to 0, with masks that keep
    all of them, and its normalisation layers to the identity. Heads stay as they are."""
    of_heads = {m for heads in model.modules() if isinstance(heads, TaskHeads) for m in heads.modules()}
    for module in model.modules():
        if isinstance(module, SubnetLayer):
            for gate in module.gated():
                constant = math.sqrt(2 / module.fan_in(gate.name))
                gate.param.copy_(torch.where(torch.rand_like(gate.param) < 0.5, -constant, constant))
                if is_bias(gate.name):
                    gate.param.zero_()
            module.density = {g.name: 1.0 if is_bias(g.name) else module.density_of(g.name) for g in module.gated()}
        elif per_task.is_norm(module) and module not in of_heads:
            for name, param in module.named_parameters(recurse=False):
                param.fill_(float(not is_bias(name)))
