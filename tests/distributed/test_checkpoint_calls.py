"""What the functions for checkpoints take and refuse, in one process."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from shutil import copytree
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_cases import flip, fresh, message_of, trained
from ddp_training import one_pass
from sharded_training import sgd
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from wsn_fast import WSN, FastSubnetLinear, TaskHeads
from wsn_fast.distributed import load_checkpoint, load_optimizer, save_checkpoint
from wsn_fast.distributed.entries import flat_masks, masks_by_row
from wsn_fast.ops import pack_mask

NAME = "one pass by 1"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint with an optimizer, one without, and one that another program has written."""
    folder = tmp_path_factory.mktemp("checkpoints")
    wsn = fresh("one pass")
    save_checkpoint(folder / NAME, wsn, trained(wsn, "one pass"))
    save_checkpoint(folder / "no optimizer", wsn)
    with pytest.warns(UserWarning, match="single process"):
        save({"weight": torch.zeros(2)}, checkpoint_id=folder / "foreign")
    return folder


def loaded(folder: Path) -> WSN:
    wsn = fresh("one pass", 3)
    load_checkpoint(folder / NAME, wsn)
    return wsn


@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 8), (5, 3), (4, 1, 3, 3), (2, 16)])
def test_masks_keep_their_bits_on_the_way_to_rows_and_back(shape: tuple[int, ...]) -> None:
    bits = torch.rand(3, *shape, generator=torch.Generator().manual_seed(0)) < 0.5
    packed = torch.stack([pack_mask(one) for one in bits])
    assert torch.equal(flat_masks(masks_by_row(packed, shape), shape), packed)


def test_rows_of_masks_can_be_joined() -> None:
    bits = torch.rand(2, 5, 3, generator=torch.Generator().manual_seed(0)) < 0.5
    parts = [masks_by_row(torch.stack([pack_mask(one) for one in part]), part.shape[1:]) for part in bits.split(2, 1)]
    whole = torch.stack([pack_mask(one) for one in bits])
    assert torch.equal(flat_masks(torch.cat(parts), (5, 3)), whole)


def test_writers_and_readers_of_dcp_are_taken(tmp_path: Path) -> None:
    wsn, other = fresh("one pass", 1), fresh("one pass", 2)
    save_checkpoint(FileSystemWriter(tmp_path / "new"), wsn)
    load_checkpoint(FileSystemReader(tmp_path / "new"), other)
    assert all(map(torch.equal, wsn.state_dict().values(), other.state_dict().values()))


def test_an_optimizer_gets_its_settings(tmp_path: Path) -> None:
    wsn = fresh("guarded")
    wsn.begin_task(0)
    saved = torch.optim.AdamW([{"params": [*wsn.parameters()], "lr": torch.tensor(0.25)}], betas=(0.5, 0.75))
    torch.optim.lr_scheduler.StepLR(saved, 1)
    save_checkpoint(tmp_path / "new", wsn, saved)
    now = torch.optim.AdamW([*wsn.parameters()], lr=torch.tensor(1.0))
    load_optimizer(tmp_path / "new", wsn, now)
    group = now.param_groups[0]
    assert (group["lr"].item(), group["betas"], group["initial_lr"]) == (0.25, (0.5, 0.75), 0.25)


def test_a_folder_with_a_checkpoint_is_not_written_to(folder: Path) -> None:
    with pytest.raises(FileExistsError, match=r"path must be a new folder, got .*one pass by 1"):
        save_checkpoint(folder / NAME, fresh("one pass"))


CALLS: dict[str, tuple[Callable[[Any, Any], object], str]] = {
    "save, no wsn": (
        lambda p, w: save_checkpoint(p / "new", nn.Linear(1, 1)),
        "wsn must be a wsn_fast.WSN, got Linear",
    ),
    "load, no wsn": (lambda p, w: load_checkpoint(p / NAME, 1), "wsn must be a wsn_fast.WSN, got int"),
    "save, no path": (lambda p, w: save_checkpoint(3, w), "path must be a str, a path or a StorageWriter, got int"),
    "load, no path": (lambda p, w: load_checkpoint(3, w), "path must be a str, a path or a StorageReader, got int"),
    "save, no optimizer": (lambda p, w: save_checkpoint(p / "new", w, w), "optimizer must be a .*Optimizer, got WSN"),
    "load, no optimizer": (lambda p, w: load_optimizer(p / NAME, w, w), "optimizer must be a .*Optimizer, got WSN"),
}


