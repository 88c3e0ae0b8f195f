from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from wsn_fast.train import checkpoint
from wsn_fast.train.checkpoint import CheckpointError

STATE: dict[str, Any] = {
    "epoch": 3,
    "loss": 0.1 + 0.2,
    "never": None,
    "rows": [[99.5], [1 / 3, 2 / 3]],
    "text": 'é"digest":"' + "0" * 64,
}
MASKS = torch.tensor([[0x0F] * 40, [0xF0] * 40], dtype=torch.uint8)


def tensors() -> dict[str, Tensor]:
    special = torch.tensor([float("nan"), float("-inf"), -0.0, 1e-42])
    return {
        "model/weight": special,
        "model/half": special.to(torch.bfloat16),
        "model/double": torch.randn(3, 4, dtype=torch.float64).t(),
        "model/flags": torch.tensor([True, False]),
        "model/0.weight_masks": MASKS,
        "model/0.bias_masks": torch.empty(0, 7, dtype=torch.uint8),
        "optimizer/0.step": torch.tensor(7.0),
    }


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def test_everything_comes_back_to_the_bit(tmp_path: Path) -> None:
    saved = tensors()
    loaded = checkpoint.load(checkpoint.save(tmp_path / "checkpoint", 12, STATE, saved))
    assert loaded.number == 12
    assert loaded.state == STATE
    assert loaded.tensors.keys() == saved.keys()
    for name, tensor in saved.items():
        assert (loaded.tensors[name].dtype, loaded.tensors[name].shape) == (tensor.dtype, tensor.shape), name
        assert bits(loaded.tensors[name]) == bits(tensor), name


def test_names_come_back_in_the_order_in_which_they_were_saved(tmp_path: Path) -> None:
    names = [f"model/heads.i{i}.weight" for i in (3, 1, 20, 0, 7, 11)]
    path = checkpoint.save(tmp_path, 1, STATE, {name: torch.zeros(i) for i, name in enumerate(names)})
    assert list(checkpoint.load(path).tensors) == names


def test_masks_are_stored_compressed_and_other_tensors_are_not(tmp_path: Path) -> None:
    stored = safetensors.torch.load_file(checkpoint.save(tmp_path, 1, STATE, tensors()))
    assert bits(stored["model/0.weight_masks"])[:4] == b"\x28\xb5\x2f\xfd"  # zstd's magic number
    assert stored["model/0.weight_masks"].numel() < MASKS.numel()
    assert stored["model/double"].shape == (4, 3)


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return checkpoint.save(tmp_path_factory.mktemp("intact"), 1, STATE, tensors()).read_bytes()


@given(place=st.floats(0, 1, exclude_max=True), change=st.integers(1, 255))
def test_any_changed_byte_is_detected(
    intact: bytes, tmp_path_factory: pytest.TempPathFactory, place: float, change: int
) -> None:
    damaged = bytearray(intact)
    damaged[int(place * len(damaged))] ^= change
    path = tmp_path_factory.getbasetemp() / "000001.safetensors"
    path.write_bytes(damaged)
    with pytest.raises(CheckpointError, match="000001"):
        checkpoint.load(path)


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 100, -1])
def test_a_truncated_file_is_detected(intact: bytes, tmp_path: Path, keep: int) -> None:
    path = tmp_path / "000001.safetensors"
    path.write_bytes(intact[:keep])
    with pytest.raises(CheckpointError, match="000001"):
        checkpoint.load(path)


def test_a_foreign_safetensors_file_is_named_as_such(tmp_path: Path) -> None:
    path = tmp_path / "000001.safetensors"
    safetensors.torch.save_file({"weight": torch.ones(2)}, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match="not a checkpoint of wsn-fast"):
        checkpoint.load(path)


def test_another_format_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "FORMAT", "wsn-fast checkpoint 999")
    path = checkpoint.save(tmp_path, 1, STATE, tensors())
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="999"):
        checkpoint.load(path)


