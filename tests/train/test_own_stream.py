"""A stream of tasks with data of one's own, and the code that makes it."""

from __future__ import annotations

import itertools
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import own_tasks
import pytest
import torch
from own_tasks import CLASSES, Endless, datasets, loaders, samples
from torch.utils.data import TensorDataset, random_split

from wsn_fast.train import Task
from wsn_fast.train.config import command_line, from_dict, resolve
from wsn_fast.train.data import DataError
from wsn_fast.train.experiment import make_experiment
from wsn_fast.train.samples.loading import SamplesOfDataset
from wsn_fast.train.samples.users_code import LoadingError
from wsn_fast.train.streams import OwnStream, own_code

CODE = own_tasks.__file__


def stream_of(made: Any, **more: Any) -> OwnStream:
    return OwnStream(made, more.pop("seed", 0), **{"val_fraction": 0.1, **more})


def data(count: int = 20, task: int = 0) -> TensorDataset:
    return TensorDataset(*samples(task, count))


def rows(stream: OwnStream, task: int, part: int) -> list[int]:
    found = stream.training(task)[part]
    assert isinstance(found, SamplesOfDataset)
    return found.rows.tolist()


# --- its tasks ------------------------------------------------------------------------------------
@pytest.mark.parametrize("make", [datasets, loaders])
def test_a_stream_has_the_tasks(make: Any) -> None:
    stream = stream_of(make(None))
    assert (len(stream), stream.task_ids, stream.input_shape) == (3, [0, 1, 2], (1, 4, 6))
    assert stream.classes == dict.fromkeys(range(3), CLASSES)
    for task in range(3):
        train, val = stream.training(task)
        assert [part.count for part in (train, val, stream.test(task))] == [
            *((180, 20) if make is datasets else (190, 10)),
            60,
        ]
        assert torch.equal(stream.test(task).first(60), samples(task, 60)[0])


def test_a_part_of_a_dataset_is_held_out() -> None:
    tasks = [Task(data(200, task), data(), CLASSES) for task in range(2)]
    train, val = (rows(stream_of(tasks), 0, part) for part in (0, 1))
    assert (len(train), len(val)) == (180, 20)
    assert sorted(train + val) == list(range(200))
    assert val != sorted(val)
    others = [rows(stream_of(tasks, seed=1), 0, 1), rows(stream_of(tasks), 1, 1)]
    assert rows(stream_of(tasks), 0, 1) == val and val not in others


def test_data_for_validation_are_taken_as_they_are() -> None:
    stream = stream_of([Task(data(200), data(), CLASSES, validation=data(7))])
    assert (len(rows(stream, 0, 0)), rows(stream, 0, 1)) == (200, list(range(7)))


def test_the_first_tasks_can_be_taken() -> None:
    assert len(stream_of(datasets(None), tasks=2)) == 2
    with pytest.raises(ValueError, match="tasks: expected at most the 3 tasks of tasks, got 4"):
        stream_of(datasets(None), tasks=4)


def test_tasks_may_have_other_numbers_of_classes() -> None:
    stream = stream_of([Task(data(), data(), CLASSES), Task(data(), data(), 9)])
    assert stream.classes == {0: CLASSES, 1: 9}


def test_tasks_are_opened_when_they_are_needed() -> None:
    class Lazy:
        def __init__(self) -> None:
            self.opened: list[int] = []

        def __len__(self) -> int:
            return 3

        def __getitem__(self, task: int) -> Task:
            self.opened.append(task)
            return datasets(None)[task]

    tasks = Lazy()
    stream = stream_of(tasks)
    assert tasks.opened == [0, 1, 2]
    stream.training(1)
    stream.test(2)
    assert tasks.opened == [0, 1, 2, 1, 2]


def test_a_task_that_is_cut_at_random_is_the_same_each_time() -> None:
    """Else samples to test on would be trained."""

    class Lazy(list[None]):
        def __getitem__(self, task: Any) -> Task:
            train, test = random_split(TensorDataset(torch.arange(80.0).view(-1, 1), torch.zeros(80).long()), [60, 20])
            return Task(train, test, CLASSES)

    stream = stream_of(Lazy([None] * 2), val_fraction=0.2)
    state = torch.get_rng_state()
    for task in (0, 1, 0):
        parts = [part.first(99).flatten().tolist() for part in (*stream.training(task), stream.test(task))]
        assert sorted(itertools.chain(*parts)) == list(range(80))
    assert torch.equal(state, torch.get_rng_state())
    assert not torch.equal(stream.test(0).first(20), stream.test(1).first(20))


