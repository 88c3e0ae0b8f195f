"""A gated tensor that FSDP2 (``fully_shard``) has cut into shards, of which each process holds one: some rows.

FSDP2 gathers what the hooks of a :class:`GatedShard` return. That is the masked shard in the compute dtype, so what a
forward pass reads is masked already, and as much travels as for a dense layer. Scores, masks and running means never
travel. FSDP2 hands over this process's rows of G, the gradient of the masked tensor, averaged over the processes.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from itertools import pairwise
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._C import _disabled_torch_function_impl
from torch.autograd.graph import increment_version

from .. import ops
from ..backends import collectives
from ..backends.mask import Mask
from .gate import Gated

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from .gated import SubnetLayer

CALL_THE_WSN = "let the forward pass of the WSN gather it: wsn(x), and no unshard() and no call of its parts"


def is_dtensor(tensor: object) -> bool:
    """Whether a tensor is a DTensor. Who has one has imported the class, which takes long."""
    kind: Any = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)
    return kind is not None and isinstance(tensor, kind)


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor: its shard of a DTensor, else the tensor itself."""
    if not is_dtensor(tensor):
        return tensor
    shard: Tensor = tensor._local_tensor  # type: ignore[attr-defined]
    return shard


def address(tensor: Tensor) -> int:
    """Where the values of a tensor are that this process holds."""
    return local(tensor).data_ptr()


def shard_of(tensor: Tensor) -> ShardedGate | None:
    """What is known about a gated tensor that is sharded, or about one with these scores; None if it is whole."""
    shard: ShardedGate | None = getattr(local(tensor), "gate", None)
    return shard


