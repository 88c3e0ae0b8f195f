from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch

from wsn_fast.train import config
from wsn_fast.train.config import resolve


def test_the_paper_is_the_default_preset() -> None:
    assert (resolve().preset, resolve().rule, resolve().reinit_scores) == ("paper", "magnitude", False)


def test_the_clarena_preset_is_the_other_rule_with_new_scores() -> None:
    settings = resolve(preset="clarena")
    assert (settings.rule, settings.reinit_scores) == ("value", True)


def test_an_explicit_setting_goes_over_the_preset() -> None:
    settings = resolve(preset="clarena", reinit_scores=False, rule="magnitude")
    assert (settings.preset, settings.rule, settings.reinit_scores) == ("clarena", "magnitude", False)


def test_none_means_not_given() -> None:
    assert resolve(preset="clarena", rule=None, reinit_scores=None, out=None) == resolve(preset="clarena")


@pytest.mark.parametrize(
    ("stream", "data", "expected"),
    [
        # tasks, epochs, batch, validation, smallest lr, net: the settings table of the specification
        ("permuted", "mnist", (10, 5, 10, 0.1, 1e-6, "mlp")),
        ("datasets", "cifar10,mnist,svhn,fashion_mnist,notmnist", (5, 100, 64, 0.05, 1e-5, "resnet18")),
        ("split", "omniglot", (100, 100, 64, 0.05, 1e-6, "lenet_large")),
        ("split", "cifar100", (10, 200, 64, 0.05, 1e-6, "alexnet")),
        ("superclass", "cifar100", (20, 50, 64, 0.05, 1e-5, "lenet")),
        ("split", "folder", (40, 10, 10, 0.1, 1e-6, "convnet4")),
    ],
)
def test_the_papers_settings_are_the_defaults(stream: str, data: str, expected: tuple[Any, ...]) -> None:
    s = resolve(stream=stream, data=data, data_dir="d")
    assert (s.tasks, s.epochs, s.batch_size, s.val_fraction, s.lr_min, s.net) == expected
    assert (s.optimizer, s.lr, s.lr_patience, s.lr_factor) == ("adam", 1e-3, 6, 2.0)


def test_the_papers_orders_of_classes() -> None:
    omniglot, superclass = resolve(stream="split", data="omniglot"), resolve(stream="superclass", data="cifar100")
    assert (omniglot.class_order, omniglot.classes_per_task) == ("given", 12)
    assert (superclass.class_order, resolve(stream="split").class_order) == ("given", "random")
    assert config.command_line(resolve(stream="superclass", data="cifar100", class_order="2,1")).endswith(
        "superclass --data cifar100 --preset paper --class-order 2,1"
    )


def test_five_percent_are_held_out_where_the_paper_does_not_say_otherwise() -> None:
    assert resolve(stream="split", data="mnist").val_fraction == 0.05


def test_out_is_named_after_the_run() -> None:
    assert resolve(stream="split", preset="clarena", seed=7).out == "runs/split-digits-clarena-seed7"
    assert resolve(out="elsewhere").out == "elsewhere"


BAD = [
    ("stream", "shuffled"),
    ("data", "imagenet"),
    ("data", 5),
    ("augment", "flips"),
    ("class_order", "sorted"),
    ("class_order", "1,"),
    ("class_order", [1, 2]),
    ("classes_per_task", -1),
    ("classes_per_task", 2),  # of a permuted stream
    ("preset", "best"),
    ("rule", "median"),
    ("score_init", "zeros"),
    ("net", "vgg"),
    ("optimizer", "lbfgs"),
    ("device", "tpu"),
    ("tasks", 0),
    ("tasks", 2.0),
    ("tasks", True),
    ("epochs", -1),
    ("batch_size", "64"),
    ("lr_patience", 0),
    ("threads", 0),
    ("seed", -1),
    ("seed", 2**63),
    ("density", 0),
    ("density", 1.01),
    ("density", float("nan")),
    ("val_fraction", 0.0),
    ("val_fraction", 1.0),
    ("lr", 0.0),
    ("lr", float("inf")),
    ("lr_min", -1e-6),
    ("lr_min", 0.1),
    ("lr_factor", 1.0),
    ("weight_decay", -0.1),
    ("checkpoint_seconds", -1),
    ("checkpoint_seconds", "often"),
    ("reinit_scores", 1),
    ("one_pass", "yes"),
    ("moments", "4bit"),
    ("out", ""),
    ("data_dir", 3),
]


@pytest.mark.parametrize(("name", "value"), BAD, ids=lambda x: str(x))
def test_a_bad_setting_is_named_with_its_value(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{name}: expected .*, got ") as error:
        resolve(**{name: value})
    assert str(error.value).endswith(f"got {value!r}")


@pytest.mark.parametrize("data", ["digits,..", "digits,", ",", "digits,a/b", 5, None])
def test_a_bad_name_among_several_datasets(data: Any) -> None:
    settings = dataclasses.asdict(resolve(stream="datasets", data="digits,mnist"))
    with pytest.raises(ValueError, match=r"^data: expected one of .*, or folders of images, with commas between them"):
        config.from_dict({**settings, "data": data})


def test_torchs_optimizers_store_float32_means_only() -> None:
    with pytest.raises(ValueError, match=r"^moments: expected float32 without one_pass, .*, got '8bit'$"):
        resolve(moments="8bit", one_pass=False)


def test_settings_survive_json() -> None:
    settings = resolve(stream="rotated", density=0.03, lr=3e-4)
    assert config.from_dict(json.loads(json.dumps(dataclasses.asdict(settings)))) == settings


def test_the_small_net_gets_one_thread_and_others_what_torch_has() -> None:
    assert resolve().threads == 1
    assert resolve(net="lenet").threads == torch.get_num_threads()


def test_unknown_and_missing_settings_are_listed() -> None:
    settings = dataclasses.asdict(resolve())
    with pytest.raises(ValueError, match="unknown settings: momentum"):
        config.from_dict({**settings, "momentum": 0.9})
    del settings["tasks"]
    with pytest.raises(ValueError, match="missing settings: tasks"):
        config.from_dict(settings)


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        resolve().tasks = 3  # type: ignore[misc]


def test_the_portable_settings_leave_out_the_places() -> None:
    assert config.portable(resolve(data_dir="a", out="b")) == config.portable(resolve(data_dir="c", out="d"))
    assert config.portable(resolve())["density"] == 0.3


def test_the_command_line_says_what_is_not_default() -> None:
    settings = resolve(data="mnist", batch_size=64, seed=1, preset="clarena", reinit_scores=False, out="x")
    assert config.command_line(settings) == (
        "wsn-fast train permuted --data mnist --preset clarena --batch-size 64 --no-reinit-scores --seed 1"
    )
