"""A grid of runs as one command."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from wsn_fast.train import children, sweep, sweep_display
from wsn_fast.train.children import Job, Pool
from wsn_fast.train.command_line import main
from wsn_fast.train.folder import read_config
from wsn_fast.train.lock import FolderLock, RunInUseError
from wsn_fast.train.report import Console

ROOT = Path(__file__).parents[2]
SMALL = ["--tasks", "2", "--epochs", "1", "--batch-size", "128", "--device", "cpu"]


def alive(number: int) -> bool:
    try:
        os.kill(number, 0)
        return "\nState:\tZ" not in Path(f"/proc/{number}/status").read_text() if Path("/proc").is_dir() else True
    except (ProcessLookupError, FileNotFoundError):  # it may end between the two looks
        return False


def wait_until(happened: object, seconds: float = 120.0) -> None:
    ends = time.monotonic() + seconds
    while not happened():  # type: ignore[operator]
        assert time.monotonic() < ends, "it has not happened"
        time.sleep(0.01)


# --- the grid ---------------------------------------------------------------------------------------------
def test_each_density_and_seed_has_a_run_with_the_other_settings() -> None:
    made = sweep.make_sweep({"epochs": 3, "out": "grid"}, [0.05, 0.1], [1, 2])
    assert [(run.density, run.seed, run.epochs, run.out) for run in made.runs.values()] == [
        (density, seed, 3, f"grid/density{density}-seed{seed}") for density in (0.05, 0.1) for seed in (1, 2)
    ]
    alone = sweep.make_sweep({"density": 0.2, "seed": 7})
    assert [*alone.runs] == ["density0.2-seed7"] and alone.folder == Path("sweeps/permuted-digits-paper")


@pytest.mark.parametrize(
    ("given", "grid", "says"),
    [
        ({"density": 0.3}, {"densities": [0.1]}, r"density: .*--densities, got 0\.3"),
        ({}, {"seeds": [1, 2, 1]}, "seeds: expected each value once, got 1,2,1"),
        ({}, {"densities": [0.1, 2.0]}, r"density: expected a number in \(0, 1\], got 2\.0"),
    ],
)
def test_a_grid_that_makes_no_sense_is_refused(
    given: dict[str, float], grid: dict[str, list[float]], says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        sweep.make_sweep(given, **grid)  # type: ignore[arg-type]


def test_a_run_gets_every_setting_of_the_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {
        "lr": 0.02,
        "reinit_scores": True,
        "one_pass": False,
        "data_dir": str(tmp_path),
        "out": str(tmp_path / "s"),
    }
    (run,) = sweep.make_sweep(given, seeds=[4]).runs.values()
    from wsn_fast.train import command_line, commands

    args = command_line._parser().parse_args(sweep._words(run))
    assert commands._settings(args, Console(quiet=True)) == run


# --- the processes ----------------------------------------------------------------------------------------
@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Each job is a Python program of its words, which needs no PyTorch."""
    popen = subprocess.Popen

    def started(command: Sequence[str], **kwargs: object) -> subprocess.Popen[bytes]:
        return popen([sys.executable, "-c", command[3]], **kwargs)  # type: ignore[call-overload, no-any-return]

    monkeypatch.setattr(subprocess, "Popen", started)
    yield


def job(folder: Path, name: str, program: str) -> Job:
    return Job(name, folder / name, [program], folder / f"{name}.log")


def run_all(pool: Pool) -> int:
    """Bring all jobs to their end. Returns how many ran at the same time at most."""
    most = 0
    while True:
        pool.advance()
        most = max(most, len(pool.running))
        if not pool.running:
            return most
        time.sleep(0.01)


@pytest.mark.usefixtures("stand_in")
def test_so_many_run_at_a_time_each_with_its_environment(tmp_path: Path) -> None:
    jobs = [job(tmp_path, str(i), "import os; print(os.environ['PLACE'])") for i in range(5)]
    with Pool(jobs, 2, [{"PLACE": "a"}, {"PLACE": "b"}]) as pool:
        assert run_all(pool) == 2
    assert [each.code for each in jobs] == [0] * 5
    assert {each.last_line() for each in jobs} == {"a", "b"}


