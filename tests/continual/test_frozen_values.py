"""The checksums of what finished tasks use."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_models import convnet, mlp, run_tasks
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from wsn_fast import WSN, TaskHeads, ops
from wsn_fast.continual import frozen_values as module
from wsn_fast.continual.fingerprints import ForgottenError
from wsn_fast.continual.frozen_values import after_task, checksum, frozen_values
from wsn_fast.nn.task_ids import decode_json, encode_json

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool,
          torch.complex64]  # fmt: skip
MASK = 2**64 - 1


def mixed(index: int, word: int) -> int:
    """The term of one element, in Python's integers; ``>>`` is that of signed numbers."""

    def signed(x: int) -> int:
        return (x + 2**63) % 2**64 - 2**63

    x = signed(index * 0x9E3779B97F4A7C15 + word)
    for shift, factor in ((32, 0xBF58476D1CE4E5B9), (29, 0x94D049BB133111EB)):
        x = signed((x ^ (x >> shift)) * factor)
    return x ^ (x >> 32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_the_formula(dtype: torch.dtype) -> None:
    x = torch.randn(41, dtype=dtype)
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    keep = torch.rand(41) < 0.5
    expected = sum(mixed(i, w) for i, w in enumerate(x.view(integers).tolist()) if keep[i])
    assert int(checksum(x, ops.pack_mask(keep))) & MASK == expected & MASK


@pytest.mark.parametrize("pieces", [2, 3, 5, 64])
@pytest.mark.parametrize("slice_size", [8, 64, 1 << 15])
def test_the_parts_of_a_cut_tensor_add_up(pieces: int, slice_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x, keep = torch.randn(63, 21), torch.rand(63, 21) < 0.3
    whole = checksum(x, ops.pack_mask(keep))
    monkeypatch.setattr(module, "_SMALL", slice_size)
    total, first = torch.zeros((), dtype=torch.int64), 0
    for part, kept in zip(x.chunk(pieces), keep.chunk(pieces), strict=True):
        total += checksum(part, ops.pack_mask(kept), first)
        first += part.numel()
    assert total == whole == checksum(x, ops.pack_mask(keep))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_every_single_bit_counts(dtype: torch.dtype) -> None:
    x = torch.randn(9, dtype=dtype)
    bits = x.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])
    found = {int(checksum(x))}
    for i in range(9):
        for bit in range(8 * x.element_size()):
            flip = torch.tensor(-(2 ** (bit)) if bit == 8 * x.element_size() - 1 else 2**bit, dtype=bits.dtype)
            bits[i] ^= flip
            found.add(int(checksum(x)))
            bits[i] ^= flip
    assert len(found) == 1 + 9 * 8 * x.element_size()


CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "two values exchanged": lambda x: torch.cat([x[1:2], x[:1], x[2:]]),
    "turned around": lambda x: x.flip(0),
    "shifted by one": lambda x: x.roll(1),
    "all signs": lambda x: -x,
    "two signs": lambda x: torch.cat([-x[:2], x[2:]]),
    "scaled a little": lambda x: x * (1 - 1e-7),
    "scaled by a power of two": lambda x: x * 2,
    "one ulp up and one down": lambda x: torch.cat([x[:1].nextafter(x[:1] + 9), x[1:2].nextafter(x[1:2] - 9), x[2:]]),
    "a zero with a sign": lambda x: torch.cat([x[:-1], -x[-1:]]),
    "a NaN of another kind": lambda x: torch.cat([x[:-1], torch.tensor([torch.nan]).to(x)]),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_changes_that_cancel_out_in_simple_sums(change: str, dtype: torch.dtype) -> None:
    x = torch.cat([torch.randn(30, dtype=dtype), torch.zeros(1, dtype=dtype)])
    assert checksum(CHANGES[change](x)) != checksum(x)


def test_what_lies_outside_does_not_count() -> None:
    x, keep = torch.randn(50), torch.rand(50) < 0.5
    before = checksum(x, ops.pack_mask(keep))
    x[~keep] = torch.nan
    assert checksum(x, ops.pack_mask(keep)) == before


@pytest.mark.parametrize("dtype", DTYPES)
def test_small_tensors_together_have_the_same_checksums(dtype: torch.dtype) -> None:
    tensors = [torch.randn(shape).to(dtype) for shape in ((3, 5), (), (0,), (7,), (2, 1, 4))]
    together = module.checksums([torch.randn(3), *tensors, torch.zeros(4, dtype=torch.int64)])
    assert [int(t) for t in together[1:-1]] == [int(checksum(t)) for t in tensors]


