"""The threshold of a tensor whose shards lie in several processes, against that of the whole tensor."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from distributions import DTYPES, RULES
from hypothesis import given
from hypothesis import strategies as st
from processes import needs_gloo, run_cases
from sharded_cases import BYTES, CASES

from wsn_fast import topc_threshold
from wsn_fast.backends import digits
from wsn_fast.ops import sharded_selection, threshold_rank

REFUSED = {
    "two devices": r"ValueError: shards of scores must have one device, got cpu, meta",
    "two dtypes": r"TypeError: shards of scores must have one dtype, got torch.bfloat16, torch.float32",
    "integers": r"TypeError: scores must be float32.* got torch.int64",
    "a backend": r"ValueError: backend must be None or 'torch' with a group.* got 'native'",
    "no group": r"TypeError: group must be a torch.distributed.ProcessGroup or None, got str",
    "too few densities": r"ValueError: density must be a number, or one for each of the 3 tensors, got 2",
    "a density": r"ValueError: density\[1\] must be a number in \(0, 1\], got 2",
    "a long shard": r"ValueError: a shard of scores must have less than 2\^31 elements, got 2147483648",
}


@pytest.fixture(scope="module", params=[2, 3])
def seen(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_cases("sharded_cases", request.param, tmp_path_factory.mktemp("processes"))


@needs_gloo
class TestInProcesses:
    @pytest.mark.parametrize("rule", RULES)
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_it_is_that_of_the_whole_tensor(self, dtype: torch.dtype, rule: str, seen: list[dict[str, Any]]) -> None:
        for one in seen:
            assert one[f"{dtype} {rule}"] == []

    @pytest.mark.parametrize("case", ["strided", "parts", "groups"])
    def test_it_is_that_of_one_whole_tensor(self, case: str, seen: list[dict[str, Any]]) -> None:
        assert [one[case] for one in seen] == [False] * len(seen)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_what_is_sent(self, dtype: torch.dtype, seen: list[dict[str, Any]]) -> None:
        rounds = {2: 2, 4: 3, 8: 6}[dtype.itemsize]
        assert [one[f"wire {dtype}"] for one in seen] == [(BYTES[dtype], rounds)] * len(seen)

    def test_no_host_waits(self, seen: list[dict[str, Any]]) -> None:
        assert [one["no host waits"] for one in seen] == [None] * len(seen)

    def test_the_threshold_of_nothing_is_nan(self, seen: list[dict[str, Any]]) -> None:
        for one in seen:
            assert str(one["nothing"]) == "[nan, nan, 0]"

    def test_a_group_without_the_process_is_refused(self, seen: list[dict[str, Any]]) -> None:
        assert seen[0]["another group"] == 1.0
        for rank, one in enumerate(seen[1:], 1):
            assert one["another group"] == (f"ValueError: group must contain this process, rank {rank} of {len(seen)}")

    @pytest.mark.parametrize("case", REFUSED)
    def test_it_is_refused(self, case: str, seen: list[dict[str, Any]]) -> None:
        for one in seen:
            assert re.match(REFUSED[case], str(one[case])), one[case]


def test_every_refusal_is_a_case() -> None:
    assert REFUSED.keys() <= CASES.keys()


@given(st.integers(0, 2**40), st.floats(1e-300, 1.0, exclude_min=True), st.sampled_from(RULES))
def test_ranks_are_those_of_the_host(n: int, density: float, rule: str) -> None:
    expected = threshold_rank(n, density, rule) if n else 0
    assert sharded_selection.ranks(torch.tensor([n, n]), density, rule).tolist() == [expected, expected]


@given(st.integers(1, 10**7), st.integers(1, 1000), st.sampled_from(RULES))
def test_ranks_of_short_densities_are_those_of_the_host(n: int, thousandths: int, rule: str) -> None:
    density = thousandths / 1000
    assert sharded_selection.ranks(torch.tensor(n), density, rule).item() == threshold_rank(n, density, rule)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_code_of_16_bits_is_decoded(dtype: torch.dtype, rule: str) -> None:
    scores = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    keys = scores.abs() if rule == "magnitude" else scores
    found = digits.decode(digits.encode(scores, rule), dtype, rule)
    assert torch.equal(found.view(torch.int16)[~keys.isnan()], (keys + 0.0).view(torch.int16)[~keys.isnan()])
    assert found[keys.isnan()].isnan().all()


@pytest.mark.parametrize("rule", RULES)
def test_counts_of_more_than_31_bits(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    copies = 2**22
    monkeypatch.setattr(sharded_selection.collectives, "sum_over", lambda group, counts: counts.mul_(copies))
    scores = torch.full((1000,), 0.5)
    scores[:10] = 0.25
    group: Any = None
    found = sharded_selection.thresholds([scores] * 2, [0.5, 0.995], rule, group)
    assert found.tolist() == [0.5, 0.25]


def test_a_list_without_a_group_has_the_threshold_of_each() -> None:
    tensors = [torch.randn(5), torch.randn(9, 2, dtype=torch.float64)]
    found = topc_threshold(tensors, [0.5, 0.2], rule="value")
    assert found == [topc_threshold(tensors[0], 0.5, rule="value"), topc_threshold(tensors[1], 0.2, rule="value")]


def test_without_processes_a_group_is_refused() -> None:
    with pytest.raises(ValueError, match=r"group must be None: .*init_process_group was not called"):
        topc_threshold(torch.ones(3), 0.5, group="gloo")  # type: ignore[call-overload]
