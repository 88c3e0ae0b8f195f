"""Keeps the buffers of the head of a finished task: a batch norm inside it would write to its running statistics in
every forward pass in training mode.

A hook puts the kept values back after each forward pass of the head, whatever mode it was in, and also after one that
an exception ended.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.compiler import is_dynamo_compiling

from ..backends import is_exporting, recording
from . import per_task

# The key of the hook is always the same, so that compiled code serves the heads of all tasks. PyTorch counts from 0.
_KEY = -1
_KEPT = "_kept_buffers"


@torch.inference_mode(False)
def keep(head: nn.Module, anew: bool) -> None:
    """From now on the buffers of ``head`` stay what they are, or what they were when it was kept before. If ``anew``,
    the values of now count."""
    if anew or _KEPT not in head.__dict__:
        head.__dict__[_KEPT] = {name: buffer.detach().clone() for name, buffer in head.named_buffers()}
        if head.__dict__[_KEPT]:
            head._forward_hooks[_KEY] = _put_back
            head._forward_hooks_always_called[_KEY] = True


def release(head: nn.Module) -> None:
    """Undo :func:`keep`."""
    if head.__dict__.pop(_KEPT, None):
        head._forward_hooks.pop(_KEY, None)
        head._forward_hooks_always_called.pop(_KEY, None)


def _put_back(head: nn.Module, args: Any, output: Any) -> None:
    if not is_dynamo_compiling() and (is_exporting() or recording()):
        return
    for name, kept in head.__dict__[_KEPT].items():
        path, _, attribute = name.rpartition(".")
        owner = head.get_submodule(path)
        if owner.training or not isinstance(owner, per_task.TORCH_NORMS):
            live = owner._buffers.get(attribute)
            if live is None or live.shape != kept.shape:
                owner._buffers[attribute] = kept.clone()
            else:  # through .data: a backward pass may need the version of now, and does not need these values
                live.data.copy_(kept)