def test_classes_may_be_a_number_of_numpy() -> None:
    assert stream_of([Task(data(), data(), np.int64(4))]).classes == {0: 4}  # type: ignore[arg-type]


def test_the_fingerprint_is_of_what_is_known() -> None:
    def fingerprint(*tasks: Task) -> str:
        return stream_of(tasks).fingerprint

    first = Task(data(), data(), CLASSES)
    assert fingerprint(first) == fingerprint(Task(data(), data(), CLASSES))
    wider = TensorDataset(torch.randn(20, 1, 4, 7), torch.zeros(20).long())
    others = [
        (first, first), (first._replace(classes=5),), (first._replace(train=data(30)),),
        (first._replace(test=data(30)),), (first._replace(test=data(task=1)),), (first._replace(validation=data()),),
        (first._replace(train=wider, test=wider),),
        (first._replace(train=data(task=1)),),
    ]  # fmt: skip
    assert len({fingerprint(first), *(fingerprint(*tasks) for tasks in others)}) == 9


def test_there_is_no_such_task() -> None:
    stream = stream_of(datasets(None))
    for read in (stream.training, stream.test):
        with pytest.raises(IndexError):
            read(3)


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        (None, "tasks: expected a sequence of at least one task, got NoneType"),
        ([], "tasks: expected a sequence of at least one task, got list of nothing"),
        (iter([1]), "tasks: expected a sequence of at least one task, got list_iterator"),
        ([(data(), data(), 4)], "tasks: task 0: expected a wsn_fast.train.Task, got tuple of TensorDataset"),
        ([Task(data(), data(), 0)], "task 0: expected classes to be an integer of at least 1, got 0"),
        ([Task(data(), data(), True)], "task 0: expected classes to be an integer of at least 1, got True"),
        ([Task(data(), data(), "4")], "task 0: expected classes to be an integer of at least 1, got '4'"),
        ([Task(data(), data(), 4), Task(data(3), data(), 4)], "task 1, train: val_fraction 0.1 of 3 samples leaves 3 "),
        ([Task(data(), data(0), 4)], "task 0, test: no samples"),
        ([Task(data(0), data(), 4)], "task 0, train: no samples"),
        ([Task(data(), 7, 4)], "task 0, test: expected a Dataset, a DataLoader, or what .* again and again, got int"),
        ([Task(data(), iter([1]), 4)], "task 0, test: expected .* again and again, got list_iterator"),
        ([Task(data(), Endless(0, 9), 4)], "task 0, test: expected an IterableDataset to be in a DataLoader, got End"),
        (
            [Task(loaders(None)[0].train, data(), 4)],
            "task 0, train: expected a dataset, .*validation= beside it, got D",
        ),
        ([Task(TensorDataset(torch.zeros(20, 3), torch.zeros(20)), data(), 4)], "task 0, train: expected one integer"),
        ([Task([(1, 2)] * 20, data(), 4)], "task 0, train: expected inputs of floating"),
    ],
)
def test_what_is_no_task_is_refused(tasks: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        stream_of(tasks)


def test_other_inputs_of_a_later_task_are_refused() -> None:
    wider = TensorDataset(torch.randn(20, 1, 4, 7), torch.zeros(20).long())
    with pytest.raises(DataError, match=r"tasks: task 1, train: .*shape \[1, 1, 4, 6\], got .* \[1, 1, 4, 7\]"):
        stream_of([Task(data(), data(), CLASSES), Task(wider, data(), CLASSES)])


# --- the code that makes it ------------------------------------------------------------------------
@pytest.fixture
def file(tmp_path: Path) -> Iterator[Path]:
    """A file of code, which is forgotten after the test."""
    before, path = {*sys.modules}, list(sys.path)
    yield tmp_path / "code_of_a_test.py"
    sys.path[:] = path
    for name in {*sys.modules} - before:
        del sys.modules[name]


def test_code_is_called_with_the_folder_of_the_data(file: Path) -> None:
    file.write_text("import helper_of_a_test\ndef make(folder): return [folder, helper_of_a_test.NUMBER]")
    file.with_name("helper_of_a_test.py").write_text("NUMBER = 5")
    assert own_code.call(f"{file}:make", "/data", 0) == ["/data", 5]
    assert own_code.call("code_of_a_test:make", None, 0) == [None, 5]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("{folder}/missing.py:make", "data: there is no file .*missing.py"),
        ("{file}:other", "data: .*code_of_a_test.py has no function 'other' "),
        ("{file}:NUMBER", "has no function 'NUMBER' "),
        ("no_module_of_mine:make", "data: there is no module 'no_module_of_mine'"),
        ("os.no_module:make", "data: there is no module 'os.no_module'"),
        ("{folder}/json.py:make", "another module is called 'json' already: give .*json.py another name"),
    ],
)
def test_code_that_is_not_there(file: Path, name: str, message: str) -> None:
    file.write_text("NUMBER = 1")
    file.with_name("json.py").write_text("def make(folder): return []")
    with pytest.raises(DataError, match=message):
        own_code.call(name.format(folder=file.parent, file=file), None, 0)


