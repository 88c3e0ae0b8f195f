"""Code of the user can do what it likes: training goes on as if it had not been called."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import own_tasks
import pytest
import torch
from fifty_samples import KIND, X, Y, loaded, of
from own_tasks import CLASSES, Shuffled
from torch import Tensor
from torch.multiprocessing import active_children
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from wsn_fast.train import Task, fastest
from wsn_fast.train.command_line import main
from wsn_fast.train.config import resolve
from wsn_fast.train.samples import Epoch, Samples
from wsn_fast.train.samples.loading import Kind, SamplesOfLoader
from wsn_fast.train.samples.randomness import Randomness
from wsn_fast.train.samples.users_code import LoadingError, in_users_code
from wsn_fast.train.streams import OwnStream


class Calling(TensorDataset):
    """Calls something for each sample, with its index."""

    def __init__(self, call: Callable[[int], object]) -> None:
        super().__init__(X, Y)
        self.call = call

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        self.call(index)
        return super().__getitem__(index)


# --- what it changes --------------------------------------------------------------------------------------
def settings() -> tuple[Any, ...]:
    return (
        torch.get_num_threads(), torch.get_default_dtype(), torch.get_default_device(), torch.is_grad_enabled(),
        torch.is_autocast_enabled("cpu"), Path.cwd(),
    )  # fmt: skip


@pytest.fixture
def own_settings() -> Iterator[None]:
    """Settings that no other test meets, whatever happens."""
    threads, *_, folder = settings()
    yield
    torch.set_num_threads(threads)
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)
    torch.set_grad_enabled(True)
    torch.set_autocast_enabled("cpu", False)
    os.chdir(folder)


CHANGES: dict[str, Callable[..., object]] = {
    "threads": lambda *_: torch.set_num_threads(3 if torch.get_num_threads() != 3 else 4),
    "dtype": lambda *_: torch.set_default_dtype(torch.float64),
    "device": lambda *_: torch.set_default_device("meta"),
    "gradients": lambda *_: torch.set_grad_enabled(False),
    "autocast": lambda *_: torch.autocast("cpu").__enter__(),
    "folder": lambda *_: os.chdir("/"),
}


@pytest.mark.usefixtures("own_settings")
@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("fails", [False, True])
def test_settings_are_put_back(name: str, fails: bool) -> None:
    before = settings()
    try:
        with in_users_code("my code", Randomness(0)):
            CHANGES[name]()
            assert settings() != before
            if fails:
                raise ValueError
    except LoadingError:
        assert fails
    assert settings() == before


@pytest.mark.usefixtures("own_settings")
@pytest.mark.parametrize("gradients", [True, False])
def test_settings_are_put_back_after_each_batch(gradients: bool) -> None:
    with torch.set_grad_enabled(gradients):
        before, seen = settings(), []
        for _ in of(Calling(CHANGES["threads"])).epoch(16, Epoch(1, 2, 3)):
            seen.append(settings())
        assert seen == [before] * 4


@pytest.mark.usefixtures("own_settings")
@pytest.mark.parametrize("line", ["torch.set_default_dtype(torch.float64)", "torch.set_grad_enabled(False)",
                                  "os.chdir('/')", "torch.set_num_threads(3)"])  # fmt: skip
def test_a_run_does_not_depend_on_settings_of_the_code(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    name = f"code_{abs(hash(line))}"
    Path(f"{name}.py").write_text(f"import os, own_tasks, torch\n{line}\nmake = own_tasks.datasets")
    words = ["train", "own", "--data", f"{name}.py:make", "--tasks", "1", "--net", "mlp", "--epochs", "1", "--quiet"]
    assert main([*words, "--device", "cpu", "--out", "run"]) == 0
    del sys.modules[name]
    assert (tmp_path / "run" / "results.json").is_file()


def test_inference_mode_at_a_yield_is_refused() -> None:
    class Loader:
        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            with torch.inference_mode():
                yield X, Y

    with pytest.raises(LoadingError, match=r"task 0, train: .* torch.inference_mode\(\) is on while the code waits"):
        loaded(SamplesOfLoader(Loader(), KIND))


def test_what_a_net_of_the_user_computes_can_be_trained_on() -> None:
    net = torch.nn.Linear(6, 6)

    class Features(TensorDataset):
        def __getitem__(self, index: int) -> tuple[Tensor, ...]:
            x, y = super().__getitem__(index)
            return net(x), y

    class Batches:
        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            with torch.inference_mode():
                batch = net(X), Y.clone()
            yield batch

    stream = OwnStream([Task(Features(X, Y), Features(X, Y), CLASSES, Batches())], 0, val_fraction=0.1)
    for part in stream.training(0):
        ((x, y),) = (batch.take(batch.own) for batch in part.epoch(50, Epoch(1, 2, 3)))
        assert not any(values.requires_grad or values.is_inference() for values in (x, y))


# --- what it draws ----------------------------------------------------------------------------------------
def test_a_sampler_that_draws_when_an_epoch_begins_is_repeated() -> None:
    given = SamplesOfLoader(DataLoader(TensorDataset(X, Y), 16, sampler=Shuffled()), KIND)
    state = np.random.get_state()[1].tolist()  # type: ignore[union-attr]
    first = loaded(given)
    assert torch.equal(first, loaded(given)) and not torch.equal(first, loaded(given, 4))
    assert np.random.get_state()[1].tolist() == state  # type: ignore[union-attr]


def test_a_sampler_hears_once_of_an_epoch() -> None:
    heard: list[int] = []

    class Counting(Shuffled):
        def set_epoch(self, epoch: int) -> None:
            heard.append(epoch)

    loaded(SamplesOfLoader(DataLoader(TensorDataset(X, Y), 16, sampler=Counting()), KIND))
    assert heard == [3]


def test_a_measurement_does_not_depend_on_the_epoch_before_it() -> None:
    given = SamplesOfLoader(DataLoader(TensorDataset(X, Y), 16, sampler=Shuffled()), KIND)
    before = [batch[1] for batch in given.in_order() if batch]
    loaded(given)
    for one, other in zip(before, (batch[1] for batch in given.in_order() if batch), strict=True):
        assert torch.equal(one, other)


def test_a_loader_may_draw_from_the_generator_of_training() -> None:
    state = torch.get_rng_state()
    given = SamplesOfLoader(DataLoader(TensorDataset(X, Y), 16, True, generator=torch.default_generator), KIND)
    assert torch.equal(loaded(given), loaded(given)) and not torch.equal(loaded(given), loaded(given, 4))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("iterable", [False, True])
def test_a_dataset_hears_of_the_epoch(iterable: bool) -> None:
    class Mapped(TensorDataset):
        epoch = 0
        generator = torch.Generator()

        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch

        def __getitem__(self, index: int) -> tuple[Tensor, ...]:
            return X[index] * 0 + self.epoch + torch.rand((), generator=self.generator) / 2, Y[index]

    class Streamed(Mapped, IterableDataset):  # type: ignore[misc]
        def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
            return (self[index] for index in range(50))

    given: Samples = SamplesOfLoader(DataLoader(Streamed(X, Y), 16), KIND) if iterable else of(Mapped(X, Y))
    first = loaded(given)
    assert {*first.long().flatten().tolist()} == {3}
    assert {*loaded(given, 4).long().flatten().tolist()} == {4}
    assert torch.equal(first, loaded(given))
    assert {*given.first(50).long().flatten().tolist()} == {0}


def test_the_generator_of_a_gpu_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Code that calls torch.manual_seed for each sample would else repeat the dropout of a training on a GPU."""
    state = [torch.tensor([1])]
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda: state[0])
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda new: state.__setitem__(0, new))
    monkeypatch.setattr(torch.cuda, "manual_seed", lambda seed: state.__setitem__(0, torch.tensor([seed])))
    randomness, other = Randomness(7), Randomness(8)
    assert state[0].item() == 1
    for once in (0, 1):
        with randomness.in_use():
            assert state[0].item() == 7 + once
            state[0] = state[0] + 1
        assert state[0].item() == 1
    with other.in_use():
        assert state[0].item() == 8


