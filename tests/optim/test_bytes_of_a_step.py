"""How many bytes a step moves: nothing is copied in a wider dtype than it has."""

from __future__ import annotations

import pytest
import torch
from allocations import allocations, make_run
from one_pass_models import each_backend
from torch import Tensor

from wsn_fast.backends import choose

backend = each_backend
SIDE = 600  # more elements than the CPU converts at once to sum them up
HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
MODES = pytest.mark.parametrize(
    ("kind", "how"),
    [
        ("adamw", {"one_pass": True}), ("sgd", {"one_pass": True}), ("adamw", {}), ("sgd", {}), ("guarded", {}),
        ("adamw", {"ahead": False}), ("guarded", {"ahead": False}), ("adamw", {"one_pass": True, "ahead": False}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(f"{k}={v}" for k, v in value.items()) or "plain",
)  # fmt: skip


@HALF
@MODES
@pytest.mark.parametrize("rule", ["magnitude", "value"])
def test_parameters_in_16_bits_are_never_widened(
    kind: str, how: dict[str, bool], dtype: torch.dtype, rule: str, backend: str
) -> None:
    """Forward passes, gates, gates made ahead, gradients, clipping and updates: no allocation, also none inside an
    operator of PyTorch, has 32 bits for each weight. What stays has 16 bits too."""
    run = make_run(kind, SIDE, dtype, backend, **how)
    for layer in run.wsn.subnet_layers().values():
        layer.rule = rule

    def steps() -> None:
        for passes, clip in ((1, False), (1, True), (2, False)):
            run.step(passes, clip=clip and kind != "guarded")

    assert allocations(steps, 4 * run.size) == []
    held = [value for state in run.optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    held += [p.grad for p in run.wsn.parameters() if p.grad is not None]
    held += [ready.masked for one in run.wsn.subnet_layers().values() for ready in one.gate_state.ready.values()]
    assert {tensor.dtype for tensor in held if tensor.numel() >= run.size} == {dtype}


@pytest.fixture
def native() -> str:
    if choose("adamw_step", "cpu", torch.float32, "native").name != "native":
        pytest.skip("the native backend is not here: that of torch makes temporary tensors")
    return "native"


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
@pytest.mark.parametrize("accumulate_in", ["float32", "bfloat16"])
def test_g_reaches_the_update_as_the_product_leaves_it(kind: str, accumulate_in: str, native: str) -> None:
    """Under autocast one pass makes G, in bfloat16, and nothing else of the size of the weight."""
    run = make_run(kind, SIDE, torch.float32, native, one_pass=True, accumulate_in=accumulate_in)
    for _ in range(2):
        run.step(autocast=torch.bfloat16)
    assert run.grad.dtype is torch.bfloat16
    for clip in (False, True):
        found = allocations(lambda clip=clip: run.step(clip=clip, autocast=torch.bfloat16), 2 * run.size)
        assert [one for one in found if "aten::mm" not in one] == []
        assert [int(one.split()[0]) for one in found] == [2 * run.size]


@pytest.mark.parametrize("accumulate_in", ["float32", "bfloat16"])
def test_what_accumulation_takes(accumulate_in: str, native: str) -> None:
    """Bytes for each weight of three backward passes and a step: three times G, in bfloat16; and two copies of it in
    float32 at the second pass and one at the third, or none."""
    run = make_run("adamw", SIDE, torch.float32, native, one_pass=True, accumulate_in=accumulate_in)
    run.step(passes=3, autocast=torch.bfloat16)
    found = allocations(lambda: run.step(passes=3, autocast=torch.bfloat16), 2 * run.size)
    sizes = sorted(int(one.split()[0]) // run.size for one in found)
    assert sizes == [2, 2, 2] + ([4, 4, 4] if accumulate_in == "float32" else [])


@pytest.mark.parametrize("ahead", [True, False])
@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_the_standard_mode_forms_both_gradients_from_g_in_bfloat16(kind: str, ahead: bool, native: str) -> None:
    """A backward pass under autocast makes G in bfloat16 and dW and dS in float32, and no copy of G."""
    run = make_run(kind, SIDE, torch.float32, native, ahead=ahead)
    run.step(autocast=torch.bfloat16)
    run.optimizer.zero_grad()
    found = allocations(lambda: run.backward(torch.bfloat16), 2 * run.size)
    masked = [] if ahead else [2]
    assert sorted(int(one.split()[0]) // run.size for one in found) == [*masked, 2, 4, 4]