@pytest.mark.parametrize("call", CALLS)
def test_other_types_are_refused(call: str, folder: Path) -> None:
    with pytest.raises(TypeError, match=CALLS[call][1]):
        CALLS[call][0](folder, fresh("one pass"))


def test_a_parameter_outside_of_the_wsn_is_refused(tmp_path: Path) -> None:
    wsn = fresh("one pass")
    with pytest.raises(ValueError, match="optimizer has a parameter that is not in wsn"):
        save_checkpoint(tmp_path, wsn, torch.optim.SGD([nn.Parameter(torch.zeros(1))]))


def test_a_setting_that_is_no_number_is_refused(tmp_path: Path) -> None:
    wsn = fresh("one pass")
    optimizer = torch.optim.SGD(wsn.parameters())
    optimizer.param_groups[0]["lr"] = float("inf")
    with pytest.raises(
        TypeError, match="lr must be a finite number, a bool, a str or None to be in a checkpoint, got inf"
    ):
        save_checkpoint(tmp_path, wsn, optimizer)


class Talks(nn.Linear):
    def get_extra_state(self) -> object:
        return {"said": 1}

    def set_extra_state(self, state: object) -> None: ...


def test_a_module_that_saves_no_tensor_is_refused(tmp_path: Path) -> None:
    wsn = fresh("one pass")
    wsn.model.append(Talks(1, 1))
    with pytest.raises(
        TypeError, match=r"model\.7\._extra_state of the WSN must be a tensor to be in a checkpoint, got dict"
    ):
        save_checkpoint(tmp_path, wsn)


def test_a_checkpoint_of_another_program_is_refused(folder: Path) -> None:
    assert "was not written by save_checkpoint" in message_of(folder / "foreign", fresh("one pass"))


def test_a_checkpoint_of_another_version_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wsn_fast.distributed.saved_checkpoint.VERSION", 2)
    assert "must have version 2, got 1" in message_of(folder / NAME, fresh("one pass"))


def change_mask(wsn: WSN) -> Tensor:
    return wsn.model[1].weight_masks


def change_weight(wsn: WSN) -> Tensor:
    return wsn.model[1].weight.data


def change_norm(wsn: WSN) -> Tensor:
    return wsn.model[2].weight_tasks


def change_head(wsn: WSN) -> Tensor:
    return wsn.heads[0].weight.data


DRIFTS: dict[Callable[[WSN], Tensor], str] = {
    change_weight: "task 0: 1.weight",
    change_mask: "task 0: 1.weight (mask)",
    change_norm: "task 0: 2.weight",
    change_head: "task 0: 6.weight",
}


@pytest.mark.parametrize("change", DRIFTS)
def test_a_finished_task_that_was_broken_before_it_was_saved_is_not_loaded(
    change: Callable[[WSN], Tensor], folder: Path, tmp_path: Path
) -> None:
    wsn = loaded(folder)
    tensor = change(wsn)
    tensor.copy_(tensor + 1 if tensor.is_floating_point() else ~tensor)
    save_checkpoint(tmp_path / "new", wsn)
    message = message_of(tmp_path / "new", fresh("one pass", 4))
    assert message.startswith("finished tasks are not what they were when they ended:")
    assert f"  {DRIFTS[change]}" in message.splitlines()


def test_a_checkpoint_can_be_read_by_its_page_alone(folder: Path) -> None:
    reader = FileSystemReader(folder / NAME)
    sizes = reader.read_metadata().state_dict_metadata
    read = {name: torch.empty(kind.size, dtype=kind.properties.dtype) for name, kind in sizes.items()}
    with pytest.warns(UserWarning, match="single process"):
        load(read, storage_reader=reader)
    info = json.loads(read.pop("wsn_fast").numpy().tobytes())
    assert {name: checksum_of(tensor.numpy()) for name, tensor in read.items()} == info["checksums"]
    assert info["version"] == 1
    assert [len(names) for names in info["optimizer"]["groups"]] == [10, 4]
    state, packed = loaded(folder).state_dict(), read["wsn.model.1.weight_masks"].numpy()
    bits = np.unpackbits(packed, axis=2, bitorder="little")[:, :, :36]  # [rows, T, elements of a row]
    flat = np.packbits(bits.transpose(1, 0, 2).reshape(2, -1), axis=1, bitorder="little")
    assert np.array_equal(flat, state["model.1.weight_masks"].numpy())
    assert torch.equal(read["wsn.model.1.weight"], state["model.1.weight"])


