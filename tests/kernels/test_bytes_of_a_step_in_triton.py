"""A step on the Triton backend makes no copy in a wider dtype, as tests/optim/test_bytes_of_a_step.py says of the other
backends."""

from __future__ import annotations

import pytest
import torch
from allocations import allocations, make_run

SIDE = 128  # a workspace of the one-pass update has about 3 bytes for each of so few weights


@pytest.mark.parametrize("kind", ["adamw", pytest.param("sgd", marks=pytest.mark.ci)])
@pytest.mark.parametrize(
    "how",
    [{"one_pass": True}, {}, pytest.param({"ahead": False}, marks=pytest.mark.ci)],
    ids=["one pass", "standard", "not ahead"],
)
def test_parameters_in_16_bits_are_never_widened(kind: str, how: dict[str, bool], device: torch.device) -> None:
    run = make_run(kind, SIDE, torch.float16, "triton", device, **how)

    def steps() -> None:
        for passes, clip in ((1, False), (2, "one_pass" in how)):
            run.step(passes, clip=clip)

    assert allocations(steps, 4 * run.size) == []


@pytest.mark.parametrize(
    "how", [{"one_pass": True}, pytest.param({}, marks=pytest.mark.ci)], ids=["one pass", "standard"]
)
def test_g_stays_in_bfloat16(how: dict[str, bool], device: torch.device) -> None:
    """Under autocast one pass makes nothing in 32 bits; the standard mode makes dW and dS, and no copy of G."""
    run = make_run("adamw", SIDE, torch.float32, "triton", device, **how)
    run.step(autocast=torch.bfloat16)
    found = allocations(lambda: run.step(autocast=torch.bfloat16), 4 * run.size)
    assert len(found) == (0 if how else 2)
    assert how == {} or run.grad.dtype is torch.bfloat16