class GatedShard(Tensor):
    """This process's rows of a gated tensor, or of its scores. FSDP2 sends the masked rows of the former.

    Attributes:
        gate: what is known about the whole tensor.
    """

    __torch_function__ = _disabled_torch_function_impl  # type: ignore[assignment]
    gate: ShardedGate

    def fsdp_pre_all_gather(
        self, mesh: Any, outer_size: torch.Size, outer_stride: Any, module: nn.Module, mp_policy: Any
    ) -> tuple[tuple[Tensor], torch.Size]:
        masked = self.gate.masked_shard(self.detach(), mp_policy.param_dtype or self.dtype)
        missing = -(-outer_size[0] // mesh.size()) - masked.shape[0]  # every process sends as many rows
        if missing:
            masked = torch.cat([masked, masked.new_zeros(missing, *masked.shape[1:])])
        return (masked,), outer_size

    def fsdp_post_all_gather(
        self, all_gather_outputs: tuple[Tensor, ...], metadata: torch.Size, param_dtype: Any, *, out: Any = None
    ) -> tuple[Tensor, tuple[()]] | None:
        if out is not None:
            return None  # it shares its memory with what was gathered
        return all_gather_outputs[0].view(-1, *metadata[1:])[: metadata[0]], ()


class ShardedGate:
    """A gated tensor of which this process holds some rows, with its scores, and the gate that all processes agree on.

    Args:
        path: its name in the model.
        layer: its layer.
        name: its name there.
        param, score: the DTensors that optimizers hold.
        group: the processes that hold the other rows.
        state: what all gates of the model have in common.

    Attributes:
        shape: of the whole tensor.
        counts: the elements that each process holds, in the order of the ranks.
        first: the index of the first element of this process's rows in the whole tensor.
        rows: which rows this process has.
        tau: the threshold of all scores.
        tau_stamp: what it was found for.
        sent: the number of the forward pass for which the masked rows were sent last.
    """

    def __init__(
        self,
        path: str,
        layer: SubnetLayer,
        name: str,
        param: Tensor,
        score: Tensor,
        group: ProcessGroup,
        state: CommonState,
    ) -> None:
        self.path, self.layer, self.name, self.param, self.score = path, layer, name, param, score
        self.group, self.state = group, state
        self.shape = param.shape
        size, rank, inner = collectives.size(group), group.rank(), prod(param.shape[1:])
        chunk = -(-param.shape[0] // size)
        borders = [min(i * chunk, param.shape[0]) for i in range(size + 1)]
        self.counts = [(end - start) * inner for start, end in pairwise(borders)]
        self.first = borders[rank] * inner
        self.rows = slice(borders[rank], borders[rank + 1])
        self.tau: Tensor | None = None
        self.tau_stamp: object = None
        self.sent = -1
        self._version = -1  # of the tensor in the last forward pass
        self._arrived = False  # whether the gathered tensor got a gradient that FSDP2 has not handed over yet
        self._gathered: weakref.ref[Tensor] | None = None
        self._made: tuple[weakref.ref[Tensor], weakref.ref[Tensor]] | None = None  # the last dW and dS
        for tensor in (param, score):
            self.hold(tensor)
        param.register_post_accumulate_grad_hook(self._take)

    def hold(self, tensor: Tensor) -> None:
        """Make the shard of a tensor one that knows this gate."""
        shard = local(tensor).as_subclass(GatedShard)
        shard.gate = self
        tensor._local_tensor = shard  # type: ignore[attr-defined]

    def gated(self) -> Gated:
        """The tensor with its scores, and this process's parts of its masks."""
        buffers = self.layer._buffers
        masks, union = buffers[f"{self.name}_masks"], buffers[f"{self.name}_union"]
        return Gated(self.name, self.param, self.score, masks, union)  # type: ignore[arg-type]

    # --- the gate
    def stamp(self) -> object:
        """What the threshold depends on."""
        score, layer = self.score, self.layer
        return score._version, address(score), layer.rule, layer.density_of(self.name)

    def keep(self) -> Tensor:
        """This process's rows of the mask of the current scores, bool."""
        return ops.keep_mask(local(self.score).detach(), self._fresh_tau(), self.layer.rule, self.layer.backend)

    def _fresh_tau(self) -> Tensor:
        if self.tau is None or self.tau_stamp != self.stamp():
            raise RuntimeError(f"the scores of {self.path} have changed since the threshold was found: {CALL_THE_WSN}")
        return self.tau

    def masked_shard(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """This process's rows of the masked tensor, to be sent."""
        layer = self.layer
        if layer._active_row != self.state.row:
            raise RuntimeError(f"the processes have not agreed on the task of {self.path}: {CALL_THE_WSN}")
        tau = self._fresh_tau() if layer._active_row is None else None
        self.sent = self.state.passes
        if weight.numel() == 0:
            return weight.to(dtype)
        if tau is None:
            packed = layer._buffers[f"{self.name}_view"]
            assert packed is not None
            return ops.gate_packed(weight, packed, dtype, layer.backend)
        return ops.gate_at(weight, local(self.score).detach(), tau, layer.rule, dtype, layer.backend)

    def check_gathered(self, param: Tensor) -> None:
        """Check that ``param``, which the layer reads, is the masked tensor that FSDP2 has gathered for this pass.

        Raises:
            RuntimeError: it is a shard, or FSDP2 has not asked for the masked rows.
        """
        if is_dtensor(param):
            raise RuntimeError(
                f"{self.path} is read while it is cut into shards: FSDP2 gathers it for the forward pass of "
                "its group only. Name a module around all modules that read it in shard(wsn, mesh, groups=[...])"
            )
        if self.sent != self.state.passes:
            raise RuntimeError(f"{self.path} was not gathered for this forward pass: {CALL_THE_WSN}")
        self._version = self.param._version
        if self._gathered is None or self._gathered() is not param:
            self._gathered = weakref.ref(param)
            if param.requires_grad:
                param.register_post_accumulate_grad_hook(self._note)

    # --- gradients
    def _note(self, _: Tensor) -> None:
        self._arrived = True

    @torch.no_grad()
    def _take(self, _: Tensor) -> None:
        """A gradient has arrived in ``param.grad``. FSDP2 hands over G, and a one-pass optimizer takes it as it is. For
        any other optimizer it becomes dW, and the scores get dS."""
        if not self._arrived:
            raise RuntimeError(
                f"{self.path} has a gradient that did not come through its layer: some code reads it without "
                "its mask, as a penalty on weights does. Let that code read layer.masked(name, dtype) in the forward "
                "pass of the group"
            )
        self._arrived = False
        layer = self.layer
        if layer.one_pass:
            self._made = None
            return
        if self.param._version != self._version:
            raise RuntimeError(f"{self.path} has changed between the forward and the backward pass")
        grad, scores = local(self.param.grad), local(self.score).detach()  # type: ignore[arg-type]
        union = layer._buffers[f"{self.name}_union"]
        mask = Mask(scores, self._fresh_tau(), layer.rule, union=union)
        weight = local(self.param).detach()
        dw, ds = ops.gate_backward(grad, weight, mask, True, True, layer.backend) if grad.numel() else (grad, grad)
        assert dw is not None and ds is not None
        if self.score.requires_grad:
            self._add_up(ds, mask)
            self._made = weakref.ref(self.param.grad), weakref.ref(self.score.grad)  # type: ignore[arg-type]
        grad.copy_(dw)

    def _add_up(self, ds: Tensor, mask: Mask) -> None:
        """Store dS, or add it to the one that is there. FSDP2 has added G to the dW of the passes before. So inside the
        trained part of the mask ``ds`` is that of all passes, and outside, where dW is 0, that of the last one."""
        before, made = self.score.grad, self._made
        if made is not None and made[0]() is self.param.grad and ds.numel():
            if before is None or made[1]() is not before:
                raise RuntimeError(
                    f"the gradients of {self.path} and of its scores were not set to None, or to 0, together"
                )
            trained = self.keep()
            if mask.union is not None:
                trained &= ~ops.unpack_mask(mask.union, trained.shape)
            sums = local(before)
            sums.copy_(torch.where(trained, ds, sums + ds))
        elif before is None:
            self.score.grad = self.placed(ds.clone() if not ds.numel() else ds)
        else:
            local(before).add_(ds)

    def placed(self, rows: Tensor, length: int | None = None) -> Tensor:
        """A DTensor that is cut as this gate is, of which this process has these rows, contiguous. Their inner
        dimensions may be others than those of the gated tensor. ``length`` is the number of all rows, if it is
        another one."""
        from torch.distributed.tensor import DTensor  # imported here, because it takes long

        score: Any = self.score
        shape = torch.Size([self.shape[0] if length is None else length, *rows.shape[1:]])
        stride = [prod(shape[i + 1 :]) for i in range(len(shape))]
        place = score.device_mesh, score.placements
        return DTensor.from_local(rows, *place, run_check=False, shape=shape, stride=tuple(stride))

    # --- what belongs to the whole tensor
    @torch.no_grad()
    def draw(self, target: Tensor, fill: Callable[[Tensor], object]) -> Tensor:
        """This process's rows of what ``fill`` draws for the whole tensor, of the dtype of ``target``: the numbers of
        the first process, which are those that a single process would draw."""
        whole = torch.empty(self.shape, dtype=target.dtype, device=local(target).device)
        fill(whole)
        collectives.send_from_first(self.group, whole)
        return whole[self.rows]

    @torch.no_grad()
    def redraw_score(self, fill: Callable[[Tensor], object]) -> None:
        """Draw new scores."""
        local(self.score).copy_(self.draw(self.score, fill))
        increment_version(self.score)

    def masked_values(self, tensor: Tensor, packed: Tensor) -> Tensor:
        """The elements of the whole of a tensor, of which this is a shard, that are in a packed mask, 1-d."""
        values = local(tensor).detach()
        return collectives.joined(self.group, values[ops.unpack_mask(packed, values.shape)])

    @torch.no_grad()
    def whole(self, tensor: Tensor) -> Tensor:
        """The whole of :attr:`param` or :attr:`score`, a copy."""
        return collectives.joined(self.group, local(tensor).detach().reshape(-1)).view(self.shape)

    def whole_masks(self, masks: Tensor) -> Tensor:
        """The packed masks of the whole tensor, ``uint8`` [T, ceil(n / 8)], of which this process has these parts."""
        tasks, sizes = len(masks), [ops.packed_size(n) for n in self.counts]
        parts = collectives.joined(self.group, masks.reshape(-1)).split([tasks * size for size in sizes])
        parts = tuple(part.view(tasks, size) for part, size in zip(parts, sizes, strict=True))
        whole = masks.new_zeros(tasks, ops.packed_size(prod(self.shape)))
        for row in range(tasks):
            bits = [ops.unpack_mask(part[row], (n,)) for part, n in zip(parts, self.counts, strict=True) if n]
            whole[row] = ops.pack_mask(torch.cat(bits))
        return whole

    def part_of_masks(self, whole: Tensor) -> Tensor:
        """The inverse of :meth:`whole_masks`: this process's part, packed."""
        mine = (ops.unpack_mask(row, self.shape)[self.rows] for row in whole)
        packed = [ops.pack_mask(bits) if bits.numel() else whole.new_zeros(0) for bits in mine]
        size = ops.packed_size(self.counts[self.group.rank()])
        return torch.stack(packed) if packed else whole.new_zeros(0, size)


class CommonState:
    """What all sharded gates of a model have in common.

    Attributes:
        passes: how many forward passes of the WSN have begun.
        row: the row of the finished task that all processes compute with; None for the current scores.
    """

    def __init__(self) -> None:
        self.passes = 0
        self.row: int | None = None
