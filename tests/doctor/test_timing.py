"""How doctor and benchmarks take times, and what the tuner makes of them."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator

import pytest
import torch

from wsn_fast.doctor.measuring import timing
from wsn_fast.doctor.tuning.entries import entry
from wsn_fast.doctor.tuning.gradients import GradientProduct
from wsn_fast.doctor.tuning.sweeps import IEEE
from wsn_fast.doctor.tuning.trials import Trials

CPU = torch.device("cpu")


def test_times_are_quantiles_of_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(10_000))
    monkeypatch.setattr(timing.time, "perf_counter", functools.partial(next, clock))
    result = timing.time_calls([lambda: None], CPU, seconds=10.0)
    assert result.median_us == result.p20_us == result.p80_us == 1e6  # the clock ticks once between start and end
    assert result.repeats >= timing.MIN_REPEATS and result.how == "host"


class SimulatedCuda:
    """As much of ``torch.cuda`` as the timing uses, on a clock that only calls move."""

    def __init__(self, *, capturable: bool = True) -> None:
        self.now, self.recorded, self.capturable = 0.0, None, capturable
        self.log: list[str] = []
        outer = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = outer.now

            def synchronize(self) -> None:
                pass

            def elapsed_time(self, end: Event) -> float:
                return end.at - self.at

        class CUDAGraph:
            def replay(self) -> None:
                outer.log.append("replay")
                for call in self.calls:
                    call()

        class Stream:
            def wait_stream(self, other: Stream) -> None:
                outer.log.append("wait")

        self.Event, self.CUDAGraph, self.Stream = Event, CUDAGraph, Stream
        self.current_stream = Stream
        self.stream = lambda stream: contextlib.nullcontext()

    def synchronize(self) -> None:
        self.log.append("synchronize")

    @contextlib.contextmanager
    def graph(self, graph: object) -> Iterator[None]:
        self.recorded = []
        try:
            yield
        finally:
            graph.calls, self.recorded = self.recorded, None

    def kernel(self, milliseconds: float) -> Callable[[], None]:
        def call() -> None:
            if self.recorded is None:
                self.now += milliseconds
            elif self.capturable:
                self.recorded.append(call)
            else:
                raise RuntimeError("operation not permitted when stream is capturing\nmore words")

        return call


def simulate(monkeypatch: pytest.MonkeyPatch, cuda: SimulatedCuda) -> None:
    monkeypatch.setattr(timing.torch, "cuda", cuda)
    monkeypatch.setattr(timing.torch, "empty", lambda *size, device: torch.zeros(1))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: cuda.now / 1e3)


def test_a_graph_is_replayed_over_all_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = SimulatedCuda()
    simulate(monkeypatch, cuda)
    result = timing.time_calls([cuda.kernel(0.010), cuda.kernel(0.030)], torch.device("cuda"), seconds=0.02)
    assert result.median_us == pytest.approx(20.0)
    assert result.how == "graph" and "replay" in cuda.log


def test_what_cannot_be_captured_is_timed_by_events_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = SimulatedCuda(capturable=False)
    simulate(monkeypatch, cuda)
    result = timing.time_calls([cuda.kernel(0.5)], torch.device("cuda"))
    assert result.median_us == pytest.approx(500.0)
    assert result.how.startswith("events (no graph: RuntimeError: operation not permitted")
    assert "more words" not in result.how


def test_what_waits_is_timed_by_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = SimulatedCuda()
    simulate(monkeypatch, cuda)
    result = timing.time_calls([cuda.kernel(2.0)], torch.device("cuda"), capture=False)
    assert result.median_us == pytest.approx(2000.0)
    assert result.how == "wall" and cuda.log.count("synchronize") == result.repeats + 1


def test_a_loop_is_timed_eagerly_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = SimulatedCuda()
    simulate(monkeypatch, cuda)
    result = timing.time_calls([cuda.kernel(3.0)], torch.device("cuda"), loop=True)
    assert result.median_us == pytest.approx(3000.0)
    assert result.how == "loop" and "replay" not in cuda.log
    assert cuda.log == ["synchronize", "synchronize", "synchronize"]  # after two warm-ups, and at the end


# --- turns
def test_contenders_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    calls = {name: [functools.partial(order.append, name)] for name in ("a", "b")}
    turns = timing.in_turns(calls, CPU, rounds=(4, 4))
    assert order == ["a", "b"] * 6  # two rounds are not timed
    assert [len(times) for times in turns.times.values()] == [4, 4]


def test_no_round_begins_after_the_end() -> None:
    turns = timing.in_turns({"a": [lambda: None]}, CPU, seconds=1.0, until=0.0)
    assert len(turns.times["a"]) == 1


def test_a_ratio_is_the_median_over_the_rounds() -> None:
    turns = timing.Turns({"a": [2.0, 9.0, 6.0], "b": [1.0, 1.0, 2.0]}, {"a": "host", "b": "host"})
    assert turns.ratio("a", "b") == 3.0  # of 2, 9 and 3: the medians have the ratio 6
    assert turns.timing("a").median_us == 6.0


def test_graphs_take_turns_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = SimulatedCuda()
    simulate(monkeypatch, cuda)
    contenders = {"a": [cuda.kernel(0.010), cuda.kernel(0.030)], "b": [cuda.kernel(5.0)]}
    turns = timing.in_turns(contenders, torch.device("cuda"), rounds=(3, 3))
    assert turns.timing("a").median_us == pytest.approx(20.0) and turns.timing("b").median_us == pytest.approx(5000.0)
    assert turns.how == {"a": "graph", "b": "graph"}


def test_what_cannot_be_captured_takes_its_turns_eagerly(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = SimulatedCuda(capturable=False)
    simulate(monkeypatch, cuda)
    turns = timing.in_turns({"a": [cuda.kernel(0.5)]}, torch.device("cuda"), rounds=(3, 3))
    assert turns.timing("a").median_us == pytest.approx(500.0)
    assert turns.how["a"].startswith("events (no graph: RuntimeError")


# --- what the tuner makes of times
def entries(trials: Trials, times: dict[int, tuple[float, float] | None]) -> list[dict[str, object]]:
    """Of a table that measures these times by rows: fused, and by memory; None fails."""

    def measure(trials: Trials, precision: object, what: str, product: GradientProduct) -> dict[str, object]:
        pair = times[product.rows]
        if pair is None:
            raise RuntimeError("out of memory")
        return {"us": pair[0], "us_dense": pair[1]}

    make = functools.partial(GradientProduct, (24, 40), device=CPU, dtype=torch.float32)
    return list(entry(trials, IEEE, "linear", (24, 40), make, list(times), measure))


@pytest.fixture
def trials() -> Trials:
    return Trials(CPU, lambda calls: 1.0, float("inf"))


def test_the_crossover_is_before_the_first_loss(trials: Trials) -> None:
    (entry,) = entries(trials, {1: (1.0, 2.0), 2: (1.0, 2.0), 4: (2.4, 2.0), 8: (1.0, 2.0)})
    assert entry["max_rows"] == 2
    assert [tile["rows"] for tile in entry["tiles"]] == [1, 2, 4, 8]


def test_a_form_that_has_clearly_lost_is_not_tried_further(trials: Trials) -> None:
    (entry,) = entries(trials, {1: (4.0, 2.0), 2: (1.0, 2.0)})
    assert entry["max_rows"] == 0
    assert len(entry["tiles"]) == 1


def test_a_failure_ends_an_entry_and_keeps_what_was_measured(trials: Trials) -> None:
    (entry,) = entries(trials, {1: (1.0, 2.0), 2: None, 4: (1.0, 2.0)})
    assert entry["max_rows"] == 1
    assert trials.not_measured == ["linear float32 ieee 24x40 scores b2: RuntimeError: out of memory"]


def test_what_nobody_has_measured_is_no_loss(trials: Trials) -> None:
    assert entries(trials, {1: None}) == []


def test_no_entry_after_the_deadline() -> None:
    late = Trials(CPU, lambda calls: 1.0, deadline=0.0)
    assert entries(late, {1: (1.0, 2.0)}) == []
    assert late.not_measured == ["linear float32 ieee 24x40 scores b1: no time left"]


def test_sums_are_split_until_every_processor_has_work(trials: Trials) -> None:
    trials.processors = 16
    assert trials.splits(programs=2, steps=100) == [1, 4, 8, 16]
    assert trials.splits(programs=2, steps=10) == [1, 4, 5]  # a part has two steps or more
    assert trials.splits(programs=64, steps=100) == [1]
