"""Tells the WSN of a model that the model is about to be loaded by itself, so that the WSN can refuse a state that does
not fit its tasks before anything is loaded."""

from __future__ import annotations

import weakref
from typing import Any, Protocol

from torch import nn

_ATTRIBUTE = "_wsn_fast_owner"


class Owner(Protocol):
    """A WSN."""

    def _before_model_load(self, model: nn.Module, state: dict[str, Any], prefix: str, assign: bool) -> None:
        """``model`` is about to be loaded from ``state``, where its names begin with ``prefix``."""


class _Known:
    """The owner of a model, and what removes its hook. A copy knows no owner until :func:`watch` is called."""

    def __init__(self, handle: Any = None) -> None:
        self.handle = handle
        self.owner: weakref.ref[Owner] | None = None

    def __reduce__(self) -> tuple[type[_Known], tuple[Any]]:
        return _Known, (self.handle,)


def watch(model: nn.Module, owner: Owner) -> None:
    """From now on ``owner`` hears of it before ``model`` is loaded. It is not kept alive."""
    known = model.__dict__.get(_ATTRIBUTE)
    if known is None:
        known = model.__dict__[_ATTRIBUTE] = _Known(model.register_load_state_dict_pre_hook(_tell))
    known.owner = weakref.ref(owner)


def forget(model: nn.Module) -> None:
    """Undo :func:`watch`."""
    known = model.__dict__.pop(_ATTRIBUTE, None)
    if known is not None:
        known.handle.remove()


def _tell(model: nn.Module, state: dict[str, Any], prefix: str, metadata: dict[str, Any], *_: Any) -> None:
    known = model.__dict__.get(_ATTRIBUTE)
    owner = None if known is None or known.owner is None else known.owner()
    if owner is not None:
        owner._before_model_load(model, state, prefix, bool(metadata.get("assign_to_params_buffers", False)))
