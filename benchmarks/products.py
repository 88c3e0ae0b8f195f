"""Cases of masked products without a training step: one task's mask, several tasks in one batch, convolutions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input

from wsn_fast import reference
from wsn_fast.backends import choose
from wsn_fast.backends import torch as portable

from .cases import Case, Prepared, Work, check_close, compute_dtype, input_sets, name_of, total_bytes
from .contenders import backend
from .data import DENSITY
from .shapes import ConvShape, Shapes

RULE = "magnitude"
FUSED = ("torch", "triton")
SOURCES = ("packed", "scores")


class Weight(NamedTuple):
    """A weight with its scores, their threshold, and masks: boolean and packed, and packed rows of several tasks."""

    weight: Tensor
    scores: Tensor
    tau: Tensor
    mask: Tensor
    packed: Tensor
    task_masks: Tensor

    @classmethod
    def random(cls, size: tuple[int, ...], device: torch.device, tasks: int = 1) -> Weight:
        """fp32, scaled as layers are, so that results are of order one."""
        weight = torch.randn(size, device=device) / weight_fan_in(size) ** 0.5
        scores = torch.randn(size, device=device)
        tau = reference.topc_threshold(scores, DENSITY)
        mask = ~(scores.abs() < tau)
        packed = portable.pack(mask)
        return cls(weight, scores, tau, mask, packed, torch.stack([packed.roll(t) for t in range(tasks)]))

    def source(self, name: str) -> tuple[Tensor | None, Tensor | None, Tensor | None, str]:
        """Where a product takes the mask from, as the primitives' arguments."""
        return (self.packed, None, None, RULE) if name == "packed" else (None, self.scores, self.tau, RULE)

    def source_bytes(self, name: str) -> float:
        """What a product must read of the weight and the mask."""
        return self.weight.numel() * (4 + (1 / 8 if name == "packed" else 4))

    def in_memory(self, source: str, dtype: torch.dtype, packed: Tensor | None = None) -> Tensor:
        """The masked weight written out, by the backend that would be chosen."""
        w = self.weight
        if source == "packed":
            mask = self.packed if packed is None else packed
            return choose("gate_packed", w.device, w.dtype).backend.gate_packed(w, mask, dtype)
        return choose("gate", w.device, w.dtype).backend.gate(w, self.scores, self.tau, RULE, dtype)


class Operands(NamedTuple):
    """A weight and a batch in the compute dtype; for a mixed batch the task of each row, and the rows of each task."""

    w: Weight
    x: Tensor
    tasks: Tensor | None = None
    rows_of: Sequence[Tensor] = ()


Product = Callable[[Operands], Tensor]
Definition = Callable[[Operands, torch.dtype], Tensor]
"""The result computed in a dtype by PyTorch, from the operands rounded to the compute dtype."""


def weight_fan_in(size: tuple[int, ...]) -> int:
    """Terms of the sum behind one output."""
    return torch.Size(size[1:]).numel()


def _prepare(
    product: Product,
    definition: Definition,
    make: Callable[[], Operands],
    source: str,
    flops: float,
    capture: bool = True,
) -> Prepared:
    first = make()
    read = first.w.source_bytes(source) + total_bytes([first.x])
    sets = [first, *(make() for _ in range(input_sets(read, first.x.device) - 1))]
    results: list[Tensor] = []

    def call(operands: Operands) -> None:
        results[:] = [product(operands)]

    def check() -> str:
        check_close(results[0], definition(first, first.x.dtype), definition(first, torch.float64), "product")
        return "fp64: at most twice torch's error"

    y = definition(first, first.x.dtype)
    calls = [partial(call, operands) for operands in sets]
    return Prepared(calls, check, [Work(read + total_bytes([y]), flops)], capture=capture)


def _case(operation: str, contender: str, shape: str, device: torch.device, prepare: Callable[[], Prepared]) -> Case:
    return Case(operation, contender, shape, name_of(compute_dtype(device)), prepare)


# --- linear
def linear_cases(shapes: Shapes, device: torch.device) -> Iterator[Case]:
    """Forward and input gradient from a packed mask and from scores: fused, or by a masked weight in memory."""
    for size in shapes.products:
        for source in SOURCES:
            for backward in (False, True):
                for rows in shapes.product_rows:
                    yield from _linear(size, source, backward, rows, device)


def _linear(size: tuple[int, int], source: str, backward: bool, rows: int, device: torch.device) -> Iterator[Case]:
    def make() -> Operands:
        x = torch.randn(rows, size[0 if backward else 1], device=device).to(compute_dtype(device))
        return Operands(Weight.random(size, device), x)

    def multiply(x: Tensor, weight: Tensor) -> Tensor:
        return x @ weight if backward else F.linear(x, weight)

    def fused(name: str, o: Operands) -> Tensor:
        module = backend(name, "masked_linear", o.x.device, o.w.weight.dtype)
        y: Tensor = module.masked_linear(o.x, o.w.weight, *o.w.source(source), None, backward)
        return y

    def definition(o: Operands, dtype: torch.dtype) -> Tensor:
        masked = reference.select(o.w.mask, o.w.weight.to(o.x.dtype))
        return multiply(o.x.to(dtype), masked.to(dtype))

    contenders: dict[str, Product] = {f"{name} backend": partial(fused, name) for name in FUSED}
    contenders["masked weight in memory"] = lambda o: multiply(o.x, o.w.in_memory(source, o.x.dtype))
    operation = f"masked linear, {source}{', dx' if backward else ''}"
    for contender, product in contenders.items():
        prepare = partial(_prepare, product, definition, make, source, 2.0 * rows * size[0] * size[1])
        yield _case(operation, contender, f"{size[0]}x{size[1]} b{rows}", device, prepare)


