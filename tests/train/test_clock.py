"""Where the time of a task goes."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from stopping_console import Stop, StoppingConsole

from wsn_fast.train import checkpoint, clock
from wsn_fast.train.config import TrainConfig, resolve
from wsn_fast.train.progress import Progress
from wsn_fast.train.report import Console
from wsn_fast.train.run import Run


@pytest.fixture
def seconds(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """The time, which a test sets: its only element."""
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    yield now


@pytest.fixture
def settings(tmp_path: Path) -> TrainConfig:
    return resolve(tasks=2, epochs=2, batch_size=128, device="cpu", out=str(tmp_path / "run"))


def lines(settings: TrainConfig) -> list[dict[str, float]]:
    entries = map(json.loads, (Path(settings.out) / "metrics.jsonl").read_text().splitlines())
    return [entry["time"] for entry in entries if entry["kind"] == "task"]


def test_every_second_is_of_one_part(seconds: list[float]) -> None:
    measured = clock.Clock()
    with measured.measures("training"):
        seconds[0] += 5
        with measured.measures("checkpoints"):
            seconds[0] += 1
        seconds[0] += 0.5
    with pytest.raises(KeyError), measured.measures("data"):
        seconds[0] += 2
        raise KeyError
    seconds[0] += 3
    expected = {"data": 2.0, "training": 5.5, "evaluation": 0.0, "checkpoints": 1.0, "other": 3.0}
    assert measured.so_far() == expected
    assert measured.take() == expected
    seconds[0] += 1
    assert measured.so_far() == {**dict.fromkeys(clock.PARTS, 0.0), "other": 1.0}


def test_what_an_earlier_process_measured_is_added(seconds: list[float]) -> None:
    measured = clock.Clock()
    seconds[0] += 1
    measured.add({"training": 4.0, "other": 2.0})
    assert measured.so_far() == {"data": 0.0, "training": 4.0, "evaluation": 0.0, "checkpoints": 0.0, "other": 3.0}


def test_a_run_says_where_the_time_of_each_task_went(settings: TrainConfig, capsys: pytest.CaptureFixture[str]) -> None:
    began = time.perf_counter()
    Run.start(settings, Console()).finish()
    elapsed = time.perf_counter() - began
    logged = lines(settings)
    assert len(logged) == 2
    assert all([*spent] == [*clock.PARTS, "other"] and min(spent.values()) > 0 for spent in logged)
    assert sum(sum(spent.values()) for spent in logged) <= elapsed
    said = capsys.readouterr().out.splitlines()
    assert [clock.in_words(spent) in line for spent, line in zip(logged, said, strict=True)] == [True, True]


def test_a_resumed_task_counts_the_seconds_before_its_checkpoint(settings: TrainConfig) -> None:
    with pytest.raises(Stop):
        Run.start(settings, StoppingConsole(12)).finish()  # in the second epoch
    folder = Path(settings.out)
    before = checkpoint.load_from(folder / "checkpoint").state["progress"]["time"]
    assert before["training"] > 0
    resumed = Run.resume(folder, Console(quiet=True))
    resumed._clock.add({"training": 1000.0})  # as if the first process had taken longer
    resumed.finish()
    first, second = lines(settings)
    assert first["training"] > 1000.0 + before["training"] and first["data"] > before["data"]
    assert sum(second.values()) < 1000.0


@pytest.mark.parametrize("time", [{"sleeping": 1.0}, {"data": -1.0}, {"data": "1"}, {"data": float("inf")}])
def test_a_checkpoint_with_other_times_is_refused(time: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"time|number"):
        Progress.from_json({"random_init": [1.0], "before": [1.0], "time": time})
