"""A backend whose calls run as the replays of CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch


class Replays:
    """Captures each call in a CUDA graph and replays the graph once, so that what was captured is what is computed.

    A call whose plan is still empty runs eagerly: it copies the addresses of its tensors to the device, which is what
    the plan is for. The next one with the same plan is captured.

    Args:
        module: the backend. Its kernels have run on such tensors before, since none may be compiled in a capture.
        record: records a function and returns its result and what replays it; a CUDA graph if not given.
    """

    def __init__(
        self, module: Any, record: Callable[[Callable[[], Any]], tuple[Any, Callable[[], None]]] | None = None
    ) -> None:
        self._module, self._record = module, record or self._capture
        self._graphs: list[torch.cuda.CUDAGraph] = []  # a graph owns the memory of its results

    def __getattr__(self, operation: str) -> Callable[..., Any]:
        function = getattr(self._module, operation)

        def call(*args: Any) -> Any:
            if any(plan == {} for plan in _plans(args)):
                return function(*args)
            result, replay = self._record(lambda: function(*args))
            replay()
            return result

        return call

    def _capture(self, work: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = work()
        self._graphs.append(graph)
        return result, graph.replay


def _plans(args: tuple[Any, ...]) -> Iterator[dict[Any, Any]]:
    """The plans among the arguments of a call, and in a batch of updates."""
    for value in args:
        if isinstance(value, dict):
            yield value
        elif hasattr(value, "plan") and value.plan is not None:
            yield value.plan
