"""Masked matrix products against PyTorch: our error against float64 at most twice that of torch at the same dtype."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from distributions import RULES
from torch import Tensor

from wsn_fast.backends import torch as portable
from wsn_fast.kernels import masked_matmul as kernels
from wsn_fast.kernels import masked_matmul_tasks
from wsn_fast.kernels._matmul_tile import MatmulConfig, load_unit
from wsn_fast.kernels.split_sum import workspace_numel
from wsn_fast.reference import specification

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
SMALL = MatmulConfig(16, 32, 32, 4, 2)
"""So that small shapes have several tiles and steps, and tails in each."""
SMALL_TASKS = replace(SMALL, slots=2)
# Whole tiles; tails, with rows that begin a byte and not; multiples of 4 and of 2; one element; tails of one.
SHAPES = ((64, 64), (40, 72), (37, 45), (36, 44), (34, 46), (1, 1), (33, 65))
COMPUTE = (torch.float32, torch.bfloat16, torch.float16)

# NumPy warns, inside the interpreter, of the infinities and NaN that are planted here, and of how the interpreter of
# Triton 3.6 reads the bound of a loop.
pytestmark = pytest.mark.filterwarnings(
    "ignore:(overflow|invalid value) encountered:RuntimeWarning",
    "ignore:Conversion of an array with ndim > 0 to a scalar:DeprecationWarning",
)


def assert_as_exact_as_torch(actual: Tensor, torchs: Tensor, exact: Tensor, scale: Tensor) -> None:
    """``|actual - exact|`` at most twice torch's own error, beside two roundings of the largest sum of magnitudes:
    torch is at times exact by luck. The interpreter truncates to bf16 where a GPU rounds: one more unit for it."""
    assert actual.isfinite().all()
    allowance = torch.finfo(torchs.dtype).eps * exact.abs()
    if actual.dtype is torch.bfloat16 and INTERPRETED:
        allowance = 2 * allowance + torch.finfo(torch.bfloat16).eps * scale
    else:
        allowance = allowance / 2 + 2 * torch.finfo(torch.float32).eps * scale
    excess = (actual.double() - exact).abs() - 2 * (torchs.double() - exact).abs() - allowance
    assert excess.max() <= 0, (
        f"error {(actual.double() - exact).abs().max()} at {divmod(int(excess.argmax()), exact.shape[1])}"
    )


def poisoned(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.full(shape, float("nan"), dtype=dtype, device=device)


def workspace(rows: int, outputs: int, splits: int, device: torch.device) -> Tensor | None:
    numel = workspace_numel(rows, outputs, splits)
    return poisoned(numel, dtype=torch.float32, device=device) if numel else None


def weight_and_mask(n: int, k: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """A weight with NaN and infinities wherever the mask drops it, and the mask."""
    mask = torch.rand(n, k, device=device) < 0.6
    rubbish = torch.tensor([float("nan"), float("inf"), float("-inf")], device=device)[torch.randint(3, (n, k))]
    return torch.where(mask, torch.randn(n, k, device=device), rubbish).to(dtype), mask


def check(
    m: int,
    n: int,
    k: int,
    device: torch.device,
    *,
    compute: torch.dtype = torch.float32,
    weight: torch.dtype = torch.float32,
    scored: str | None = None,
    backward: bool = False,
    with_bias: bool = True,
    config: MatmulConfig = SMALL,
    splits: int = 1,
) -> Tensor:
    w, mask = weight_and_mask(n, k, weight, device)
    source: dict[str, Tensor | str] = {"packed": portable.pack(mask)}
    if scored:
        scores = torch.randn(n, k, device=device).to(weight)
        tau = specification.topc_threshold(scores, 0.4, rule=scored)
        mask = specification.topc_mask(scores, 0.4, rule=scored)
        w = torch.where(mask, w.nan_to_num(1.0, 1.0, 1.0), w.new_tensor(float("nan")))
        source = {"scores": scores, "tau": tau, "rule": scored}
    inputs, outputs = (n, k) if backward else (k, n)
    x = torch.randn(m, inputs, device=device).to(compute)
    bias = torch.randn(outputs, device=device).to(compute) if with_bias else None
    y = poisoned(m, outputs, dtype=compute, device=device)
    kernels.masked_matmul(
        x,
        w,
        y,
        bias=bias,
        backward=backward,
        config=config,
        splits=splits,
        workspace=workspace(m, outputs, splits, device),
        **source,  # type: ignore[arg-type]
    )
    gated = specification.select(mask, w.to(compute))
    gated = gated.T if backward else gated
    linear = torch.nn.functional.linear
    exact = linear(x.double(), gated.double(), None if bias is None else bias.double())
    scale = linear(x.double().abs(), gated.double().abs(), None if bias is None else bias.double().abs())
    assert_as_exact_as_torch(y, linear(x, gated, bias), exact, scale)
    return y


@pytest.mark.sample(29)
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("scored", [None, *RULES])
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_shapes(n: int, k: int, scored: str | None, backward: bool, device: torch.device) -> None:
    check(17, n, k, device, scored=scored, backward=backward)


@pytest.mark.parametrize("m", range(1, 18))
def test_every_small_batch(m: int, device: torch.device) -> None:
    check(m, 35, 41, device)


@pytest.mark.sample(29)
@pytest.mark.parametrize("scored", [None, *RULES])
@pytest.mark.parametrize("weight", COMPUTE)
@pytest.mark.parametrize("compute", COMPUTE)
def test_dtypes(compute: torch.dtype, weight: torch.dtype, scored: str | None, device: torch.device) -> None:
    check(5, 40, 72, device, compute=compute, weight=weight, scored=scored)


@pytest.mark.parametrize("backward", [False, True])
def test_without_bias(backward: bool, device: torch.device) -> None:
    check(3, 37, 45, device, with_bias=False, backward=backward)


@pytest.mark.sample(17)
@pytest.mark.parametrize("config", [*kernels.CONFIGS, *kernels.IEEE_CONFIGS, *kernels.TF32_CONFIGS])
def test_every_tile(config: MatmulConfig, device: torch.device) -> None:
    check(70, 131, 77, device, compute=torch.float16, config=config)


def test_loads_are_as_wide_as_strides_and_addresses_allow(device: torch.device) -> None:
    x = torch.empty(64, device=device)
    assert [load_unit((x, None), *strides) for strides in ((8, 32), (12, 16), (8, 6), (8, 7))] == [8, 4, 2, 1]
    assert load_unit((x, x[1:]), 8, 32) == 1


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("splits", [2, 3, 7])  # seven: more than there are steps
def test_split_sums(splits: int, backward: bool, device: torch.device) -> None:
    check(3, 70, 93, device, splits=splits, backward=backward)


def test_the_same_call_gives_the_same_bits(device: torch.device) -> None:
    results = []
    for _ in range(2):
        torch.manual_seed(3)
        results.append(check(3, 70, 93, device, splits=3))
    assert torch.equal(*results)


@pytest.mark.parametrize("compute", COMPUTE)
def test_ties_zeros_of_both_signs_and_nan_are_kept(compute: torch.dtype, device: torch.device) -> None:
    w = torch.randn(8, 16, device=device)
    scores = torch.zeros(8, 16, device=device)
    scores[0], scores[1] = -0.0, float("nan")
    y = poisoned(16, 8, dtype=compute, device=device)
    one = torch.eye(16, device=device, dtype=compute)
    kernels.masked_matmul(one, w.to(compute), y, scores=scores, tau=scores[2, 0], rule="value", config=SMALL)
    assert torch.equal(y, w.to(compute).T)


@pytest.fixture
def tf32() -> Iterator[None]:
    """torch may multiply fp32 as tf32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


