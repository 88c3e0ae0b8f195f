"""The steps of the paper's recipe: a guarded optimizer per task, an epoch of training, a measurement."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from wsn_fast import WSN
from wsn_fast.optim import SubnetAdamW, SubnetSGD
from wsn_fast.train.config import TrainConfig

# Part of what is computed: kernels may round differently for another batch size.
EVAL_BATCH = 1024
SGD_MOMENTUM = 0.9


def make_optimizer(wsn: WSN, settings: TrainConfig) -> torch.optim.Optimizer:
    """The guarded optimizer of a task that has begun."""
    parameters = [parameter for parameter in wsn.parameters() if parameter.requires_grad]
    lr, decay = settings.lr, settings.weight_decay
    if settings.one_pass:  # which guards itself
        if settings.optimizer == "sgd":
            return SubnetSGD(wsn, lr, SGD_MOMENTUM, weight_decay=decay, score_weight_decay=decay)
        decoupled = settings.optimizer == "adamw"
        return SubnetAdamW(wsn, lr, weight_decay=decay, decoupled=decoupled, score_weight_decay=decay)
    optimizer: torch.optim.Optimizer
    if settings.optimizer == "sgd":
        optimizer = torch.optim.SGD(parameters, lr, momentum=SGD_MOMENTUM, weight_decay=decay, fused=True)
    else:
        kind = torch.optim.AdamW if settings.optimizer == "adamw" else torch.optim.Adam
        optimizer = kind(parameters, lr, weight_decay=decay, fused=True)  # one pass instead of a dozen
    return wsn.guard(optimizer)


def sample_order(samples: int, seed: int, task: int, epoch: int) -> Tensor:
    """The order of an epoch's samples, int64 [samples], from these numbers alone: no state to resume."""
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
) -> float:
    """One pass over the data; the mask comes from the current scores at every step.

    Args:
        wsn: the model, with the task in progress.
        optimizer: its guarded optimizer.
        x: inputs [N, ...].
        y: labels [N].
        batches: row numbers of each batch, on the device of ``x``.
        after_batch: called after every step.

    Returns:
        The mean loss per sample, not finite if that of any batch was not.
    """
    wsn.train()
    # Summed on the device: a number for the host at each step would stall a GPU.
    total = torch.zeros((), device=x.device)
    for rows in batches:
        loss = F.cross_entropy(wsn(x.index_select(0, rows)), y.index_select(0, rows))
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        optimizer.step()
        total += loss.detach() * len(rows)
        after_batch()
    return total.item() / len(x)


@torch.no_grad()
def evaluate(wsn: WSN, x: Tensor, y: Tensor) -> tuple[float, float]:
    """Mean cross-entropy and accuracy in percent, in eval mode, with the mask and head in use.

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
