"""Several processes of one test. They run all cases of a module of cases, each case in a process group of its own, so
that one that fails in one process does not disturb the next ones."""

from __future__ import annotations

import importlib
import multiprocessing
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing

needs_gloo = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")
TIMEOUT = timedelta(seconds=30)  # of a case in which one process waits for another that has failed


def run_cases(
    module: str, world: int, folder: Path, names: list[str] | None = None, inside: Path | None = None
) -> list[dict[str, Any]]:
    """What each of ``world`` processes returned from the cases of a module, or the text of its error, by case.

    ``module`` has ``CASES``: functions by name that are called with the rank. Without ``names``, all of them run.
    ``folder`` is one of this call alone. The processes work ``inside`` of another one, if it is given."""
    # They are forked from a process that has imported what would take each of them seconds.
    multiprocessing.set_forkserver_preload(["torch", "torch.distributed", "torch._dynamo"])
    arguments = (module, world, str(folder), names, inside)
    torch.multiprocessing.start_processes(_work, arguments, world, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]


def _work(rank: int, module: str, world: int, folder: str, names: list[str] | None, inside: Path | None) -> None:
    torch.set_num_threads(1)
    if inside is not None:
        os.chdir(inside)
    cases = importlib.import_module(module).CASES
    store = dist.FileStore(f"{folder}/store", world)
    seen: dict[str, Any] = {}
    for name in cases if names is None else names:
        own = dist.PrefixStore(name, store)
        dist.init_process_group("gloo", store=own, rank=rank, world_size=world, timeout=TIMEOUT)
        torch.manual_seed(0)
        try:
            seen[name] = cases[name](rank)
        except Exception as error:
            seen[name] = f"{type(error).__name__}: {error}"
        # One that goes while another still connects to it is an error there.
        store.set(f"{name} {rank} is done", "")
        store.wait([f"{name} {other} is done" for other in range(world)], 2 * TIMEOUT)
        dist.destroy_process_group()
    torch.save(seen, f"{folder}/{rank}.pt")


class Sent:
    """What was sent while it was counted: the bytes of each collective of PyTorch, as this process handed them over."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    @property
    def bytes(self) -> int:
        return sum(self.sizes)


@contextmanager
def counting() -> Iterator[Sent]:
    """Count what goes through ``all_reduce`` and ``broadcast`` of ``torch.distributed``, called from Python."""
    sent = Sent()

    def counted(call: Any) -> Any:
        def collective(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            sent.sizes.append(tensor.numel() * tensor.element_size())
            return call(tensor, *args, **kwargs)

        return collective

    calls = {name: counted(getattr(dist, name)) for name in ("all_reduce", "broadcast")}
    with patch.multiple(dist, **calls):
        yield sent
