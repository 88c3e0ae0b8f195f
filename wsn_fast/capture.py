"""A whole training step as one CUDA graph: from the threshold to the optimizer, launched at once.

A layer of the paper's nets is a few microseconds of work, and a step is dozens of launches: captured, they cost one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from .subnet import SubnetLayer
from .wsn import WSN

WARM_UP = 3
"""Steps that run as they are before a capture: libraries initialise, kernels compile, optimizers make their state."""

Signature = tuple[Any, ...]


class Graph(Protocol):
    """What a capture needs: to record work without doing it, and to do it again and again."""

    def record(self, work: Callable[[], Tensor]) -> Tensor:
        """Record ``work``; its result, which every replay writes."""

    def replay(self) -> None:
        """Do the recorded work."""


class CudaGraph:
    """``torch.cuda.CUDAGraph`` as a :class:`Graph`."""

    def __init__(self) -> None:
        self._graph = torch.cuda.CUDAGraph()

    def record(self, work: Callable[[], Tensor]) -> Tensor:
        """See :class:`Graph`."""
        # Other threads (a data loader that pins memory) may go on meanwhile.
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            return work()

    def replay(self) -> None:
        """See :class:`Graph`."""
        self._graph.replay()


def obstacle_of(device: torch.device) -> str:
    """Why no step is captured on this device; empty if one can be."""
    return "" if device.type == "cuda" else f"CUDA graphs are for NVIDIA GPUs, and the model is on {device.type}"


def capture_step(
    wsn: WSN, optimizer: torch.optim.Optimizer, loss_fn: Callable[..., Tensor], *, max_norm: float | None = None
) -> CapturedStep:
    """A training step that becomes one CUDA graph where that is possible, and runs as it is elsewhere.

    ``step = capture_step(wsn, optimizer, lambda x, y: F.cross_entropy(wsn(x), y))`` and then ``loss = step(x, y)`` do
    what ``zero_grad``, forward, ``backward`` and ``optimizer.step()`` do; every call is one step of training. The first
    calls run as they are, then the step is captured. A batch of another shape (the last of an epoch), and a step after
    weights or scores were changed from outside, run as they are. A new task, or settings of the optimizer other than
    the learning rate, lead to a new capture; the learning rate may change at any time. Evaluate as you like in between.

    Args:
        wsn: the model, with a task in progress.
        optimizer: guarded by ``wsn``: one of :mod:`wsn_fast.optim`, or another that supports capture.
        loss_fn: called with the tensors of a batch, gives the loss (0-d). It must not wait for the device (no
            ``.item()``), and whatever else it reads must stay where it is in memory. No ``GradScaler``.
        max_norm: clip the norm of the gradients, if given.

    Raises:
        TypeError: ``wsn`` is not a WSN, or ``loss_fn`` cannot be called.
        ValueError: ``max_norm`` is not positive.
    """
    return CapturedStep(wsn, optimizer, loss_fn, max_norm)


class CapturedStep:
    """See :func:`capture_step`.

    Attributes:
        captured: whether the last call was a replay.
        reason: why, or why not.
        replays: how many calls were.
        began_update: whether the last call came as far as to change something; one that raised before may be repeated.
    """

    captured: bool
    reason: str
    replays: int
    began_update: bool

    def __init__(
        self, wsn: WSN, optimizer: torch.optim.Optimizer, loss_fn: Callable[..., Tensor], max_norm: float | None
    ) -> None:
        if not isinstance(wsn, WSN):
            raise TypeError(f"wsn must be a wsn_fast.WSN, got {type(wsn).__name__}")
        if not callable(loss_fn):
            raise TypeError(f"loss_fn must be callable, got {type(loss_fn).__name__}")
        if max_norm is not None and not max_norm > 0:
            raise ValueError(f"max_norm must be positive or None, got {max_norm!r}")
        self._wsn, self._optimizer, self._loss_fn, self._max_norm = wsn, optimizer, loss_fn, max_norm
        self._obstacle = obstacle_of(next(wsn.parameters()).device)
        self._forget()
        self.replays, self.began_update = 0, False
        self.captured, self.reason = False, self._obstacle or "the first steps run as they are"

    def _forget(self) -> None:
        self._graph: Graph | None = None
        self._signature: Signature | None = None
        self._warm = self._strays = 0
        self._inputs: list[Tensor] = []
        self._rates: list[Tensor] = []
        self._loss: Tensor | None = None

    def __call__(self, *batch: Tensor) -> Tensor:
        """One training step on a batch. Returns the loss, 0-d, detached."""
        self.began_update = False
        if self._obstacle:
            return self._as_it_is(batch, self._obstacle)
        self._wsn.check_step(self._optimizer)  # which a replay would not
        signature = self._sign(batch)
        if signature == self._signature:
            self._strays = 0
        elif self._is_stray(signature):
            return self._as_it_is(batch, "a batch of another shape")
        else:
            self._forget()
            self._signature = signature
        if self._warm < WARM_UP:
            self._warm += 1
            return self._beside(batch)
        if not all(layer.is_ready() for layer in self._layers()):
            return self._as_it_is(batch, "weights or scores were changed since the last step")
        if self._graph is None and not self._capture(batch):
            return self._as_it_is(batch, self._obstacle)
        return self._replay(batch)

    def _is_stray(self, signature: Signature) -> bool:
        """Whether a batch of another shape is the exception: the last of an epoch, and not what comes from now on."""
        if self._signature is None or signature[1:] != self._signature[1:]:
            return False
        self._strays += 1
        return self._strays <= WARM_UP

    # --- one step, in three ways
    def _step(self, batch: tuple[Tensor, ...] | list[Tensor]) -> Tensor:
        self._optimizer.zero_grad(set_to_none=True)
        loss = self._loss_fn(*batch)
        torch.autograd.backward(loss)
        if self._max_norm is not None:
            clip_gradients(self._optimizer, self._max_norm)
        self.began_update = True
        self._optimizer.step()
        return loss.detach()

    def _as_it_is(self, batch: tuple[Tensor, ...], reason: str) -> Tensor:
        self.captured, self.reason = False, reason
        return self._step(batch)

    def _beside(self, batch: tuple[Tensor, ...]) -> Tensor:
        """On another stream, as PyTorch asks of the steps before a capture."""
        if batch[0].device.type != "cuda":
            return self._as_it_is(batch, "the first steps run as they are")
        here, there = torch.cuda.current_stream(), torch.cuda.Stream()
        there.wait_stream(here)
        with torch.cuda.stream(there):
            loss = self._as_it_is(batch, "the first steps run as they are")
        here.wait_stream(there)
        return loss

    def _capture(self, batch: tuple[Tensor, ...]) -> bool:
        self._inputs = [x.clone() for x in batch]
        self._rates = [
            torch.as_tensor(group["lr"], dtype=torch.float32, device=batch[0].device).clone()
            for group in self._optimizer.param_groups
        ]

        def work() -> Tensor:
            with self._settings_of_graph():
                return self._step(self._inputs)

        graph = new_graph()
        try:
            self._loss = graph.record(work)
            self.began_update = False
        except (RuntimeError, AssertionError) as error:  # an operation that cannot be captured; nothing has been done
            self._forget()
            self._obstacle = f"the step cannot be captured: {(str(error) or repr(error)).splitlines()[0]}"
            return False
        self._graph = graph
        return True

    def _replay(self, batch: tuple[Tensor, ...]) -> Tensor:
        assert self._graph is not None and self._loss is not None
        for static, given in zip(self._inputs, batch, strict=True):
            static.copy_(given, non_blocking=True)
        for static, group in zip(self._rates, self._optimizer.param_groups, strict=True):
            rate = group["lr"]
            if isinstance(rate, Tensor):
                static.copy_(rate)
            else:
                static.fill_(rate)
        self.began_update = True
        self._graph.replay()
        self._note_changes()
        self.replays += 1
        self.captured, self.reason = True, "the step is a CUDA graph"
        return self._loss.clone()

    # --- what a graph depends on
    def _layers(self) -> Iterator[SubnetLayer]:
        return iter(self._wsn.subnet_layers().values())

    def _sign(self, batch: tuple[Tensor, ...]) -> Signature:
        """The shapes of the batch, and all else that is part of a graph but not read by it from memory."""
        groups = tuple(
            (*(id(p) for p in group["params"]), *(v for k, v in group.items() if k not in ("params", "lr")))
            for group in self._optimizer.param_groups
        )
        memory = tuple(
            (p.data_ptr(), p.requires_grad) for group in self._optimizer.param_groups for p in group["params"]
        )
        gates = tuple((layer.active_row, layer.gate_density, layer.one_pass) for layer in self._layers())
        shapes = tuple((x.shape, x.dtype, x.device) for x in batch)
        return shapes, self._wsn.current_task, self._wsn.training, groups, memory, gates

    @contextmanager
    def _settings_of_graph(self) -> Iterator[None]:
        """Learning rates that the graph reads from memory, and PyTorch told that its optimizer is captured."""
        groups = self._optimizer.param_groups
        kept: list[dict[str, Any]] = [
            {name: group[name] for name in ("lr", "capturable") if name in group} for group in groups
        ]
        try:
            for group, rate in zip(groups, self._rates, strict=True):
                group["lr"] = rate
                if "capturable" in group:
                    group["capturable"] = True
            yield
        finally:
            for group, values in zip(groups, kept, strict=True):
                group.update(values)

    def _note_changes(self) -> None:
        """Tell autograd and the layers what a replay has changed, as no Python ran that could."""
        optimizer = self._optimizer
        params = [p for group in optimizer.param_groups for p in group["params"]]
        states = [t for p in params for t in optimizer.state.get(p, {}).values() if isinstance(t, Tensor)]
        increment_version([*params, *states])
        for layer in self._layers():
            layer.restamp()


def new_graph() -> Graph:
    """An empty graph of the current device."""
    return CudaGraph()


def clip_gradients(optimizer: torch.optim.Optimizer, max_norm: float) -> Tensor:
    """Clip the norm of all gradients that an optimizer holds, by its own ``clip_grad_norm_`` if it has one. Returns the
    norm before, 0-d."""
    own = getattr(optimizer, "clip_grad_norm_", None)
    if own is not None:
        norm: Tensor = own(max_norm)
        return norm
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return torch.nn.utils.clip_grad_norm_(params, max_norm)
