"""Samples that are loaded when they are needed give what samples in memory give."""

from __future__ import annotations

import random
from collections.abc import Iterable
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from fifty_samples import KIND, X, Y
from own_tasks import Endless, Noisy, samples
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    RandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from wsn_fast.train.data import DataError
from wsn_fast.train.samples import Batch, Epoch, KeptSamples, Samples, SamplesInMemory, Share
from wsn_fast.train.samples import kept as of_keeping
from wsn_fast.train.samples import loading as of_loading
from wsn_fast.train.samples.loading import SamplesOfDataset, SamplesOfLoader
from wsn_fast.train.samples.randomness import Randomness
from wsn_fast.train.samples.users_code import LoadingError

EPOCH = Epoch(1, 2, 3)


def of_dataset(data: Any = None, rows: Tensor | None = None, workers: int = 0) -> SamplesOfDataset:
    return SamplesOfDataset(data or TensorDataset(X, Y), torch.arange(50) if rows is None else rows, KIND, workers)


def of_loader(loader: Iterable[Any] | None = None) -> SamplesOfLoader:
    return SamplesOfLoader(DataLoader(TensorDataset(X, Y), 16) if loader is None else loader, KIND)


def taken(batches: Iterable[Batch]) -> list[tuple[Tensor, Tensor]]:
    return [batch.take(batch.own) for batch in batches]


def assert_same(ours: Iterable[Any], theirs: Iterable[Any]) -> None:
    for (x, y), (other_x, other_y) in zip(ours, theirs, strict=True):
        assert torch.equal(x, other_x) and torch.equal(y, other_y)


# --- those of a dataset are those in memory -----------------------------------------------------------------
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("augment", [False, True])
@pytest.mark.parametrize("share", [Share(), Share(0, 2), Share(1, 2), Share(2, 3)], ids=str)
def test_epochs_of_a_dataset_are_those_in_memory(share: Share, augment: bool, workers: int) -> None:
    batches = [list(s.epoch(16, EPOCH, augment=augment, share=share))
               for s in (of_dataset(workers=workers), SamplesInMemory(X, Y))]  # fmt: skip
    assert [(batch.size, batch.own, batch.share) for batch in batches[0]] == [
        (batch.size, batch.own, batch.share) for batch in batches[1]
    ]
    assert_same(*map(taken, batches))


@pytest.mark.parametrize("of", [of_dataset, of_loader, lambda: SamplesInMemory(X, Y)])
@pytest.mark.parametrize("augment", [False, True])
def test_a_batch_can_be_taken_in_parts_and_again(of: Any, augment: bool) -> None:
    for batch in of().epoch(16, EPOCH, augment=augment):
        whole = batch.take(batch.own)
        middle = batch.size // 2
        parts = [batch.take(slice(0, middle)), batch.take(slice(middle, batch.size))]
        assert_same([whole], [tuple(map(torch.cat, zip(*parts, strict=True)))])
        assert_same([whole], [batch.take(batch.own)])


def test_only_the_rows_are_used() -> None:
    rows = torch.tensor([4, 9, 2, 30])
    some = of_dataset(rows=rows)
    assert (some.count, some.batches(3), len(list(some.epoch(3, EPOCH)))) == (4, 2, 2)
    seen = torch.cat([y for _, y in taken(some.epoch(3, EPOCH))])
    assert sorted(seen.tolist()) == sorted(Y[rows].tolist())
    assert torch.equal(some.first(3), X[rows[:3]])
    assert_same(some.in_order(), [(X[rows], Y[rows])])


@pytest.mark.parametrize("of", [of_dataset, of_loader])
def test_the_first_samples_can_be_fewer_than_asked(of: Any) -> None:
    assert torch.equal(of().first(20), X[:20])
    assert torch.equal(of().first(100), X)


def test_batches_for_measuring_are_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(of_loading, "EVAL_BATCH", 20)
    loaded: list[int] = []

    class Noted(TensorDataset):
        def __getitem__(self, index: int) -> tuple[Tensor, ...]:
            loaded.append(index)
            return super().__getitem__(index)

    parts = [list(of_dataset(Noted(X, Y)).in_order(Share(rank, 2))) for rank in (0, 1)]
    assert [[batch is None for batch in part] for part in parts] == [[False, True, False], [True, False, True]]
    both = [one or other for one, other in zip(*parts, strict=True)]
    assert_same(both, zip(X.split(20), Y.split(20), strict=True))
    assert sorted(loaded) == list(range(50))  # nobody loads what another process measures