@pytest.mark.parametrize("limit", [1, 8, 30, 1 << 15])
def test_tensors_of_one_size_and_others_in_any_order(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = [(5,), (2, 5), (0,), (10,), (5,), (3, 7), (10, 1), (), (5,), (0,), (5, 1), (5,), (0,), (0,), (2, 5), (5,)]
    kinds = [torch.float32] * 14 + [torch.complex64, torch.bfloat16]
    tensors = [torch.randn(shape).to(dtype) for shape, dtype in zip(shapes, kinds, strict=True)]
    expected = [int(checksum(t)) for t in tensors]
    monkeypatch.setattr(module, "_SMALL", limit)
    monkeypatch.setattr(module, "_ROWS", 2)
    assert module.checksums(tensors).tolist() == expected


def test_many_tensors_of_one_size_need_no_running_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_joined_checksums", None)
    assert len(module.checksums([torch.randn(5) for _ in range(40)] + [torch.randn(3, 2) for _ in range(40)])) == 80


@pytest.mark.parametrize("make", [lambda x: x.t(), lambda x: x[:, ::2], lambda x: x.clone().requires_grad_()])
def test_strides_do_not_count(make: Callable[[Tensor], Tensor]) -> None:
    x = make(torch.randn(6, 8))
    assert checksum(x) == checksum(x.detach().contiguous())


# --- of a model ------------------------------------------------------------------------------------------------------
def sgd(params: object) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, 0.1)  # type: ignore[arg-type]


def test_everything_that_finished_tasks_use_has_one() -> None:
    model = nn.Sequential(*convnet()[:-1], nn.Linear(12, 12), convnet()[-1])
    wsn = WSN(model, frozen="7.*")
    assert frozen_values(wsn._parts) == {}
    for task in (3, "b"):
        wsn.begin_task(task)  # type: ignore[arg-type]
        wsn.end_task()
    per_task = [f"{n}.{what}_tasks" for n in (1, 5) for what in ("weight", "bias")]
    per_task += [f"1.{what}_tasks" for what in ("running_mean", "running_var", "num_batches_tracked")]
    heads = [f"8.heads.{key}.{what}" for key in ("i3", "sb") for what in ("weight", "bias")]
    gated = [f"{n}.{what}" for n in (0, 4) for what in ("weight", "bias")]
    assert frozen_values(wsn._parts).keys() == {*gated, *heads, *per_task, "7.weight", "7.bias"}


def test_a_tensor_on_several_devices_is_read_once_for_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """The checksums of a device are read together: the host waits once."""
    wsn = WSN(convnet())
    run_tasks(wsn, [0, 1], sgd)
    reads: list[int] = []
    tolist = Tensor.tolist
    monkeypatch.setattr(Tensor, "tolist", lambda self: reads.append(1) or tolist(self))
    frozen_values(wsn._parts)
    assert len(reads) == 1


class Work(TorchDispatchMode):
    """Counts the operations of torch, and the elements that are mixed."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations += 0 if func.is_view else 1
        if func is torch.ops.aten.bitwise_xor_.Tensor:
            self.elements += args[0].numel() / 3  # it is done three times to each
        return func(*args, **(kwargs or {}))


def work(call: Callable[[], object]) -> Work:
    with Work() as counted:
        call()
    return counted


HEAD = 12 * 3 + 3


def test_the_cost_does_not_grow_with_the_tasks() -> None:
    """Apart from what is each task's own: its head."""
    wsn = WSN(mlp())
    run_tasks(wsn, [0], sgd, 1)
    one = work(lambda: frozen_values(wsn._parts)).elements
    run_tasks(wsn, [1, 2, 3, 4], sgd, 1)
    assert work(lambda: frozen_values(wsn._parts)).elements == pytest.approx(one + 4 * HEAD)
    assert one == pytest.approx(36 * 16 + 16 + 16 * 12 + 12 + HEAD)


def without_training(tasks: int, model: nn.Module) -> WSN:
    wsn = WSN(model)
    for task in range(tasks):
        wsn.begin_task(task)
        wsn.end_task()
    return wsn


