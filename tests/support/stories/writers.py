"""Moves in which somebody writes to a tensor of the model past the library; and optimizers that nobody guarded."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import foreign_optimizers as foreign
import torch
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule
from small_models import batches, train
from torch import Tensor

from wsn_fast import WSN

from .models import OPTIMIZERS
from .story import FINDERS, Story, X


def changed(tensor: Tensor, elements: st.DataObject | None) -> Tensor:
    """Other values of the same dtype: all of them, or one element by its last bit."""
    flat = tensor.detach().clone().reshape(-1)
    if elements is None:
        return (flat * 0.5 + 0.25 if flat.is_floating_point() else ~flat).view(tensor.shape)
    bits = flat.view({1: torch.uint8, 4: torch.int32, 8: torch.int64}[flat.element_size()])
    bits[elements.draw(st.integers(0, len(bits) - 1), "element")] ^= 1
    return flat.view(tensor.shape)


def in_place(wsn: WSN, tensor: Tensor, other: Tensor) -> None:
    with torch.no_grad():
        tensor.copy_(other)


def through_data(wsn: WSN, tensor: Tensor, other: Tensor) -> None:
    tensor.data.copy_(other)


def through_numpy(wsn: WSN, tensor: Tensor, other: Tensor) -> None:
    tensor.detach().numpy()[...] = other.numpy()


def with_other_data(wsn: WSN, tensor: Tensor, other: Tensor) -> None:
    tensor.data = other


def in_a_forward_hook(wsn: WSN, tensor: Tensor, other: Tensor) -> None:
    """As a finished task, or as the present one if there is a head for it."""
    hook = wsn.model.register_forward_hook(lambda *_: in_place(wsn, tensor, other))
    try:
        with torch.no_grad():
            wsn.eval()(X)
    except RuntimeError as error:
        assert "no task is active" in str(error)
        in_place(wsn, tensor, other)
    finally:
        hook.remove()


def in_a_step_hook(wsn: WSN, tensor: Tensor, other: Tensor) -> None:
    """The hook of an optimizer that is not guarded, and that has none of these parameters."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])
    optimizer.register_step_post_hook(lambda *_: in_place(wsn, tensor, other))
    optimizer.step()


WAYS: dict[str, Callable[[WSN, Tensor, Tensor], None]] = {
    "in place": in_place,
    "through .data": through_data,
    "through numpy": through_numpy,
    "with other data": with_other_data,
    "in a forward hook": in_a_forward_hook,
    "in a step hook": in_a_step_hook,
}
UNGUARDED: dict[str, Callable[[WSN], Any]] = {
    "adamw": lambda wsn: torch.optim.AdamW(wsn.parameters(), 0.01, weight_decay=0.1),
    "sgd": lambda wsn: torch.optim.SGD(wsn.parameters(), 0.05, weight_decay=0.1),
    "Muon-like": lambda wsn: foreign.MuonLike(wsn.parameters()),
    "a copy of a guarded one": lambda wsn: copy.copy(OPTIMIZERS["Muon-like"](wsn)),
    "a wrapper around a guarded one": lambda wsn: foreign.Lookahead(OPTIMIZERS["adamw"](wsn)),
}


class Writers(Story):
    """What the library cannot prevent is undone, or found before the next mask is taken."""

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of the model by name, scores and unions included."""
        named = (*self.wsn.model.named_parameters(), *self.wsn.model.named_buffers())
        return {name: tensor for name, tensor in named if tensor.numel()}

    @precondition(lambda self: self.known)
    @rule(
        data=st.data(), way=st.sampled_from(list(WAYS)), one=st.booleans(), finder=st.sampled_from(FINDERS),
        fresh=st.booleans(), kind=st.sampled_from([None, *OPTIMIZERS]),
    )  # fmt: skip
    def somebody_writes(
        self, data: st.DataObject, way: str, one: bool, finder: str, fresh: bool, kind: str | None
    ) -> None:
        if kind is not None:
            self.in_a_task()
            self.train_some(1, kind, another=True)  # it may have left copies of frozen values
        used = data.draw(st.sampled_from([None, *self.known]), "in use")
        good = self.good()
        self.wsn.use_task(used)
        kinds: dict[str, list[str]] = {}
        for name in self.tensors():
            kinds.setdefault("head" if ".heads." in name else name.rpartition("_")[2], []).append(name)
        kind_of_tensor = data.draw(st.sampled_from(list(kinds)), "kind of tensor")
        name = data.draw(st.sampled_from(kinds[kind_of_tensor]), "tensor")
        tensor = self.tensors()[name]
        WAYS[way](self.wsn, tensor, changed(tensor, data if one else None))
        if finder != "verify":
            self.wsn.use_task(None)
        looked_at = not name.endswith(("_masks", "_view"))
        self.must_be_found(good, [self.shown(name)], finder, fresh, looked_at, used)

    @rule(kind=st.sampled_from(list(UNGUARDED)), finder=st.sampled_from(FINDERS), fresh=st.booleans())
    def nobody_guards(self, kind: str, finder: str, fresh: bool) -> None:
        self.in_a_task()
        good = self.good()
        self.wsn.use_task(None)
        optimizer = UNGUARDED[kind](self.wsn)
        train(self.wsn, optimizer, batches(self.steps, 2))
        self.optimizer = None
        self.must_be_found(good, [self.shown(name) for name in self.tensors()], finder, fresh)