# --- on a GPU ---------------------------------------------------------------------------------------------
class OnGpu(Tensor):
    """As a tensor on a GPU, it has no numbers for NumPy."""

    def numpy(self, *args: Any, **more: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu()")

    def cpu(self, *args: Any, **more: Any) -> Tensor:
        return self.as_subclass(Tensor)


def test_samples_may_be_on_a_gpu() -> None:
    class Batches:
        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            yield X.as_subclass(OnGpu), Y.as_subclass(OnGpu)  # type: ignore[no-untyped-call]

    stream = OwnStream([Task(Batches(), Batches(), CLASSES, Batches())], 0, val_fraction=0.1)
    assert len(loaded(stream.training(0)[0])) == 50


def test_only_samples_on_the_cpu_are_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    class Halves(Dataset[Any]):
        def __len__(self) -> int:
            return 50

        def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
            return torch.empty(1, 4, 6, device="meta"), Y[index]

    pinned: list[torch.device] = []
    monkeypatch.setattr(Tensor, "pin_memory", lambda self, *_: pinned.append(self.device) or self)
    seen: list[list[str]] = []

    def check(self: Kind, batch: Any) -> tuple[Tensor, Tensor]:
        seen.append([part.device.type for part in batch])
        return X[:16], Y[: len(batch[1])]

    monkeypatch.setattr(Kind, "check", check)
    monkeypatch.setattr(torch.utils.data.dataloader._BaseDataLoaderIter, "__init__", pinning_always)
    given = of(Halves())
    for _ in given._load([torch.arange(16)], 0):
        pass
    assert seen == [["meta", "cpu"]] and pinned == [torch.device("cpu")]


_begin = torch.utils.data.dataloader._BaseDataLoaderIter.__init__


def pinning_always(self: Any, loader: Any) -> None:
    """As where there is a GPU."""
    _begin(self, loader)
    self._pin_memory = True


# --- the choice of the fastest way ------------------------------------------------------------------------
def test_no_process_loads_while_it_is_measured_what_is_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    children: list[int] = []
    monkeypatch.setattr(fastest, "train_epoch", lambda *_: children.append(len(active_children())))
    data = f"{own_tasks.__file__}:datasets"
    fastest.with_fastest(resolve(stream="own", data=data, net="mlp", device="cpu", workers=1), ["memory_format"])
    assert children and {*children} == {0}
