"""Captures a whole training step in one CUDA graph, from the threshold to the optimizer.

A step launches many kernels, and in a small net each of them has little work. A captured step needs one launch.
"""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import chain
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from ..continual.wsn import WSN
from ..nn.task_ids import TaskId

WARM_UP = 3
"""The number of steps that run eagerly before a capture. In them libraries are initialised, kernels are compiled and
loaded, and optimizers make their state: none of this can happen inside a capture. These steps use the same kinds of
arguments as the capture will: learning rates are tensors, and PyTorch's optimizers count their steps on the device."""
WARMING_UP = "warm-up: the first steps run eagerly"

Signature = tuple[Any, ...]
VERSION, IS_TRAINED = attrgetter("_version"), attrgetter("requires_grad")


class Graph(Protocol):
    """Records work without doing it, and replays it."""

    def record(self, work: Callable[[], Tensor]) -> Tensor:
        """Record ``work``. Returns its result, which every replay overwrites."""

    def replay(self) -> None:
        """Do the recorded work."""


class CudaGraph:
    """``torch.cuda.CUDAGraph`` as a :class:`Graph`."""

    def __init__(self) -> None:
        self._graph = torch.cuda.CUDAGraph()

    def record(self, work: Callable[[], Tensor]) -> Tensor:
        """See :class:`Graph`."""
        pool = torch.cuda.graph_pool_handle()
        # The outer context is for a capture that fails: PyTorch would leave its stream the current one.
        with torch.cuda.stream(torch.cuda.current_stream()):
            try:
                # Other threads (a data loader that pins memory) may continue meanwhile.
                with torch.cuda.graph(self._graph, pool, capture_error_mode="thread_local"):
                    return work()
            except BaseException:
                _clear_up(pool)
                raise

    def replay(self) -> None:
        """See :class:`Graph`."""
        self._graph.replay()


def _clear_up(pool: tuple[int, int]) -> None:
    """Finish what PyTorch leaves open where a capture fails: memory that is set aside for the graph, and random numbers
    that the graph would count. Without this, every later ``torch.randn`` raises an error."""
    from torch._C import _cuda_endAllocateToPool, _cuda_releasePool  # a build without CUDA lacks them

    device = torch.cuda.current_device()
    with suppress(RuntimeError):  # the capture ended, and then the graph will do this
        _cuda_endAllocateToPool(device, pool)
        _cuda_releasePool(device, pool)
    scratch = torch.zeros(1, device="cuda")
    with torch.cuda.graph(torch.cuda.CUDAGraph(), capture_error_mode="thread_local"):
        scratch.zero_()  # the end of a capture that succeeds resets the generator


def _first_of(error: BaseException) -> str:
    """The first line of the error that began it, and where it was raised. The end of a capture raises another error,
    which says only that there was one."""
    seen = {id(error)}
    while error.__context__ is not None and id(error.__context__) not in seen:
        error = error.__context__
        seen.add(id(error))
    line = (str(error) or repr(error)).splitlines()[0]
    frames = traceback.extract_tb(error.__traceback__)
    return f"{line} (in {frames[-1].name}, {Path(frames[-1].filename).name})" if frames else line


def obstacle_of(device: torch.device) -> str:
    """The reason why no step can be captured on this device; empty if steps can be captured."""
    return "" if device.type == "cuda" else f"CUDA graphs are for NVIDIA GPUs, and the model is on {device.type}"


def capture_step(
    wsn: WSN, optimizer: torch.optim.Optimizer, loss_fn: Callable[..., Tensor], *, max_norm: float | None = None
) -> CapturedStep:
    """Make a training step that is captured in one CUDA graph. Without CUDA it runs eagerly.

    After ``step = capture_step(wsn, optimizer, lambda x, y: F.cross_entropy(wsn(x), y))``, each call ``loss = step(x,
    y)`` is one step of training: ``zero_grad``, forward, ``backward`` and ``optimizer.step()``. The first calls run
    eagerly, then the step is captured. A batch of another shape (the last batch of an epoch) runs eagerly, and so does
    a step after weights or scores were changed from outside. A new task leads to a new capture, and so does a change of
    the optimizer's settings, except for the learning rate, which may change at any time. You may evaluate the model
    between steps. If a step cannot be captured, a warning gives the reason. It then runs eagerly until the next task
    begins, where the capture is tried again.

    Args:
        wsn: the model, with a task in progress.
        optimizer: an optimizer that ``wsn`` guards: one of :mod:`wsn_fast.optim`, or another that supports capture.
        loss_fn: computes the loss (0-d) from the tensors of a batch. It must not wait for the device (no ``.item()``),
            and everything else that it reads must keep its address in memory. A ``GradScaler`` is not supported.
        max_norm: the largest norm of the gradients; larger ones are clipped. None means no clipping.

    Raises:
        TypeError: ``wsn`` is not a WSN, or ``loss_fn`` cannot be called.
        ValueError: ``max_norm`` is not positive, or ``wsn`` is sharded.
    """
    return CapturedStep(wsn, optimizer, loss_fn, max_norm)


