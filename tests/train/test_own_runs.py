"""Runs over tasks with data of one's own."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import own_tasks
import pytest
import torch
from same_end import assert_same_end
from seen_loading import Seen
from stopping_console import Stop, StoppingConsole

from wsn_fast import WSN
from wsn_fast.train import checkpoint, records
from wsn_fast.train.command_line import main
from wsn_fast.train.config import resolve
from wsn_fast.train.report import Console
from wsn_fast.train.run import Run
from wsn_fast.train.samples.users_code import LoadingError
from wsn_fast.train.streams import own_code

CODE = own_tasks.__file__
SMALL = {"net": "mlp", "epochs": 3, "batch_size": 32, "device": "cpu", "lr": 0.01, "preset": "clarena"}
WORDS = [word for name, value in SMALL.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def settings(folder: Path, make: str, **more: Any) -> Any:
    return resolve(stream="own", data=f"{CODE}:{make}", out=str(folder), **{**SMALL, **more})


@pytest.mark.parametrize("make", ["datasets", "loaders", "of_unknown_length"])
def test_a_run_learns_and_forgets_nothing(make: str, tmp_path: Path) -> None:
    run = Run.start(settings(tmp_path / "run", make), Console(quiet=True))
    results = run.finish()
    assert results["bwt"] == 0.0
    assert min(results["accuracy_matrix"][-1]) > 80
    assert results["config"]["tasks"] == len(run.stream) == len(results["accuracy_matrix"])
    log = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    begun = [line["train_samples"] for line in log if line["kind"] == "begin"]
    assert begun == {"datasets": [190] * 3, "loaders": [190] * 3, "of_unknown_length": [None] * 2}[make]
    assert all(line["time"]["data"] > 0 for line in log if line["kind"] == "task")
    assert records.read(str(tmp_path / "run")).notes == []


def test_the_opening_of_the_data_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = Seen()
    monkeypatch.setattr(Console, "loading", lambda self, *about: seen(*about))
    Run.start(settings(tmp_path / "run", "datasets"), Console(quiet=True))
    assert seen.counts == {"opening the data of tasks": (3, 3)}


@pytest.mark.parametrize(
    ("make", "workers"), [("datasets", 0), ("loaders", 0), pytest.param("datasets", 2, marks=pytest.mark.ci)]
)
@pytest.mark.parametrize("steps", [9, 20, 31])
def test_a_run_that_is_resumed_ends_the_same(make: str, workers: int, steps: int, tmp_path: Path) -> None:
    """With noise and order drawn anew in each epoch, wherever it was stopped."""
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    Run.start(settings(whole, make, workers=workers), Console(quiet=True)).finish()
    with pytest.raises(Stop):
        Run.start(settings(stopped, make, workers=workers), StoppingConsole(steps)).finish()
    torch.rand(7)  # another process has other random numbers
    Run.resume(stopped, Console(quiet=True), data=f"{CODE}:{make}").finish()
    assert_same_end(stopped, whole)


def test_batches_that_do_not_fit_are_trained_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forward, sizes = WSN.forward, set()

    def limited(self: WSN, x: torch.Tensor) -> torch.Tensor:
        if self.training and len(x) > 16:
            raise torch.OutOfMemoryError("out of memory")
        sizes.add(len(x) if self.training else None)
        return forward(self, x)

    monkeypatch.setattr(WSN, "forward", limited)
    for make in ("datasets", "loaders"):
        results = Run.start(settings(tmp_path / make, make), Console(quiet=True)).finish()
        assert min(results["accuracy_matrix"][-1]) > 80
    assert sizes >= {16, None}


def test_images_are_augmented_on_request(tmp_path: Path) -> None:
    plain, crops = (
        Run.start(settings(tmp_path / augment, "datasets", augment=augment, tasks=1), Console(quiet=True)).finish()
        for augment in ("none", "crops")
    )
    assert plain["acc"] > crops["acc"]  # the places of the pixels say the label


# --- the command -----------------------------------------------------------------------------------
def test_the_command_trains_measures_and_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, run = f"{CODE}:datasets", str(tmp_path / "run")
    assert main(["train", "own", "--data", code, *WORDS, "--tasks", "2", "--workers", "1", "--out", run]) == 0
    assert json.loads((tmp_path / "run" / "config.json").read_text())["config"]["workers"] == 1
    assert "own_tasks.py:datasets: 2 tasks, mlp" in capsys.readouterr().out
    assert main(["eval", run, "--data", code]) == 0
    assert main(["report", run]) == 0


def test_no_code_runs_because_a_folder_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, run = f"{CODE}:datasets", tmp_path / "run"
    assert main(["train", "own", "--data", code, *WORDS, "--tasks", "2", "--out", str(run), "--quiet"]) == 0
    monkeypatch.setattr(own_code, "call", lambda *_: pytest.fail("the code has run"))
    for words in (["train", "--resume"], ["eval"]):
        assert main([*words, str(run)]) == 2
        said = capsys.readouterr().err
        assert "data: expected --data FILE.py:FUNCTION, the code that makes the tasks, because the folder" in said
        assert main([*words, str(run), "--data", ""]) == 2
        assert "data: expected FILE.py:FUNCTION or MODULE:FUNCTION" in capsys.readouterr().err
    assert main(["report", str(run)]) == 0


def test_a_file_that_was_moved_makes_the_same_tasks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, run = f"{CODE}:datasets", tmp_path / "run"
    with pytest.raises(Stop):
        Run.start(settings(run, "datasets", tasks=2), StoppingConsole(9)).finish()
    moved = tmp_path / "moved_tasks.py"
    moved.write_text(Path(CODE).read_text())
    assert main(["train", "--resume", str(run), "--data", f"{moved}:datasets", "--quiet"]) == 0
    assert main(["eval", str(run), "--data", code]) == 0


def test_other_tasks_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    with pytest.raises(Stop):
        Run.start(settings(run, "datasets", tasks=2), StoppingConsole(9)).finish()
    assert main(["train", "--resume", str(run), "--data", f"{CODE}:of_unknown_length"]) == 2
    assert "data: expected those with fingerprint" in capsys.readouterr().err


def test_other_streams_need_no_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(tmp_path / "run")
    assert main(["train", "--tasks", "1", "--epochs", "1", "--device", "cpu", "--out", run, "--quiet"]) == 0
    assert main(["eval", run, "--data", f"{CODE}:datasets"]) == 2
    assert "data: expected none, since those of the run are 'digits', got" in capsys.readouterr().err


def test_a_sweep_over_tasks_of_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["sweep", "own", "--data", f"{CODE}:datasets", *WORDS, "--seeds", "1,2", "--out", str(tmp_path / "sweep")]
    assert main(words) == 0
    runs = sorted((tmp_path / "sweep").glob("density*/results.json"))
    assert [json.loads(run.read_text())["config"]["tasks"] for run in runs] == [3, 3]
    first = runs[0].read_bytes()
    for name in ("results.json", "checkpoint"):
        path = runs[0].with_name(name)
        if path.is_file():
            path.unlink()
    assert main(words) == 0  # goes on with the run that is not finished, and names the code again
    assert runs[0].read_bytes() == first


def test_code_that_fails_shows_where(tmp_path: Path) -> None:
    (tmp_path / "failing_tasks.py").write_text("def make(folder): return [1 / 0]")
    with pytest.raises(LoadingError, match=r"failing_tasks.py:make: .*: ZeroDivisionError: division by zero"):
        main(["train", "own", "--data", f"{tmp_path / 'failing_tasks.py'}:make", "--out", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


def test_a_damaged_sample_stops_the_run_and_keeps_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "damaged_tasks.py"
    file.write_text(
        "import own_tasks\nfrom torch.utils.data import TensorDataset\n"
        "def make(folder):\n"
        "    first, second, _ = own_tasks.datasets(None)\n"
        "    x, y = own_tasks.samples(1, 200)\n"
        "    return [first, second._replace(train=TensorDataset(x, y + (y == 3)))]\n"
    )
    run = tmp_path / "run"
    assert main(["train", "own", "--data", f"{file}:make", *WORDS, "--out", str(run), "--quiet"]) == 2
    assert "damaged_tasks.py:make: task 1, train: expected labels from 0 to 3, got 4" in capsys.readouterr().err
    assert checkpoint.load_from(run / "checkpoint").state["progress"]["task"] == 1


@pytest.mark.ci
def test_the_commands_of_the_page_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[2] / "docs/how-to/own-data.md").read_text("utf-8")
    section = page.partition("## With the driver and your own code")[2]
    code, commands = re.findall(r"```(?:python|sh)\n(.*?)```", section, re.S)
    monkeypatch.chdir(tmp_path)
    Path("my_tasks.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    for line in commands.splitlines():
        assert main(shlex.split(line)[1:]) == 0, line
    assert json.loads(Path("runs/own/results.json").read_text())["acc"] > 60
