"""Folders of runs that somebody made to harm: bounded memory, nothing written through a link, and the other runs are
still reported."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import struct
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import zstandard
from pages import Page
from peak_memory import peak_of

from wsn_fast.nn import json_text
from wsn_fast.page import markup
from wsn_fast.train import checkpoint, page, records, safe_files, task_logs
from wsn_fast.train import command_line as cli
from wsn_fast.train.checkpoint import Checkpoint, CheckpointError
from wsn_fast.train.config import resolve
from wsn_fast.train.folder import read_config
from wsn_fast.train.loop import make_optimizer
from wsn_fast.train.report import Console
from wsn_fast.train.run import Run

GIB = 1 << 30

# --- JSON ------------------------------------------------------------------------------------------------------------
HARD_JSON = {
    "deep lists": "[" * 100_000,
    "deep objects": '{"a":' * 100_000,
    "deep and closed": "[" * 2_000 + "]" * 2_000,
    "deep after a string with brackets": '["]]]]]]]",' + "[" * 100 + "]" * 101,
    "not a number": '{"acc": NaN}',
    "infinite": '{"acc": -Infinity}',
    "too large": '{"acc": 1e999}',
    "a long integer": '{"acc": ' + "9" * 5_000 + "}",
    "an integer beyond floats": '{"acc": ' + "9" * 400 + "}",
    "no UTF-8": b'{"acc": "\xff"}',
}


@pytest.mark.parametrize("text", HARD_JSON.values(), ids=HARD_JSON)
def test_json_that_is_deep_huge_or_not_finite_is_refused(text: str | bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        json_text.parse(text)


@pytest.mark.parametrize("value", [{"a": [1, 2.5e-300, -0.0, None, True, '"[{\\"']}, [[[]]] * 70, 10**99, "[" * 99])
def test_ordinary_json_is_read_as_python_reads_it(value: Any) -> None:
    assert json_text.parse(json.dumps(value)) == value


LINES = [
    '{"kind": "epoch", "task": 0, "epoch": 1, "seconds": -1}',
    '{"kind": "epoch", "task": 0, "epoch": 1e300, "seconds": 1}',
    '{"kind": "epoch", "task": 0, "epoch": 1, "seconds": 1e300}',
    '{"kind": "epoch", "task": 99999999999, "epoch": 1, "seconds": 1}',
    '{"kind": "epoch", "task": 0, "epoch": true, "seconds": 1}',
    '{"kind": "task", "task": 0, "best_epoch": "1"}',
    '{"kind": "begin", "task": 0, "train_samples": -3, "optimizer": "", "paths": []}',
    '{"kind": "x", "task": 0, "long": "' + "y" * (1 << 20) + '"}',
]


@pytest.mark.parametrize("name", ["config.json", "results.json", "metrics.jsonl"])
@pytest.mark.parametrize("text", HARD_JSON.values(), ids=HARD_JSON)
def test_such_json_in_a_run_is_an_error_or_a_note_that_names_the_file(copy: Path, name: str, text: str | bytes) -> None:
    raw = text if isinstance(text, bytes) else text.encode()
    if name == "config.json":
        (copy / "results.json").unlink()
    (copy / name).write_bytes(raw + b"\n")
    try:
        said = " ".join(records.read(str(copy)).notes)
    except ValueError as error:
        said = str(error)
    assert str(copy / name) in said and len(said) < 1000


def test_a_json_file_has_a_largest_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.json").write_text("[1, 2, 3]")
    monkeypatch.setattr(safe_files, "JSON_BYTES", 9)
    assert safe_files.read_json(tmp_path / "x.json") == [1, 2, 3]
    monkeypatch.setattr(safe_files, "JSON_BYTES", 8)
    with pytest.raises(ValueError, match="more than 8 bytes"):
        safe_files.read_json(tmp_path / "x.json")


@pytest.mark.ci
def test_json_takes_no_more_memory_than_it_may(tmp_path: Path) -> None:
    for target, texts in {
        "config": ["[" * 4_000_000, "[" + "{}," * 1_300_000 + "{}]"],
        "results": ["[" + "[]," * 1_300_000 + "[]]", '{"accuracy_matrix": [' + "[1]," * 1_000_000 + "[1]]}"],
        "log": ["\n" * 4_000_000, "{}\n" * 1_300_000, "[" * 4_000_000 + "\n"],
    }.items():
        (tmp_path / target).mkdir()
        for number, text in enumerate(texts):
            (tmp_path / target / f"{number}").write_text(text)
        assert peak_of(target, tmp_path / target) < GIB


def test_a_log_of_damage_is_given_up(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task_logs, "_GIVE_UP", 100)
    lines = (copy / "metrics.jsonl").read_text()
    (copy / "metrics.jsonl").write_text(lines + "x\n" * 200 + LINES[0].replace("-1", "1") + "\n")
    notes = records.read(str(copy)).notes
    assert len(notes) == 11 and "more than 100 lines are damaged" in notes[-1]


def test_many_damaged_lines_are_counted_and_not_listed(copy: Path) -> None:
    with open(copy / "metrics.jsonl", "a") as file:
        file.write("x\n" * 1000)
    notes = records.read(str(copy)).notes
    assert len(notes) == 11 and notes[-1].endswith("990 more lines are damaged")


@pytest.mark.parametrize("line", LINES, ids=range(len(LINES)))
def test_absurd_numbers_in_a_log_are_noted(copy: Path, line: str) -> None:
    before = records.read(str(copy)).tasks
    with open(copy / "metrics.jsonl", "a") as file:
        file.write(line + "\n")
    run = records.read(str(copy))
    assert run.tasks == before and len(run.notes) == 1


# --- absurd numbers --------------------------------------------------------------------------------------------------
ABSURD = [
    ("tasks", 10**9), ("tasks", 10_001), ("epochs", 10**19), ("batch_size", 2**63), ("threads", 10**6), ("lr", 1e39),
    ("lr", 10**30), ("lr_factor", 1e300), ("weight_decay", 1e39), ("lr_patience", 10**40), ("checkpoint_seconds", 1e99),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), ABSURD)
def test_absurd_numbers_in_a_config_are_named(tmp_path: Path, name: str, value: float) -> None:
    about = {"config": {**asdict(resolve()), name: value}, "versions": {}}
    (tmp_path / "config.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match=rf"config\.json is damaged: {name}: expected"):
        read_config(tmp_path)


@pytest.mark.parametrize("settings", [[], 3, "x", None, {"x" * 10_000: 1}, {"data": "y" * 100_000}])
def test_a_config_of_another_kind_is_named_in_few_words(tmp_path: Path, settings: Any) -> None:
    if isinstance(settings, dict) and "data" in settings:
        settings = {**asdict(resolve()), **settings}
    (tmp_path / "config.json").write_text(json.dumps({"config": settings}))
    with pytest.raises(
        ValueError, match=r"config\.json is damaged: (settings: expected a mapping|missing settings|data: expected)"
    ) as caught:
        read_config(tmp_path)
    assert len(str(caught.value)) < 1500


def test_a_model_that_does_not_fit_into_the_memory_is_refused_before_it_is_made(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(os, "sysconf", lambda name: {"SC_PHYS_PAGES": 10, "SC_PAGE_SIZE": 4096}[name], raising=False)
    with pytest.raises(ValueError, match=r"net: mlp for inputs \(1, 8, 8\) and 5 tasks takes .* GiB"):
        Run.start(resolve(out=str(tmp_path / "run"), device="cpu"), Console(quiet=True))
    assert not (tmp_path / "run").exists()


RESULTS: list[tuple[str, Any]] = [
    ("acc", 1e300), ("acc", -1), ("bwt", 101), ("capacity", 1e9), ("compression", 10**90), ("union_density", 100.1),
    ("forgetting", [0.0, 1e9]), ("random_init", [1.0, -5.0]), ("accuracy_matrix", [[1e9, None], [1.0, 2.0]]),
    ("overlap", [[100.0, 1e30], [1.0, 2.0]]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), RESULTS, ids=lambda value: str(value)[:20])
def test_measurements_out_of_range_are_damage(copy: Path, name: str, value: Any) -> None:
    path = copy / "results.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))
    with pytest.raises(ValueError, match=r"results\.json is damaged: expected \d+ numbers from"):
        records.read(str(copy))


@pytest.mark.parametrize("elements", [-3, 0, 10**30, True, "many"])
def test_a_layer_has_a_number_of_elements(copy: Path, elements: Any) -> None:
    path = copy / "results.json"
    stored = json.loads(path.read_text())
    stored["layers"][0]["elements"] = elements
    path.write_text(json.dumps(stored))
    with pytest.raises(ValueError, match=r"results\.json is damaged: expected \d+ numbers from 1"):
        records.read(str(copy))


@pytest.mark.parametrize("task", [[1], {"a": 1}, None, True, 1.5, ""])
def test_a_task_in_results_needs_an_id(copy: Path, task: Any) -> None:
    path = copy / "results.json"
    stored = json.loads(path.read_text())
    stored["reuse"][0]["task"] = task
    path.write_text(json.dumps(stored))
    with pytest.raises(ValueError, match=r"results\.json is damaged: expected the id of a task"):
        records.read(str(copy))


# --- checkpoints -----------------------------------------------------------------------------------------------------
def signed(path: Path, header: dict[str, Any], body: bytes) -> Path:
    text = json.dumps(header, separators=(",", ":")).encode()
    raw = struct.pack("<Q", len(text)) + text + body
    found = checkpoint._DIGEST.search(raw)
    assert found is not None
    path.write_bytes(raw[: found.start(1)] + checkpoint._digest(raw, found.start(1)) + raw[found.end(1) :])
    return path


def with_masks(path: Path, frame: bytes, shape: Any, tensors: int = 1, state: str = "{}", order: str = "[]") -> Path:
    """A checkpoint with so many compressed masks, all of one frame and one claimed shape."""
    names = [f"model/{i}.weight_masks" for i in range(tensors)]
    header: dict[str, Any] = {
        "__metadata__": {
            "format": checkpoint.FORMAT, "digest": checkpoint._BLANK, "state": state, "order": order,
            "compressed": json.dumps(dict.fromkeys(names, shape)),
        }
    }  # fmt: skip
    for i, name in enumerate(names):
        header[name] = {"dtype": "U8", "shape": [len(frame)], "data_offsets": [i * len(frame), (i + 1) * len(frame)]}
    return signed(path, header, frame * tensors)


def zeros(size: int) -> bytes:
    return zstandard.ZstdCompressor().compress(bytes(size))


MASK_BOMBS = {
    "one tensor": (zeros(64 << 20), [1, 64 << 20], 1),
    "many rows": (zeros(64 << 20), [1 << 20, 64], 1),
    "many tensors": (zeros(1 << 20), [1, 1 << 20], 40),
}


@pytest.mark.parametrize(("frame", "shape", "tensors"), MASK_BOMBS.values(), ids=MASK_BOMBS)
def test_masks_that_expand_too_far_are_refused(tmp_path: Path, frame: bytes, shape: list[int], tensors: int) -> None:
    with pytest.raises(CheckpointError, match="its masks would take"):
        checkpoint.load(with_masks(tmp_path / "000001.safetensors", frame, shape, tensors))


@pytest.mark.ci
def test_a_bomb_of_masks_takes_no_more_memory_than_it_may(tmp_path: Path) -> None:
    folder = tmp_path / "bombs"
    folder.mkdir()
    blocks = (200 << 20) // (128 << 10)  # a frame of zstd that claims 200 MiB: 4 bytes for a block of 128 KiB
    frame = b"\x28\xb5\x2f\xfd\xa0" + struct.pack("<I", 200 << 20) + b"\x02\x00\x10\x00" * (blocks - 1)
    frame += b"\x03\x00\x10\x00"
    for number, tensors in enumerate((1, 30)):
        with_masks(folder / f"{number}", frame, [1, 200 << 20], tensors)
    assert peak_of("signed_checkpoint", folder) < GIB


@pytest.mark.parametrize("shape", [[-1, -3], [3.0], "3", [2, "x"], {"a": 3}, [True, 3], None])
def test_a_shape_that_is_none_is_refused(tmp_path: Path, shape: Any) -> None:
    with pytest.raises(CheckpointError, match="has a shape that is none"):
        checkpoint.load(with_masks(tmp_path / "000001.safetensors", zeros(3), shape))


def test_a_frame_that_ends_early_is_refused(tmp_path: Path) -> None:
    frame = zeros(1000)[:-1] + b"\x00"
    with pytest.raises(CheckpointError, match="000001"):
        checkpoint.load(with_masks(tmp_path / "000001.safetensors", frame[:12], [1, 1000]))


def test_masks_that_zstd_shrinks_to_nothing_are_read(tmp_path: Path) -> None:
    masks = torch.full((1000, 500), 255, dtype=torch.uint8)
    saved = checkpoint.save(tmp_path, 1, {}, {"0.weight": torch.zeros(4000), "0.weight_masks": masks})
    assert torch.equal(checkpoint.load(saved).tensors["0.weight_masks"], masks)


@pytest.mark.parametrize("text", [t for t in HARD_JSON.values() if isinstance(t, str)])
@pytest.mark.parametrize("field", ["state", "order"])
def test_hard_json_in_a_checkpoint_is_refused(tmp_path: Path, text: str, field: str) -> None:
    with pytest.raises(CheckpointError, match="000001"):
        checkpoint.load(with_masks(tmp_path / "000001.safetensors", zeros(3), [1, 3], **{field: text}))


@pytest.mark.parametrize("make", [lambda p: os.mkfifo(p), lambda p: p.mkdir(), lambda p: p.symlink_to("/dev/zero")])
def test_a_checkpoint_that_is_no_file_is_refused_at_once(tmp_path: Path, make: Callable[[Path], object]) -> None:
    make(tmp_path / "000001.safetensors")
    with pytest.raises(CheckpointError, match=r"it is no regular file|Is a directory"):
        checkpoint.load_from(tmp_path)


MASKS: list[Callable[[dict[str, Any]], object]] = [
    lambda tensors: tensors.update({"model/model.features.1.weight_masks": torch.zeros(1, 800, dtype=torch.uint8)}),
    lambda tensors: tensors.update({"model/model.features.1.weight_masks": torch.zeros(2, 7, dtype=torch.uint8)}),
    lambda tensors: tensors.update({"model/model.features.1.weight_masks": torch.zeros(2, 800)}),
    lambda tensors: tensors.update({"model/model.features.1.weight": torch.zeros(0)}),
    lambda tensors: tensors.update({"model/_extra_state": torch.zeros(3)}),
    lambda tensors: tensors.pop("model/_extra_state"),
]


@pytest.mark.parametrize("damage", MASKS, ids=range(len(MASKS)))
def test_masks_that_no_run_has_are_noted_in_a_report(copy: Path, damage: Callable[[Any], object]) -> None:
    (copy / "results.json").unlink()
    kept = checkpoint.load_from(copy / "checkpoint")
    assert tuple(kept.tensors["model/model.features.1.weight_masks"].shape) == (2, 800)
    damage(kept.tensors)
    checkpoint.save(copy / "checkpoint", kept.number + 1, kept.state, kept.tensors)
    run = records.read(str(copy))
    assert run.results is None and len(run.notes) == 1 and str(copy / "checkpoint") in run.notes[0]


PROGRESS: list[tuple[str, Any]] = [
    ("task", -1), ("task", 10**30), ("task", "1"), ("task", 9), ("training", 1), ("epoch", 1.5), ("lr", "fast"),
    ("best_loss", [1]), ("best_loss", float("inf")), ("matrix", [[1.0, 2.0]]), ("matrix", [[1e9]]),
    ("matrix", [["x"]]), ("matrix", [[True]]), ("matrix", [[float("nan")]]), ("lr", float("inf")),
    ("random_init", [1.0]), ("random_init", None), ("before", []), ("metrics_bytes", -1), ("metrics_bytes", True),
    ("more", 1),
]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run inside its second task."""
    folder = tmp_path_factory.mktemp("hostile") / "run"
    run = Run.start(resolve(tasks=2, epochs=2, batch_size=256, device="cpu", out=str(folder)), Console(quiet=True))
    run._train_task()
    train, val = run.stream.training(1)
    run.wsn.begin_task(1)
    run._optimizer = make_optimizer(run.wsn, run.settings)
    run.progress.training, run.progress.epoch, run.progress.lr = True, 0, run.settings.lr
    run._train_epoch(train, val)
    run.save()
    return run


