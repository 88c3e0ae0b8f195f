"""The parts of the training loop: the guarded optimizer of a task, an epoch of training, and a measurement."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from wsn_fast import WSN, CapturedStep, capture_step
from wsn_fast.optim.capture import obstacle_of
from wsn_fast.optim.optimizers import SubnetAdamW, SubnetSGD
from wsn_fast.train.augmentation import Augmentation
from wsn_fast.train.batches import Batches, parts_of
from wsn_fast.train.config import TrainConfig
from wsn_fast.train.processes import ALONE, Processes

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


def make_graph(
    wsn: WSN, optimizer: torch.optim.Optimizer, settings: TrainConfig, processes: Processes = ALONE
) -> tuple[CapturedStep | None, str]:
    """The training step as a CUDA graph; or None, and why it is none."""
    obstacle = obstacle_of(next(wsn.parameters()).device) or ("cuda_graph is off" * (settings.cuda_graph == "off"))
    if processes.size > 1:
        obstacle = "several processes train the model"
    return None if obstacle else capture_step(wsn, optimizer, lambda x, y: F.cross_entropy(wsn(x), y)), obstacle


def sample_order(samples: int, seed: int, task: int, epoch: int) -> Tensor:
    """The order of the samples in an epoch, int64 [samples]. It depends on the arguments alone, so a resumed run needs
    no saved state for it."""
    generator = torch.Generator().manual_seed(_seed_of(seed, task, epoch))
    return torch.randperm(samples, generator=generator)


def epoch_batches(settings: TrainConfig, x: Tensor, y: Tensor, epoch: tuple[int, int, int]) -> Batches:
    """The batches of an epoch.

    Args:
        settings: the config.
        x: all inputs of the task, [N, ...].
        y: their labels, [N].
        epoch: the seed of the run, the task and the epoch.
    """
    rows = sample_order(len(x), *epoch).to(x.device).split(settings.batch_size)
    return Batches(x, y, rows, Augmentation(*epoch) if settings.augment == "crops" else None)


def _seed_of(*numbers: int) -> int:
    digest = hashlib.blake2b("/".join(map(str, numbers)).encode(), digest_size=7).digest()
    return int.from_bytes(digest, "big")


def train_epoch(
    wsn: WSN,
    optimizer: torch.optim.Optimizer,
    batches: Batches,
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
        batches: the batches of the epoch.
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
    total = torch.zeros((), device=batches.x.device)
    parts = 1
    for number in range(len(batches)):
        size = batches.size(number)
        while True:
            try:
                if graph is not None and parts == 1:
                    loss = graph(*batches.take(number))
                else:
                    loss = _gradients(wsn, optimizer, batches, number, min(parts, size))
                break
            except torch.OutOfMemoryError:
                if parts >= size or (graph is not None and parts == 1 and graph.began_update):
                    raise
            # Outside the handler the exception is gone, and with it the memory that the failed attempt held.
            parts *= 2
            on_split(parts)
        if graph is None or parts > 1:
            optimizer.step()
        total += loss * size
        after_batch()
    return total.item() / batches.samples


def train_epoch_in_parts(
    wsn: WSN,
    optimizer: torch.optim.Optimizer,
    batches: Batches,
    after_batch: Callable[[], None],
    processes: Processes,
    epoch: tuple[int, int, int],
) -> float:
    """:func:`train_epoch`, where each process trains its part of every batch.

    The gradients are those of the mean loss over the whole batch, whatever the parts. Batch norms see the part, and at
    the end of the epoch all processes take the running statistics of the first one.

    Args:
        wsn: the model, with the task in progress, the same in all processes.
        optimizer: its guarded optimizer.
        batches: the whole batches of the epoch.
        after_batch: called after every step.
        processes: those that train.
        epoch: the seed of the run, the task and the epoch. What a process draws, for dropout, follows from them and its
            rank. The first process goes on with its generators instead, whose state a checkpoint keeps.

    Returns:
        The mean loss per sample, the same in all processes.

    Raises:
        torch.OutOfMemoryError: memory does not suffice for the part of a batch.
        ValueError: a part is one sample, and batch norm takes no statistics of it.
    """
    from torch.nn.parallel import DistributedDataParallel

    from wsn_fast.distributed import level_buffers  # and FSDP with it, which a single process does not need

    # A wrapper of its own for each epoch, since a resumed run begins with a new one: the wrapper rearranges what it
    # sends after its first step, and with that the order of sums over more than two processes.
    ddp = DistributedDataParallel(wsn)
    wsn.train()
    if not processes.is_first:
        torch.manual_seed(_seed_of(*epoch, processes.rank))
    total = torch.zeros((), device=batches.x.device)
    for number in range(len(batches)):
        size = batches.size(number)
        own = parts_of(size, processes.size)[processes.rank]
        share = (own.stop - own.start) / size
        if not share:  # the batch is too small for all: this process trains a sample of another one that counts 0
            own = slice(0, 1)
        optimizer.zero_grad(set_to_none=True)
        x, y = batches.take(number, own)
        try:
            loss = F.cross_entropy(ddp(x), y)
        except ValueError as error:
            if len(x) > 1:
                raise
            raise ValueError(
                f"batch_size: the last batch of {size} leaves one sample to a process, and the net cannot train "
                f"it ({error}): choose another --batch-size, or fewer processes"
            ) from error
        # The wrapper divides the sum of the gradients by the number of processes.
        torch.autograd.backward(loss * (share * processes.size))
        optimizer.step()
        total += loss.detach() * (share * size)
        after_batch()
    processes.sum(total)
    level_buffers(wsn)
    return total.item() / batches.samples


def _gradients(wsn: WSN, optimizer: torch.optim.Optimizer, batches: Batches, number: int, parts: int) -> Tensor:
    """Compute the gradients of the mean loss over a batch, in parts. Returns that loss, detached."""
    optimizer.zero_grad(set_to_none=True)
    size, losses = batches.size(number), []
    for part in parts_of(size, parts):
        x, y = batches.take(number, part)
        loss = F.cross_entropy(wsn(x), y)
        if parts > 1:
            loss = loss * (len(x) / size)
        torch.autograd.backward(loss)
        losses.append(loss.detach())
    return functools.reduce(torch.add, losses)


@torch.no_grad()
def evaluate(wsn: WSN, x: Tensor, y: Tensor, processes: Processes = ALONE) -> tuple[float, float]:
    """Measure the mean cross-entropy and the accuracy in percent, in eval mode, with the mask and head in use.

    The processes take the batches in turn, and the sums are the same to the bit for any number of them.

    Args:
        wsn: the model.
        x: inputs [N, ...], N >= 1.
        y: labels [N], on the same device.
        processes: those that measure, with the same model.
    """
    wsn.eval()
    batches = list(zip(torch.split(x, EVAL_BATCH), torch.split(y, EVAL_BATCH), strict=True))
    losses = torch.zeros(len(batches), device=x.device)
    correct = torch.zeros((), dtype=torch.int64, device=x.device)
    for i in range(processes.rank, len(batches), processes.size):
        inputs, labels = batches[i]
        logits = wsn(inputs)
        losses[i] = F.cross_entropy(logits, labels, reduction="sum")
        correct += (logits.argmax(1) == labels).sum()
    processes.sum(losses)  # all but one of them have 0 for each batch
    processes.sum(correct)
    loss = functools.reduce(torch.add, losses.unbind())
    return loss.item() / len(y), 100 * correct.item() / len(y)