def test_batches_for_measuring_have_fewer_large_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(of_loading, "_MOST_NUMBERS", 24 * 7)
    assert [len(batch[1]) for batch in of_dataset().in_order() if batch] == [7] * 7 + [1]
    monkeypatch.setattr(of_loading, "_MOST_NUMBERS", 1)
    assert [len(batch[1]) for batch in of_dataset().in_order() if batch] == [1] * 50


def test_no_samples_are_no_batches_for_measuring() -> None:
    assert list(of_dataset(rows=torch.arange(0)).in_order()) == []


# --- those of a loader --------------------------------------------------------------------------------------
def test_a_loader_decides_its_batches() -> None:
    loader = of_loader()
    assert (loader.count, loader.batches(5)) == (50, 4)
    assert_same(taken(loader.epoch(5, EPOCH)), zip(X.split(16), Y.split(16), strict=True))


@pytest.mark.parametrize("loader", [DataLoader(Endless(0, 50), 16), [(X[:9], Y[:9]), (X[9:], Y[9:])]])
def test_batches_can_be_without_a_number(loader: Any) -> None:
    given = of_loader(loader)
    assert given.count is None
    assert given.batches(5) == (2 if isinstance(loader, list) else None)
    for _ in range(2):
        assert torch.equal(torch.cat([y for _, y in taken(given.epoch(5, EPOCH))]), samples(0, 50)[1])


@pytest.mark.parametrize("world", [2, 3])
def test_processes_take_their_parts_of_a_loaders_batch(world: int) -> None:
    parts = [taken(of_loader().epoch(5, EPOCH, share=Share(rank, world))) for rank in range(world)]
    for whole, *shares in zip(taken(of_loader().epoch(5, EPOCH)), *parts, strict=True):
        assert_same([whole], [tuple(map(torch.cat, zip(*shares, strict=True)))] if len(whole[1]) >= world else [whole])


def shuffling(sampled: bool = False, generator: torch.Generator | None = None) -> DataLoader[Any]:
    data = TensorDataset(X, Y)
    if sampled:
        sampler = WeightedRandomSampler([1.0] * 40 + [5.0] * 10, 50, generator=generator)
        return DataLoader(data, 16, sampler=sampler)
    return DataLoader(data, 16, shuffle=True, generator=generator)


@pytest.mark.parametrize("generator", [False, True])
@pytest.mark.parametrize("sampled", [False, True])
def test_a_loader_shuffles_by_the_epoch(sampled: bool, generator: bool) -> None:
    def epoch(number: int) -> Tensor:
        torch.rand(number)  # what else is drawn does not matter
        loader = shuffling(sampled, torch.Generator().manual_seed(number) if generator else None)
        return torch.cat([x for x, _ in taken(of_loader(loader).epoch(5, Epoch(1, 2, number)))])

    first, second = epoch(3), epoch(4)
    assert torch.equal(first, epoch(3)) and not torch.equal(first, second)


def test_one_loader_shuffles_anew_in_each_epoch() -> None:
    given = of_loader(shuffling(generator=torch.Generator()))
    orders = [torch.cat([x for x, _ in taken(given.epoch(5, Epoch(1, 2, number)))]) for number in (3, 4, 3)]
    assert torch.equal(orders[0], orders[2]) and not torch.equal(orders[0], orders[1])


def test_a_sampler_hears_of_the_epoch() -> None:
    class Sampler(list[int]):
        def set_epoch(self, epoch: int) -> None:
            self[0] = epoch

    sampler = Sampler(range(5))
    list(of_loader(DataLoader(TensorDataset(X, Y), 5, sampler=sampler)).epoch(5, Epoch(1, 2, 7)))
    assert sampler[0] == 7


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"batch_size": 16, "sampler": DistributedSampler(TensorDataset(X), 2, 0)}, "a DistributedSampler"),
        (
            {"batch_sampler": BatchSampler(DistributedSampler(TensorDataset(X), 2, 0), 16, False)},
            "a DistributedSampler",
        ),
        ({"batch_size": 16, "num_workers": 1, "persistent_workers": True}, "persistent_workers: they go on with"),
        ({"batch_size": 16, "num_workers": 1, "in_order": False}, "in_order=False: the order"),
    ],
)
def test_a_loader_that_cannot_be_repeated_is_refused(more: dict[str, Any], why: str) -> None:
    with pytest.raises(DataError, match=f"task 0, train: expected a loader without {why}"):
        of_loader(DataLoader(TensorDataset(X, Y), **more))