def test_the_last_two_are_kept(tmp_path: Path) -> None:
    for number in range(9, 13):
        checkpoint.save(tmp_path, number, STATE, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000011.safetensors", "000012.safetensors"]


def test_leftovers_of_a_killed_save_are_removed_by_the_next(tmp_path: Path) -> None:
    (tmp_path / "000007.safetensors.tmp").write_bytes(b"half")
    checkpoint.save(tmp_path, 8, STATE, {})
    assert [path.name for path in tmp_path.iterdir()] == ["000008.safetensors"]


@pytest.fixture
def three(tmp_path: Path) -> Path:
    checkpoint.save(tmp_path, 1, {"at": 1}, {})
    first = (tmp_path / "000001.safetensors").read_bytes()
    checkpoint.save(tmp_path, 2, {"at": 2}, {})
    checkpoint.save(tmp_path, 3, {"at": 3}, {})
    (tmp_path / "000001.safetensors").write_bytes(first)
    return tmp_path


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def test_the_newest_is_read_unless_one_is_named(three: Path) -> None:
    assert checkpoint.load_from(three).state == {"at": 3}
    assert checkpoint.load_from(three, "000002.safetensors").state == {"at": 2}


def test_a_damaged_newest_is_named_and_the_newest_intact_one_offered(three: Path) -> None:
    truncate(three / "000003.safetensors")
    with pytest.raises(CheckpointError, match=r"000003\.safetensors is damaged.* --checkpoint 000002\."):
        checkpoint.load_from(three)


def test_only_an_intact_one_is_offered(three: Path) -> None:
    truncate(three / "000003.safetensors")
    truncate(three / "000002.safetensors")
    with pytest.raises(CheckpointError, match=r"000003\.safetensors is damaged.* --checkpoint 000001\."):
        checkpoint.load_from(three)


def test_none_is_offered_when_none_is_intact(tmp_path: Path) -> None:
    truncate(checkpoint.save(tmp_path, 1, STATE, {}))
    with pytest.raises(CheckpointError, match="None before is intact"):
        checkpoint.load_from(tmp_path)


def test_an_unknown_name_is_answered_with_the_known_ones(three: Path) -> None:
    with pytest.raises(CheckpointError, match=r"'000009\.safetensors'.*000001.*000002.*000003"):
        checkpoint.load_from(three, "000009.safetensors")


def test_an_empty_folder_has_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint"):
        checkpoint.load_from(tmp_path)


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """No file may grow beyond ``size`` bytes inside the block: pytest's own log may be a larger one."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_save_that_runs_out_of_room_loses_nothing(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 1, {"at": 1}, {})
    too_large = pytest.raises(CheckpointError, match=r"000002\.safetensors.*too large.*--resume")
    with too_large as failure, file_size_limit(4096):
        checkpoint.save(tmp_path, 2, {"at": 2}, {"weight": torch.zeros(4096)})
    assert isinstance(failure.value.__cause__, OSError)
    assert [path.name for path in tmp_path.iterdir()] == ["000001.safetensors"]
    assert checkpoint.load_from(tmp_path).state == {"at": 1}
    checkpoint.save(tmp_path, 2, {"at": 2}, {})
    assert checkpoint.load_from(tmp_path).state == {"at": 2}


def test_a_full_disk_is_reported_with_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fsync(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(CheckpointError, match=r"000001\.safetensors: No space left on device"):
        checkpoint.save(tmp_path, 1, {}, {})
    assert not list(tmp_path.iterdir())


def test_an_interrupted_write_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def replace(source: Path, target: Path) -> None:
        raise KeyboardInterrupt

    path = tmp_path / "file"
    checkpoint.write_atomic(path, b"old")
    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.write_atomic(path, b"new")
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("file", b"old")]


@pytest.mark.skipif(sys.platform == "win32", reason="folders cannot be synced there")
def test_file_and_folder_reach_the_disk_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace

    def noted_fsync(handle: int) -> None:
        calls.append("folder" if os.path.isdir(f"/proc/self/fd/{handle}") else "file")
        fsync(handle)

    def noted_replace(source: Path, target: Path) -> None:
        calls.append("replace")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    checkpoint.write_atomic(tmp_path / "file", b"data")
    assert calls == ["file", "replace", "folder"]


OPTIMIZERS = [
    lambda p: torch.optim.Adam(p, 0.1),
    lambda p: torch.optim.AdamW(p, 0.1, weight_decay=0.1),
    lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True),
    lambda p: torch.optim.SGD(p, 0.1),
]


@pytest.mark.parametrize("make", OPTIMIZERS, ids=["adam", "adamw", "nesterov", "sgd"])
def test_an_optimizer_continues_from_its_packed_state_to_the_bit(make: Any) -> None:
    def step(parameter: Tensor, optimizer: torch.optim.Optimizer, times: int) -> None:
        for _ in range(times):
            optimizer.zero_grad()
            parameter.pow(3).sum().backward()
            optimizer.step()

    unused = torch.nn.Parameter(torch.ones(2))
    straight = torch.nn.Parameter(torch.linspace(-1, 1, 9))
    optimizer = make([unused, straight])
    step(straight, optimizer, 3)
    packed, state = checkpoint.pack_optimizer(optimizer.state_dict())
    packed = json.loads(json.dumps(packed))
    resumed = torch.nn.Parameter(straight.detach().clone())
    second = make([unused, resumed])
    copies = {name: tensor.clone() for name, tensor in state.items()}
    second.load_state_dict(checkpoint.unpack_optimizer(packed, copies))
    step(straight, optimizer, 3)
    step(resumed, second, 3)
    assert bits(resumed.detach()) == bits(straight.detach())
