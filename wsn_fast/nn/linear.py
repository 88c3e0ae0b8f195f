"""Linear layers whose weight and bias are gated by trainable scores."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..ops import products
from ..ops.fusion import Fusion, fused_rows, linear_fusion
from .gated import SubnetLayer
from .product_layer import ProductLayer


class _SubnetLinear(ProductLayer):
    """The forward of the linear layers."""

    in_features: int
    out_features: int

    def forward(self, x: Tensor) -> Tensor:
        taken = self.taken(x)
        if taken is not None:
            return F.linear(x, taken[0].t() if self.TRANSPOSED else taken[0], taken[1])
        dtype = self.dtype_of_pass(x)
        if self.row_tasks is not None:
            if x.dtype is not dtype and not torch.is_autocast_enabled(x.device.type):
                raise TypeError(f"x must have the dtype of the weight, {dtype}, got {x.dtype}")
            return self._forward_rows(x.to(dtype), self.row_tasks)
        bias = self.masked("bias", dtype)
        if self._fuses(x, dtype):
            rows = x.to(dtype).reshape(-1, self.in_features)
            return self._product(rows, bias, None, transposed=self.TRANSPOSED).view(*x.shape[:-1], self.out_features)
        weight = self.masked("weight", dtype)
        assert weight is not None
        return F.linear(x, weight.t() if self.TRANSPOSED else weight, bias)

    def fusion(self, dtype: torch.dtype, source: str) -> Fusion:
        weight, (n, k) = self._weight, self._weight.shape
        return linear_fusion("masked_linear", weight.device, dtype, source, n, k, self._backend)

    def _fuses(self, x: Tensor, dtype: torch.dtype) -> bool:
        n, k = self._weight.shape
        limit = fused_rows("masked_linear", self._weight.device, dtype, self._mask_source(), n, k, self._backend)
        if limit == 0 or x.ndim == 0 or x.shape[-1] != self.in_features or not self._takes(x, dtype):
            return False
        return 0 < x.numel() // self.in_features <= limit

    def _forward_rows(self, x: Tensor, tasks: Tensor) -> Tensor:
        if not self.SERVES_MIXED_BATCHES:
            raise ValueError(f"{type(self).__name__} cannot compute rows of several tasks in one pass")
        if x.ndim < 2 or x.shape[0] != len(tasks) or x.shape[-1] != self.in_features:
            raise ValueError(
                f"x must be [{len(tasks)}, ..., {self.in_features}] for {len(tasks)} rows, got {tuple(x.shape)}"
            )
        flat, bias = x.reshape(-1, self.in_features), self.param("bias")
        y = products.masked_linear_tasks(
            flat,
            self._weight.detach(),
            self.weight_masks,
            tasks.repeat_interleave(len(flat) // max(len(tasks), 1)),
            None if bias is None else bias.detach(),
            None if bias is None else self.bias_masks,
            self._backend,
        )
        return y.view(*x.shape[:-1], self.out_features)


class FastSubnetLinear(_SubnetLinear, nn.Linear):
    """``y = x (W*m)^T + b*m_b``: ``nn.Linear`` whose weight and bias are masked by trainable scores.

    Args:
        in_features, out_features, bias, device, dtype: as for ``nn.Linear``.
        density: the fraction of weights (and of biases) kept, in (0, 1].
        rule: "magnitude" (the paper's code) or "value" (CLArena); see :func:`wsn_fast.topc_threshold`.

    Shape:
        ``[*, in_features] -> [*, out_features]``, any number of leading dimensions, empty ones too.

    Raises:
        TypeError: ``bias`` is no bool.
        ValueError: ``density`` is outside (0, 1] or ``rule`` is unknown.
    """

    DENSE = nn.Linear
    SERVES_MIXED_BATCHES = True

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        density: float = 0.5,
        rule: str = "magnitude",
    ) -> None:
        super().__init__(in_features, out_features, ops.check_bool("bias", bias), device, dtype)
        self._init_subnet(density, rule)

    def mixed_batch_rows(self) -> int:
        weight, (n, k) = self._weight, self._weight.shape
        operation = "masked_linear_tasks"
        return linear_fusion(operation, weight.device, weight.dtype, "packed", n, k, self._backend).rows


class FastSubnetTransposedLinear(_SubnetLinear):
    """``y = x (W*m) + b*m_b`` with ``W`` stored ``[in_features, out_features]``, as Hugging Face's ``Conv1D`` stores
    it.

    :func:`wsn_fast.convert` makes it from that class. Shapes and arguments are otherwise those of
    :class:`FastSubnetLinear`.
    """

    DENSE = nn.Linear
    TRANSPOSED = True
    OWN = (*SubnetLayer.OWN, "nx", "nf")

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        density: float = 0.5,
        rule: str = "magnitude",
    ) -> None:
        super().__init__()
        bias = ops.check_bool("bias", bias)
        self.in_features, self.out_features = in_features, out_features
        # Conv1D has these names, and code that reads them must go on working.
        self.nx, self.nf = in_features, out_features
        self.weight = nn.Parameter(torch.empty(in_features, out_features, device=device, dtype=dtype))
        nn.init.normal_(self.weight, std=0.02)
        zeros = torch.zeros(out_features, device=device, dtype=dtype)
        self.register_parameter("bias", nn.Parameter(zeros) if bias else None)
        self._init_subnet(density, rule)

    @classmethod
    def is_made_from(cls, kind: type[nn.Module]) -> bool:
        # By name, so that transformers need not be installed.
        return (kind.__module__, kind.__name__) == ("transformers.pytorch_utils", "Conv1D")

    def _complete(self) -> None:
        self.in_features, self.out_features = self._weight.shape

    def fan_in(self, name: str) -> int:
        return self.in_features

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {super().extra_repr().lstrip(', ')}"


LAYERS: tuple[type[SubnetLayer], ...] = (FastSubnetLinear, FastSubnetTransposedLinear)
"""The kinds of layers in this file."""
