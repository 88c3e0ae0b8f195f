from __future__ import annotations

import pytest
import torch

from wsn_fast import ops
from wsn_fast.continual import statistics


def packed(*rows: list[int]) -> torch.Tensor:
    return torch.stack([ops.pack_mask(torch.tensor(row, dtype=torch.bool)) for row in rows])


def test_overlap_is_the_share_of_the_rows_weights_over_all_tensors() -> None:
    first = packed([1, 1, 1, 0, 0], [1, 0, 0, 1, 0])
    second = packed([1] * 9, [1] * 3 + [0] * 6)
    both, own, other = 1 + 3, 3 + 9, 2 + 3
    assert statistics.overlap([first, second]) == [[1.0, both / own], [both / other, 1.0]]


def test_an_empty_mask_overlaps_with_nothing() -> None:
    assert statistics.overlap([packed([0, 0, 0], [1, 1, 0])]) == [[0.0, 0.0], [0.0, 1.0]]


@pytest.mark.parametrize("given", [[], [torch.zeros(0, 2, dtype=torch.uint8)]], ids=["no tensors", "no tasks"])
def test_without_masks_there_is_no_overlap(given: list[torch.Tensor]) -> None:
    assert statistics.overlap(given) == []