def test_tf32(tf32: None, device: torch.device) -> None:
    """Where both sides may round to tf32, the error as a whole is at most three times torch's: the tensor cores cut off
    what Triton gives them, and torch rounds first. On an H200 it was 2.5 times."""
    w, mask = weight_and_mask(70, 200, torch.float32, device)
    x, gated = torch.randn(20, 200, device=device), specification.select(mask, w)
    y = poisoned(20, 70, dtype=torch.float32, device=device)
    config = kernels.TF32_CONFIGS[0]
    kernels.masked_matmul(x, w, y, packed=portable.pack(mask), config=config, precision="tf32")
    exact = x.double() @ gated.double().T
    assert (y - exact).norm() <= 3 * (x @ gated.T - exact).norm()


def test_rows_with_gaps(device: torch.device) -> None:
    """Rows of x and y may lie apart; nothing is read or written between them."""
    w, mask = weight_and_mask(24, 40, torch.float32, device)
    x = poisoned(6, 50, dtype=torch.float32, device=device)[:, 3:43]
    x.normal_()
    wide = poisoned(6, 30, dtype=torch.float32, device=device)
    kernels.masked_matmul(x, w, wide[:, 2:26], packed=portable.pack(mask), config=SMALL)
    expected = x @ specification.select(mask, w).T
    torch.testing.assert_close(wide[:, 2:26], expected, rtol=1e-5, atol=1e-5)
    assert wide[:, :2].isnan().all() and wide[:, 26:].isnan().all()


