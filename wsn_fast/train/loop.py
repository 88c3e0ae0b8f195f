"""The parts of the training loop: the guarded optimizer of a task, an epoch of training, and a measurement."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from wsn_fast import WSN, CapturedStep, capture_step
from wsn_fast.optim.capture import obstacle_of
from wsn_fast.optim.optimizers import SubnetAdamW, SubnetSGD
from wsn_fast.train.config import TrainConfig

# This number is part of the results: kernels may round differently for another batch size.
EVAL_BATCH = 1024
SGD_MOMENTUM = 0.9


def make_optimizer(wsn: WSN, settings: TrainConfig) -> torch.optim.Optimizer:
    """The guarded optimizer of a task that has begun."""
    parameters = [parameter for parameter in wsn.parameters() if parameter.requires_grad]
    lr, decay = settings.lr, settings.weight_decay
    if settings.one_pass:  # these optimizers guard themselves
        both: dict[str, Any] = {"weight_decay": decay, "score_weight_decay": decay, "moments": settings.moments}
        if settings.optimizer == "sgd":
            return SubnetSGD(wsn, lr, SGD_MOMENTUM, one_pass=True, **both)
        return SubnetAdamW(wsn, lr, decoupled=settings.optimizer == "adamw", one_pass=True, **both)
    optimizer: torch.optim.Optimizer
    if settings.optimizer == "sgd":
        optimizer = torch.optim.SGD(parameters, lr, momentum=SGD_MOMENTUM, weight_decay=decay, fused=True)
    else:
        kind = torch.optim.AdamW if settings.optimizer == "adamw" else torch.optim.Adam
        optimizer = kind(parameters, lr, weight_decay=decay, fused=True)  # one kernel instead of a dozen
    return wsn.guard(optimizer)


def make_graph(wsn: WSN, optimizer: torch.optim.Optimizer, settings: TrainConfig) -> CapturedStep | None:
    """The training step as a CUDA graph; None if the settings switch that off or the device does not support it."""
    if settings.cuda_graph == "off" or obstacle_of(next(wsn.parameters()).device):
        return None
    return capture_step(wsn, optimizer, lambda x, y: F.cross_entropy(wsn(x), y))


def sample_order(samples: int, seed: int, task: int, epoch: int) -> Tensor:
    """The order of the samples in an epoch, int64 [samples]. It depends on the arguments alone, so a resumed run needs
    no saved state for it."""
    digest = hashlib.blake2b(f"{seed}/{task}/{epoch}".encode(), digest_size=7).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "big"))
    return torch.randperm(samples, generator=generator)


def train_epoch(
    wsn: WSN,
    optimizer: torch.optim.Optimizer,
    x: Tensor,
    y: Tensor,
    batches: tuple[Tensor, ...],
    after_batch: Callable[[], None],
    graph: CapturedStep | None = None,
    on_split: Callable[[int], None] = lambda parts: None,
) -> float:
    """Train one pass over the data. Every step computes the mask from the current scores.

    If a batch does not fit into memory, it is trained in 2 parts, then in 4 and so on, and later batches are split in
    the same way. The gradient is then that of the whole batch, up to rounding. But batch norms see the statistics of
    the parts, and the failed attempt has changed running statistics and the random generator once.

    Args:
        wsn: the model, with the task in progress.
        optimizer: its guarded optimizer.
        x: inputs [N, ...].
        y: labels [N].
        batches: row numbers of each batch, on the device of ``x``.
        after_batch: called after every step.
        graph: does the steps, unless a batch has to be split; None means that steps run without a CUDA graph.
        on_split: called with the number of parts whenever that grows.

    Returns:
        The mean loss per sample. It is not finite if the loss of any batch was not finite.

    Raises:
        torch.OutOfMemoryError: memory does not even suffice for one sample, or it ran out after the optimizer's step
            had begun, and a step cannot be repeated.
    """
    wsn.train()
    # The sum stays on the device: reading it at every step would stall a GPU.
    total = torch.zeros((), device=x.device)
    parts = 1
    for rows in batches:
        while True:
            try:
                if graph is not None and parts == 1:
                    loss = graph(x.index_select(0, rows), y.index_select(0, rows))
                else:
                    loss = _gradients(wsn, optimizer, x, y, rows.tensor_split(min(parts, len(rows))))
                break
            except torch.OutOfMemoryError:
                if parts >= len(rows) or (graph is not None and parts == 1 and graph.began_update):
                    raise
            # Outside the handler the exception is gone, and with it the memory that the failed attempt held.
            parts *= 2
            on_split(parts)
        if graph is None or parts > 1:
            optimizer.step()
        total += loss * len(rows)
        after_batch()
    return total.item() / len(x)


def _gradients(wsn: WSN, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, parts: Sequence[Tensor]) -> Tensor:
    """Compute the gradients of the mean loss over the rows of all parts. Returns that loss, detached."""
    optimizer.zero_grad(set_to_none=True)
    samples, losses = sum(map(len, parts)), []
    for rows in parts:
        loss = F.cross_entropy(wsn(x.index_select(0, rows)), y.index_select(0, rows))
        if len(parts) > 1:
            loss = loss * (len(rows) / samples)
        torch.autograd.backward(loss)
        losses.append(loss.detach())
    return functools.reduce(torch.add, losses)


@torch.no_grad()
def evaluate(wsn: WSN, x: Tensor, y: Tensor) -> tuple[float, float]:
    """Measure the mean cross-entropy and the accuracy in percent, in eval mode, with the mask and head in use.

    Args:
        wsn: the model.
        x: inputs [N, ...], N >= 1.
        y: labels [N], on the same device.
    """
    wsn.eval()
    loss = torch.zeros((), device=x.device)
    correct = torch.zeros((), dtype=torch.int64, device=x.device)
    for inputs, labels in zip(torch.split(x, EVAL_BATCH), torch.split(y, EVAL_BATCH), strict=True):
        logits = wsn(inputs)
        loss += F.cross_entropy(logits, labels, reduction="sum")
        correct += (logits.argmax(1) == labels).sum()
    return loss.item() / len(y), 100 * correct.item() / len(y)
