"""What a layer of a sharded model computes with: the masked tensors that FSDP2 has gathered."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .gate_state import Pass, stamp

if TYPE_CHECKING:
    from .gated import SubnetLayer


def gathered(layer: SubnetLayer, name: str, param: Tensor, dtype: torch.dtype) -> Tensor:
    """The masked tensor of a layer in a forward pass, which FSDP2 has gathered as ``param``."""
    state = layer.gate_state
    assert state.shards is not None
    if torch.compiler.is_compiling():
        raise RuntimeError("torch.compile cannot follow a WSN that is sharded: run it eagerly")
    gate = state.shards[name]
    gate.check_gathered(param)
    masked = param
    if layer._active_row is not None:
        masked = param.detach()
    elif torch.is_grad_enabled() and layer.one_pass:
        assert gate.tau is not None
        state.noted += 1
        now = Pass(gate.tau, param.dtype, stamp(layer, gate.param, gate.score))
        state.note(name, now, waiting=gate.param.grad is not None)
    return masked if masked.dtype is dtype else masked.to(dtype)
