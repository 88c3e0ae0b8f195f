"""What several processes would do to a WSN in silence is refused before a step, with the name of the wrapper and a way
out. Two processes run all cases once."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from parallel_cases import CASES, work

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")

REFUSED = {
    "DistributedDataParallel inside": r"wrapped in DistributedDataParallel inside of the WSN.*wrap the whole WSN",
    "DataParallel inside": r"wrapped in DataParallel inside of the WSN.*Train on one process",
    "a head made later": r"heads\.i1\.weight was made after DistributedDataParallel.*Wrap the WSN again",
    "different tasks": r"task [01] is finished and in use inside of DistributedDataParallel.*call the WSN itself",
    "batch norm": r"running_mean differs between the processes of DistributedDataParallel.*SyncBatchNorm",
    "different scores": r"DistributedDataParallel have different values of .*weight_score.*one seed before begin_task",
    "sharded before begin_task": r"is a DTensor: FSDP2.*Train on one process",
    "sharded after guard": r"is a DTensor: FSDP2.*Train on one process",
    "sharded after begin_task": r"is a DTensor: FSDP2.*Train on one process",
}


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str | None]]:
    path: Path = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.spawn(work, (str(path),), 2)
    return [torch.load(path / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("case", REFUSED)
def test_it_is_refused_in_all_processes(case: str, seen: list[dict[str, str | None]]) -> None:
    for rank in range(2):
        assert re.match(f"RuntimeError: .*{REFUSED[case]}", str(seen[rank][case])), seen[rank][case]


def test_a_wsn_that_is_wrapped_for_each_task_works(seen: list[dict[str, str | None]]) -> None:
    assert [one["works"] for one in seen] == [None, None]


def test_every_case_has_an_expectation() -> None:
    assert CASES.keys() == {*REFUSED, "works"}