@pytest.mark.usefixtures("stand_in")
def test_a_failed_job_has_an_exit_code_and_a_last_line(tmp_path: Path) -> None:
    bad = job(tmp_path, "bad", "print('begun'); raise SystemExit('wsn-fast: error: no such file\\n')")
    killed = job(tmp_path, "killed", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    with Pool([bad, killed], 2) as pool:
        run_all(pool)
    assert (bad.code, bad.last_line()) == (1, "no such file")
    assert (killed.code, killed.last_line()) == (-signal.SIGKILL, "exit code -9")


@pytest.mark.usefixtures("stand_in")
def test_leaving_the_pool_ends_its_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(children, "_PATIENCE", 0.1)
    stubborn = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); time.sleep(99)"
    )
    jobs = [
        job(tmp_path, "mild", "import time; print(1, flush=True); time.sleep(99)"),
        job(tmp_path, "stubborn", stubborn),
    ]
    with pytest.raises(KeyboardInterrupt), Pool([*jobs, job(tmp_path, "late", "print(1)")], 2) as pool:
        pool.advance()
        wait_until(lambda: all(each.log.read_text() for each in jobs))
        raise KeyboardInterrupt
    assert [each.code for each in jobs] == [-signal.SIGTERM, -signal.SIGKILL]
    assert not (tmp_path / "late.log").exists()


def test_a_child_ends_with_its_parent() -> None:
    code = (
        "import os, sys, threading, time; sys.argv[1:] = []\n"
        "from wsn_fast.train import child\n"
        "threading.Thread(target=child._follow_parent, daemon=True).start()\n"
        "print(os.getpid(), flush=True); time.sleep(99)"
    )
    program = (
        f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {code!r}], stdin=subprocess.PIPE); "
        "time.sleep(99)"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, cwd=ROOT) as parent:
        assert parent.stdout is not None
        number = int(parent.stdout.readline())
        assert alive(number)
        parent.kill()
        wait_until(lambda: not alive(number), 20)


# --- the folder -------------------------------------------------------------------------------------------
def written(made: sweep.Sweep) -> sweep.Sweep:
    made.folder.mkdir()
    sweep._check_or_write(made)
    return made


def test_another_sweep_in_the_folder_is_refused_by_name(tmp_path: Path) -> None:
    given = {"epochs": 3, "out": str(tmp_path / "s")}
    written(sweep.make_sweep(given, [0.1], [1, 2]))
    sweep._check_or_write(sweep.make_sweep({**given, "data_dir": str(tmp_path)}, [0.1], [1, 2]))  # the same one
    other = sweep.make_sweep({**given, "epochs": 4}, [0.1, 0.2], [1, 2])
    with pytest.raises(ValueError, match=r"out: .*sweep\.json, but these are others: epochs, densities\."):
        sweep.run_sweep(other)
    (tmp_path / "s" / "sweep.json").write_text("{}")
    with pytest.raises(ValueError, match=r"sweep\.json is damaged"):
        sweep.run_sweep(other)


def test_the_folder_of_a_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").touch()
    with pytest.raises(ValueError, match=r"out: expected a folder for a sweep, and .* is that of a run"):
        sweep.run_sweep(sweep.make_sweep({"out": str(tmp_path)}))


