"""What a WSN does not have is that of its model."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from wsn_fast import WSN, OwnershipError, convert


class Model(nn.Module):
    """A model with a setting, and with methods of its own."""

    _hidden = "private"
    tasks = "the model's"

    def __init__(self) -> None:
        super().__init__()
        self.config = {"width": 4}
        self.first, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encode(x))

    def encode(self, x: Tensor) -> Tensor:
        return self.first(x).relu()

    def save_pretrained(self, folder: str) -> None:
        raise AssertionError(folder)


def made() -> WSN:
    return WSN(convert(Model(), density=0.5, heads="head"))


def test_public_attributes_are_those_of_the_model() -> None:
    wsn = made()
    assert wsn.config is wsn.model.config
    x = torch.randn(3, 4)
    assert torch.equal(wsn.encode(x), wsn.model.encode(x))


def test_what_a_wsn_has_is_its_own() -> None:
    assert made().tasks == []


@pytest.mark.parametrize("name", ["_hidden", "absent"])
def test_private_and_absent_names_are_errors(name: str) -> None:
    with pytest.raises(AttributeError, match=f"'WSN' object has no attribute '{name}'"):
        getattr(made(), name)


def test_saving_without_the_tasks_says_what_to_save() -> None:
    with pytest.raises(AttributeError, match=r"save_pretrained would .* the tasks: save wsn\.state_dict\(\)"):
        made().save_pretrained("folder")


def test_a_copy_and_a_pickle_have_the_attributes_of_their_own_model() -> None:
    wsn = made()
    for other in (copy.deepcopy(wsn), pickle.loads(pickle.dumps(wsn))):
        assert other.config == wsn.config
        assert other.config is other.model.config is not wsn.config


def test_parameters_that_come_in_the_middle_of_a_task_are_named_at_its_end() -> None:
    wsn = made()
    wsn.begin_task(1)
    wsn.model.first.adapter = nn.Linear(4, 4)
    with pytest.raises(OwnershipError, match=r"first\.adapter\.weight"):
        wsn.end_task()
    assert (wsn.current_task, wsn.tasks) == (1, [])


def test_a_wrapper_in_it_is_not_unwrapped() -> None:
    """Programs look for ``module``, to find the model in a wrapper such as DistributedDataParallel."""
    wsn = made()
    wsn.model.module = wsn.model.first
    assert not hasattr(wsn, "module")
