"""What a masked product is to the tuner: operands, the kernel, the way by memory, and a check of both."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input

from ...backends import torch as portable
from ..measuring.checks import check_close
from ..measuring.launchers import kernels
from ..measuring.shapes import ConvShape
from ..measuring.weights import Weight, input_sets

Results = Tensor | tuple[Tensor, ...]
WAYS = tuple((source, backward) for source in ("packed", "scores") for backward in (False, True))
"""Result and input gradient, from a packed mask and from scores."""


class Product(ABC):
    """A masked product at one shape, in a compute dtype. Subclasses say what its operands and its results are."""

    operation: ClassVar[str]  # the name of the primitive in the backends
    launcher: ClassVar[tuple[str, str]]  # the module of the Triton launcher in wsn_fast.kernels, and its name
    names: ClassVar[tuple[str, ...]] = ("product",)  # of the results
    source: str = "packed"  # where the mask comes from
    backward: bool = False  # whether this is the gradient of the input

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype

    @abstractmethod
    def operands(self) -> Any:
        """New random operands, the weight as ``w``."""

    @abstractmethod
    def in_memory(self, o: Any) -> Results:
        """The results by way of memory."""

    @abstractmethod
    def definition(self, o: Any, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """The results in ``dtype`` by PyTorch, from the operands rounded to the compute dtype."""

    @abstractmethod
    def launch(self, o: Any, outputs: tuple[Tensor, ...], config: Any, splits: int, precision: str) -> None:
        """Run the Triton kernel with a given tile; it writes ``outputs``."""

    def grid(self, config: Any) -> tuple[int, int]:
        """How many programs a tile makes, and how many steps of the sum each one takes; one step cannot be split."""
        return 1, 1

    def fitting(self, configs: Sequence[Any]) -> Sequence[Any]:
        """The tiles that are worth a trial at this shape."""
        return configs

    def kernel(self) -> Callable[..., None]:
        """The Triton launcher; raises ``UnavailableError`` where Triton cannot run."""
        module, name = self.launcher
        return getattr(kernels(module, self.device), name)

    def workspace(self, rows: int, outputs: int, splits: int) -> Tensor | None:
        """The fp32 memory of a sum in ``splits`` parts."""
        numel = kernels("split_sum", self.device).workspace_numel(rows, outputs, splits)
        return torch.empty(numel, dtype=torch.float32, device=self.device) if numel else None

    def checker(self, o: Any) -> Callable[[tuple[Tensor, ...]], None]:
        """A check of the results for ``o`` by the 2x rule; it raises ``WrongResultError``."""
        torchs, exact = (self.definition(o, dtype) for dtype in (self.dtype, torch.float64))

        def check(got: tuple[Tensor, ...]) -> None:
            for name, one, theirs, right in zip(self.names, got, torchs, exact, strict=True):
                check_close(one, theirs, right, name)

        return check

    def sets(self) -> list[Any]:
        """As many operands as keep a GPU's L2 cache from holding the next ones."""
        first = self.operands()
        return [first, *(self.operands() for _ in range(input_sets(4 * first.w.weight.numel(), self.device) - 1))]


class Operands(NamedTuple):
    """A weight, and a batch ``x`` in the compute dtype: of inputs, or of gradients of results."""

    w: Weight
    x: Tensor


class LayerProduct(Product):
    """What linear and convolutional layers share: they multiply ``x`` with a masked weight."""

    weight_size: tuple[int, ...]
    x_size: tuple[int, ...]

    def multiply(self, x: Tensor, weight: Tensor) -> Tensor:
        """The product with a weight that is masked already."""
        raise NotImplementedError

    def operands(self) -> Operands:
        x = torch.randn(self.x_size, device=self.device).to(self.dtype)
        return Operands(Weight.random(self.weight_size, self.device), x)

    def in_memory(self, o: Operands) -> Results:
        return self.multiply(o.x, o.w.in_memory(self.source, self.dtype))

    def definition(self, o: Operands, dtype: torch.dtype) -> tuple[Tensor, ...]:
        return (self.multiply(o.x.to(dtype), o.w.as_defined(self.dtype).to(dtype)),)

    def launched_mask(self, o: Operands) -> dict[str, Any]:
        """The mask as arguments of a launcher."""
        mask = o.w.source(self.source)
        return {"packed": mask.packed, "scores": mask.scores, "tau": mask.tau, "rule": mask.rule}


