"""The one timing of doctor and benchmarks: medians with quantiles, and how they were taken.

On a GPU the calls are captured in a CUDA graph and its replays are timed with events, which leaves out the gaps between
launches. What cannot be captured is timed with events around eager calls, or by the host's clock if the call waits for
the device itself; the result says which. Steps of whole nets are timed as a loop of eager calls. On a CPU the host's
clock is used.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
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
    if device.type != "cuda":
        return _clocked(calls, seconds, _nothing, "host")
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
        return _evented(_in_turn(calls), len(calls), once, seconds, _not_captured(error))
    return _evented(graph.replay, len(calls) * loops, once * loops, seconds, "graph")


class Turns(NamedTuple):
    """Microseconds per call of contenders that took turns, one list with a time for each round; and how each was timed,
    as in :class:`Timing`."""

    times: dict[str, list[float]]
    how: dict[str, str]

    def timing(self, name: str) -> Timing:
        """The quantiles of a contender."""
        return _quantiles(self.times[name], self.how[name])

    def ratio(self, name: str, to: str) -> float:
        """The median over the rounds of a contender's time over that of another one."""
        return statistics.median(mine / other for mine, other in zip(self.times[name], self.times[to], strict=True))


def in_turns(
    contenders: Mapping[str, Sequence[Call]],
    device: torch.device,
    *,
    seconds: float = 0.2,
    rounds: tuple[int, int] = (MIN_REPEATS, MAX_REPEATS),
    until: float = math.inf,
) -> Turns:
    """Time contenders in turns, so that what else runs on the machine meets them all alike.

    Args:
        contenders: calls by name; those of a contender do the same work on different data, as in :func:`time_calls`.
        device: where they work.
        seconds: about how long to measure all of them together.
        rounds: at least and at most so many.
        until: of ``time.monotonic``: after it no round but the first is begun.
    """
    wait = torch.cuda.synchronize if device.type == "cuda" else _nothing
    runs = {name: _run_of(calls, device) for name, calls in contenders.items()}
    for run, _, _ in runs.values():  # the first replay uploads a graph
        run()
    wait()
    start = time.perf_counter()
    for run, _, _ in runs.values():
        run()
    wait()
    count = max(rounds[0], min(rounds[1], int(seconds / max(time.perf_counter() - start, 1e-6))))
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(count):
        if turn and time.monotonic() > until:
            break
        for name, (run, calls, _) in runs.items():
            times[name].append(_span(run, device) / calls)
    return Turns(times, {name: how for name, (_, _, how) in runs.items()})


def _run_of(calls: Sequence[Call], device: torch.device) -> tuple[Call, int, str]:
    """What is timed as one: a call on a CPU, a graph of all calls on a GPU; how many calls that is, and how it runs."""
    if device.type != "cuda":
        turns = itertools.cycle(calls)
        return lambda: next(turns)(), 1, "host"
    loops = max(1, min(_MAX_LOOPS, int(_REPLAY_SECONDS / _once(calls))))
    try:
        return capture_graph(list(calls) * loops).replay, len(calls) * loops, "graph"
    except Exception as error:  # any kind: a library's refusal to be captured is a reason, not the end of the row
        torch.cuda.synchronize()
        return _in_turn(calls), len(calls), _not_captured(error)


def _span(run: Call, device: torch.device) -> float:
    """Microseconds of one run."""
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return (time.perf_counter() - start) * 1e6
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    run()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) * 1e3


def _nothing() -> None:
    pass


def _not_captured(error: Exception) -> str:
    reason = f"{type(error).__name__}: {error}".splitlines()[0][:120]
    return f"events (no graph: {reason})"


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
