"""Streams: what each task holds, that it is the same every time, and that bad arguments are named."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from wsn_fast.train.choices import KINDS, ORDERED
from wsn_fast.train.data import Dataset
from wsn_fast.train.streams import TaskData, TaskStream
from wsn_fast.train.streams import stream as of_streams

CLASSES = 6
SUPERCLASSES = torch.tensor([1, 7, 4, 7, 1, 4])


def dataset(train: int = 60, test: int = 18, height: int = 5, width: int = 4) -> Dataset:
    """Two channels of noise; sample i has class i % 6."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (train + test, 2, height, width), generator=generator).to(torch.uint8)
    labels = torch.arange(train + test) % CLASSES
    return Dataset("noise", images[:train], labels[:train], images[train:], labels[train:], CLASSES, SUPERCLASSES)


def coded(pixels: Tensor, train: int = 60) -> Dataset:
    """One-channel data with the given images, [N, H, W] of 0..255; sample i has class i % 6."""
    images = pixels.to(torch.uint8).unsqueeze(1)
    labels = torch.arange(len(images)) % CLASSES
    return Dataset("coded", images[:train], labels[:train], images[train:], labels[train:], CLASSES, SUPERCLASSES)


def stream_of(kind: str, data: Dataset, seed: int, val_fraction: float = 0.1) -> TaskStream:
    """Three tasks of a kind."""
    return TaskStream(kind, [data] * 3 if kind == "datasets" else data, 3, seed, val_fraction=val_fraction)


def raw(stream: object, x: Tensor) -> Tensor:
    """Undo the normalisation."""
    return (x * stream.std[0] + stream.mean[0]).round().long()


def parts(task: TaskData) -> tuple[Tensor, ...]:
    return task.train_x, task.train_y, task.val_x, task.val_y, task.test_x, task.test_y


def numbered() -> Dataset:
    """Images of one value, the sample's number."""
    return coded(torch.arange(78)[:, None, None].expand(-1, 3, 3))