class LinearProduct(LayerProduct):
    """``y = x @ (W*m).T``, or ``dx = dy @ (W*m)`` for ``backward``; W is [outputs, inputs] as ``size`` says."""

    operation, launcher = "masked_linear", ("masked_matmul", "masked_matmul")

    def __init__(
        self, size: tuple[int, int], rows: int, source: str, backward: bool, device: torch.device, dtype: torch.dtype
    ) -> None:
        super().__init__(device, dtype)
        self.rows, self.source, self.backward = rows, source, backward
        self.terms, self.outputs = size if backward else (size[1], size[0])
        self.weight_size, self.x_size = size, (rows, self.terms)

    def multiply(self, x: Tensor, weight: Tensor) -> Tensor:
        return x @ weight if self.backward else F.linear(x, weight)

    def launch(self, o: Any, outputs: tuple[Tensor, ...], config: Any, splits: int, precision: str) -> None:
        self.kernel()(
            o.x, o.w.weight, outputs[0], **self.launched_mask(o), backward=self.backward, config=config,
            splits=splits, workspace=self.workspace(self.rows, self.outputs, splits), precision=precision,
        )  # fmt: skip

    def grid(self, config: Any) -> tuple[int, int]:
        tiles = -(-self.rows // config.block_m) * -(-self.outputs // config.block_o)
        return tiles, -(-self.terms // config.block_r)

    def fitting(self, configs: Sequence[Any]) -> Sequence[Any]:
        """Tiles that hold the rows with little to spare."""
        heights = sorted({c.block_m for c in configs})
        fitting = [h for h in heights if h >= self.rows] or heights[-1:]
        return [c for c in configs if c.block_m in fitting[:2]]


class TaskOperands(NamedTuple):
    """A weight with the masks of several tasks and a batch; ``rows_of`` has the rows of each task in ``of_row``."""

    w: Weight
    x: Tensor
    of_row: Tensor
    order: Tensor
    rows_of: dict[int, Tensor]


class TaskProduct(LinearProduct):
    """``y = x @ (W*m).T`` where every row has the mask of its own task, and the tasks are mixed."""

    operation, launcher = "masked_linear_tasks", ("masked_matmul_tasks", "masked_matmul_tasks")

    def __init__(self, size: tuple[int, int], rows: int, tasks: int, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(size, rows, "packed", False, device, dtype)
        self.tasks = tasks

    def operands(self) -> Any:
        mixed = torch.randperm(self.rows, generator=torch.Generator().manual_seed(0))
        of_row = (torch.arange(self.rows) % self.tasks)[mixed]
        rows_of = {task: (of_row == task).nonzero().flatten().to(self.device) for task in of_row.unique().tolist()}
        x = torch.randn(self.x_size, device=self.device).to(self.dtype)
        of_row = of_row.to(self.device, torch.int32)
        order = of_row.argsort().to(torch.int32)
        return TaskOperands(Weight.random(self.weight_size, self.device, self.tasks), x, of_row, order, rows_of)

    def in_memory(self, o: Any) -> Results:
        return self._in_turn(o, lambda task: o.w.in_memory("packed", self.dtype, o.w.task_masks[task]), self.dtype)

    def definition(self, o: Any, dtype: torch.dtype) -> tuple[Tensor, ...]:
        def masked(task: int) -> Tensor:
            keep = portable.unpack(o.w.task_masks[task], o.w.weight.numel()).view(self.weight_size)
            return o.w.as_defined(self.dtype, keep)

        return (self._in_turn(o, masked, dtype),)

    def _in_turn(self, o: TaskOperands, masked: Callable[[int], Tensor], dtype: torch.dtype) -> Tensor:
        y = torch.empty(self.rows, self.outputs, dtype=dtype, device=self.device)
        for task, at in o.rows_of.items():
            y[at] = F.linear(o.x[at].to(dtype), masked(task).to(dtype))
        return y

    def launch(self, o: TaskOperands, outputs: tuple[Tensor, ...], config: Any, splits: int, precision: str) -> None:
        self.kernel()(
            o.x, o.w.weight, outputs[0], packed=o.w.task_masks, tasks=o.of_row, order=o.order, config=config,
            splits=splits, workspace=self.workspace(self.rows, self.outputs, splits), precision=precision,
        )  # fmt: skip


class ConvProduct(LayerProduct):
    """The convolution, or for ``backward`` the gradient of its input."""

    operation, launcher = "masked_conv", ("implicit_conv", "masked_conv")

    def __init__(self, size: ConvShape, source: str, backward: bool, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(device, dtype)
        s = self.size = size
        self.source, self.backward = source, backward
        self.weight_size = (s.outputs, s.channels // s.groups, s.kernel, s.kernel)
        self.x_size = (s.batch, s.outputs, s.out_size, s.out_size) if backward else s.input_size

    def multiply(self, x: Tensor, weight: Tensor) -> Tensor:
        s = self.size
        if self.backward:
            return conv2d_input(s.input_size, weight, x, s.stride, s.padding, 1, s.groups)
        return F.conv2d(x, weight, None, s.stride, s.padding, 1, s.groups)

    def launch(self, o: Operands, outputs: tuple[Tensor, ...], config: Any, splits: int, precision: str) -> None:
        s = self.size
        self.kernel()(
            o.x, o.w.weight, outputs[0], **self.launched_mask(o), stride=(s.stride,) * 2, padding=(s.padding,) * 2,
            dilation=(1, 1), groups=s.groups, backward=self.backward, config=config, precision=precision,
        )  # fmt: skip
