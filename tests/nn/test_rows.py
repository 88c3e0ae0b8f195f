"""The rows that modules keep for finished tasks."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from wsn_fast.nn import rows


class Rows(nn.Module):
    def __init__(self, count: int = 0) -> None:
        super().__init__()
        self.register_buffer("some", torch.arange(count * 3).view(count, 3))


def append(module: Rows, times: int) -> None:
    for _ in range(times):
        rows.append(module, "some", torch.full((3,), len(module.some)))


def values(module: Rows) -> list[int]:
    return module.some[:, 0].tolist()


def test_rows_are_appended_in_order() -> None:
    module = Rows()
    append(module, 40)
    assert values(module) == list(range(40))


def test_storages_have_an_eighth_to_spare_and_no_more() -> None:
    module = Rows()
    for count in range(1, 100):
        append(module, 1)
        whole = module.some.untyped_storage().nbytes() // module.some[0].nbytes
        assert count <= whole <= count + count // 8 + 1


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "shallow copy", "to", "state", "view"])
def test_what_shares_or_copies_a_storage_is_not_written_to(how: str) -> None:
    module = Rows()
    append(module, 17)  # room for one more
    if how == "state":
        state = module.state_dict()
        append(module, 1)
        other = Rows(17)
        other.load_state_dict(state, assign=True)
    elif how == "view":
        other = Rows()
        other.some = module.some[:17]
    elif how == "to":
        other = copy.copy(module)
        other._buffers = {"some": module.some.clone()}
    else:
        copies = {"deepcopy": copy.deepcopy, "shallow copy": copy.copy}
        other = copies[how](module) if how in copies else pickle.loads(pickle.dumps(module))
        other._buffers = dict(other._buffers)
    rows.append(module, "some", torch.full((3,), 100))
    before = module.some.clone()
    rows.append(other, "some", torch.full((3,), 200))
    rows.append(other, "some", torch.full((3,), 201))
    assert torch.equal(module.some, before)
    assert values(other)[-2:] == [200, 201] and values(other)[:17] == list(range(17))


def test_rows_that_were_replaced_are_those_that_grow() -> None:
    module = Rows()
    append(module, 17)  # room for one more
    module.some = module.some + 100
    append(module, 1)
    assert values(module) == [*range(100, 117), 17]


def test_a_row_is_removed_and_the_rest_kept() -> None:
    module = Rows()
    append(module, 20)
    rows.remove(module, "some", 3)
    append(module, 2)
    assert values(module) == [*range(3), *range(4, 20), 19, 20]


@pytest.mark.parametrize("row", [0, 1, 2])
def test_any_row_can_be_removed(row: int) -> None:
    module = Rows(3)
    rows.remove(module, "some", row)
    assert values(module) == [3 * i for i in range(3) if i != row]


@pytest.mark.parametrize(
    "save", [lambda module: module.state_dict(), lambda module: nn.Sequential(module).state_dict()]
)
@pytest.mark.parametrize("count", [1, 17, 200])
def test_a_state_has_no_rows_to_spare(save: Callable[[Rows], dict[str, torch.Tensor]], count: int) -> None:
    module = Rows()
    append(module, count)
    (saved,) = save(module).values()
    assert saved.untyped_storage().nbytes() == saved.nbytes == count * saved[0].nbytes
    append(module, 3)
    assert saved[:, 0].tolist() == list(range(count)) and values(module) == list(range(count + 3))


def test_safetensors_saves_a_module_whose_buffers_have_grown(tmp_path: Path) -> None:
    module, other = Rows(), Rows(20)
    append(module, 20)
    safetensors.torch.save_model(module, str(tmp_path / "x.safetensors"))
    safetensors.torch.load_model(other, str(tmp_path / "x.safetensors"))
    assert values(other) == list(range(20))


def test_nothing_stays_when_a_module_forgets_its_rows() -> None:
    module = Rows()
    before = {**module.__dict__}
    append(module, 20)
    rows.forget_spare(module)
    assert module.__dict__.keys() == before.keys() and not module._state_dict_pre_hooks
