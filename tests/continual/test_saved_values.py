"""Copies of frozen values: what is put back, when memory is taken and given back, and what is kept."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from wsn_fast import ops
from wsn_fast.continual import saved_values
from wsn_fast.continual.saved_values import Frozen, SavedValues


def make_frozen(dtypes: tuple[torch.dtype, ...] = (torch.float32,)) -> list[Frozen]:
    """Parameters of several shapes, one of them not contiguous. Every second one is frozen everywhere."""
    shapes = [(6, 4), (9,), (2, 3, 2, 2), (1, 1), (33,)]
    params = [nn.Parameter(torch.randn(shape).to(dtype)) for dtype in dtypes for shape in shapes]
    params[0].data = params[0].data.t().contiguous().t()
    unions = [ops.pack_mask(torch.rand(p.shape) < 0.5) if i % 2 == 0 else None for i, p in enumerate(params)]
    return [*zip(params, unions, strict=True)]


@torch.no_grad()
def step(frozen: list[Frozen]) -> list[Tensor]:
    """Move everything, and return what each tensor has to be when the frozen values are back."""
    right = []
    for param, union in frozen:
        before = param.clone()
        param.add_(1)
        mask = torch.ones(param.shape, dtype=torch.bool) if union is None else ops.unpack_mask(union, param.shape)
        right.append(torch.where(mask, before, param))
    return right


def assert_are(frozen: list[Frozen], right: list[Tensor]) -> None:
    for i, ((param, _), expected) in enumerate(zip(frozen, right, strict=True)):
        assert param.dtype is expected.dtype and torch.equal(param, expected), f"tensor {i}"


@pytest.mark.parametrize("part", [2**28, 100, 1])
def test_frozen_values_are_put_back(part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in several pieces of memory, and if every tensor is larger than one."""
    monkeypatch.setattr(saved_values, "PART", part)
    frozen, saved = make_frozen((torch.float32, torch.bfloat16, torch.float64)), SavedValues()
    for _ in range(3):
        saved.save(frozen)
        right = step(frozen)
        saved.restore()
        assert_are(frozen, right)
        assert all(param.requires_grad and param.is_leaf for param, _ in frozen)
        saved.forget()


def test_they_can_be_put_back_again() -> None:
    """A closure may look at a finished task in the middle of a step."""
    frozen, saved = make_frozen(), SavedValues()
    saved.save(frozen)
    step(frozen)
    saved.restore()
    right = step(frozen)
    saved.restore()
    assert_are(frozen, right)


def test_nothing_is_put_back_before_it_is_saved_or_after_it_is_forgotten() -> None:
    frozen, saved = make_frozen(), SavedValues()
    saved.restore()
    saved.forget()
    saved.save(frozen)
    step(frozen)
    saved.forget()
    now = [param.clone() for param, _ in frozen]
    saved.restore()
    assert_are(frozen, now)


def test_nothing_may_be_frozen() -> None:
    saved = SavedValues()
    saved.save(make_frozen())
    saved.save([])
    saved.restore()
    saved.forget()


def orders_of(saved: SavedValues) -> list[int]:
    return [id(part.orders) for part in saved._parts]


def test_the_same_tensors_have_the_same_places() -> None:
    frozen, saved = make_frozen(), SavedValues()
    saved.save(frozen)
    before = orders_of(saved)
    saved.save(list(frozen))
    assert orders_of(saved) == before


def another_parameter(frozen: list[Frozen]) -> None:
    frozen[1] = nn.Parameter(torch.randn(9)), frozen[1][1]


def another_union(frozen: list[Frozen]) -> None:
    frozen[0] = frozen[0][0], ops.pack_mask(torch.rand(6, 4) < 0.5)


def no_union(frozen: list[Frozen]) -> None:
    frozen[0] = frozen[0][0], None


def one_less(frozen: list[Frozen]) -> None:
    del frozen[-1]


def one_more(frozen: list[Frozen]) -> None:
    frozen.append((nn.Parameter(torch.randn(7)), None))


def another_shape(frozen: list[Frozen]) -> None:
    frozen[1][0].data = torch.randn(3, 4)


def another_dtype(frozen: list[Frozen]) -> None:
    frozen[1][0].data = frozen[1][0].data.double()


def elsewhere(frozen: list[Frozen]) -> None:
    frozen[1][0].data = torch.randn(9)