@pytest.mark.parametrize(("name", "value"), PROGRESS, ids=lambda value: str(value)[:20])
def test_a_progress_that_cannot_be_is_refused(run: Run, name: str, value: Any) -> None:
    good = checkpoint.load_from(run.folder / "checkpoint")
    bad = {**good.state, "progress": {**good.state["progress"], name: value}}
    with pytest.raises(CheckpointError, match="cannot be restored"):
        run.restore(Checkpoint(good.path, good.number, bad, good.tensors))
    run.restore(good)


OPTIMIZER: list[Callable[[dict[str, Any], dict[str, Any]], object]] = [
    lambda state, tensors: state["optimizer"]["param_groups"].pop(),
    lambda state, tensors: state["optimizer"]["param_groups"][0].update(lr=1e300),
    lambda state, tensors: state["optimizer"]["param_groups"][0].update(betas="xy"),
    lambda state, tensors: state["optimizer"]["param_groups"][0].update(weight_decay=float(-5)),
    lambda state, tensors: state["optimizer"]["state"].update({"0": {"more": "x"}}),
    lambda state, tensors: tensors.update({"optimizer/0.exp_avg": torch.zeros(3)}),
    lambda state, tensors: tensors.update({"optimizer/77.exp_avg": torch.zeros(3)}),
    lambda state, tensors: tensors.update({"optimizer/x": torch.zeros(3)}),
]


