"""The check of ``wsn_fast.doctor`` on the kernels of this backend."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from wsn_fast.backends import choice, comparison, triton
from wsn_fast.backends import torch as portable
from wsn_fast.doctor import checking

pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero) encountered:RuntimeWarning")


def test_every_kernel_passes(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    def choose(operation: str, *_: object) -> choice.Choice:
        found = hasattr(triton, operation)
        return choice.Choice(triton, "triton", "") if found else choice.Choice(portable, "torch", "no kernel")

    monkeypatch.setattr(checking, "candidate", choose)
    monkeypatch.setattr(checking, "DTYPES", (torch.float32,))
    monkeypatch.setattr(comparison, "ALL", partial(comparison.ALL, scores=("awkward",), sizes=(63, 300)))
    assert {verdict.operation: verdict.problem for verdict in checking.check(device) if verdict.problem} == {}
