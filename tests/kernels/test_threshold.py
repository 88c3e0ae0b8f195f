"""The selection against the reference, bit for bit, on every way through it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from distributions import DENSITIES, DISTRIBUTIONS, LARGE_SIZES, RULES, SMALL_SIZES
from torch import Tensor

from wsn_fast.kernels import _layout as layout
from wsn_fast.kernels import threshold
from wsn_fast.kernels.threshold import Config, Table, make_table, select, workspace_size
from wsn_fast.reference import specification

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Densities = float | list[float]  # one for all tensors, or one for each
# Tensors of a few thousand scores are sampled, have a window and a list, and span several programs.
RANKS = [layout.TENSOR_LOW_RANK.value, layout.TENSOR_HIGH_RANK.value]
SMALL = Config(window_block=512, digit_block=512, items=4096, sample=2048)

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_rule = pytest.mark.parametrize("rule", RULES)


def poisoned(table: Table) -> Tensor:
    return torch.full((workspace_size(table),), -1, dtype=torch.int64, device=table.tensors.device)


def run(table: Table, rule: str, workspace: Tensor | None = None) -> Tensor:
    """The thresholds, from outputs and a workspace that held anything but zeros."""
    count, device = len(table.tensors), table.tensors.device
    tau = torch.full((count,), -1.0, dtype=table.dtype, device=device)
    select(table=table, tau=tau, workspace=poisoned(table) if workspace is None else workspace, rule=rule)
    return tau.cpu()


def table_of(scores: Sequence[Tensor], density: Densities, rule: str, config: Config = SMALL) -> Table:
    densities = [density] * len(scores) if isinstance(density, float) else density
    ranks = [specification.threshold_rank(s.numel(), c, rule) for s, c in zip(scores, densities, strict=True)]
    return make_table(scores, ranks, config)


def assert_same(tau: Tensor, scores: Sequence[Tensor], density: Densities, rule: str) -> None:
    """Every threshold is the reference's, with +0.0 for a zero of either sign, or NaN where that is NaN."""
    densities = [density] * len(scores) if isinstance(density, float) else density
    integers = torch.int32 if tau.dtype is torch.float32 else torch.int16
    for i, (s, c) in enumerate(zip(scores, densities, strict=True)):
        expected = specification.topc_threshold(s.cpu().flatten(), c, rule=rule)
        expected = torch.where(expected == 0, torch.zeros_like(expected), expected)
        same = torch.equal(tau[i].view(integers), expected.view(integers))
        both_nan = bool(tau[i].isnan() & expected.isnan())
        what = f"tensor {i} of {s.numel()} scores, density {c}"
        assert same or both_nan, f"{what}: got {tau[i].item()}, expected {expected.item()}"


def searched(workspace: Tensor, table: Table) -> str:
    """Where the search took place, by the state that it left, for a table of one tensor."""
    state, row = workspace[: layout.STATE_SIZE.value].tolist(), table.tensors[0].tolist()
    rank = row[layout.TENSOR_RANK] - state[layout.STATE_BELOW]
    fields = (layout.STATE_AT_LOW, layout.STATE_LISTED, layout.STATE_AT_HIGH)
    low, listed, high = itertools.accumulate(state[field] for field in fields)
    if 0 <= rank < high and not low <= rank < listed:
        return "nowhere"
    return "list" if low <= rank < listed and listed - low <= row[layout.TENSOR_ROOM] else "scores"


class Spoiling:
    """In place of a kernel: the first launch finds scores that are all NaN."""

    def __init__(self, kernel: Any, scores: Tensor) -> None:
        self.kernel, self.scores = kernel, scores

    def __getitem__(self, grid: Any) -> Any:
        self.scores.fill_(float("nan"))
        return self.kernel[grid]


# --- the definition
def mixture(count: int, sizes: Sequence[int], dtype: torch.dtype) -> tuple[list[Tensor], list[float]]:
    """``count`` tensors and densities; distributions, densities and sizes each repeat at their own pace."""
    makers, densities = list(DISTRIBUTIONS.values()), [DENSITIES[i % len(DENSITIES)] for i in range(count)]
    return [makers[i % len(makers)](sizes[i % len(sizes)], dtype) for i in range(count)], densities


@pytest.mark.sample(25)
@each_rule
@each_dtype
def test_small_sizes(dtype: torch.dtype, rule: str, device: torch.device) -> None:
    scores, densities = mixture(3 * len(DISTRIBUTIONS), SMALL_SIZES, dtype)
    scores = [s.to(device) for s in scores]
    assert_same(run(table_of(scores, densities, rule), rule), scores, densities, rule)


