"""The parts of the training loop: the guarded optimizer of a task, an epoch of training, and a measurement."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from wsn_fast import WSN, CapturedStep, capture_step
from wsn_fast.optim.capture import obstacle_of
from wsn_fast.optim.optimizers import SubnetAdamW, SubnetSGD
from wsn_fast.train.config import TrainConfig
from wsn_fast.train.data.files import DataError
from wsn_fast.train.processes import ALONE, Processes
from wsn_fast.train.samples import Batch, Epoch, Samples, parts_of

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


def train_epoch(
    wsn: WSN,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[Batch],
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
    total = torch.zeros((), device=next(wsn.parameters()).device)
    samples, parts = 0, 1
    for batch in batches:
        while True:
            try:
                if graph is not None and parts == 1:
                    loss = graph(*batch.take(batch.own))
                else:
                    loss = _gradients(wsn, optimizer, batch, min(parts, batch.size))
                break
            except torch.OutOfMemoryError:
                if parts >= batch.size or (graph is not None and parts == 1 and graph.began_update):
                    raise
            # Outside the handler the exception is gone, and with it the memory that the failed attempt held.
            parts *= 2
            on_split(parts)
        if graph is None or parts > 1:
            optimizer.step()
        total += loss * batch.size
        samples += batch.size
        after_batch()
    return total.item() / samples


def train_epoch_in_parts(
    wsn: WSN,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[Batch],
    after_batch: Callable[[], None],
    processes: Processes,
    epoch: Epoch,
) -> float:
    """:func:`train_epoch`, where each process trains its part of every batch.

    The gradients are those of the mean loss over the whole batch, whatever the parts. Batch norms see the part, and at
    the end of the epoch all processes take the running statistics of the first one.

    Args:
        wsn: the model, with the task in progress, the same in all processes.
        optimizer: its guarded optimizer.
        batches: the batches of the epoch, with the share of this process.
        after_batch: called after every step.
        processes: those that train.
        epoch: what a process draws, for dropout, follows from it and the rank. The first process goes on with its
            generators instead, whose state a checkpoint keeps.

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
        torch.manual_seed(epoch.number(processes.rank))
    total, samples = torch.zeros((), device=next(wsn.parameters()).device), 0
    for batch in batches:
        optimizer.zero_grad(set_to_none=True)
        x, y = batch.take(batch.own)
        try:
            loss = F.cross_entropy(ddp(x), y)
        except ValueError as error:
            if len(x) > 1:
                raise
            raise ValueError(
                f"batch_size: the last batch of {batch.size} leaves one sample to a process, and the net cannot train "
                f"it ({error}): choose another --batch-size, or fewer processes"
            ) from error
        # The wrapper divides the sum of the gradients by the number of processes.
        torch.autograd.backward(loss * (batch.share * processes.size))
        optimizer.step()
        total += loss.detach() * (batch.share * batch.size)
        samples += batch.size
        after_batch()
    processes.sum(total)
    level_buffers(wsn)
    return total.item() / samples


def agreeing(batches: Iterable[Batch], processes: Processes) -> Iterator[Batch]:
    """The batches of loaders, of which each process has its own.

    Raises:
        DataError: not all processes have loaded the same labels, or some of them have no batch any more.
    """
    iterator = iter(batches)
    while True:
        batch = next(iterator, None)
        _check_same(0 if batch is None else batch.mark, processes)
        if batch is None:
            return
        yield batch


def _check_same(number: int, processes: Processes) -> None:
    """Raise ``DataError`` in all processes if they do not have the same number, which their loaders have given."""
    numbers = torch.zeros(processes.size, dtype=torch.int64)
    numbers[processes.rank] = number
    processes.sum(numbers)
    if (numbers != numbers[0]).any():
        raise DataError(
            "data: the loader of each process has to give the same batches in the same order, and they differ: draw "
            "what is random with the generators of torch, NumPy or Python, and do not cut the data up yourself"
        )


def _gradients(wsn: WSN, optimizer: torch.optim.Optimizer, batch: Batch, parts: int) -> Tensor:
    """Compute the gradients of the mean loss over a batch, in parts. Returns that loss, detached."""
    optimizer.zero_grad(set_to_none=True)
    losses = []
    for part in parts_of(batch.size, parts):
        x, y = batch.take(part)
        loss = F.cross_entropy(wsn(x), y)
        if parts > 1:
            loss = loss * (len(x) / batch.size)
        torch.autograd.backward(loss)
        losses.append(loss.detach())
    return functools.reduce(torch.add, losses)


@torch.no_grad()
def evaluate(
    wsn: WSN, samples: Samples, processes: Processes = ALONE, waits: Callable[[Iterable[Any]], Iterable[Any]] = iter
) -> tuple[float, float]:
    """Measure the mean cross-entropy and the accuracy in percent, in eval mode, with the mask and head in use.

    The processes take the batches in turn, and the sums are the same to the bit for any number of them.

    Args:
        wsn: the model.
        samples: those to measure on, on the device of the model.
        processes: those that measure, with the same model.
        waits: gives the batches on, and may measure the time until they are there.

    Raises:
        DataError: the loaders of the processes have not given the same number of batches.
        ValueError: there are no samples.
    """
    wsn.eval()
    nothing, correct = torch.zeros((), device=samples.device), torch.zeros((), dtype=torch.int64, device=samples.device)
    losses, count = [], 0
    for batch in waits(samples.in_order(processes.share)):
        losses.append(nothing)
        if batch is not None:
            inputs, labels = batch
            logits = wsn(inputs)
            losses[-1] = F.cross_entropy(logits, labels, reduction="sum").to(nothing.dtype)
            correct += (logits.argmax(1) == labels).sum()
            count += len(labels)
    if not losses:
        raise ValueError("samples: there are none to measure on")
    if samples.each_process_loads_all and processes.size > 1:  # a sum of other lengths would never end
        _check_same(len(losses), processes)
    sums, right = torch.stack(losses), torch.stack((correct, torch.full_like(correct, count)))
    processes.sum(sums)  # all but one process have 0 for each batch
    processes.sum(right)
    loss = functools.reduce(torch.add, sums.unbind())
    hits, total = right.tolist()
    return loss.item() / total, 100 * hits / total