def test_an_error_in_code_says_where_and_has_its_cause(file: Path) -> None:
    file.write_text("import no_such_module_here\n")
    with pytest.raises(
        LoadingError, match=r"code_of_a_test.py:make: the code that makes the data has failed: Mod"
    ) as error:
        own_code.call(f"{file}:make", None, 0)
    assert isinstance(error.value.__cause__, ModuleNotFoundError)


def test_what_code_draws_is_decided_by_the_seed(file: Path) -> None:
    file.write_text(
        "import random, numpy, torch\ndef make(folder): return torch.rand(1), numpy.random.rand(), random.random()"
    )
    state = torch.get_rng_state()
    first, again, other = (own_code.call(f"{file}:make", None, seed) for seed in (1, 1, 2))
    assert first == again
    assert all(a != b for a, b in zip(first, other, strict=True))
    assert torch.equal(state, torch.get_rng_state())


# --- its settings ----------------------------------------------------------------------------------
def test_settings_of_a_stream_of_ones_own() -> None:
    settings = resolve(stream="own", data="some/my tasks.py:make")
    assert (settings.tasks, settings.net, settings.workers) == (0, "resnet18", 0)
    assert settings.out == "runs/own-my+tasks.py+make-paper-seed0"
    assert shlex.split(command_line(settings))[3:5] == ["--data", "some/my tasks.py:make"]
    windows = resolve(stream="own", data=r"C:\me\my_tasks.py:make")
    assert windows.out == "runs/own-my_tasks.py+make-paper-seed0"
    assert shlex.split(command_line(windows))[4] == r"C:\me\my_tasks.py:make"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"stream": "own"}, "data: expected FILE.py:FUNCTION or MODULE:FUNCTION, .*, got 'digits'"),
        ({"stream": "own", "data": "file.py"}, "data: expected FILE.py:FUNCTION"),
        ({"stream": "own", "data": "file.py:f()"}, "data: expected FILE.py:FUNCTION"),
        ({"stream": "own", "data": "file.py:f\n"}, "data: expected FILE.py:FUNCTION"),
        ({"stream": "own", "data": "\x1b[2Jfile.py:f"}, "data: expected FILE.py:FUNCTION"),
        ({"stream": "own", "data": ""}, "data: expected FILE.py:FUNCTION"),
        ({"stream": "own", "data": 7}, "data: expected FILE.py:FUNCTION"),
        ({"stream": "own", "data": "f:g", "workers": -1}, "workers: expected an integer from 0 to 1024, got -1"),
        ({"stream": "own", "data": "f:g", "tasks": -1}, "tasks: expected an integer from 0 to"),
        (
            {"stream": "own", "data": "f:g", "class_order": "given"},
            "class_order: expected random for the stream own",
        ),
        ({"tasks": 0}, "tasks: expected an integer from 1 to 10000, got 0"),
        ({"workers": 2}, "workers: expected 0 for the stream permuted, whose data are in memory, got 2"),
        ({"stream": "split", "data": "f:g"}, "data: expected one of digits"),
    ],
)
def test_settings_that_do_not_fit(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve(**given)


def test_old_configs_have_no_workers() -> None:
    settings = {**vars(resolve())}
    del settings["workers"]
    assert from_dict(settings).workers == 0


def test_flat_inputs_are_not_augmented(file: Path) -> None:
    file.write_text(
        "import torch\nfrom wsn_fast.train import Task\nfrom torch.utils.data import TensorDataset\n"
        "def make(folder):\n"
        "    data = TensorDataset(torch.randn(50, 6), torch.zeros(50).long())\n"
        "    return [Task(data, data, 2)]\n"
    )
    given = {"stream": "own", "data": f"{file}:make", "net": "mlp", "device": "cpu"}
    assert make_experiment(resolve(**given)).stream.input_shape == (6,)
    with pytest.raises(ValueError, match=r"augment: expected none for inputs of the shape \(6,\), got 'crops'"):
        make_experiment(resolve(**given, augment="crops"))
