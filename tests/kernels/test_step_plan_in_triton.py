"""Whatever changes between two steps: the kernels, which read addresses that were written once, train as torch's
optimizer under the guard does."""

from __future__ import annotations

import pytest
import torch
from plan_changes import CASES, assert_alike, make_run, train

CLOSE = 1e-5  # both are float32
AT_ONCE = {
    ("adamw", "a union appears and grows", True),
    ("adamw", "data of a weight", True),
    ("adamw", "other states", False),
    ("dampened", "data of a running mean", False),
    ("dampened", "no momentum, and again", True),
}
"""The cases of the ordinary run: the others take long in the interpreter."""
EACH = [(kind, change, one_pass) for kind, change in CASES for one_pass in (True, False)]


@pytest.mark.parametrize(
    ("kind", "change", "one_pass"),
    [pytest.param(*case, marks=[] if case in AT_ONCE else pytest.mark.ci) for case in EACH],
)
def test_a_step_after_a_change_is_that_of_torch(kind: str, change: str, one_pass: bool, device: torch.device) -> None:
    ours, theirs = (make_run(kind, one_pass, mine, "triton", torch.float32, device=device) for mine in (True, False))
    for run in (ours, theirs):
        train(run, change, steps=2)
    assert_alike(ours, theirs, CLOSE)