# --- all kinds ---


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_dtypes_and_the_sequence(kind: str) -> None:
    stream = stream_of(kind, dataset(), 0)
    share = 3 if kind in ORDERED else 1
    assert len(stream) == 3 and stream.task_ids == [0, 1, 2] and stream.kind == kind
    assert stream.classes == dict.fromkeys(range(3), CLASSES // share)
    for number, task in enumerate(stream):
        assert task.task == number and task.classes == CLASSES // share
        for x, y, count in zip(*[iter((*parts(task),))] * 2, (54, 6, 18), strict=False):
            assert x.shape == (count // share, 2, 5, 4) and x.dtype == torch.float32 and x.is_contiguous()
            assert y.shape == (count // share,) and y.dtype == torch.int64
        assert stream.input_shape == (2, 5, 4)


def test_indices_as_in_a_list() -> None:
    stream = TaskStream("split", dataset(), 3, 0)
    assert stream[-1].task == 2 and [task.task for task in stream[1:]] == [1, 2]
    with pytest.raises(IndexError):
        stream[3]


@pytest.mark.parametrize("kind", KINDS)
def test_a_task_is_rebuilt_to_the_bit(kind: str) -> None:
    first = stream_of(kind, dataset(), 7)
    _ = first[0], first[1]
    torch.manual_seed(5)
    second = stream_of(kind, dataset(), 7)
    assert all(map(torch.equal, parts(first[2]), parts(second[2])))


@pytest.mark.parametrize("kind", KINDS)
def test_the_global_generator_is_left_alone(kind: str) -> None:
    before = torch.get_rng_state()
    _ = stream_of(kind, dataset(), 7)[1]
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("kind", KINDS)
def test_the_dataset_is_left_alone(kind: str) -> None:
    data = dataset()
    before = data.train_x.clone()
    stream_of(kind, data, 7)[1].train_x.zero_()
    assert torch.equal(data.train_x, before)


@pytest.mark.parametrize("kind", KINDS)
def test_the_seed_matters(kind: str) -> None:
    first, second = (stream_of(kind, dataset(), seed)[1] for seed in (0, 1))
    assert not torch.equal(first.train_x, second.train_x)


@pytest.mark.parametrize("kind", KINDS)
def test_images_are_made_in_parts(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = parts(stream_of(kind, dataset(), seed=1)[1])
    monkeypatch.setattr(of_streams, "_AT_ONCE", 3)
    assert all(map(torch.equal, whole, parts(stream_of(kind, dataset(), seed=1)[1])))


@pytest.mark.parametrize("kind", KINDS)
def test_test_data_is_the_tasks_test_part(kind: str) -> None:
    stream = stream_of(kind, dataset(), 0)
    x, y = stream.test_data(1)
    assert torch.equal(x, stream[1].test_x) and torch.equal(y, stream[1].test_y)


def test_inputs_have_mean_zero_and_deviation_one_in_each_channel() -> None:
    data = dataset()
    data.train_x[:, 1] //= 7
    x = TaskStream("permuted", data, 2, 0, val_fraction=0.0)[1].train_x
    torch.testing.assert_close(x.mean((0, 2, 3)), torch.zeros(2), atol=1e-6, rtol=0)
    torch.testing.assert_close(x.std((0, 2, 3), correction=0), torch.ones(2))


def test_test_inputs_use_the_training_statistics() -> None:
    data = dataset()
    stream = TaskStream("split", data, 1, 0)
    expected = data.test_x.double().sub(data.train_x.double().mean((0, 2, 3))[:, None, None])
    expected /= data.train_x.double().std((0, 2, 3), correction=0)[:, None, None]
    torch.testing.assert_close(stream[0].test_x.double(), expected, atol=1e-5, rtol=0)


def test_a_constant_channel_stays_finite() -> None:
    data = dataset()
    data.train_x[:, 0] = 9
    assert TaskStream("permuted", data, 1, 0)[0].train_x.isfinite().all()


# --- validation ---


@pytest.mark.parametrize("kind", KINDS)
def test_train_and_validation_are_disjoint_and_complete(kind: str) -> None:
    stream = stream_of(kind, numbered(), 0, val_fraction=0.2)
    # The centre pixel: permuting equal pixels changes nothing, and rotation keeps the centre.
    train, val = (raw(stream, x)[:, 0, 1, 1].tolist() for x in (stream[1].train_x, stream[1].val_x))
    labels = stream[1].train_y.tolist() + stream[1].val_y.tolist()
    wanted = [n for n in range(60) if n % CLASSES in classes_of(stream, 1)]
    assert len(wanted) == (20 if kind in ORDERED else 60)
    assert sorted(train + val) == wanted and len(val) == len(wanted) // 5
    assert all(number % CLASSES == label for number, label in zip(train + val, labels, strict=True)) or kind in ORDERED


def classes_of(stream: object, task: int) -> set[int]:
    return set((raw(stream, stream[task].test_x)[:, 0, 1, 1] % CLASSES).tolist())


@pytest.mark.parametrize("kind", ["permuted", "rotated"])
def test_all_tasks_hold_out_the_same_images(kind: str) -> None:
    stream = TaskStream(kind, numbered(), 3, 0)
    held_out = [raw(stream, task.val_x)[:, 0, 1, 1].tolist() for task in stream]
    assert held_out[0] == held_out[1] == held_out[2] != sorted(held_out[0])


def test_no_validation() -> None:
    task = TaskStream("permuted", dataset(), 2, 0, val_fraction=0.0)[0]
    assert task.val_x.shape == (0, 2, 5, 4) and task.val_y.shape == (0,) and len(task.train_x) == 60


# --- permuted ---


def positions() -> Dataset:
    """Every pixel holds its position, in train and test images alike."""
    return coded(torch.arange(20).view(1, 4, 5).expand(78, -1, -1))


def test_a_task_permutes_all_its_images_by_one_permutation() -> None:
    stream = TaskStream("permuted", positions(), 2, 0)
    for task in stream:
        orders = raw(stream, torch.cat([task.train_x, task.val_x, task.test_x])).flatten(1)
        assert sorted(orders[0].tolist()) == list(range(20)) and (orders == orders[0]).all()


def test_every_task_has_a_permutation_of_its_own_the_first_too() -> None:
    stream = TaskStream("permuted", positions(), 4, 0)
    orders = [tuple(raw(stream, task.test_x)[0].flatten().tolist()) for task in stream]
    assert len({*orders, tuple(range(20))}) == 5


def test_a_longer_stream_begins_with_the_same_tasks() -> None:
    short, long = (TaskStream("permuted", positions(), tasks, 0) for tasks in (2, 4))
    assert torch.equal(short[1].train_x, long[1].train_x)


def test_channels_move_together() -> None:
    pixels = torch.arange(20, dtype=torch.uint8).view(1, 1, 4, 5).expand(12, 2, -1, -1)
    data = Dataset("two", pixels, torch.arange(12) % 2, pixels, torch.arange(12) % 2, 2)
    x = TaskStream("permuted", data, 1, 0)[0].train_x
    assert torch.equal(x[:, 0], x[:, 1])


# --- split ---


def test_every_class_is_in_exactly_one_task() -> None:
    stream = TaskStream("split", numbered(), 3, 0)
    assert sorted(c for task in range(3) for c in classes_of(stream, task)) == list(range(CLASSES))


def test_labels_are_renumbered_alike_in_all_parts() -> None:
    stream = TaskStream("split", numbered(), 2, 3, val_fraction=0.2)
    for task in stream:
        seen: dict[int, set[int]] = {}
        for x, y in ((task.train_x, task.train_y), (task.val_x, task.val_y), (task.test_x, task.test_y)):
            for number, label in zip(raw(stream, x)[:, 0, 0, 0].tolist(), y.tolist(), strict=True):
                seen.setdefault(number % CLASSES, set()).add(label)
        assert sorted(seen.values(), key=min) == [{0}, {1}, {2}]


def test_classes_come_in_a_given_order() -> None:
    def dealt(order: str | list[int], **more: int) -> list[set[int]]:
        stream = TaskStream("split", numbered(), 2, 0, class_order=order, **more)
        return [classes_of(stream, task) for task in range(2)]

    assert dealt("given") == [{0, 1, 2}, {3, 4, 5}]
    assert dealt([5, 0, 3, 1, 4, 2]) == [{5, 0, 3}, {1, 4, 2}]
    assert dealt([5, 0, 3, 1]) == [{5, 0}, {3, 1}]
    assert dealt("given", classes_per_task=2) == [{0, 1}, {2, 3}]


def test_labels_follow_the_given_order() -> None:
    task = TaskStream("split", numbered(), 2, 0, class_order=[5, 0, 3, 1, 4, 2])[0]
    stream = TaskStream("split", numbered(), 2, 0, class_order=[5, 0, 3, 1, 4, 2])
    assert [[5, 0, 3][label] for label in task.test_y] == (raw(stream, task.test_x)[:, 0, 1, 1] % CLASSES).tolist()


def test_classes_are_shuffled_by_the_seed() -> None:
    dealt = {str([classes_of(TaskStream("split", numbered(), 3, s), task) for task in range(3)]) for s in range(5)}
    assert len(dealt) > 1


# --- rotated ---


def test_the_first_task_is_not_rotated() -> None:
    data = dataset()
    stream = TaskStream("rotated", data, 4, 0)
    assert torch.equal(raw(stream, stream[0].test_x), data.test_x.long())


def test_half_way_is_a_quarter_turn_counter_clockwise() -> None:
    data = dataset(height=5, width=5)
    stream = TaskStream("rotated", data, 2, 0)
    assert torch.equal(raw(stream, stream[1].test_x), torch.rot90(data.test_x.long(), 1, (2, 3)))


@pytest.mark.parametrize(("before", "after"), [((2, 5), (1, 4)), ((1, 4), (2, 3))], ids=["right", "above"])
def test_oblong_images_keep_their_angles(before: tuple[int, int], after: tuple[int, int]) -> None:
    """A quarter turn takes what is right of the centre above it, and what is above it to its left."""
    pixels, expected = torch.zeros(78, 5, 9), torch.zeros(5, 9, dtype=torch.int64)
    pixels[:, before[0], before[1]] = expected[after] = 200
    stream = TaskStream("rotated", coded(pixels), 2, 0)
    assert torch.equal(raw(stream, stream[1].test_x)[0, 0], expected)


def test_angles_are_spread_evenly_over_half_a_turn() -> None:
    size = 41
    y, x = torch.meshgrid(torch.arange(size) - 20.0, torch.arange(size) - 20.0, indexing="ij")
    blob = 255 * torch.exp(-((x - 12) ** 2 + y**2) / 8)
    stream = TaskStream("rotated", coded(blob.expand(78, -1, -1)), 6, 0)
    angles = []
    for task in range(6):
        image = raw(stream, stream.test_data(task)[0])[0, 0].double()
        angles.append(math.degrees(math.atan2(-(image * y).sum(), (image * x).sum())))
    assert angles == pytest.approx([0, 30, 60, 90, 120, 150], abs=0.5)


def test_outside_the_image_is_black() -> None:
    stream = TaskStream("rotated", coded(torch.full((78, 8, 8), 100)), 4, 0)
    assert raw(stream, stream[1].test_x)[0, 0, 0, 0] == 0


# --- superclass ---


def test_a_task_has_the_classes_of_a_superclass() -> None:
    def dealt(tasks: int, order: str | list[int]) -> list[set[int]]:
        stream = TaskStream("superclass", numbered(), tasks, 0, class_order=order)
        return [classes_of(stream, task) for task in range(tasks)]

    assert dealt(3, "given") == [{0, 4}, {2, 5}, {1, 3}]  # the superclasses 1, 4 and 7
    assert dealt(2, [2, 0]) == [{1, 3}, {0, 4}]
    assert dealt(1, "given") == [{0, 4}]
    assert {str(dealt_by(seed)) for seed in range(5)} != {str(dealt(3, "given"))}


def dealt_by(seed: int) -> list[set[int]]:
    stream = TaskStream("superclass", numbered(), 3, seed)
    return [classes_of(stream, task) for task in range(3)]


def test_labels_of_a_superclass_are_in_the_order_of_the_classes() -> None:
    stream = TaskStream("superclass", numbered(), 3, 0, class_order="given")
    x, y = stream.test_data(2)
    assert [[1, 3][label] for label in y] == (raw(stream, x)[:, 0, 1, 1] % CLASSES).tolist()


def test_a_class_without_superclass_belongs_to_no_task() -> None:
    data = replace(numbered(), superclasses=torch.tensor([0, -1, 0, 1, 1, -1]))
    stream = TaskStream("superclass", data, 2, 0, class_order="given")
    assert [classes_of(stream, task) for task in range(2)] == [{0, 2}, {3, 4}]


def test_other_superclasses_are_other_data() -> None:
    first, second = (
        replace(numbered(), superclasses=torch.tensor(s)) for s in ([0, 0, 0, 1, 1, 1], [0, 1, 0, 1, 0, 1])
    )
    prints = {TaskStream("superclass", data, 2, 0).fingerprint for data in (first, second)}
    assert len(prints) == 2
    assert TaskStream("split", first, 2, 0).fingerprint == TaskStream("split", second, 2, 0).fingerprint


# --- datasets ---


def grey(value: int, side: int, classes: int = 2) -> Dataset:
    """Images of one channel and one value each, ``value`` and the number of the class more."""
    labels = torch.arange(20) % classes
    images = (labels + value).to(torch.uint8)[:, None, None, None].expand(-1, 1, side, side)
    return Dataset(f"grey {value}", images, labels, images[:classes], labels[:classes], classes)


def test_each_task_is_a_dataset_in_the_order_given() -> None:
    stream = TaskStream("datasets", [grey(10, 4), dataset(), grey(50, 4, classes=3)], 3, 0)
    assert stream.classes == {0: 2, 1: CLASSES, 2: 3} and stream.input_shape == (2, 5, 4)
    x, y = stream.test_data(2)
    pixels = (x * stream.std[2] + stream.mean[2]).round()
    assert y.tolist() == [0, 1, 2] and pixels[:, :, 2, 2].tolist() == [[50, 50], [51, 51], [52, 52]]


def test_smaller_images_get_a_border_of_zeros() -> None:
    stream = TaskStream("datasets", [grey(10, 3), grey(20, 6)], 2, 0)
    pixels = (stream.test_data(0)[0] * stream.std[0] + stream.mean[0]).round()
    expected = torch.zeros(6, 6)
    expected[1:4, 1:4] = 10
    assert torch.equal(pixels[0, 0], expected)


def test_each_dataset_has_its_own_statistics_and_validation() -> None:
    stream = TaskStream("datasets", [grey(10, 4), grey(90, 4)], 2, 0)
    for task in stream:
        x = torch.cat([task.train_x, task.val_x])
        torch.testing.assert_close(x.mean((0, 2, 3)), torch.zeros(1), atol=1e-5, rtol=0)
    orders = [TaskStream("datasets", [numbered()] * 2, 2, 0)[task].val_x[:, 0, 0, 0].tolist() for task in (0, 1)]
    assert orders[0] != orders[1]


def test_a_dataset_of_three_channels_and_one_of_two() -> None:
    three = dataset().train_x[:, :1].expand(-1, 3, -1, -1)
    labels = torch.arange(60) % CLASSES
    with pytest.raises(ValueError, match="'noise' has images of 2 channels, and another dataset of the stream has 3"):
        TaskStream("datasets", [dataset(), Dataset("three", three, labels, three, labels, CLASSES)], 2, 0)


# --- bad arguments ---


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "shuffled"}, "kind: expected one of permuted, split, rotated, superclass, datasets, got 'shuffled'"),
        ({"tasks": 0}, "tasks: expected an integer of at least 1, got 0"),
        ({"tasks": True}, "tasks: expected an integer of at least 1, got True"),
        ({"tasks": 2.0}, "tasks: expected an integer of at least 1, got 2.0"),
        ({"kind": "split", "tasks": 4}, "tasks: 4 does not divide the 6 classes of 'noise'"),
        ({"kind": "split", "tasks": 12}, "tasks: 12 does not divide the 6 classes of 'noise'"),
        ({"kind": "split", "classes_per_task": 4}, "tasks: 2 tasks of 4 classes need 8, and 'noise' has 6: 1 tasks"),
        ({"kind": "split", "classes_per_task": 0}, "classes_per_task: expected an integer of at least 1, got 0"),
        ({"kind": "split", "class_order": "sorted"}, "class_order: expected random, given or numbers, got 'sorted'"),
        ({"kind": "split", "class_order": []}, r"class_order: expected random, given or numbers, got \[\]"),
        ({"kind": "split", "class_order": [0, 6]}, "class_order: .* numbers of classes of 'noise', 0 to 5, got 6"),
        ({"kind": "split", "class_order": [0, -1]}, "class_order: expected numbers .* got -1"),
        ({"kind": "split", "class_order": [3, 0, 3, 1]}, "class_order: expected each number once, got 3 more often"),
        ({"kind": "split", "class_order": [0, 1, 2]}, "tasks: 2 does not divide the 3 classes of 'noise'; 1, 3 do"),
        ({"kind": "superclass", "tasks": 4}, "tasks: expected at most the 3 superclasses of 'noise', got 4"),
        ({"kind": "superclass", "class_order": [3, 1]}, "class_order: .* of superclasses of 'noise', 0 to 2, got 3"),
        ({"kind": "superclass", "classes_per_task": 2}, "classes_per_task: a superclass stream .* got 2"),
        ({"kind": "superclass", "data": grey(1, 4)}, "data: 'grey 1' has no superclasses"),
        ({"kind": "datasets", "data": [grey(1, 4)]}, "tasks: expected the number of datasets, 1, got 2"),
        ({"data": [grey(1, 4)] * 2}, "data: a permuted stream has one dataset, got 2"),
        ({"seed": 1.5}, "seed: expected an integer, got 1.5"),
        ({"val_fraction": 1.0}, r"val_fraction: expected a number in \[0, 1\), got 1.0"),
        ({"val_fraction": -0.1}, r"val_fraction: expected a number in \[0, 1\), got -0.1"),
        ({"val_fraction": "0.1"}, r"val_fraction: expected a number in \[0, 1\), got '0.1'"),
        ({"val_fraction": math.nan}, r"val_fraction: expected a number in \[0, 1\), got nan"),
        (
            {"val_fraction": 0.001},
            "val_fraction: 0.001 of the 60 training .* 60 to train on, 0 to validate on",
        ),
        (
            {"val_fraction": 0.999},
            "val_fraction: 0.999 of the 60 training .* 0 to train on, 60 to validate on",
        ),
    ],
)
def test_bad_arguments_are_named_with_their_values(change: dict[str, object], message: str) -> None:
    arguments = {"kind": "permuted", "tasks": 2, "seed": 0} | change
    with pytest.raises(ValueError, match=message):
        TaskStream(**{"data": dataset()} | arguments)


def test_a_task_without_training_samples_is_an_error() -> None:
    with pytest.raises(ValueError, match="of the 0 training samples of task 2"):
        TaskStream("split", dataset(train=4), 3, 5, val_fraction=0.0)  # seed 5 deals 4 and 5 to task 2


def test_a_task_without_test_samples_is_an_error() -> None:
    with pytest.raises(ValueError, match="dataset: 'noise' has no test samples for task 1"):
        TaskStream("split", dataset(test=2), 3, 20)  # seed 20 deals 0 and 1 to task 0