@pytest.mark.sample(17)
@each_rule
@each_dtype
def test_sampled_sizes(dtype: torch.dtype, rule: str, device: torch.device) -> None:
    scores, densities = mixture(len(DISTRIBUTIONS), (6001, 4096, 4099), dtype)
    scores = [s.to(device) for s in scores]
    assert_same(run(table_of(scores, densities, rule), rule), scores, densities, rule)


@pytest.mark.sample(17)
@pytest.mark.parametrize("density", DENSITIES)
def test_density(density: float, device: torch.device) -> None:
    scores = [torch.randn(4099, device=device)]
    assert_same(run(table_of(scores, density, "magnitude"), "magnitude"), scores, density, "magnitude")


@pytest.mark.ci
def test_mixed_sizes_in_one_launch(device: torch.device) -> None:
    scores = [torch.randn(n, device=device) for n in (1, 4096, 5000, 2048, 2, 2049, 12289, 33)]
    assert_same(run(table_of(scores, 0.3, "value"), "value"), scores, 0.3, "value")


def test_shapes_and_unaligned_addresses(device: torch.device) -> None:
    scores = [torch.randn(6001, device=device)[1:].view(60, 10, 10), torch.randn((), device=device)]
    assert_same(run(table_of(scores, 0.5, "magnitude"), "magnitude"), scores, 0.5, "magnitude")


def test_table_is_used_again(device: torch.device) -> None:
    scores = [torch.randn(5000, device=device)]
    table = table_of(scores, 0.3, "magnitude")
    workspace = poisoned(table)
    run(table, "magnitude", workspace)
    scores[0].mul_(-3)
    assert_same(run(table, "magnitude", workspace), scores, 0.3, "magnitude")


@pytest.mark.sample(13)
@pytest.mark.parametrize("config", threshold.CONFIGS, ids=str)
def test_config(config: Config, device: torch.device) -> None:
    scores = [torch.randn(40001, device=device)]
    assert_same(run(table_of(scores, 0.5, "magnitude", config), "magnitude"), scores, 0.5, "magnitude")


class LastParts:
    """In place of ``search_kernel``: all parts but the last ones of every digit are taken and counted already."""

    def __init__(self, kernel: Any, parts: int) -> None:
        self.kernel, self.parts = kernel, parts

    def __getitem__(self, grid: Any) -> Any:
        def launch(state_ptr: Tensor, **arguments: Any) -> None:
            for field in (layout.STATE_TAKEN, layout.STATE_COUNTED):
                state_ptr[field.value : field.value + 4] = self.parts - 2
            self.kernel[grid](state_ptr=state_ptr, **arguments)

        return launch