@pytest.mark.parametrize(
    ("processes", "jobs", "says"), [("2", None, "sweep: expected one process"), ("1", 0, "jobs: .* got 0")]
)
def test_a_sweep_in_several_processes_or_without_jobs_is_refused(
    processes: str, jobs: int | None, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", processes)
    with pytest.raises(ValueError, match=says):
        sweep.run_sweep(sweep.make_sweep({"out": str(tmp_path / "s")}), jobs)
    assert not (tmp_path / "s").exists()


def test_a_sweep_that_another_process_runs_is_refused(tmp_path: Path) -> None:
    made = written(sweep.make_sweep({"out": str(tmp_path / "s")}))
    lock = FolderLock(made.folder)
    lock.acquire()
    try:
        with pytest.raises(RunInUseError, match="is in use"):
            sweep.run_sweep(made)
    finally:
        lock.release()


def test_a_begun_run_is_continued_and_a_new_one_begun(tmp_path: Path) -> None:
    made = sweep.make_sweep({"out": str(tmp_path), "data_dir": "data"}, seeds=[1])
    (run,) = made.runs.values()
    assert sweep._words(run)[:2] == ["train", "permuted"] and sweep._words(run)[-4:-2] == ["--out", run.out]
    Path(run.out).mkdir()
    (Path(run.out) / "config.json").touch()
    assert sweep._words(run) == ["train", "--resume", run.out, "--data-dir", "data"]


@pytest.mark.parametrize(
    ("visible", "names"), [(None, ["0", "1"]), ("3,5", ["3", "5"]), ("GPU-1a", ["GPU-1a"])], ids=str
)
def test_runs_take_the_gpus_in_turn(visible: str | None, names: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: len(names))
    assert sweep._gpus("auto") == names
    assert sweep._gpus("cpu") == []


def test_a_log_is_read_while_it_grows(tmp_path: Path) -> None:
    log, path = sweep_display.Log(tmp_path, 2, 5), tmp_path / "metrics.jsonl"
    assert (log.read(), log.says) == ([], "")
    epoch = json.dumps({"kind": "epoch", "task": 0, "epoch": 3, "val_acc": 90.0})
    path.write_text(f"{epoch}\nnonsense\n[1]\n" + '{"kind": "task", "ta')
    assert (log.read(), log.says) == ([], "task 1/2, epoch 3/5, validation 90.0 %")
    with open(path, "a") as file:
        file.write('sk": 0, "test_acc": [91.5]}\n')
    assert log.read() == ["task 1/2 has ended, test accuracy 91.50 %"]
    path.write_text(f"{epoch}\n")  # a resumed run
    assert (log.read(), log.says) == ([], "task 1/2, epoch 3/5, validation 90.0 %")


def test_a_terminal_has_a_line_for_each_run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr("shutil.get_terminal_size", lambda: os.terminal_size((20, 6)))
    display = sweep_display.Display(["a", "b", "c"])
    display.changed("a", "finished, ACC 90.00 %")
    display.draw({"b": "task 1/2"})
    assert capsys.readouterr().out == "\x1b[Ja: finished, ACC 90\nb: task 1/2\nc: waits\n"
    display.draw({"c": "begins"})
    assert capsys.readouterr().out.startswith("\x1b[3A\x1b[J")
    many = sweep_display.Display([str(i) for i in range(9)])
    many.draw({"7": "begins"})
    assert capsys.readouterr().out == "\x1b[J7: begins\n0: waits\n1: waits\n... and 6 more\n"


# --- whole sweeps -----------------------------------------------------------------------------------------
@pytest.mark.ci
def test_a_run_that_fails_does_not_stop_the_others(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "s"
    command = ["sweep", "permuted", *SMALL, "--seeds", "1,2,3", "--densities", "0.3", "--jobs", "2", "--out", str(out)]
    (out / "density0.3-seed1").mkdir(parents=True)
    (out / "density0.3-seed1" / "mine.txt").touch()
    locked = out / "density0.3-seed3"
    locked.mkdir()
    lock = FolderLock(locked)
    lock.acquire()
    assert main(command) == 1
    lock.release()
    said, error = capfd.readouterr()
    assert "density0.3-seed2: begins\n" in said and "density0.3-seed2: task 2/2 has ended" in said
    assert error.startswith(f"wsn-fast: error: {out / 'density0.3-seed1'}: out: expected an empty or new folder")
    assert f"\nwsn-fast: error: {locked}: {locked} is in use: another process is at work" in error
    assert (out / "report.html").is_file()
    (out / "density0.3-seed1" / "mine.txt").unlink()
    results = out / "density0.3-seed2" / "results.json"
    before = results.stat().st_mtime_ns
    assert main(command) == 0
    assert results.stat().st_mtime_ns == before, "a finished run is left alone"
    assert "density0.3-seed1: finished, ACC" in capfd.readouterr().out


def processes_of(folder: Path) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode(errors="replace")
        except OSError:
            continue
        if str(folder) in words and "wsn_fast.train.child" in words:
            found.append(int(path.parent.name))
    return found


@pytest.mark.ci
@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="finds processes in /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_sweep_leaves_no_process_and_continues(number: signal.Signals, tmp_path: Path) -> None:
    out = tmp_path / "s"
    words = ["sweep", *SMALL, "--epochs", "30", "--seeds", "1,2", "--jobs", "2", "--out", str(out), "--quiet"]
    command = [sys.executable, "-m", "wsn_fast.train", *words]
    logs = [out / f"density0.3-seed{seed}" / "metrics.jsonl" for seed in (1, 2)]
    held: dict[Path, int] = {}

    def are_held() -> bool:
        """Hold each run where its log has four lines: it would end while the other one still begins."""
        for log in logs:
            if log not in held and log.is_file() and log.read_text().count("\n") > 3:
                [held[log]] = processes_of(log.parent)
                os.kill(held[log], signal.SIGSTOP)
        return len(held) == len(logs)

    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True) as started:
        try:
            wait_until(are_held)
            started.send_signal(number)
        finally:
            for process in held.values():
                os.kill(process, signal.SIGCONT)
        _, error = started.communicate(timeout=60)
    wait_until(lambda: not processes_of(out), 20)
    if number != signal.SIGKILL:
        assert error == f"wsn-fast: interrupted; the same command continues the sweep in {out}\n"
        assert started.returncode == 130
    assert not any((log.parent / "results.json").exists() for log in logs)
    assert main(words) == 0
    assert [read_config(log.parent).seed for log in logs] == [1, 2]
    assert "--resume" not in (out / "density0.3-seed1.log").read_text()
    assert all(log.read_text().count('"kind": "begin"') == 2 for log in logs), "they were resumed, not begun again"