def checksum_of(values: np.ndarray[Any, Any]) -> str:
    words = values.reshape(-1).view({1: "u1", 4: "i4", 8: "i8"}[values.itemsize]).astype(np.int64)
    with np.errstate(over="ignore"):
        x = np.arange(len(words), dtype=np.int64) * as_signed(0x9E3779B97F4A7C15) + words
        x = (x ^ x >> 32) * as_signed(0xBF58476D1CE4E5B9)
        x = (x ^ x >> 29) * as_signed(0x94D049BB133111EB)
        x ^= x >> 32
    return f"{values.dtype} {int(x.sum()) % 2**64:016x}"


def as_signed(number: int) -> np.int64:
    return np.uint64(number).astype(np.int64)


class Shift(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.by = nn.Parameter(torch.zeros(5))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.by


def shifted() -> WSN:
    model = nn.Sequential(FastSubnetLinear(4, 5, density=0.5), Shift(), TaskHeads(5, 2))
    return WSN(model, frozen="1.by")


def test_a_frozen_parameter_of_finished_tasks_is_checked_too(tmp_path: Path) -> None:
    wsn = shifted()
    wsn.begin_task(0)
    wsn.end_task()
    save_checkpoint(tmp_path / "right", wsn)
    assert message_of(tmp_path / "right", shifted()) == "it was loaded"
    wsn.model[1].by.data += 1
    save_checkpoint(tmp_path / "wrong", wsn)
    assert "  task 0: 1.by" in message_of(tmp_path / "wrong", shifted()).splitlines()


def test_a_checkpoint_without_an_optimizer_gives_none(folder: Path) -> None:
    wsn = loaded(folder)
    with pytest.raises(RuntimeError, match="no optimizer has no optimizer: save_checkpoint was not given one"):
        load_optimizer(folder / "no optimizer", wsn, one_pass(wsn))


def test_an_optimizer_with_other_parameters_is_refused(folder: Path) -> None:
    wsn = loaded(folder)
    few = wsn.guard(torch.optim.AdamW([wsn.model[1].weight]))
    with pytest.raises(RuntimeError, match="optimizer has other parameters than the saved one: only one of them has"):
        load_optimizer(folder / NAME, wsn, few)


def test_an_optimizer_of_another_kind_is_refused(folder: Path) -> None:
    wsn = loaded(folder)
    with pytest.raises(RuntimeError, match="optimizer is a SubnetSGD, and the saved one has no dampening, momentum"):
        load_optimizer(folder / NAME, wsn, sgd(wsn))


def test_an_optimizer_of_other_tasks_is_refused(folder: Path) -> None:
    wsn = fresh("one pass")
    wsn.begin_task(2)
    with pytest.raises(RuntimeError, match=r"finished tasks \[0, 'two'\] and 2 in progress, and wsn has \[\] and 2"):
        load_optimizer(folder / NAME, wsn, one_pass(wsn))


def test_a_damaged_running_mean_is_named_and_the_optimizer_is_as_before(folder: Path, tmp_path: Path) -> None:
    copytree(folder / NAME, tmp_path / "copy")
    flip(tmp_path / "copy", "optimizer.model.1.weight.exp_avg")
    wsn = loaded(folder)
    optimizer = one_pass(wsn)
    with pytest.raises(RuntimeError, match=r"damaged: optimizer\.model\.1\.weight\.exp_avg are not what was saved"):
        load_optimizer(tmp_path / "copy", wsn, optimizer)
    assert not optimizer.state


def test_a_checkpoint_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    class Full(FileSystemWriter):
        def write_data(self, *args: Any) -> Any:
            raise OSError("no space left on device")

    with pytest.raises(RuntimeError, match="the checkpoint was not written: OSError: no space left on device"):
        save_checkpoint(Full(tmp_path / "new"), fresh("one pass"))