@pytest.mark.parametrize(
    ("more", "count"),
    [
        ({"batch_size": 16}, 50),
        ({"batch_size": 16, "drop_last": True}, 48),
        ({"batch_sampler": BatchSampler(RandomSampler(range(20)), 8, True)}, None),
        ({"batch_size": None}, None),
    ],
)
def test_the_number_of_samples_of_a_loader(more: dict[str, Any], count: int | None) -> None:
    assert of_loader(DataLoader(TensorDataset(X, Y), **more)).count == count


def test_a_generator_inside_a_batch_sampler_is_seeded() -> None:
    def order(number: int) -> Tensor:
        sampler = BatchSampler(RandomSampler(range(50), generator=torch.Generator()), 16, False)
        loader = DataLoader(TensorDataset(X, Y), batch_sampler=sampler)
        return torch.cat([x for x, _ in taken(of_loader(loader).epoch(5, Epoch(1, 2, number)))])

    assert torch.equal(order(3), order(3)) and not torch.equal(order(3), order(4))


def test_batches_of_a_loader_have_a_mark_and_others_do_not() -> None:
    marks = [batch.mark for batch in of_loader().epoch(5, EPOCH)]
    assert len({*marks}) == 4 and min(marks) > 0
    assert marks == [batch.mark for batch in of_loader().epoch(5, Epoch(3, 3, 3))]
    for given in (of_dataset(), SamplesInMemory(X, Y)):
        assert {batch.mark for batch in given.epoch(16, EPOCH)} == {0}


@pytest.mark.parametrize("of", ["dataset", "loader"])
def test_an_error_of_the_data_says_whose_it_is(of: str) -> None:
    class Broken(TensorDataset):
        def __getitem__(self, index: int) -> tuple[Tensor, ...]:
            raise ValueError("file 7 is damaged")

    given: Samples = of_dataset(Broken(X, Y)) if of == "dataset" else of_loader(DataLoader(Broken(X, Y), 16))
    for use in (lambda: list(given.epoch(5, EPOCH)), lambda: list(given.in_order()), lambda: given.first(1)):
        with pytest.raises(LoadingError, match=r"^task 0, train: .* failed: ValueError: file 7 is damaged") as error:
            use()
        assert isinstance(error.value.__cause__, ValueError)


# --- what loading draws -------------------------------------------------------------------------------------
def drawn() -> tuple[float, float, float]:
    return torch.rand(()).item(), float(np.random.random()), random.random()


def test_random_numbers_of_loading_are_apart() -> None:
    before = drawn()
    assert len({*before}) == 3
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # type: ignore[union-attr]
    one, other, next_one = Randomness(5), Randomness(5), Randomness(6)
    for randomness in (one, other, next_one):
        with randomness.in_use():
            drawn()
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1:] == (np.random.get_state()[1].tolist(), random.getstate())  # type: ignore[union-attr]
    again = []
    for randomness in (one, other, next_one):
        with randomness.in_use():
            again.append(drawn())
    assert again[0] == again[1]
    assert all(a != b for a, b in zip(again[0], again[2], strict=True))


def test_randomness_is_put_back_after_an_error() -> None:
    state = torch.get_rng_state()
    with pytest.raises(KeyError), Randomness(5).in_use():
        raise KeyError(torch.rand(3))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("of", ["dataset", "loader"])
def test_noise_follows_from_the_epoch(of: str, workers: int) -> None:
    noisy = Noisy(X, Y)

    def epoch(number: int) -> Tensor:
        drawn()
        given: Samples = of_dataset(noisy, workers=workers)
        if of == "loader":
            given = of_loader(DataLoader(noisy, 16, num_workers=workers))
        return torch.cat([x for x, _ in taken(given.epoch(16, Epoch(1, 2, number)))]) - 0

    first = epoch(3)
    assert torch.equal(first, epoch(3))
    rows = Epoch(1, 2, 3).order(50) if of == "dataset" else torch.arange(50)
    noise = (first - X[rows]).flatten(1)[:, 0]
    assert len({*noise.tolist()}) == 50 and noise.std() > 0.3  # every sample has noise of its own
    assert not torch.equal(first, epoch(4))