@pytest.mark.parametrize("widths", [lambda task: 3, lambda task: 1 + task % 40], ids=["one width", "40 widths"])
def test_heads_cost_no_operations_of_their_own(widths: Callable[[int], int]) -> None:
    heads = TaskHeads(12, tasks={task: widths(task) for task in range(80)})
    wsn = without_training(20, nn.Sequential(*mlp()[:-1], heads))
    few = work(lambda: frozen_values(wsn._parts)).operations
    for task in range(20, 80):
        wsn.begin_task(task)
        wsn.end_task()
    assert work(lambda: frozen_values(wsn._parts)).operations <= few + 2 * 12  # two sizes get rows of their own


def test_what_a_task_adds_costs_the_same_after_any_number_of_tasks() -> None:
    wsn = without_training(2, convnet())
    few = work(lambda: after_task(wsn._parts, wsn._register.frozen))
    for task in range(2, 30):
        wsn.begin_task(task)
        wsn.end_task()
    many = work(lambda: after_task(wsn._parts, wsn._register.frozen))
    assert (many.operations, many.elements) == (few.operations, few.elements)


def test_what_a_task_adds_makes_what_is_there() -> None:
    wsn = WSN(nn.Sequential(*convnet()[:-1], nn.Linear(12, 12), convnet()[-1]), frozen="7.*")
    for task in range(4):
        run_tasks(wsn, [task], sgd, 2)
        assert wsn._register.frozen == frozen_values(wsn._parts)
    wsn.remove_task(1)
    assert wsn._register.frozen == frozen_values(wsn._parts)
    run_tasks(wsn, [1], sgd, 2)
    assert wsn._register.frozen == frozen_values(wsn._parts)


# --- what they find --------------------------------------------------------------------------------------------------
def flip(x: Tensor) -> None:
    """Flip the lowest bit of the last element, without autograd."""
    x.data.view(-1)[-1:].view({4: torch.int32, 8: torch.int64}[x.element_size()]).bitwise_xor_(1)


def values_of_tasks(wsn: WSN) -> dict[str, Tensor]:
    """The heads and rows of all tasks by the name that an error gives, each a view of what the model has."""
    found: dict[str, Tensor] = {}
    for task in wsn.tasks:
        found |= {f"task {task!r}: 7.{n}": t for n, t in wsn.model[-1].head(task).named_parameters()}
    for name, rows in wsn.model.named_buffers():
        if name.endswith("_tasks"):
            named = name.removesuffix("_tasks")
            found |= {f"task {t!r}: {named}": row for t, row in zip(wsn.tasks, rows, strict=True)}
    return found


@pytest.mark.parametrize("when", ["before the next task", "in the next task"])
def test_one_bit_of_any_task_is_found_and_named(when: str) -> None:
    wsn = without_training(6, convnet())
    if when == "in the next task":
        wsn.begin_task(6)
    call = wsn.end_task if when == "in the next task" else lambda: wsn.begin_task(6)
    names = values_of_tasks(wsn)
    assert len(names) == 6 * (2 + 5 + 2)
    for name, value in names.items():
        flip(value)
        with pytest.raises(ForgottenError, match=re.escape(name) + "\n"):
            call()
        flip(value)
    call()


def test_exchanged_heads_and_rows_are_found() -> None:
    wsn = WSN(convnet())
    run_tasks(wsn, [0, 1, 2], sgd, 2)
    values = values_of_tasks(wsn)
    for what in ("7.weight", "5.bias"):
        one, other = (values[f"task {task}: {what}"].data for task in (0, 2))
        kept = one.clone()
        one.copy_(other), other.copy_(kept)
        with pytest.raises(ForgottenError, match=re.escape(f"task 2: {what}")):
            wsn.begin_task(3)
        other.copy_(one), one.copy_(kept)
    wsn.begin_task(3)


def test_a_state_without_checksums_gets_them() -> None:
    wsn = without_training(3, convnet())
    register = decode_json(wsn.state_dict()["_extra_state"])
    frozen = register.pop("frozen")
    other = WSN(convnet())
    other.load_state_dict({**wsn.state_dict(), "_extra_state": encode_json(register)})
    assert other._register.frozen == frozen
    flip(other.model[-1].head(1).weight)
    with pytest.raises(ForgottenError, match=r"task 1: 7\.weight"):
        other.begin_task(3)