def test_beyond_32_bits(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the last scores are read, and tau is of these. No other page is touched."""
    n, last = 2**31 + 4096, 8192
    scores = torch.empty(n, dtype=torch.bfloat16, device=device)
    tail = scores[n - last :].copy_(torch.randn(last))
    config = Config(window_block=512, digit_block=512, items=4096, sample=64)
    table = make_table([scores], [last // 3], config)
    table.tensors[:, RANKS] = config.sample  # a window above all scores
    table.tensors[:, layout.TENSOR_PROGRAMS.value] = n // 4096
    programs = torch.tensor([[0, n - last], [0, n - last + 4096]], device=device)
    monkeypatch.setattr(threshold, "search_kernel", LastParts(threshold.search_kernel, n // 4096))
    expected = tail.float().sort().values[last // 3].bfloat16()
    assert torch.equal(run(table._replace(programs=programs), "value")[0], expected.cpu())


# --- the ways through it: what is read again, and what is not
@pytest.mark.sample(17)
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_no_distribution_is_read_again(name: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = [DISTRIBUTIONS[name](9001, torch.float32).to(device)]
    table, before = table_of(scores, 0.5, "value"), [scores[0].clone()]
    monkeypatch.setattr(threshold, "search_kernel", Spoiling(threshold.search_kernel, scores[0]))
    assert_same(run(table, "value"), before, 0.5, "value")


def test_equal_keys_are_not_listed(device: torch.device) -> None:
    scores = [torch.full((9001,), -0.5, device=device)]
    table = table_of(scores, 0.5, "magnitude")
    workspace = poisoned(table)
    run(table, "magnitude", workspace)
    assert searched(workspace, table) == "nowhere" and workspace[layout.STATE_LISTED.value] == 0


@pytest.mark.sample(29)
@each_rule
@each_dtype
@pytest.mark.parametrize("ends", [(0, 1), (2047, 2048), (-1, 2048)], ids=["too low", "too high", "too wide"])
def test_unlucky_sample(ends: tuple[int, int], dtype: torch.dtype, rule: str, device: torch.device) -> None:
    scores = [torch.randn(5001, device=device).to(dtype)]
    table = table_of(scores, 0.3, rule)
    table.tensors[:, RANKS] = torch.tensor(ends, device=device)
    workspace = poisoned(table)
    assert_same(run(table, rule, workspace), scores, 0.3, rule)
    assert searched(workspace, table) == "scores"


# --- arguments
@pytest.mark.parametrize(
    ("tensors", "ranks", "error", "message"),
    [
        ([], [], ValueError, "at least one, got 0 and 0"),
        ([torch.ones(3)], [0, 1], ValueError, "got 1 and 2"),
        ([torch.ones(3), torch.ones(3).half()], [0, 0], TypeError, r"\[1\]: expected .*float32, got .*16"),
        ([torch.ones(3).double()], [0], TypeError, r"tensors\[0\]: expected .*float16.* got .*float64"),
        ([torch.ones(4, 4).t()[1:]], [0], ValueError, r"tensors\[0\]: expected a contiguous.*\(3, 4\)"),
        ([torch.ones(3)], [3], ValueError, r"ranks\[0\]: expected 0 <= rank < numel, got 3 for 3"),
        ([torch.ones(3)], [-1], ValueError, r"ranks\[0\]: .* got -1"),
        ([torch.ones(0)], [0], ValueError, r"ranks\[0\]: .* 0 elements"),
    ],
)
def test_bad_argument(tensors: list[Tensor], ranks: list[int], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make_table(tensors, ranks)


# --- on a GPU
@pytest.mark.gpu
@each_rule
@each_dtype
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_large_sizes(name: str, dtype: torch.dtype, rule: str, device: torch.device) -> None:
    if device.type != "cuda":
        pytest.skip("too slow in the interpreter")
    scores = [DISTRIBUTIONS[name](n, dtype).to(device) for n in LARGE_SIZES]
    for density in (0.03, 0.5, 0.999):
        tau = run(table_of(scores, density, rule, Config()), rule)
        assert_same(tau, scores, density, rule)


@pytest.mark.gpu
def test_graph_capture(device: torch.device) -> None:
    if device.type != "cuda":
        pytest.skip("a CUDA graph needs a GPU")
    scores = [torch.randn(n, device=device) for n in (100_003, 100)]
    table = table_of(scores, 0.3, "magnitude", Config())
    tau, workspace = torch.empty(2, device=device), poisoned(table)
    select(table=table, tau=tau, workspace=workspace, rule="magnitude")  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        select(table=table, tau=tau, workspace=workspace, rule="magnitude")
    for s in scores:
        s.normal_()
    graph.replay()
    assert_same(tau.cpu(), scores, 0.3, "magnitude")


@pytest.mark.parametrize("n", [1, 4096, 4097, 100_001])
def test_a_table_written_on_the_device_is_that_of_the_host(n: int, device: torch.device) -> None:
    scores, config, columns = torch.randn(n, device=device), threshold.CONFIGS[1], layout.TENSOR_COLUMNS.value
    expected = make_table([scores], [n // 3], config)
    rows = torch.full((1, columns), -1, device=device)
    programs = torch.full((threshold.programs_of(n, config), 2), -1, device=device)
    actual = threshold.describe(scores, n // 3, tensors=rows, programs=programs, config=config)
    assert actual[2:5] == expected[2:5] and workspace_size(actual) == workspace_size(expected)
    # On the host, the address of tau is not known either. It is the same if both write to the same tensor.
    tau, workspace = torch.empty(1, device=device), poisoned(expected)
    for table in (actual, expected):
        select(table=table, tau=tau, workspace=workspace, rule="value")
    assert actual.tensors.tolist() == expected.tensors.tolist()
    assert actual.programs.tolist() == expected.programs.tolist()


@pytest.mark.parametrize(
    ("scores", "processors", "items", "programs"),
    [
        (1, 132, 2048, 1),
        (1 << 20, 132, 2048, 512),
        (1 << 24, 132, 32768, 512),
        (1 << 26, 132, 131072, 512),
        (1 << 26, 16, 1 << 19, 128),
        (1 << 40, 132, 1 << 19, 1 << 21),
    ],
)
def test_programs_follow_from_the_scores_and_the_gpu(scores: int, processors: int, items: int, programs: int) -> None:
    config = threshold.spread(threshold.CONFIGS[0], scores, processors)
    assert config.items == items
    assert threshold.programs_of(scores, config) == programs