@pytest.mark.parametrize("damage", OPTIMIZER, ids=range(len(OPTIMIZER)))
def test_an_optimizer_of_another_run_is_refused(run: Run, damage: Callable[[Any, Any], object]) -> None:
    good = checkpoint.load_from(run.folder / "checkpoint")
    state, tensors = json.loads(json.dumps(good.state)), dict(good.tensors)
    damage(state, tensors)
    with pytest.raises(
        CheckpointError,
        match=r"cannot be restored: (ValueError: (the optimizer has|\w+ of parameter)|KeyError: 77|.*unpack)",
    ):
        run.restore(Checkpoint(good.path, good.number, state, tensors))
    run.restore(good)


# --- links -----------------------------------------------------------------------------------------------------------
RESUME = ["--checkpoint", "000006.safetensors", "--quiet"]  # the first of two tasks is finished there


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    path = tmp_path / "victim"
    path.write_bytes(b"precious")
    return path


REPLACED = ["results.json", "results.json.tmp", "accuracy_matrix.png", "capacity.png", "capacity.png.tmp"]
REFUSED = ["metrics.jsonl", ".lock"]


@pytest.mark.parametrize("name", [*REPLACED, "checkpoint/000007.safetensors", "checkpoint/000007.safetensors.tmp"])
def test_a_link_in_a_run_is_replaced_by_the_file(copy: Path, victim: Path, name: str) -> None:
    (copy / name).unlink(missing_ok=True)
    (copy / name).symlink_to(victim)
    assert cli.main(["train", "--resume", str(copy), *RESUME]) == 0
    assert victim.read_bytes() == b"precious"
    assert not (copy / name).is_symlink()


