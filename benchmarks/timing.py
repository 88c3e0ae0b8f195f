"""The one timing of all benchmarks: medians with quantiles, and how they were taken.

On a GPU the calls are captured in a CUDA graph and its replays are timed with events, which leaves out the gaps between
launches. What cannot be captured is timed with events around eager calls, or by the host's clock if the call waits for
the device itself; the result says which. Steps of whole nets are timed as a loop of eager calls. On a CPU the host's
clock is used.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

Call = Callable[[], object]
MIN_REPEATS, MAX_REPEATS = 3, 200
_REPLAY_SECONDS = 2e-3  # long against the gap between replays
_MAX_LOOPS = 64
_LEAST_IN_A_LOOP = 5  # the first call of a row finds the device idle


class Timing(NamedTuple):
    """Microseconds per call. ``how`` is "graph", "loop", "events", "wall" or "host"; "events" comes with the reason why
    there is no graph."""

    median_us: float
    p20_us: float
    p80_us: float
    repeats: int
    how: str


def time_calls(
    calls: Sequence[Call], device: torch.device, *, seconds: float = 0.2, capture: bool = True, loop: bool = False
) -> Timing:
    """Time calls that do the same work on different data; returns the quantiles over the repeats, per call.

    Args:
        calls: called in turn; several where the data of one would stay in the L2 cache.
        device: where they work.
        seconds: about how long to measure, with at least ``MIN_REPEATS`` repeats; 0 for a single one, in a dry run.
        capture: whether they can be captured in a CUDA graph. Without it the host's clock is used.
        loop: whether to time eager calls in a row between two events, as a training loop makes them.
    """
    if device.type == "cpu":
        return _clocked(calls, seconds, lambda: None, "host")
    if not capture and not loop:
        return _clocked(calls, seconds, torch.cuda.synchronize, "wall")
    once = _once(calls)
    loops = max(1, min(_MAX_LOOPS, int(_REPLAY_SECONDS / once)))
    if loop:
        loops = max(loops, _LEAST_IN_A_LOOP)
        return _evented(_in_turn(list(calls) * loops), len(calls) * loops, once * loops, seconds, "loop")
    try:
        graph = capture_graph(list(calls) * loops)
    except Exception as error:  # any kind: a library's refusal to be captured is a reason, not the end of the row
        torch.cuda.synchronize()
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:120]
        return _evented(_in_turn(calls), len(calls), once, seconds, f"events (no graph: {reason})")
    return _evented(graph.replay, len(calls) * loops, once * loops, seconds, "graph")


def capture_graph(calls: Sequence[Call]) -> torch.cuda.CUDAGraph:
    """The calls in one CUDA graph, after a warm-up on a stream beside the default one."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in list(dict.fromkeys(calls)) * 2:
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def _in_turn(calls: Sequence[Call]) -> Call:
    def every() -> None:
        for call in calls:
            call()

    return every


def _once(calls: Sequence[Call]) -> float:
    """Seconds of all calls in turn, the first use of each left out."""
    every = _in_turn(calls)
    every()
    torch.cuda.synchronize()
    start = time.perf_counter()
    every()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def _evented(run: Call, calls_per_run: int, once: float, seconds: float, how: str) -> Timing:
    run()  # the first replay uploads the graph
    repeats = max(MIN_REPEATS if seconds else 1, min(MAX_REPEATS, int(seconds / max(once, 1e-6))))
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for start, end in events:
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return _quantiles([start.elapsed_time(end) * 1e3 / calls_per_run for start, end in events], how)


def _clocked(calls: Sequence[Call], seconds: float, wait: Call, how: str) -> Timing:
    calls[-1]()
    wait()
    times: list[float] = []
    begin = time.perf_counter()
    least = MIN_REPEATS if seconds else 1
    while len(times) < least or (time.perf_counter() - begin < seconds and len(times) < MAX_REPEATS):
        call = calls[len(times) % len(calls)]
        start = time.perf_counter()
        call()
        wait()
        times.append((time.perf_counter() - start) * 1e6)
    return _quantiles(times, how)


def _quantiles(times: list[float], how: str) -> Timing:
    median, low, high = (sorted(times)[int(share * len(times))] for share in (0.5, 0.2, 0.8))
    return Timing(median, low, high, len(times), how)
