"""``--threads auto``, and the order of images in memory: settings that change results by rounding at most."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from wsn_fast.train import config, experiment, machine, nets, threads
from wsn_fast.train.checkpoint import load_from
from wsn_fast.train.command_line import main
from wsn_fast.train.config import TrainConfig

SMALL = ["train", "permuted", "--tasks", "1", "--epochs", "1", "--batch-size", "2000", "--device", "cpu"]


def test_more_threads_have_to_be_clearly_faster() -> None:
    assert threads.best({1: 1.0, 2: 0.97, 4: 0.94}) == 4
    assert threads.best({1: 1.0, 2: 0.97}) == 1
    assert threads.best({1: 1.0, 2: 0.5, 4: 0.49}) == 2


@pytest.mark.parametrize(("most", "tried"), [(1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (8, [1, 2, 4, 8])])
def test_numbers_of_threads_double_up_to_the_cores(
    most: int, tried: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "cores", lambda: most)
    assert threads._numbers() == tried


@pytest.mark.ci  # two threads take seconds where the cores are busy
def test_a_run_with_measured_threads_is_the_run_with_that_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trained: list[int] = []
    epoch = threads.train_epoch

    def noted(*arguments: object) -> float:
        trained.append(torch.get_num_threads())
        return epoch(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(threads, "train_epoch", noted)
    monkeypatch.setattr(machine, "cores", lambda: 2)
    monkeypatch.setattr(threads, "best", lambda seconds: max(seconds))
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
    monkeypatch.setattr(threads, "make_experiment", lambda settings: pytest.fail("it was measured"))
    assert main([*SMALL, "--threads", "auto", "--out", str(tmp_path)]) == 2


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