@pytest.mark.parametrize("name", REFUSED)
def test_a_link_that_would_be_written_through_is_refused(
    copy: Path, victim: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (copy / name).unlink(missing_ok=True)
    (copy / name).symlink_to(victim)
    assert cli.main(["train", "--resume", str(copy), *RESUME]) == 2
    assert victim.read_bytes() == b"precious"
    assert "nothing is written through one" in capsys.readouterr().err


@pytest.mark.parametrize("name", REFUSED)
def test_a_link_to_nothing_makes_no_file_elsewhere(copy: Path, tmp_path: Path, name: str) -> None:
    (copy / name).unlink(missing_ok=True)
    (copy / name).symlink_to(tmp_path / "new")
    assert cli.main(["train", "--resume", str(copy), *RESUME]) == 2
    assert not (tmp_path / "new").exists()


def test_checkpoints_are_not_written_or_deleted_in_a_folder_elsewhere(
    copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    elsewhere = tmp_path / "elsewhere"
    shutil.move(copy / "checkpoint", elsewhere)
    (elsewhere / "mine.tmp").write_bytes(b"precious")
    (copy / "checkpoint").symlink_to(elsewhere)
    before = {path.name: path.read_bytes() for path in elsewhere.iterdir()}
    assert cli.main(["train", "--resume", str(copy), *RESUME]) == 2
    assert {path.name: path.read_bytes() for path in elsewhere.iterdir()} == before
    assert "nothing is written through one" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["config.json.tmp", ".lock"])
def test_a_new_run_writes_through_no_link_either(tmp_path: Path, victim: Path, name: str) -> None:
    folder = tmp_path / "new"
    folder.mkdir()
    (folder / name).symlink_to(victim)
    code = cli.main(["train", "--tasks", "1", "--epochs", "1", "--device", "cpu", "--quiet", "--out", str(folder)])
    assert code == (2 if name == ".lock" else 0)
    assert victim.read_bytes() == b"precious"


@pytest.mark.parametrize("name", ["report.html", "report.html.tmp", "capacity.png", "accuracy_matrix.png"])
def test_a_report_replaces_links(copy: Path, victim: Path, name: str) -> None:
    (copy / name).unlink(missing_ok=True)
    (copy / name).symlink_to(victim)
    assert cli.main(["report", str(copy)]) == 0
    assert victim.read_bytes() == b"precious"
    assert (copy / "report.html").is_file() and not (copy / "report.html").is_symlink()


def test_a_folder_among_the_checkpoints_does_not_stop_a_run(copy: Path) -> None:
    (copy / "checkpoint" / "000001.safetensors").mkdir()
    (copy / "checkpoint" / "x.tmp").mkdir()
    assert cli.main(["train", "--resume", str(copy), *RESUME]) == 0


# --- the report ------------------------------------------------------------------------------------------------------
def shape(name: str, value: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / "results.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))

    return damage


def pipe(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return damage


BAD_RUNS: dict[str, Callable[[Path], object]] = {
    "deep results": lambda folder: (folder / "results.json").write_text("[" * 100_000),
    "compressed results": lambda folder: (folder / "results.json").write_bytes(gzip.compress(b"{}")),
    "a huge number": shape("acc", 10**99),
    "no mapping": lambda folder: (folder / "results.json").write_text("[]"),
    "settings of another kind": shape("config", [[]]),
    "a folder": lambda folder: ((folder / "results.json").unlink(), (folder / "config.json").unlink()),
    "a pipe": pipe("config.json"),
}


@pytest.mark.parametrize("damage", BAD_RUNS.values(), ids=BAD_RUNS)
def test_one_bad_run_does_not_stop_the_report_on_another(
    copy: Path, finished: Path, tmp_path: Path, damage: Callable[[Path], object], capsys: pytest.CaptureFixture[str]
) -> None:
    if "pipe" in repr(damage):
        (copy / "results.json").unlink()
    damage(copy)
    target = tmp_path / "x.html"
    assert cli.main(["report", str(copy), str(finished), "--html", str(target)]) == 2
    out, err = capsys.readouterr()
    assert str(copy) in err and "Traceback" not in err and str(finished) in out
    assert len(Page(target.read_text("utf-8")).rows("Runs")) == 2


@pytest.mark.parametrize("error", [RecursionError, MemoryError, OverflowError, ZeroDivisionError])
def test_a_fault_of_the_reader_itself_stops_only_its_run(
    copy: Path, finished: Path, tmp_path: Path, error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    read = records.read

    def fails(name: str) -> records.Record:
        if name == str(copy):
            raise error("as if")
        return read(name)

    monkeypatch.setattr(records, "read", fails)
    assert cli.main(["report", str(copy), str(finished), "--html", str(tmp_path / "x.html")]) == 2
    assert len(Page((tmp_path / "x.html").read_text("utf-8")).rows("Runs")) == 2


def test_plots_that_cannot_be_written_do_not_stop_a_report(
    copy: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("capacity.png", "accuracy_matrix.png"):
        (copy / name).unlink()
        (copy / name).mkdir()
    assert cli.main(["report", str(copy), str(finished), "--html", str(tmp_path / "x.html")]) == 2
    assert f"{copy}: its plots cannot be drawn" in capsys.readouterr().err
    assert len(Page((tmp_path / "x.html").read_text("utf-8")).rows("Runs")) == 3


@pytest.mark.parametrize("part", ["compare.summary", "compare.charts", "compare.paths", "section"])
def test_a_run_that_cannot_be_drawn_does_not_keep_another_off_the_page(
    finished: Path, copy: Path, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [records.read(str(copy)), records.read(str(finished))]
    where, name = (page.compare, part.partition(".")[2]) if "." in part else (page, part)
    real = getattr(where, name)

    def fails(entries: Any) -> Any:
        if any(entry.run is runs[0] for entry in ([entries] if name == "section" else entries)):
            raise OverflowError("as if")
        return real(entries)

    monkeypatch.setattr(where, name, fails)
    shown = page.render(runs, (), page.datetime.now())
    assert "cannot be shown here" in shown and "OverflowError" in shown and str(finished) in shown


def test_a_table_of_too_many_numbers_is_not_on_the_page(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = json.loads((copy / "results.json").read_text())
    many = 40
    monkeypatch.setattr(markup, "CELLS", 1000)
    shares = [{"task": i, "density": 30.0, "reuse": 1.0, "new": 0.1} for i in range(many)]
    zeros = [0.0] * many
    stored |= {
        "accuracy_matrix": [[50.0] * (i + 1) + [None] * (many - i - 1) for i in range(many)], "reuse": shares,
        "forgetting": zeros, "random_init": zeros, "before_training": zeros, "overlap": [[1.0] * many] * many,
        "layers": [{"name": "x" * 50_000, "elements": 3, "tasks": shares}],
    }  # fmt: skip
    (copy / "results.json").write_text(json.dumps(stored))
    assert cli.main(["report", str(copy), "--html", str(tmp_path / "x.html")]) == 0
    text = (tmp_path / "x.html").read_text("utf-8")
    assert f"{many * (many + 1)} numbers are too many for a page" in text
