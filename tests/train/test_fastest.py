"""``--threads auto``, and the order of images in memory: settings that change results by rounding at most."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from wsn_fast import WSN
from wsn_fast.train import config, experiment, fastest, machine, nets
from wsn_fast.train.checkpoint import load_from
from wsn_fast.train.choices import MEMORY_FORMATS
from wsn_fast.train.command_line import main
from wsn_fast.train.config import TrainConfig
from wsn_fast.train.fastest import Way

SMALL = ["train", "permuted", "--tasks", "1", "--epochs", "1", "--batch-size", "2000", "--device", "cpu"]


@pytest.mark.parametrize(
    ("seconds", "chosen"),
    [
        ([1.0, 0.97, 0.94], 2),
        ([1.0, 0.97], 0),
        ([1.0, 0.5, 0.49], 1),
        ([1.0, 0.97, 0.96, 0.94], 3),
        ([1.0, 2.0, 0.9, 0.8], 3),
        ([1.0], 0),
    ],
)
def test_a_later_way_has_to_be_clearly_faster(seconds: list[float], chosen: int) -> None:
    every = [Way(threads, name) for threads in (1, 2) for name in MEMORY_FORMATS]
    assert fastest.best(dict(zip(every, seconds, strict=False))) == every[chosen]


def test_the_ways_that_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "cores", lambda: 2)
    settings = config.resolve(threads=5, memory_format="channels_last")
    tried = {names: fastest.ways(settings, names) for names in (("threads",), ("memory_format",), fastest.MEASURED)}
    assert tried == {
        ("threads",): [Way(1, "channels_last"), Way(2, "channels_last")],
        ("memory_format",): [Way(5, "contiguous"), Way(5, "channels_last")],
        fastest.MEASURED: [Way(threads, name) for threads in (1, 2) for name in MEMORY_FORMATS],
    }


@pytest.mark.parametrize(("most", "tried"), [(1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (8, [1, 2, 4, 8])])
def test_numbers_of_threads_double_up_to_the_cores(
    most: int, tried: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "cores", lambda: most)
    assert fastest._numbers() == tried


@pytest.mark.ci  # two threads take seconds where the cores are busy
def test_a_run_with_measured_threads_is_the_run_with_that_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trained: list[int] = []
    epoch = fastest.train_epoch

    def noted(*arguments: object) -> float:
        trained.append(torch.get_num_threads())
        return epoch(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(fastest, "train_epoch", noted)
    monkeypatch.setattr(machine, "cores", lambda: 2)
    monkeypatch.setattr(fastest, "best", lambda seconds: max(seconds))
    measured, given = tmp_path / "measured", tmp_path / "given"
    assert main([*SMALL, "--threads", "auto", "--out", str(measured)]) == 0
    assert trained == [1, 1, 2, 2] * 3
    assert capsys.readouterr().out.startswith("threads: 2 (a step takes ")
    assert json.loads((measured / "config.json").read_text())["config"]["threads"] == 2
    assert main([*SMALL, "--threads", "2", "--out", str(given), "--quiet"]) == 0
    assert (measured / "results.json").read_bytes() == (given / "results.json").read_bytes()
    ours, theirs = (load_from(folder / "checkpoint").tensors for folder in (measured, given))
    assert ours.keys() == theirs.keys() and all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_nothing_is_measured_for_a_folder_in_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.txt").touch()
    monkeypatch.setattr(fastest, "make_experiment", lambda *_, **__: pytest.fail("it was measured"))
    assert main([*SMALL, "--threads", "auto", "--out", str(tmp_path)]) == 2


@pytest.mark.parametrize("names", [["--memory-format"], ["--memory-format", "--threads"]])
def test_the_order_of_images_can_be_measured(
    names: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[torch.memory_format] = []
    epoch = fastest.train_epoch

    def noted(wsn: WSN, *arguments: Any) -> float:
        seen.append(wsn.model.memory_format)
        return epoch(wsn, *arguments)

    monkeypatch.setattr(fastest, "train_epoch", noted)
    monkeypatch.setattr(machine, "cores", lambda: 1)
    monkeypatch.setattr(fastest, "best", lambda seconds: [*seconds][-1])
    words = [word for name in names for word in (name, "auto")]
    assert main([*SMALL, "--net", "lenet", *words, "--out", str(tmp_path / "run")]) == 0
    assert seen == [torch.contiguous_format] * 2 + [torch.channels_last] * 2 + seen[4:] and len(seen) == 12
    said = capsys.readouterr().out
    assert "memory_format: channels_last" in said and re.search(r"ms with (1 )?contiguous, .*channels_last\)", said)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["config"]["memory_format"] == "channels_last"


# --- the order of images in memory ------------------------------------------------------------------------
def trained_with(memory_format: str) -> tuple[Tensor, list[bool]]:
    """The loss and gradients of a LeNet for colour images, and whether each activation of a convolution has its
    channels last."""
    torch.manual_seed(0)
    net = nets.build("lenet", (3, 8, 8), 5).double()
    net.memory_format = getattr(torch, {"contiguous": "contiguous_format"}.get(memory_format, memory_format))
    last: list[bool] = []
    for module in net.features:
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(
                lambda _, __, out: last.append(out.is_contiguous(memory_format=torch.channels_last))
            )
    net(torch.randn(4, 3, 8, 8, dtype=torch.float64)).square().sum().backward()
    return torch.cat([parameter.grad.flatten() for parameter in net.parameters()]), last


def test_convolutions_compute_with_channels_last() -> None:
    (plain, before), (last, after) = trained_with("contiguous"), trained_with("channels_last")
    assert (before, after) == ([False, False], [True, True])
    torch.testing.assert_close(last, plain, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["contiguous", "channels_last"])
def test_the_setting_reaches_the_net(name: str) -> None:
    settings = config.resolve(stream="split", net="lenet", memory_format=name, device="cpu")
    found = experiment.make_experiment(settings).wsn.model.memory_format
    assert found is {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}[name]


def test_runs_of_earlier_versions_stay_contiguous() -> None:
    old = config.portable(config.resolve(memory_format="channels_last"))
    del old["memory_format"]
    resumed: TrainConfig = config.from_dict({**old, "data_dir": None, "out": "run"})
    assert resumed.memory_format == "contiguous"