def another_stride(frozen: list[Frozen]) -> None:
    frozen[0][0].data = torch.randn(6, 4)


CHANGES = [
    another_parameter, another_union, no_union, one_less, one_more, another_shape, another_dtype, elsewhere,
    another_stride,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_other_tensors_are_saved_the_next_time(change: Callable[[list[Frozen]], None]) -> None:
    frozen, saved = make_frozen(), SavedValues()
    saved.save(frozen)
    saved.forget()
    change(frozen)
    saved.save(frozen)
    right = step(frozen)
    saved.restore()
    assert_are(frozen, right)


@pytest.mark.parametrize("change", [elsewhere, another_stride])
def test_a_step_may_give_a_parameter_other_memory(change: Callable[[list[Frozen]], None]) -> None:
    """As an optimizer does that sets ``param.data``."""
    frozen, saved = make_frozen(), SavedValues()
    saved.save(frozen)
    right = step(frozen)
    moved = {elsewhere: 1, another_stride: 0}[change]
    value = frozen[moved][0].detach().clone()
    change(frozen)
    with torch.no_grad():
        frozen[moved][0].copy_(value)
    saved.restore()
    assert_are(frozen, right)


def test_a_model_may_be_cast_before_the_values_are_back() -> None:
    """As after a step that an exception ended."""
    frozen, saved = make_frozen(), SavedValues()
    saved.save(frozen)
    right = step(frozen)
    for param, _ in frozen:
        param.data = param.data.double()
    saved.restore()
    assert_are(frozen, [tensor.double() for tensor in right])


@pytest.mark.parametrize("is_new", [True, False])
def test_if_memory_runs_out_nothing_is_saved(is_new: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    frozen, saved = make_frozen(), SavedValues()
    if not is_new:
        saved.save(frozen)
    step(frozen)

    def no_memory(*args: object) -> None:
        raise torch.OutOfMemoryError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "_foreach_copy_", no_memory)
        with pytest.raises(torch.OutOfMemoryError):
            saved.save(frozen)
    now = [param.clone() for param, _ in frozen]
    saved.restore()
    assert_are(frozen, now)
    saved.save(frozen)
    right = step(frozen)
    saved.restore()
    assert_are(frozen, right)


# --- memory
def bytes_of(saved: SavedValues) -> int:
    return sum(part.memory.untyped_storage().nbytes() for part in saved._parts)


def test_a_cpu_keeps_the_memory_and_other_devices_do_not() -> None:
    for device, kept in (("cpu", 400), ("meta", 0)):
        param, saved = nn.Parameter(torch.empty(100, device=device)), SavedValues()
        for _ in range(2):
            saved.save([(param, None)])
            assert bytes_of(saved) == 400
            saved.forget()
            assert bytes_of(saved) == kept


def test_a_piece_of_memory_is_not_larger_than_it_should(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless a single tensor is."""
    monkeypatch.setattr(saved_values, "PART", 100)
    saved = SavedValues()
    saved.save([(torch.zeros(n, dtype=torch.uint8), None) for n in (60, 30, 20, 80, 1, 300, 99, 2)])
    assert [part.size for part in saved._parts] == [90, 100, 1, 300, 99, 2]


def test_no_more_memory_is_taken_if_the_last_step_was_cut_short() -> None:
    frozen, saved = make_frozen(), SavedValues()
    saved.save(frozen)
    (before,) = (part.memory.data_ptr() for part in saved._parts)
    saved.save(frozen)
    assert [part.memory.data_ptr() for part in saved._parts] == [before]


def test_other_tensors_do_not_take_memory_beside_the_old_one(monkeypatch: pytest.MonkeyPatch) -> None:
    saved, held = SavedValues(), []
    saved.save(make_frozen())
    part_of = saved_values._part
    monkeypatch.setattr(saved_values, "_part", lambda *args: (held.append(bytes_of(saved)), part_of(*args))[1])
    saved.save(make_frozen())
    assert held == [0]


def test_the_copies_of_a_part_share_one_piece_of_memory() -> None:
    """So they move together, and the tables of the backends stay right."""
    frozen, saved = make_frozen(), SavedValues()
    saved.save(frozen)
    (part,) = saved._parts
    assert {order.saved.untyped_storage().data_ptr() for order in part.orders} == {part.memory.data_ptr()}
    assert part.size == sum(param.nbytes for param, _ in frozen)
