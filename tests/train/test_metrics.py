from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wsn_fast.reference import specification
from wsn_fast.train import metrics

percent = st.floats(0, 100)


@st.composite
def matrices(draw: st.DrawFn) -> list[list[float]]:
    tasks = draw(st.integers(1, 6))
    return [draw(st.lists(percent, min_size=i + 1, max_size=i + 1)) for i in range(tasks)]


@given(matrices())
def test_matrix_metrics_agree_with_the_reference(matrix: list[list[float]]) -> None:
    assert metrics.average_accuracy(matrix) == pytest.approx(specification.average_accuracy(matrix))
    assert metrics.backward_transfer(matrix) == pytest.approx(specification.backward_transfer(matrix))
    assert metrics.forgetting(matrix) == pytest.approx(specification.forgetting(matrix))


@given(st.lists(st.tuples(percent, percent), min_size=1, max_size=6))
def test_forward_transfer_agrees_with_the_reference(pairs: list[tuple[float, float]]) -> None:
    before, at_random = [b for b, _ in pairs], [r for _, r in pairs]
    expected = specification.forward_transfer(before, at_random)
    assert metrics.forward_transfer(before, at_random) == pytest.approx(expected)


def test_numbers_worked_out_by_hand() -> None:
    matrix = [[90.0], [80.0, 70.0], [85.0, 60.0, 50.0]]
    assert metrics.average_accuracy(matrix) == 65.0
    assert metrics.backward_transfer(matrix) == -7.5
    assert metrics.forgetting(matrix) == [5.0, 10.0, 0.0]
    assert metrics.forward_transfer([99.0, 20.0, 40.0], [1.0, 10.0, 20.0]) == 15.0


def test_columns_of_later_tasks_are_not_looked_at() -> None:
    assert metrics.average_accuracy([[90.0, 1.0], [80.0, 70.0]]) == 75.0
    assert metrics.forgetting([[90.0, 99.0], [80.0, 70.0]]) == [10.0, 0.0]


def test_equal_rows_have_a_backward_transfer_of_exactly_zero() -> None:
    row = [100 * 349 / 360, 100 * 331 / 360, 100 * 1 / 3]
    assert metrics.backward_transfer([row[: i + 1] for i in range(3)]) == 0.0


def test_one_task_transfers_nothing() -> None:
    assert metrics.backward_transfer([[50.0]]) == 0.0
    assert metrics.forward_transfer([10.0], [20.0]) == 0.0


@pytest.mark.parametrize("matrix", [[], [[1.0], [1.0]]])
@pytest.mark.parametrize("metric", [metrics.average_accuracy, metrics.backward_transfer, metrics.forgetting])
def test_an_incomplete_matrix_is_refused(metric: object, matrix: list[list[float]]) -> None:
    with pytest.raises(ValueError, match="matrix"):
        metric(matrix)  # type: ignore[operator]


def test_forward_transfer_refuses_rows_of_different_lengths() -> None:
    with pytest.raises(ValueError, match="1 and 2"):
        metrics.forward_transfer([1.0], [1.0, 2.0])