class _Failure(NamedTuple):
    """A capture that failed: the task that was in progress, and why."""

    task: TaskId | None
    reason: str


class CapturedStep:
    """See :func:`capture_step`.

    Attributes:
        captured: whether the last call was a replay of the graph.
        reason: why it was, or why it was not.
        replays: the number of calls that were replays.
        began_update: whether the last call began to change weights. If it raised an exception before that, it may be
            repeated.
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
        if wsn.gates.sharding is not None:
            raise ValueError("wsn must be whole: steps of a sharded WSN cannot be captured")
        if not callable(loss_fn):
            raise TypeError(f"loss_fn must be callable, got {type(loss_fn).__name__}")
        if max_norm is not None and not max_norm > 0:
            raise ValueError(f"max_norm must be positive or None, got {max_norm!r}")
        self._wsn, self._optimizer, self._loss_fn, self._max_norm = wsn, optimizer, loss_fn, max_norm
        self._obstacle = obstacle_of(next(wsn.parameters()).device)
        self._failure: _Failure | None = None
        self._forget()
        self.replays, self.began_update = 0, False
        self.captured, self.reason = False, self._obstacle or WARMING_UP

    def _forget(self) -> None:
        self._graph: Graph | None = None
        self._signature: Signature | None = None
        self._state: object = None  # of the optimizer when it was described, so that no other one gets its id
        self._warm_up_steps = self._odd_batches = 0
        self._inputs: list[Tensor] = []
        self._changed: list[Tensor] = []  # what a replay writes and autograd has to know of
        self._gated: list[Tensor] = []  # weights and scores
        self._versions: list[int] | None = None  # of those, after the last replay
        self._rates: list[Tensor] = []
        self._loss: Tensor | None = None

    def __call__(self, *batch: Tensor) -> Tensor:
        """One training step on a batch. Returns the loss, 0-d, detached."""
        self.began_update = False
        if self._obstacle:
            return self._run_eagerly(batch, self._obstacle)
        if self._failure is not None and self._failure.task == self._wsn.current_task:
            return self._run_eagerly(batch, self._failure.reason)
        self._failure = None
        self._wsn.check_step(self._optimizer)  # a replay does not run the guard
        signature = self._describe(batch)
        if signature == self._signature:
            self._odd_batches = 0
        elif self._is_odd_batch(signature):
            return self._run_eagerly(batch, "this batch has another shape than the captured step")
        else:
            self._forget()
            self._signature, self._state = signature, self._optimizer.state
        if self._warm_up_steps < WARM_UP:
            self._warm_up_steps += 1
            return self._run_warm_up(batch)
        if not self._gates_are_right():
            return self._run_eagerly(batch, "weights or scores were changed since the last step")
        if self._graph is None:
            self._failure = self._capture(batch)
            if self._failure is not None:
                return self._run_eagerly(batch, self._failure.reason)
        return self._replay(batch)

    def _is_odd_batch(self, signature: Signature) -> bool:
        """Whether a batch of another shape is an exception (the last batch of an epoch), and not the new shape of all
        batches."""
        if self._signature is None or signature[1:] != self._signature[1:]:
            return False
        self._odd_batches += 1
        return self._odd_batches <= WARM_UP

    # --- one step: eagerly, on a side stream, or as a graph
    def _step(self, batch: tuple[Tensor, ...] | list[Tensor]) -> Tensor:
        self._optimizer.zero_grad(set_to_none=True)
        loss = self._loss_fn(*batch)
        torch.autograd.backward(loss)
        if self._max_norm is not None:
            clip_gradients(self._optimizer, self._max_norm)
        self.began_update = True
        self._optimizer.step()
        return loss.detach()

    def _run_eagerly(self, batch: tuple[Tensor, ...], reason: str) -> Tensor:
        if self._graph_made_them():
            self._wsn.gates.restamp()
        self.captured, self.reason = False, reason
        return self._step(batch)

    def _run_warm_up(self, batch: tuple[Tensor, ...]) -> Tensor:
        """Run a warm-up step with the kinds of arguments that the capture will have, and on another stream, as PyTorch
        requires it for the steps before a capture."""
        if not self._rates:
            self._rates = [
                torch.as_tensor(group["lr"], dtype=torch.float32, device=batch[0].device).clone()
                for group in self._optimizer.param_groups
            ]
        self._set_rates()
        with self._settings_of_graph(), _another_stream(batch[0].device):
            return self._run_eagerly(batch, WARMING_UP)

    def _capture(self, batch: tuple[Tensor, ...]) -> _Failure | None:
        self._inputs = [x.clone() for x in batch]

        def work() -> Tensor:
            with self._settings_of_graph():
                return self._step(self._inputs)

        graph = new_graph()
        try:
            self._loss = graph.record(work)
        except (RuntimeError, AssertionError) as error:  # an operation that cannot be captured; nothing has been done
            self._forget()
            reason = f"the step cannot be captured: {_first_of(error)}"
            warnings.warn(f"{reason}. It runs eagerly until the next task begins", RuntimeWarning, stacklevel=3)
            return _Failure(self._wsn.current_task, reason)
        finally:
            self.began_update = False
        self._graph = graph
        self._changed = [*self._params()]  # not the running means: no backward pass reads them
        self._gated = self._wsn.gates.tensors()
        return None

    def _replay(self, batch: tuple[Tensor, ...]) -> Tensor:
        assert self._graph is not None and self._loss is not None
        for static, given in zip(self._inputs, batch, strict=True):
            static.copy_(given, non_blocking=True)
        self._set_rates()
        self.began_update = True
        self._graph.replay()
        self._note_changes()
        self.replays += 1
        self.captured, self.reason = True, "the step is a CUDA graph"
        return self._loss.clone()

    def _set_rates(self) -> None:
        """Write the present learning rates to where the graph reads them."""
        for static, group in zip(self._rates, self._optimizer.param_groups, strict=True):
            rate = group["lr"]
            if isinstance(rate, Tensor):
                static.copy_(rate)
            else:
                static.fill_(rate)

    # --- what a graph depends on
    def _params(self) -> Iterator[Tensor]:
        return chain.from_iterable(group["params"] for group in self._optimizer.param_groups)

    def _describe(self, batch: tuple[Tensor, ...]) -> Signature:
        """The shapes of the batch, and everything else that a graph fixes instead of reading it from memory. ``map``
        over functions written in C keeps this below a microsecond for each parameter."""
        settings = [
            [v for k, v in group.items() if k not in ("params", "lr")] for group in self._optimizer.param_groups
        ]
        params = [*map(id, self._params())], [*map(Tensor.data_ptr, self._params())], [*map(IS_TRAINED, self._params())]
        gates = self._wsn.gates.settings()
        shapes = [(x.shape, x.dtype, x.device) for x in batch]
        task = self._wsn.current_task, self._wsn.training
        return shapes, task, settings, params, gates, id(self._optimizer.state)

    def _gates_are_right(self) -> bool:
        """Whether the gates that the graph will read are those of the present weights and scores."""
        return self._graph_made_them() or self._wsn.gates.are_ready()

    def _graph_made_them(self) -> bool:
        """Whether the last replay made the gates, and no weight or score has changed since."""
        return self._versions is not None and self._versions == [*map(VERSION, self._gated)]

    @contextmanager
    def _settings_of_graph(self) -> Iterator[None]:
        """Let the graph read learning rates from memory, and tell PyTorch that its optimizer is captured."""
        groups = self._optimizer.param_groups
        names = ("lr", "capturable", "fused", "foreach")
        kept: list[dict[str, Any]] = [{name: group[name] for name in names if name in group} for group in groups]
        try:
            for group, rate in zip(groups, self._rates, strict=True):
                group["lr"] = rate
                if "capturable" in group:
                    group["capturable"] = True
                elif isinstance(self._optimizer, torch.optim.SGD):  # its other forms ask for the value of the rate
                    group["fused"], group["foreach"] = True, False
            yield
        finally:
            for group, values in zip(groups, kept, strict=True):
                group.update(values)

    def _note_changes(self) -> None:
        """Tell autograd what a replay has changed. A replay runs no Python code that could do this."""
        increment_version(self._changed)
        torch.clear_autocast_cache()  # it does not look at versions
        self._versions = [*map(VERSION, self._gated)]


@contextmanager
def _another_stream(device: torch.device) -> Iterator[None]:
    """On CUDA, work on another stream. At the end the current stream waits for it."""
    if device.type != "cuda":
        yield
        return
    here, there = torch.cuda.current_stream(), torch.cuda.Stream()
    there.wait_stream(here)
    with torch.cuda.stream(there):
        yield
    here.wait_stream(there)


def new_graph() -> Graph:
    """An empty graph of the current device."""
    return CudaGraph()


def clip_gradients(optimizer: torch.optim.Optimizer, max_norm: float) -> Tensor:
    """Clip the norm of all gradients of an optimizer, with its own ``clip_grad_norm_`` if it has one. Returns the norm
    before clipping, 0-d."""
    own = getattr(optimizer, "clip_grad_norm_", None)
    if own is not None:
        norm: Tensor = own(max_norm)
        return norm
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return torch.nn.utils.clip_grad_norm_(params, max_norm)
