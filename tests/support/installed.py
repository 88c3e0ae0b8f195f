"""A short trial of an installed package, for wheels: ``python tests/support/installed.py``. It needs nothing but what
the package depends on, and fails if the native library of the wheel does not load, an operation is wrong, or a task is
forgotten."""

from __future__ import annotations

import sys
from importlib.metadata import distribution
from pathlib import Path

import torch
from torch import nn

import wsn_fast
from wsn_fast.backends import native
from wsn_fast.doctor.__main__ import main as doctor


def check_library() -> None:
    """The native library is loaded, and it is the one that was installed."""
    library = native.load()
    assert library.lib is not None and library.file is not None, library.reason
    installed = Path(str(distribution("wsn-fast").locate_file("wsn_fast"))).resolve()
    assert Path(wsn_fast.__file__).resolve().parent == installed, f"{wsn_fast.__file__} is not in {installed}"
    assert library.file.resolve().is_relative_to(installed), f"{library.file} is not in {installed}"


def check_promise() -> None:
    """A task keeps its outputs while another one is trained."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 10))
    wsn = wsn_fast.WSN(wsn_fast.convert(model, density=0.3, heads="2"))
    x, y = torch.randn(256, 64), torch.randint(10, (256,))
    outputs = []
    for task in ("first", "second"):
        wsn.begin_task(task)
        optimizer = wsn_fast.optim.SubnetAdamW(wsn, lr=0.01, one_pass=True)
        for _ in range(3):
            optimizer.zero_grad()
            nn.functional.cross_entropy(wsn(x), y).backward()
            optimizer.step()
        wsn.end_task()
        with torch.no_grad(), wsn.use_task("first"):
            outputs.append(wsn(x))
    assert torch.equal(*outputs), "the first task has changed"
    wsn.verify()


if __name__ == "__main__":
    check_library()
    check_promise()
    sys.exit(doctor([]) or doctor(["--check"]))
