"""Errors in code of the user, and in the data that it gives, say whose they are."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fifty_samples import KIND, X, Y, loaded, of
from own_tasks import CLASSES, Shuffled
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, TensorDataset

from wsn_fast.train import Task, commands
from wsn_fast.train.command_line import main
from wsn_fast.train.data import DataError
from wsn_fast.train.processes import PeerLostError, is_lost
from wsn_fast.train.samples import Samples
from wsn_fast.train.samples.loading import SamplesOfLoader
from wsn_fast.train.samples.randomness import Randomness
from wsn_fast.train.samples.users_code import LoadingError, in_users_code
from wsn_fast.train.streams import OwnStream, own_code


# --- how it fails -----------------------------------------------------------------------------------------
class Ending(TensorDataset):
    """A dataset around an iterator that ends too early."""

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        if index == 40:
            next(iter(()))
        return super().__getitem__(index)


class WholeBatches(TensorDataset):
    """A dataset of batches that ends too early."""

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        return super().__getitem__(slice(0, 9)) if index < 5 else next(iter(()))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["dataset", "loader", "loader that shuffles", "loader of batches", "whole batches"])
def test_a_sample_that_stops_the_iteration_does_not_end_the_epoch(kind: str) -> None:
    data = Ending(X, Y)
    given: Samples = {
        "dataset": lambda: of(data),
        "loader": lambda: SamplesOfLoader(DataLoader(data, 16), KIND),
        "loader that shuffles": lambda: SamplesOfLoader(DataLoader(data, 16, shuffle=True), KIND),
        "loader of batches": lambda: SamplesOfLoader(DataLoader(data, batch_sampler=[[3, 4], [40], [7]]), KIND),
        "whole batches": lambda: SamplesOfLoader(DataLoader(WholeBatches(X, Y), None), KIND),
    }[kind]()
    for use in (lambda: loaded(given), lambda: list(given.in_order())):
        with pytest.raises(DataError, match=r"task 0, train: expected \d+ batches, got \d: .* raised StopIteration"):
            use()


def test_a_sampler_may_say_a_wrong_length() -> None:
    class Fewer(Shuffled):
        def __len__(self) -> int:
            return 1000

    for more in ({"sampler": Fewer(), "batch_size": 16}, {"batch_sampler": BatchSampler(Fewer(), 16, False)}):
        loader: DataLoader[Any] = DataLoader(TensorDataset(X, Y), **more)  # type: ignore[arg-type]
        assert len(loaded(SamplesOfLoader(loader, KIND))) == 50


def test_samples_that_are_left_out_are_missed() -> None:
    class Some(TensorDataset):
        def __getitems__(self, rows: list[int]) -> list[Any]:
            return [self[row] for row in rows if row != 7]

    for use in (lambda: loaded(of(Some(X, Y))), lambda: list(of(Some(X, Y)).in_order())):
        with pytest.raises(
            DataError, match=r"task 0, train: expected (16|50) samples for so many indices, got (15|49)"
        ):
            use()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_inputs_that_are_not_finite_are_refused(value: float) -> None:
    x = X.clone()
    x[7, 0, 2, 2] = value
    with pytest.raises(DataError, match="task 0, train: expected finite inputs, got NaN or infinity"):
        loaded(of(TensorDataset(x, Y)))


def test_large_inputs_are_finite() -> None:
    assert loaded(of(TensorDataset(torch.full_like(X, 1e38), Y))).max() == 1e38


@pytest.mark.parametrize("status", [None, 0, 2])
def test_code_that_ends_the_program_is_an_error(status: int | None, tmp_path: Path) -> None:
    file = tmp_path / f"ends_{status}.py"
    file.write_text(f"import sys\nsys.exit({status})")
    with pytest.raises(LoadingError, match=rf"ends_{status}.py:make: the code that makes the data has ended the prog"):
        main(["train", "own", "--data", f"{file}:make", "--out", str(tmp_path / "run")])


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError(), "task 0, train: the memory is too small"),
        (MemoryError("Unable to allocate 1 GiB"), "task 0, train: Unable to allocate 1 GiB"),
        (torch.OutOfMemoryError("CUDA out of memory"), "task 0, train: CUDA out of memory"),
    ],
)
def test_data_that_do_not_fit_are_named(error: Exception, message: str) -> None:
    with pytest.raises(type(error), match=f"^{message}$"), in_users_code("task 0, train", Randomness(0)):
        raise error


def test_an_error_without_words_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(commands.Run, "start", fail)
    assert main(["train"]) == 2
    assert capsys.readouterr().err == "wsn-fast: error: MemoryError\n"


class NoLength(TensorDataset):
    def __init__(self, error: Exception) -> None:
        super().__init__(X, Y)
        self.error = error

    def __len__(self) -> int:
        raise self.error


def test_a_length_that_fails_says_whose_it_is() -> None:
    class Tasks(list[Task]):
        def __len__(self) -> int:
            raise OSError("no disk")

    good, bad = TensorDataset(X, Y), NoLength(OSError("no disk"))
    with pytest.raises(LoadingError, match=r"^tasks: task 0, test: .* OSError: no disk"):
        OwnStream([Task(good, bad, CLASSES)], 0, val_fraction=0.1)
    with pytest.raises(LoadingError, match=r"^tasks: .* OSError: no disk"):
        OwnStream(Tasks(), 0, val_fraction=0.1)
    given = SamplesOfLoader(DataLoader(bad, 16), KIND)
    for use in (lambda: given.count, lambda: given.batches(16)):
        with pytest.raises(LoadingError, match=r"^task 0, train: .* OSError: no disk"):
            use()


@pytest.mark.parametrize("error", [TypeError("no length"), NotImplementedError("no length")])
def test_what_has_no_length_is_of_unknown_length(error: Exception) -> None:
    given = SamplesOfLoader(DataLoader(NoLength(error), 16), KIND)
    assert given.count is None and given.batches(16) is None


def test_an_error_may_say_anything() -> None:
    """A message that has the letters of "gloo" in it does not mean that another process was lost."""
    assert is_lost(RuntimeError("[../gloo/transport] Connection closed")) and is_lost(PeerLostError())
    with pytest.raises(LoadingError) as error, in_users_code("igloo.py:make", Randomness(0)):
        raise ValueError("igloo/7.png is damaged")
    assert not is_lost(error.value)


# --- where it is ------------------------------------------------------------------------------------------
@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder for modules, which are forgotten after the test."""
    before, path = {*sys.modules}, list(sys.path)
    yield tmp_path
    sys.path[:] = path
    for name in {*sys.modules} - before:
        del sys.modules[name]


@pytest.mark.parametrize("target", ["target_of_a_link.py", "blob_without_ending"])
def test_a_file_may_be_a_link(target: str, folder: Path) -> None:
    (folder / "there").mkdir()
    real = folder / "there" / target
    real.write_text("def make(folder): return [folder]")
    if real.suffix:  # as when Python runs the link
        (folder / "there" / "beside_the_target.py").write_text("")
        real.write_text("import beside_the_target\ndef make(folder): return [folder]")
    link = folder / "link_of_a_test.py"
    link.symlink_to(real)
    assert own_code.call(f"{link}:make", "/data", 0) == ["/data"]


def test_a_name_with_dots_is_refused(folder: Path) -> None:
    (folder / "my.tasks.py").write_text("def make(folder): return [folder]")
    with pytest.raises(DataError, match=r"data: a module cannot be called 'my.tasks', with a dot: give .* another"):
        own_code.call(f"{folder / 'my.tasks.py'}:make", None, 0)


def test_a_package_that_is_not_there_is_named() -> None:
    with pytest.raises(DataError, match=r"data: there is no module 'os.no_module.tasks'"):
        own_code.call("os.no_module.tasks:make", None, 0)