# --- several tasks in one batch
def task_cases(shapes: Shapes, device: torch.device) -> Iterator[Case]:
    """Rows that belong to different tasks, mixed: one call, or a product per task."""
    for size in shapes.products[:1]:
        for rows in shapes.task_rows:
            yield from _tasks(size, shapes.tasks, rows, device)


def _tasks(size: tuple[int, int], tasks: int, rows: int, device: torch.device) -> Iterator[Case]:
    mixed = torch.randperm(rows, generator=torch.Generator().manual_seed(0))
    of_row = (torch.arange(rows) % tasks)[mixed]
    names = of_row.unique().tolist()

    def make() -> Operands:
        x = torch.randn(rows, size[1], device=device).to(compute_dtype(device))
        rows_of = [(of_row == task).nonzero().flatten().to(device) for task in names]
        return Operands(Weight.random(size, device, tasks), x, of_row.to(device, torch.int32), rows_of)

    def fused(name: str, o: Operands) -> Tensor:
        module = backend(name, "masked_linear_tasks", o.x.device, o.w.weight.dtype)
        y: Tensor = module.masked_linear_tasks(o.x, o.w.weight, o.w.task_masks, o.tasks, None, None)
        return y

    def loop(o: Operands, masked: Callable[[int], Tensor], dtype: torch.dtype) -> Tensor:
        y = torch.empty(rows, size[0], dtype=dtype, device=device)
        for task, at in zip(names, o.rows_of, strict=True):
            y[at] = F.linear(o.x[at].to(dtype), masked(task).to(dtype))
        return y

    def definition(o: Operands, dtype: torch.dtype) -> Tensor:
        def masked(task: int) -> Tensor:
            keep = portable.unpack(o.w.task_masks[task], o.w.weight.numel()).view(size)
            return reference.select(keep, o.w.weight.to(o.x.dtype))

        return loop(o, masked, dtype)

    def in_memory(o: Operands) -> Tensor:
        return loop(o, lambda task: o.w.in_memory("packed", o.x.dtype, o.w.task_masks[task]), o.x.dtype)

    contenders: dict[str, Product] = {f"{name} backend": partial(fused, name) for name in FUSED}
    contenders["a masked weight per task"] = in_memory
    for contender, product in contenders.items():
        capture = contender != "torch backend"  # it asks on the host which tasks there are
        flops = 2.0 * rows * size[0] * size[1]
        prepare = partial(_prepare, product, definition, make, "packed", flops, capture)
        yield _case(f"masked linear, {tasks} tasks", contender, f"{size[0]}x{size[1]} b{rows}", device, prepare)


# --- convolutions
def conv_cases(shapes: Shapes, device: torch.device) -> Iterator[Case]:
    """Forward and input gradient: an implicit product, or a masked weight in memory and cuDNN."""
    for shape in shapes.convs:
        for source in SOURCES:
            for backward in (False, True):
                yield from _conv(shape, source, backward, device)


def conv_operands(s: ConvShape, backward: bool, device: torch.device) -> Operands:
    """Random ones; ``x`` is the gradient of the result for ``backward``."""
    size = (s.batch, s.outputs, s.out_size, s.out_size) if backward else (s.batch, s.channels, s.size, s.size)
    x = torch.randn(size, device=device).to(compute_dtype(device))
    return Operands(Weight.random((s.outputs, s.channels // s.groups, s.kernel, s.kernel), device), x)


def conv_arguments(s: ConvShape, backward: bool) -> tuple[Any, ...]:
    """(bias, geometry, groups, input_shape) as ``masked_conv`` takes them."""
    input_shape = [s.batch, s.channels, s.size, s.size] if backward else None
    return None, ((s.stride,) * 2, (s.padding,) * 2, (1, 1)), s.groups, input_shape


def conv_definition(s: ConvShape, backward: bool, o: Operands, dtype: torch.dtype) -> Tensor:
    """cuDNN's, or on a CPU PyTorch's own, with the masked weight."""
    return convolve(s, backward, o.x.to(dtype), reference.select(o.w.mask, o.w.weight.to(o.x.dtype)).to(dtype))


def convolve(s: ConvShape, backward: bool, x: Tensor, weight: Tensor) -> Tensor:
    """The convolution, or the gradient of its input."""
    if backward:
        size = (s.batch, s.channels, s.size, s.size)
        return conv2d_input(size, weight, x, s.stride, s.padding, 1, s.groups)
    return F.conv2d(x, weight, None, s.stride, s.padding, 1, s.groups)


def _conv(s: ConvShape, source: str, backward: bool, device: torch.device) -> Iterator[Case]:
    def fused(name: str, o: Operands) -> Tensor:
        module = backend(name, "masked_conv", o.x.device, o.w.weight.dtype)
        y: Tensor = module.masked_conv(o.x, o.w.weight, *o.w.source(source), *conv_arguments(s, backward))
        return y

    contenders: dict[str, Product] = {f"{name} backend": partial(fused, name) for name in FUSED}
    contenders["masked weight in memory"] = lambda o: convolve(s, backward, o.x, o.w.in_memory(source, o.x.dtype))
    operation = f"masked conv, {source}{', dx' if backward else ''}"
    flops = 2.0 * s.batch * s.outputs * s.out_size**2 * s.channels // s.groups * s.kernel**2
    for contender, product in contenders.items():
        make = partial(conv_operands, s, backward, device)
        prepare = partial(_prepare, product, partial(conv_definition, s, backward), make, source, flops)
        yield _case(operation, contender, str(s), device, prepare)
