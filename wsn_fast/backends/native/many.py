"""The gates, the gradients, or the frozen values of many tensors in one call of the native CPU library; see
:mod:`wsn_fast.backends.native`.

The library reads a table with a row for each tensor: addresses, numbers of elements and codes, 64 bits each. For small
tensors the Python that checks them and fills in this table takes longer than the work. So it goes through the orders by
columns, and a plan keeps the table with what was checked.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from itertools import chain
from operator import attrgetter, is_
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..mask import GateOrder, GradientOrder, RestoreOrder
from ..updates import Plan
from .binding import DTYPES, call, contiguous, dtype_code, packed_mask, rule_code, threshold_pointer

TABLES = 8
"""How many tables a plan keeps."""

Column = tuple[Tensor, ...]
Gaps = tuple[Tensor | None, ...]

# The members of wsn_gate_item, wsn_backward_item and wsn_restore_item, in csrc/include/wsn_fast.h.
_GATE = ("weight", "scores", "tau", "masked", "n", "rank", "weight_dtype", "scores_dtype", "masked_dtype", "rule")
_BACKWARD = (
    "grad", "weight", "scores", "tau", "union", "weight_grad", "score_grad", "n", "grad_dtype", "weight_dtype",
    "scores_dtype", "rule",
)  # fmt: skip
_RESTORE = ("param", "saved", "union", "itemsize", "n")

_DTYPE, _IS_CPU = attrgetter("dtype"), attrgetter("is_cpu")


def _addresses(tensors: Sequence[Tensor | None]) -> list[int]:
    return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]


def _codes(tensors: Column) -> list[int]:
    return [DTYPES[tensor.dtype] for tensor in tensors]


def _table(members: Sequence[str], **columns: list[int]) -> Any:
    """The table of these columns, a ctypes array."""
    words: Any = (ctypes.c_int64 * (len(members) * len(columns["n"])))()
    for place, member in enumerate(members):
        words[place :: len(members)] = columns[member]
    return words


def _with(table: Any, members: Sequence[str], **columns: list[int]) -> Any:
    """A copy of the table with other columns. It is a copy because another thread may make one at the same time."""
    words = type(table).from_buffer_copy(table)
    for member, column in columns.items():
        words[members.index(member) :: len(members)] = column
    return words


class _Checked:
    """A table of orders that were checked, which serves later orders of the same tensors and constants.

    It holds the tensors, so that no other one can take the place of one. A tensor that is still the same, and where it
    was, needs no other check, but whether it was transposed.

    Attributes:
        table: the table, which nobody changes.
        rest: of gates, their thresholds. Of gradients, what was checked of the tensors that are new at every step.
    """

    def __init__(self, table: Any, staying: Sequence[Gaps], constants: Any, rest: Any) -> None:
        self.table = table
        self.rest = rest
        self._constants = constants
        self._staying = list(chain(*staying))
        self._places = _addresses(self._staying)

    def serves(self, staying: Sequence[Gaps], constants: Any) -> bool:
        """Whether tensors and constants are the same."""
        tensors = list(chain(*staying))
        return (
            all(map(is_, tensors, self._staying))
            and constants == self._constants
            and all(map(Tensor.is_contiguous, [tensor for tensor in tensors if tensor is not None]))
            and _addresses(tensors) == self._places
        )


def _keep(plan: Plan, key: Any, checked: _Checked) -> None:
    """Add a table to the plan, and drop the oldest of more than :data:`TABLES`."""
    for old in [old for old in list(plan) if old != key][: max(0, len(plan) - TABLES + 1)]:
        plan.pop(old, None)
    plan[key] = checked


def _same(columns: Sequence[Sequence[Any]], others: Sequence[Sequence[Any]]) -> bool:
    return all(all(map(is_, *pair)) for pair in zip(columns, others, strict=True))


# --- gates ------------------------------------------------------------------------------------------------------------


class _Gates(NamedTuple):
    """Gate orders, field by field."""

    weight: Column
    scores: Column
    rank: tuple[int, ...]
    rule: tuple[str, ...]
    masked: Column


def gates(orders: Sequence[GateOrder], plan: Plan | None = None) -> list[Tensor]:
    """:func:`wsn_fast.backends.torch.gates`, in one call.

    A ``plan`` saves the checks. It holds the tensors of the last calls. The thresholds that such a call returns are
    written again by the next call for the same tensors.
    """
    if not orders:
        return []
    columns = _Gates(*zip(*orders, strict=True))
    key = "gates", id(columns.weight[0]), len(orders)
    staying, constants = (columns.weight, columns.scores, columns.masked), (columns.rank, columns.rule)
    checked: _Checked | None = None if plan is None else plan.get(key)
    if checked is None or not checked.serves(staying, constants):
        dense = _Gates(*zip(*map(_checked_gate, range(len(orders)), orders), strict=True))
        taus = _new_thresholds(columns.scores)
        checked = _Checked(_gate_table(dense, taus), staying, constants, taus)
        if plan is not None and _same(dense, columns):
            _keep(plan, key, checked)
    call("wsn_gates", checked.table, len(orders))
    return list(checked.rest)


def _new_thresholds(scores: Column) -> list[Tensor]:
    """Room for the thresholds: one piece of memory for each dtype, since an allocation takes longer than a view."""
    dtypes = [one.dtype for one in scores]
    rooms = {dtype: iter(torch.empty(dtypes.count(dtype), dtype=dtype, device="cpu").unbind()) for dtype in set(dtypes)}
    return [next(rooms[dtype]) for dtype in dtypes]


def _checked_gate(i: int, order: GateOrder) -> GateOrder:
    """The order on contiguous tensors, after all of it was checked."""
    weight, scores, rank, rule, masked = order
    w, s, n = contiguous("weight", weight), contiguous("scores", scores, weight), weight.numel()
    for name, tensor in (("weight", w), ("scores", s), ("masked", masked)):
        dtype_code(name, tensor.dtype)
    if contiguous("masked", masked, weight) is not masked:
        raise ValueError(f"orders[{i}].masked must be contiguous, got strides {masked.stride()}")
    if not 0 <= rank < n:
        raise ValueError(f"orders[{i}].rank must be in [0, {n}), got {rank}")
    rule_code(rule)
    return GateOrder(w, s, rank, rule, masked)


def _gate_table(columns: _Gates, taus: Sequence[Tensor]) -> Any:
    return _table(
        _GATE,
        weight=_addresses(columns.weight),
        scores=_addresses(columns.scores),
        tau=_addresses(taus),
        masked=_addresses(columns.masked),
        n=[weight.numel() for weight in columns.weight],
        rank=list(columns.rank),
        weight_dtype=_codes(columns.weight),
        scores_dtype=_codes(columns.scores),
        masked_dtype=_codes(columns.masked),
        rule=list(map(rule_code, columns.rule)),
    )


# --- gradients --------------------------------------------------------------------------------------------------------


class _Gradients(NamedTuple):
    """Gradient orders, field by field."""

    grad: Column
    weight: Column
    scores: Column
    tau: Column
    union: Gaps
    rule: tuple[str, ...]
    weight_grad: Gaps
    score_grad: Gaps


def gates_backward(orders: Sequence[GradientOrder], plan: Plan | None = None) -> None:
    """:func:`wsn_fast.backends.torch.gates_backward`, in one call.

    A ``plan`` saves most of the checks. It holds the weights, scores and unions of the last calls.
    """
    if not orders:
        return
    columns = _Gradients(*zip(*orders, strict=True))
    copies: list[tuple[Tensor, Tensor]] = []
    key = "gates_backward", id(columns.weight[0]), len(orders)
    staying = columns.weight, columns.scores, columns.union
    checked: _Checked | None = None if plan is None else plan.get(key)
    if checked is not None and checked.serves(staying, columns.rule) and checked.rest == _facts(columns):
        table = _with(checked.table, _BACKWARD, **_moving(columns))
    else:
        dense = _Gradients(*zip(*(_checked_order(order, copies) for order in orders), strict=True))
        table = _gradient_table(dense)
        if plan is not None and _same(dense, columns):
            _keep(plan, key, _Checked(table, staying, columns.rule, _facts(columns)))
    call("wsn_gates_backward", table, len(orders))
    for result, written in copies:
        result.copy_(written)


def _moving(columns: _Gradients) -> dict[str, list[int]]:
    """The addresses of what is another tensor at every step."""
    return {name: _addresses(getattr(columns, name)) for name in ("grad", "tau", "weight_grad", "score_grad")}


def _facts(columns: _Gradients) -> list[list[Any]]:
    """What is checked of the tensors that are new at every step."""
    facts: list[list[Any]] = [
        [None if t is None else (t.shape, t.dtype, t.is_cpu, t.is_contiguous()) for t in column]
        for column in (columns.grad, columns.weight_grad, columns.score_grad)
    ]
    # A tau without an element has no address, which the library refuses.
    return [*facts, [(tau.dtype, tau.is_cpu) for tau in columns.tau]]


def _checked_order(order: GradientOrder, copies: list[tuple[Tensor, Tensor]]) -> GradientOrder:
    """The order on contiguous tensors, after all of it was checked. Where a result is not contiguous, ``copies`` gets
    it and the tensor that is written in its place."""
    grad, weight, scores, tau, union, rule, *_ = order
    w = contiguous("weight", weight)
    g, s = contiguous("grad", grad, weight), contiguous("scores", scores, weight)
    for name, tensor in (("grad", g), ("weight", w), ("scores", s)):
        dtype_code(name, tensor.dtype)
    threshold_pointer(tau, s)
    rule_code(rule)
    bits = None if union is None else packed_mask("union", union, w.numel())
    dw = _result("weight_grad", order.weight_grad, w, copies)
    ds = _result("score_grad", order.score_grad, s, copies)
    return GradientOrder(g, w, s, tau, bits, rule, dw, ds)


def _result(name: str, result: Tensor | None, like: Tensor, copies: list[tuple[Tensor, Tensor]]) -> Tensor | None:
    if result is None:
        return None
    if result.dtype is not like.dtype:
        raise TypeError(f"{name} must be a {like.dtype} tensor, got {result.dtype}")
    dense = contiguous(name, result, like)
    if dense is not result:
        copies.append((result, dense))
    return dense


def _gradient_table(columns: _Gradients) -> Any:
    return _table(
        _BACKWARD,
        weight=_addresses(columns.weight),
        scores=_addresses(columns.scores),
        union=_addresses(columns.union),
        n=[weight.numel() for weight in columns.weight],
        grad_dtype=_codes(columns.grad),
        weight_dtype=_codes(columns.weight),
        scores_dtype=_codes(columns.scores),
        rule=list(map(rule_code, columns.rule)),
        **_moving(columns),
    )


# --- frozen values ----------------------------------------------------------------------------------------------------


class _Restored(NamedTuple):
    """Orders that were checked, and what the table has of them beside addresses."""

    orders: Sequence[RestoreOrder]
    params: Column
    saved: Column
    unions: Gaps
    dtypes: list[torch.dtype]
    columns: dict[str, list[int]]

    @classmethod
    def of(cls, orders: Sequence[RestoreOrder], plain: Sequence[RestoreOrder]) -> _Restored:
        params, saved, unions = zip(*plain, strict=True)
        columns = {"itemsize": [param.itemsize for param in params], "n": [param.numel() for param in params]}
        return cls(orders, params, saved, unions, [*map(_DTYPE, params)], columns)

    def serves(self, orders: Sequence[RestoreOrder]) -> bool:
        """Whether these are the same orders, and the parameters are still what they were, but for their addresses."""
        return (
            self.orders is orders
            and all(map(Tensor.is_contiguous, self.params))
            and all(map(_IS_CPU, self.params))
            and [*map(_DTYPE, self.params)] == self.dtypes
            and [*map(Tensor.numel, self.params)] == self.columns["n"]
        )

    def table(self) -> Any:
        """The table for the library."""
        return _table(
            _RESTORE,
            param=_addresses(self.params),
            saved=_addresses(self.saved),
            union=_addresses(self.unions),
            **self.columns,
        )


def restore_frozen_many(orders: Sequence[RestoreOrder], plan: Plan | None = None) -> None:
    """:func:`wsn_fast.backends.torch.restore_frozen_many`, in one call.

    A ``plan`` saves most of the checks if it is given the same sequence again. It holds the orders of the last call.
    """
    if not orders:
        return
    copies: list[tuple[Tensor, Tensor]] = []
    known: _Restored | None = None if plan is None else plan.get(_Restored)
    if known is None or not known.serves(orders):
        plain = [_plain(order, copies) for order in orders]
        known = _Restored.of(orders, plain)
        if plan is not None and _same(orders, plain):
            plan[_Restored] = known
    call("wsn_restore_frozen_many", known.table(), len(orders))
    for param, written in copies:
        param.copy_(written)


def _plain(order: RestoreOrder, copies: list[tuple[Tensor, Tensor]]) -> RestoreOrder:
    """The order on contiguous tensors, after all of it was checked. If the parameter is not contiguous, ``copies`` gets
    it and the copy that is written in its place."""
    param, saved, union = order
    dense, values, n = contiguous("param", param), contiguous("saved", saved), param.numel()
    if values.dtype is not dense.dtype:
        raise TypeError(f"saved must have the dtype {dense.dtype} of param, got {values.dtype}")
    if values.numel() != n:
        raise ValueError(f"saved must have the {n} elements of param, got {values.numel()}")
    bits = None if union is None else packed_mask("union", union, n)
    if dense is not param:
        copies.append((param, dense))
    return RestoreOrder(dense, values, bits)
