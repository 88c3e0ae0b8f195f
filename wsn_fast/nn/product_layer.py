"""The base of the layers that multiply their input with one weight, as linear layers and convolutions do."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.compiler import is_compiling

from ..backends import is_exporting
from ..backends.conv_geometry import Geometry
from ..ops.autograd import ProductForm, SubnetProduct
from ..ops.fusion import FUSED_DTYPES
from . import refusals
from .gated import SubnetLayer
from .reads import hooks_of_saved_tensors
from .transforms import are_active


class ProductLayer(SubnetLayer):
    """A layer whose forward masks its weight and bias. It computes in the dtype of autocast, can multiply with a weight
    whose mask is applied while it is loaded, and takes what was made ahead in the shortest way.

    A new kind of layer sets ``DENSE``, and sets or overrides only what differs from the defaults: the class attributes
    ``TRANSPOSED``, ``OWN`` and ``SERVES_MIXED_BATCHES``, and the methods :meth:`is_made_from`, :meth:`fan_in`,
    :meth:`fusion` and :meth:`_complete`. CONTRIBUTING.md has the steps.

    Attributes:
        weight, bias: the gated tensors; the bias may be None.
    """

    GATED = ("weight", "bias")

    weight_score: Tensor
    weight_masks: Tensor
    weight_union: Tensor | None
    weight_view: Tensor | None
    bias_masks: Tensor
    bias_score: Tensor | None

    @property
    def _weight(self) -> Tensor:
        """The weight itself, also in a forward pass."""
        weight: Tensor = self.param("weight")
        return weight

    def fan_in(self, name: str) -> int:
        return self._weight[0].numel()

    def taken(self, x: Tensor) -> tuple[Tensor, Tensor | None] | None:
        """The masked weight and bias that the layer was given for the forward pass that is running, if they are right
        for the input ``x``: the short way through a forward pass, which costs little more than a dense layer's."""
        state = self.gate_state
        given = state.given
        if not given or self.row_tasks is not None:
            return None
        compiling, parameters = is_compiling(), self._parameters
        kind = "cpu" if x.is_cpu else "cuda" if x.is_cuda else x.device.type  # the last takes five times as long
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        weight, bias, other = given.get("weight"), given.get("bias"), parameters.get("bias")
        if weight is None or not weight.is_for(parameters.get("weight"), dtype, compiling):
            return None
        if other is not None and (bias is None or not bias.is_for(other, dtype, compiling)):
            return None
        if weight.score is None and not compiling:
            return weight.masked, None if bias is None else bias.masked
        if not (compiling or weight.may_be_taken(hooks_of_saved_tensors(False))):
            return None
        return state.take("weight", weight, compiling), None if bias is None else state.take("bias", bias, compiling)

    def dtype_of_pass(self, x: Tensor) -> torch.dtype:
        """The dtype in which this layer computes: that of autocast if it is on, else that of the weight."""
        dtype, kind = self._weight.dtype, refusals.device_kind(x)
        # Autocast itself leaves float64 alone and does not know meta tensors.
        if dtype is torch.float64 or kind == "meta" or not torch.is_autocast_enabled(kind):
            return dtype
        return torch.get_autocast_dtype(kind)

    def _mask_source(self) -> str:
        """Where the mask of the weight comes from: "scores" in training, "packed" for a finished task."""
        return "scores" if self.weight_view is None else "packed"

    def _product(
        self, x: Tensor, bias: Tensor | None, geometry: Geometry | None, groups: int = 1, transposed: bool = False
    ) -> Tensor:
        """Multiply ``x``, in the compute dtype, with the masked weight without writing that weight to memory."""
        packed = self.weight_view
        weight, score = (self._weight, self.weight_score) if packed is None else (self._weight.detach(), None)
        form = ProductForm(self.density_of("weight"), self.rule, self._backend, geometry, groups, transposed)
        result: Tensor = SubnetProduct.apply(x, weight, score, bias, self.weight_union, packed, form)
        return result

    def _takes(self, x: Tensor, dtype: torch.dtype) -> bool:
        """Whether :meth:`_product` can take ``x``. Where it cannot, torch's own product runs and reports bad inputs."""
        if self.gate_state.shards is not None:  # the weight is masked already
            return False
        if (self.one_pass and self.weight_view is None) or is_exporting() or (not is_compiling() and are_active()):
            return False
        if self._weight.dtype not in FUSED_DTYPES or self.weight_score.dtype not in FUSED_DTYPES:
            return False
        return x.device == self._weight.device and (x.dtype is dtype or torch.is_autocast_enabled(x.device.type))
