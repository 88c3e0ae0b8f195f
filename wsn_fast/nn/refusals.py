"""What tools of PyTorch must not do with a WSN and its layers, and the way out: :func:`wsn_fast.to_dense`.

A subnet layer computes with ``W*m``. Tools that read or replace the weights of layers, or that record a program while a
task is in training, would give a program that computes something else, or an error that does not say what to do. Each
check stands where such a tool calls: scripting calls ``__prepare_scriptable__``, quantization sets ``qconfig``, pruning
and fusing register parameters, and recorders call the forward pass.
"""

from __future__ import annotations

import sys
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from .. import ops
from ..backends import is_exporting, recording, tracing
from ..ops.same_bits import same_bits

WAY_OUT = "Take a plain copy of a finished task, to_dense(wsn, task)"


def check_not_recorded() -> None:
    """Check that no program is recorded of a forward pass with the mask of the current scores.

    The threshold of the scores is found outside of PyTorch's operations, so the program would keep that of now.

    Raises:
        RuntimeError: one is: ``torch.export``, an ONNX exporter, ``torch.jit.trace`` or ``make_fx`` is running.
    """
    if is_exporting() or (not is_compiling() and recording() and (tracing() or _has_proxies())):
        raise RuntimeError(
            "no finished task is in use, so a program that is exported or traced now would have the mask of the scores "
            f"of this moment, which training changes. {WAY_OUT}, and export that; or export inside of "
            "`with wsn.use_task(task):`"
        )


def _has_proxies() -> bool:
    """Whether ``make_fx`` records. A FLOP counter, for instance, sees the operations too and keeps no program."""
    module = sys.modules.get("torch.fx.experimental.proxy_tensor")  # whoever records with it has imported it
    return module is not None and module.get_proxy_mode() is not None


def device_kind(x: Tensor) -> str:
    """The type of the device of an input. Raises ``RuntimeError`` if ``x`` stands for an input that
    ``torch.fx.symbolic_trace`` does not know yet."""
    kind = x.device.type
    if type(kind) is not str:
        _refuse_symbols()
    return kind


def check_no_symbol(x: object) -> None:
    """Raise ``RuntimeError`` if ``x`` stands for an input that ``torch.fx.symbolic_trace`` does not know yet."""
    if type(getattr(getattr(x, "device", None), "type", "")) is not str:
        _refuse_symbols()


def check_arguments(args: object) -> None:
    """Check that the ``*args`` of a module are arguments. ``torch.fx.symbolic_trace`` gives a symbol in their place.

    Raises:
        RuntimeError: it does.
    """
    if type(args) is not tuple:
        _refuse_symbols()


def _refuse_symbols() -> NoReturn:
    raise RuntimeError(
        "torch.fx.symbolic_trace, and what is built on it (quantize_fx, torch.fx.experimental.optimization), cannot "
        "follow a subnet layer, which looks at the dtype and device of its input. "
        f"{WAY_OUT}, and trace that; or use torch.export inside of `with wsn.use_task(task):`"
    )


class StaysInTheLibrary:
    """A base of modules that the quantization and the scripting of PyTorch cannot change into modules of their own."""

    def _get_qconfig(self) -> NoReturn:
        raise AttributeError("qconfig")  # as for any module without one

    def _refuse_qconfig(self, value: object) -> NoReturn:
        raise RuntimeError(
            f"quantization knows layers by their exact class and would leave out {type(self).__name__}, or quantize "
            f"heads alone. {WAY_OUT}, and quantize that"
        )

    qconfig = property(_get_qconfig, _refuse_qconfig)
    """Eager quantization sets this attribute on every module before it changes any."""

    def __prepare_scriptable__(self) -> NoReturn:
        raise RuntimeError(
            f"torch.jit.script cannot compile {type(self).__name__}. {WAY_OUT}, and script that; or use "
            "torch.jit.trace or torch.export inside of `with wsn.use_task(task):`"
        )


class KeepsItsWeights(StaysInTheLibrary, nn.Module):
    """The base of subnet layers. Nothing replaces what finished tasks use, or puts another tensor in front of it."""

    GATED: ClassVar[tuple[str, ...]]
    TENSORS: ClassVar[tuple[str, ...]]

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Register a parameter as ``nn.Module`` does; ``layer.weight = ...`` comes here, too.

        Raises:
            RuntimeError: a reparametrization puts another tensor in the place of a weight (``weight_orig`` of a pruned
                weight, for instance); a bias is added to a layer without one; or the new values differ where finished
                tasks use the old ones. The layer stays what it was.
        """
        if param is not None and "gate_state" in self.__dict__ and "_loads" not in self.__dict__:
            self._check_parameter(name, param)
        super().register_parameter(name, param)

    def _check_parameter(self, name: str, param: nn.Parameter) -> None:
        kind = type(self).__name__
        for gated in self.GATED:
            if not name.startswith(f"{gated}_") or name in self.TENSORS:
                continue
            if param.shape == getattr(self, f"{gated}_score").shape:  # else a part, as the g of weight_norm
                self._put_back(gated, param)
                raise RuntimeError(
                    f"a {kind} cannot have a parameter {name!r}: pruning and other reparametrizations of its {gated} "
                    f"would change what finished tasks compute. {WAY_OUT}, and apply them to that"
                )
        if name not in self.GATED:
            return
        old, masks = self._parameters.get(name), self._buffers.get(f"{name}_masks")
        if masks is None:
            raise RuntimeError(
                f"this {kind} has no {name}, hence no scores for one, and cannot get one. If a tool such as "
                f"fuse_conv_bn_eval adds it: {WAY_OUT[0].lower()}{WAY_OUT[1:]}, and use the tool on that"
            )
        if len(masks) and old is not None and not _same_within(old, param, masks):
            raise RuntimeError(
                f"the new {name} of this {kind} differs from the old one where finished tasks use it. If a tool such "
                f"as fuse_conv_bn_eval or a quantizer replaces it: {WAY_OUT[0].lower()}{WAY_OUT[1:]}, and use the tool "
                "on that. To load values, use load_state_dict"
            )

    def _put_back(self, gated: str, value: Tensor) -> None:
        """Put a gated tensor back that a reparametrization has removed, and remove what it has added."""
        parameters = self._parameters
        kept = parameters.get(gated, value if isinstance(value, nn.Parameter) else nn.Parameter(value.detach()))
        for name in [n for n in parameters if n.startswith(f"{gated}_") and n not in self.TENSORS]:
            del parameters[name]
        parameters[gated] = kept
        scores = [f"{name}_score" for name in self.GATED]
        for name in [n for n in (*self.GATED, *scores) if n in parameters]:  # optimizers count on the order
            parameters[name] = parameters.pop(name)

    def _load_from_state_dict(self, *args: Any) -> None:
        self.__dict__["_loads"] = True  # with assign=True the parameters come before the masks that they belong to
        try:
            super()._load_from_state_dict(*args)
        finally:
            del self.__dict__["_loads"]


@torch.no_grad()
def _same_within(old: Tensor, new: Tensor, masks: Tensor) -> bool:
    """Whether two weights have the same bits where any of the packed ``masks`` [T, bytes] is set."""
    if old is new or old.is_meta or new.is_meta:
        return True
    if old.shape != new.shape or old.dtype != new.dtype or type(old.data) is not type(new.data):
        return False
    union = ops.unpack_mask(ops.union_packed(masks), old.shape)
    values = (one.detach().masked_fill(~union.to(one.device), 0).to(old.device) for one in (old, new))
    return same_bits(*values)
