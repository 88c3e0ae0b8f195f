from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from wsn_fast.train import checkpoint, commands
from wsn_fast.train import command_line as cli
from wsn_fast.train.run import Run

SMALL = ["--tasks", "2", "--epochs", "2", "--batch-size", "128", "--device", "cpu"]


def test_training_says_what_it_does_and_what_came_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "rotated", *SMALL, "--out", str(tmp_path / "run")]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0].startswith("rotated digits: 2 tasks, mlp, density 0.3, rule magnitude, cpu")
    assert [line.split(":")[0] for line in lines[1:3]] == ["task 0 (1/2)", "task 1 (2/2)"]
    assert lines[3].startswith("ACC ")
    assert err == ""


def test_quiet_training_says_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", *SMALL, "--epochs", "1", "--out", str(tmp_path / "run"), "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")


def test_every_option_reaches_the_config(tmp_path: Path) -> None:
    given = {
        "stream": "split", "data": "digits", "tasks": 2, "class_order": "3,1,4,0", "classes_per_task": 2,
        "epochs": 1, "batch_size": 99, "density": 0.4,
        "rule": "value", "reinit_scores": True, "score_init": "N01", "net": "lenet", "optimizer": "sgd",
        "lr": 0.02, "weight_decay": 0.003, "one_pass": True, "moments": "8bit", "lr_patience": 4, "lr_factor": 5.0,
        "lr_min": 1e-5, "cuda_graph": "off", "memory_format": "channels_last", "augment": "crops",
        "val_fraction": 0.2, "threads": 1, "seed": 6, "device": "cpu", "checkpoint_seconds": 7.0, "preset": "paper",
        "data_dir": str(tmp_path), "workers": 0, "out": str(tmp_path / "run"),
    }  # fmt: skip
    words = [f"--{name.replace('_', '-')}={value}" for name, value in given.items() if name != "stream"]
    flags = ["--reinit-scores", "--one-pass"]
    words = [word for word in words if word.removesuffix("=True") not in flags]
    assert cli.main(["train", "split", *words, *flags, "--quiet"]) == 0
    assert json.loads((tmp_path / "run" / "config.json").read_text())["config"] == given


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ([], ["train", "eval", "report", "examples:"]),
        (["train"], ["tasks:", "method:", "training of each task:", "run:", "examples:", "default: 0.3", "--resume"]),
        (["eval"], ["RUN", "--checkpoint", "results.json"]),
        (["report"], ["RUN", "paper's numbers", "--csv FILE", "--latex FILE", "--paper"]),
    ],
    ids=["wsn-fast", "train", "eval", "report"],
)
def test_help_can_be_followed(command: list[str], words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main([*command, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert [word for word in words if word not in text] == []


def test_defaults_in_the_help_are_those_of_the_config(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert (
        "largest number of epochs per task (default: 20; 40 for digits; 5 for permuted mnist; 200 for split cifar100; "
        "50 for superclass cifar100; 100 for split omniglot" in text
    )
    assert (
        "number of tasks (default: 5; 10 for permuted mnist; 10 for split cifar100; 20 for superclass cifar100; "
        "100 for split omniglot; 40 for split folder)" in text
    )


ERRORS = [
    (["train", "--density", "1.5", "--out", "{new}"], "density: expected a number in (0, 1], got 1.5"),
    (["train", "--out", "{used}"], "--resume {used}"),
    (["train", "--data", "mnist", "--out", "{new}"], "'mnist' is read from a folder"),
    (["train", "--data", "mnist", "--data-dir", "{new}", "--out", "{new}"], "{new}: not a folder"),
    (
        ["train", "split", "--tasks", "3", "--out", "{new}"],
        "3 does not divide the 10 classes of 'digits'; 1, 2, 5, 10 do",
    ),
    (["train", "--data", "mnistt", "--out", "{new}"], "data: expected one of digits, mnist,"),
    (["train", "--data", "digits,mnist", "--out", "{new}"], "omniglot, folder, got 'digits,mnist'"),
    (["train", "datasets", "--data", "digits,", "--out", "{new}"], "with commas between them, got 'digits,'"),
    (["train", "datasets", "--data", "digits,..", "--out", "{new}"], "got 'digits,..'"),
    (["train", "superclass", "--out", "{new}"], "data: 'digits' has no superclasses"),
    (["train", "split", "--class-order", "2,1,2", "--out", "{new}"], "class_order: expected each number once, got 2"),
    (["train", "split", "--class-order", "2;1", "--out", "{new}"], "class_order: expected random, given, or numbers"),
    (["train", "--class-order", "given", "--out", "{new}"], "class_order: expected random for the stream permuted"),
    (
        ["train", "rotated", "--classes-per-task", "2", "--out", "{new}"],
        "classes_per_task: expected 0 for the stream",
    ),
    (["train", "--resume", "{new}"], "{new} holds no run"),
    (["train", "--resume", "{used}", "--epochs", "9"], "epochs"),
    (["train", "--resume", "{used}", "--checkpoint", "000099.safetensors"], "'000099.safetensors'"),
    (["train", "--checkpoint", "000001.safetensors", "--out", "{new}"], "--checkpoint: expected together with"),
    (["eval", "{new}"], "{new} holds no run"),
    (["report", "{new}"], "{new} holds no run"),
]


@pytest.mark.parametrize(("arguments", "message"), ERRORS, ids=[" ".join(e[0]) for e in ERRORS])
def test_a_users_mistake_is_one_line(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    places = {"new": str(tmp_path / "new"), "used": str(finished)}
    assert cli.main([word.format(**places) for word in arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("wsn-fast: error: ")
    assert err.count("\n") == 1
    assert message.format(**places) in err
    assert not (tmp_path / "new").exists()


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        cli.main(["eval", str(tmp_path), "--debug"])


def test_a_loss_that_is_not_finite_is_one_line_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    harsh = ["--optimizer", "sgd", "--lr", "1e30", "--quiet", "--out", str(tmp_path / "run")]
    assert cli.main(["train", *SMALL, *harsh]) == 1
    assert "wsn-fast: error: task 0, epoch 1: features." in capsys.readouterr().err


def test_a_cpu_without_memory_is_one_line_too(
    copy: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_much(*_: object, **__: object) -> None:
        torch.empty(1 << 55)

    monkeypatch.setattr(commands, "evaluate_run", too_much)
    assert cli.main(["eval", str(copy)]) == 2
    assert "allocate memory" in capsys.readouterr().err


def test_an_interrupted_run_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def finish(self: Run) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Run, "finish", finish)
    assert cli.main(["train", *SMALL, "--out", str(tmp_path / "run")]) == 130
    assert f"wsn-fast train --resume {tmp_path / 'run'}" in capsys.readouterr().err


# --- eval -------------------------------------------------------------------------------------------------
def test_eval_finds_every_number_again(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    assert cli.main(["eval", str(finished)]) == 0
    out = capsys.readouterr().out
    assert "2 of 2 tasks finished, all verified to the bit" in out
    assert f"every number is that of {finished / 'results.json'}" in out
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before


@pytest.mark.parametrize("name", ["acc", "capacity", "random_init", "reuse", "accuracy_matrix"])
def test_eval_names_a_number_that_differs(copy: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    path = copy / "results.json"
    results = json.loads(path.read_text())
    if name == "reuse":
        results[name][1]["reuse"] += 1e-9
    elif name == "accuracy_matrix":
        results[name][1][0] += 1
    elif name == "random_init":
        results[name][0] += 1
    else:
        results[name] += 1e-9
    path.write_text(json.dumps(results))
    assert cli.main(["eval", str(copy)]) == 1
    err = capsys.readouterr().err
    assert [line.split(": ")[:3] for line in err.splitlines()] == [["wsn-fast", "differs", name]]


def test_eval_measures_and_does_not_copy(
    copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("wsn_fast.train.run.evaluate", lambda wsn, samples, *rest: (0.0, 12.5))
    assert cli.main(["eval", str(copy)]) == 1
    named = {line.split(": ")[2] for line in capsys.readouterr().err.splitlines()}
    assert {"accuracy_matrix", "acc", "random_init"} <= named


def test_eval_names_a_task_that_was_forgotten(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = checkpoint.load_from(copy / "checkpoint")
    kept.tensors["model/model.features.1.weight"] += 1e-3
    checkpoint.save(copy / "checkpoint", kept.number + 1, kept.state, kept.tensors)
    assert cli.main(["eval", str(copy)]) == 1
    assert "task 0: features.1.weight" in capsys.readouterr().err


def test_eval_of_an_unfinished_run_has_nothing_to_compare_with(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (copy / "results.json").unlink()
    assert cli.main(["eval", str(copy), "--checkpoint", "000006.safetensors"]) == 0
    out = capsys.readouterr().out
    assert "1 of 2 tasks finished" in out
    assert "nothing to compare with" in out


def test_eval_before_any_task_is_finished_is_an_error(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = checkpoint.load_from(copy / "checkpoint")
    kept.state["progress"]["matrix"] = []
    checkpoint.save(copy / "checkpoint", kept.number + 1, kept.state, kept.tensors)
    assert cli.main(["eval", str(copy)]) == 2
    assert "no task has been finished yet" in capsys.readouterr().err


# --- report -----------------------------------------------------------------------------------------------
def test_report_prints_a_row_per_run_and_draws_again(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    other = Path(shutil.copytree(copy, tmp_path / "other"))
    (copy / "capacity.png").unlink()
    assert cli.main(["report", str(copy), str(other)]) == 0
    rows = [line.split("  ")[:2] for line in capsys.readouterr().out.splitlines()[1:3]]
    assert [name for name, _ in rows] == [str(copy), str(other)]
    assert (copy / "capacity.png").is_file()


@pytest.mark.parametrize("text", ["", "[]", '{"acc": 1.0}'])
def test_report_names_a_damaged_file(copy: Path, capsys: pytest.CaptureFixture[str], text: str) -> None:
    (copy / "results.json").write_text(text)
    assert cli.main(["report", str(copy)]) == 2
    assert f"{copy / 'results.json'} is damaged" in capsys.readouterr().err
