"""What happens around ``state_dict`` and ``load_state_dict`` of a WSN, or of a module around it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn

from . import loading
from .view import View

if TYPE_CHECKING:
    from .wsn import WSN


def register(wsn: WSN) -> None:
    """Register the hooks. They also run when a parent module is loaded; an override of ``load_state_dict`` would
    not."""
    wsn.register_load_state_dict_pre_hook(_before_load)
    wsn.register_load_state_dict_post_hook(_after_load)
    wsn.register_state_dict_pre_hook(_before_save)


def _before_save(wsn: WSN, prefix: str, keep_vars: bool) -> None:
    if not wsn.__dict__.get("_is_exported", False):
        wsn._check_whole(
            "state_dict()", "wsn_fast.distributed.full_state_dict(wsn) returns the state of the whole model"
        )
    wsn._restore_frozen()


@contextmanager
def strictness(wsn: nn.Module, strict: bool) -> Iterator[None]:
    """Tell the hooks whether the load inside the block is strict. Torch tells them that every load is."""
    wsn.__dict__["_strict"] = strict
    try:
        yield
    finally:
        del wsn.__dict__["_strict"]


def _before_load(wsn: WSN, state: dict[str, Any], prefix: str, metadata: dict[str, Any], *_: Any) -> None:
    strict = wsn.__dict__.get("_strict", False)
    assign = bool(metadata.get("assign_to_params_buffers", False))
    if not wsn.__dict__.get("_is_exported", False):
        wsn._check_whole(
            "load_state_dict()", "wsn_fast.distributed.load_full_state_dict(wsn, state) loads a whole state"
        )
    wsn._restore_frozen()
    loading.check(wsn, state, prefix, strict, assign)
    wsn.__dict__["_checked"] = True
    wsn._guards.kept.expect_others()
    wsn.__dict__["_ties"] = loading.ties(wsn) if assign else []


def _after_load(wsn: WSN, incompatible_keys: Any) -> None:
    """Bring the model to where the checkpoint was."""
    for tie in wsn.__dict__.pop("_ties", []):
        tie.tie()
    wsn._refresh()
    wsn._parts.finish(wsn.tasks, anew=True)
    wsn._register.trust_frozen(wsn._parts)
    wsn._guards.keep_for_task(wsn)
    wsn._generation += 1
    known = [set(module.tasks) for module in wsn._parts.heads.values()]
    tasks = (task for task in (wsn.current_task, wsn._view.head, *reversed(wsn.tasks)) if task is not None)
    wsn._show(View(None, next((task for task in tasks if all(task in of for of in known)), None)))


def before_model_load(wsn: WSN, model: nn.Module, state: dict[str, Any], prefix: str, assign: bool) -> None:
    """The model of ``wsn`` is about to be loaded, by itself or with the WSN. Refuse a state that would change what
    finished tasks use, or which tasks the layers have.

    Raises:
        StateError: it would. Nothing has been loaded.
    """
    if wsn.__dict__.pop("_checked", False) or (not wsn.tasks and wsn.current_task is None):
        return
    path = next((f"{name}." for name, module in wsn.named_modules() if module is model), None)
    if path is None:  # the WSN has another model now
        return
    wsn._restore_frozen()
    given = {f"{path}{name[len(prefix) :]}": value for name, value in state.items() if name.startswith(prefix)}
    try:
        loading.check(wsn, given, "", False, assign)
    except loading.StateError as error:
        raise loading.StateError(
            f"{error}\nThis is the model of a WSN with the tasks {wsn.tasks}. Load the state of a WSN with "
            "wsn.load_state_dict(state), or load the state of a model before WSN(model)"
        ) from error
    wsn._generation += 1
    wsn._show(View(None, wsn.current_task if wsn._view.task is not None else wsn._view.head))