def check_tasks(
    m: int,
    n: int,
    k: int,
    tasks: int,
    device: torch.device,
    *,
    compute: torch.dtype = torch.float32,
    with_bias: bool = True,
    mask_bias: bool = True,
    sort: bool = True,
    config: MatmulConfig = SMALL_TASKS,
    splits: int = 1,
) -> None:
    w = torch.randn(n, k, device=device)
    b = torch.randn(n, device=device).to(compute) if with_bias else None
    masks, bias_masks = torch.rand(tasks, n, k, device=device) < 0.6, torch.rand(tasks, n, device=device) < 0.6
    w[~masks.any(0)] = float("nan")
    if not mask_bias:
        bias_masks[:] = True
    elif b is not None:
        b[~bias_masks.any(0)] = float("inf")
    x = torch.randn(m, k, device=device).to(compute)
    task = torch.randint(tasks, (m,), device=device, dtype=torch.int32)
    y = poisoned(m, n, dtype=compute, device=device)
    masked_matmul_tasks.masked_matmul_tasks(
        x,
        w,
        y,
        packed=torch.stack([portable.pack(mask) for mask in masks]),
        tasks=task,
        order=task.argsort().int() if sort else None,
        bias=b,
        packed_bias=torch.stack([portable.pack(mask) for mask in bias_masks]) if mask_bias else None,
        config=config,
        splits=splits,
        workspace=workspace(m, n, splits, device),
    )
    linear = torch.nn.functional.linear
    for i in range(m):
        t = int(task[i])
        gated = specification.select(masks[t], w.to(compute))
        bias = None if b is None else specification.select(bias_masks[t], b)
        row = x[i : i + 1]
        exact = linear(row.double(), gated.double(), None if bias is None else bias.double())
        scale = linear(row.double().abs(), gated.double().abs(), None if bias is None else bias.double().abs())
        assert_as_exact_as_torch(y[i : i + 1], linear(row, gated, bias), exact, scale)


@pytest.mark.sample(29)
@pytest.mark.parametrize("sort", [False, True])
@pytest.mark.parametrize(("m", "tasks"), [(1, 1), (1, 5), (7, 1), (17, 3), (20, 9), (33, 2)])
@pytest.mark.parametrize(("n", "k"), [(40, 72), (37, 45)])
def test_several_tasks(m: int, tasks: int, n: int, k: int, sort: bool, device: torch.device) -> None:
    check_tasks(m, n, k, tasks, device, sort=sort)


@pytest.mark.parametrize("compute", COMPUTE)
def test_several_tasks_dtypes(compute: torch.dtype, device: torch.device) -> None:
    check_tasks(9, 37, 45, 4, device, compute=compute)


@pytest.mark.sample(17)
@pytest.mark.parametrize(
    "config",
    [
        *masked_matmul_tasks.TASKS_CONFIGS,
        *masked_matmul_tasks.TASKS_TF32_CONFIGS,
        *masked_matmul_tasks.TASKS_IEEE_CONFIGS,
    ],
)
def test_several_tasks_every_tile(config: MatmulConfig, device: torch.device) -> None:
    check_tasks(18, 70, 77, 7, device, compute=torch.float16, config=config)


@pytest.mark.parametrize("mask_bias", [False, True])
@pytest.mark.parametrize("splits", [1, 3])
def test_several_tasks_bias(mask_bias: bool, splits: int, device: torch.device) -> None:
    check_tasks(9, 37, 70, 4, device, mask_bias=mask_bias, splits=splits)


def test_several_tasks_without_bias(device: torch.device) -> None:
    check_tasks(9, 37, 45, 4, device, with_bias=False)


def test_another_tasks_rows_do_not_matter(device: torch.device) -> None:
    """A row's bits depend on its own task, not on the tasks of the rows beside it."""
    w, x = torch.randn(37, 45, device=device), torch.randn(4, 45, device=device)
    packed = torch.stack([portable.pack(torch.rand(37, 45, device=device) < 0.5) for _ in range(3)])
    results = []
    for tasks in ([0, 0, 0, 0], [0, 1, 2, 1]):
        y = poisoned(4, 37, dtype=torch.float32, device=device)
        task = torch.tensor(tasks, dtype=torch.int32, device=device)
        masked_matmul_tasks.masked_matmul_tasks(x, w, y, packed=packed, tasks=task, config=SMALL_TASKS)
        results.append(y[0])
    assert torch.equal(*results)