def test_noise_is_of_its_own_in_each_process() -> None:
    noise = []
    for rank in (0, 1):
        x = torch.cat([x for x, _ in taken(of_dataset(Noisy(X * 0, Y)).epoch(16, EPOCH, share=Share(rank, 2)))])
        noise.append(x.flatten(1)[:, 0])
    assert not {*noise[0].tolist()} & {*noise[1].tolist()}


def test_what_is_measured_is_the_same_each_time() -> None:
    given = of_dataset(Noisy(X, Y))
    assert_same(list(given.in_order()), list(given.in_order()))


# --- what is no sample --------------------------------------------------------------------------------------
def wrong(x: Any = X, y: Any = Y) -> Any:
    return [(x, y)]


BAD: dict[str, tuple[Any, str]] = {
    "no pair": ([(X, Y, Y)], r"expected batches of two tensors, inputs and labels, got tuple of torch.float32 \[50"),
    "no tensor": ([(X, ["cat"])], "expected batches of two tensors, inputs and labels, got tuple of torch.float32"),
    "a dictionary": ([{"x": X, "y": Y}], "expected batches of two tensors, inputs and labels, got dict"),
    "nothing in it": ([()], "got tuple of nothing"),
    "other shape": (wrong(X[:, :, :3]), r"floating point and the shape \[50, 1, 4, 6\], got torch.float32 \[50, 1, 3"),
    "bytes": (wrong(X.byte()), r"floating point and the shape \[50, 1, 4, 6\], got torch.uint8 \[50, 1, 4, 6\]"),
    "fewer inputs": (wrong(X[:49]), r"the shape \[50, 1, 4, 6\], got torch.float32 \[49, 1, 4, 6\]"),
    "one-hot labels": (wrong(y=torch.eye(4)[Y]), r"one integer label for each sample, got torch.float32 \[50, 4\]"),
    "labels of floats": (wrong(y=Y.float()), "one integer label for each sample, got torch.float32"),
    "truth values": (wrong(y=Y > 0), "one integer label for each sample, got torch.bool"),
    "label too large": (wrong(y=Y + 1), "expected labels from 0 to 3, got 4"),
    "label too small": (wrong(y=Y - 1), "expected labels from 0 to 3, got -1"),
    "no batches": ([], "no batches"),
    "no samples": (
        wrong(X[:0], Y[:0]),
        "at least one sample in each batch, got tuple of torch",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_batches_of_another_kind_are_refused(name: str) -> None:
    batches, message = BAD[name]
    with pytest.raises(DataError, match=f"^task 0, train: .*{message}"):
        list(of_loader(batches).epoch(5, EPOCH))
    with pytest.raises(DataError, match=message):
        list(of_loader(batches).in_order())
    with pytest.raises(DataError, match=message):
        of_loader(batches).first(3)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.uint16])
def test_other_numbers_become_float32_and_int64(dtype: torch.dtype) -> None:
    ((x, y),) = taken(of_loader(wrong(X.double(), Y.to(dtype))).epoch(5, EPOCH))
    assert (x.dtype, y.dtype) == (torch.float32, torch.int64)
    assert torch.equal(x, X) and torch.equal(y, Y)


def test_nothing_is_loaded_before_it_is_needed() -> None:
    loaded: list[int] = []

    class Noted(TensorDataset):
        def __getitem__(self, index: int) -> tuple[Tensor, ...]:
            loaded.append(index)
            return super().__getitem__(index)

    batches = of_dataset(Noted(X, Y)).epoch(16, EPOCH)
    assert loaded == []
    list(islice(batches, 1))
    assert len(loaded) == 16


# --- what is kept ----------------------------------------------------------------------------------
def test_small_samples_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    def make(task: int) -> Samples:
        made.append(task)
        return of_dataset() if task == 3 else SamplesInMemory(*samples(task, 50))

    size = 50 * (24 * 4 + 8)
    monkeypatch.setattr(of_keeping, "MOST_BYTES", 2 * size)
    kept = KeptSamples(make, torch.device("cpu"))
    for _ in range(2):
        for task in range(4):
            assert torch.equal(kept[task].first(50), samples(0 if task == 3 else task, 50)[0])
    assert made == [0, 1, 2, 3, 2, 3]  # the third one is too much, and those of a dataset are not in memory
