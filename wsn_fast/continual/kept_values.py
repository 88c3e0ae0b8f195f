"""The copies of frozen values that guards take. They belong to the WSN and not to an optimizer, so they are still there
when the optimizer is gone."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch.autograd.graph import increment_version

from .. import ops
from ..nn.shards import local
from .frozen_values import Frozen, together
from .saved_values import SavedValues


class _Copy:
    """The values that a parameter must have where it is frozen.

    Attributes:
        frozen: the parameter, and where it is frozen.
        values: a copy of it, of the same shape.
        version: the version of the parameter when these values were last put back; -1 if they were not yet.
        outdated: whether other values have been loaded since.
    """

    __slots__ = ("frozen", "outdated", "values", "version")  # read at every step

    def __init__(self, frozen: Frozen) -> None:
        self.frozen, self.values = frozen, local(frozen.tensor).detach().clone()
        self.version, self.outdated = -1, False

    def put_back(self) -> None:
        """Write the frozen values into the parameter.

        If autograd knows of no other write since the last time, it does not hear of this one either: what was computed
        meanwhile used the right values, unless somebody wrote through ``.data``, and may still need its backward pass.
        """
        tensor, union = self.frozen
        torch.clear_autocast_cache()  # it keeps casts of the values that were there
        heard = self.version != tensor._version
        target = local(tensor)
        if target is not tensor and heard:
            increment_version(tensor)
        elif target is tensor and not heard:
            target = tensor.data
        if union is None:
            target.copy_(self.values)
        else:
            ops.restore_frozen_(target, self.values, union)
        self.version = tensor._version

    def follow(self) -> bool:
        """Move and cast the copy if that happened to the parameter since. Returns False if the parameter was given data
        of another shape: then nothing can be put back, and the checksum at the end of the task decides."""
        (held, union), values = self.frozen, self.values
        tensor = local(held)
        if tensor.shape != values.shape:
            return False
        if tensor.dtype is not values.dtype or tensor.device != values.device:
            self.values = values.to(tensor.device, tensor.dtype)
            self.frozen = Frozen(held, None if union is None else union.to(tensor.device))
        return True


class KeptValues:
    """The copies by parameter: those of one step, and those that stay until the task ends.

    Frozen values do not change while a task is trained. So a copy that was taken in this task is right, whatever has
    happened to the parameter since.

    Attributes:
        ran: whether a guarded step has begun since the task did.
    """

    def __init__(self) -> None:
        self.ran = False
        self._copies: dict[int, _Copy] = {}  # for the task
        self._step = SavedValues()
        self._step_versions: list[int] = []  # those of the saved tensors when they were last put back
        self._stepped = False
        self._paused = False

    def __bool__(self) -> bool:
        return bool(self._copies) or self._step.are_saved

    def keep(self, frozen: Iterable[Frozen], for_task: bool) -> None:
        """Copy the values of those of ``frozen`` that have no copy yet.

        Args:
            frozen: parameters, and where they are frozen.
            for_task: keep the copies until the task ends (:meth:`forget`), and not only until :meth:`end_step`.
        """
        self._stepped = True
        copies, new = self._copies, []
        for one in together(frozen):
            known = copies.get(id(one.tensor))  # a copy holds its tensor, so no other one has this id
            if known is None or not known.follow():
                new.append(one)
                continue
            if known.outdated:
                known.values.copy_(local(one.tensor).detach())  # in place, because a CUDA graph may read it
                known.outdated = False
            known.frozen = one
        if for_task:
            copies.update((id(one.tensor), _Copy(one)) for one in new)
        elif new or self._step.are_saved:
            self._step.restore()  # an earlier step may not have ended
            self._step.save(new)

    @torch.no_grad()
    def end_step(self, params: Collection[int]) -> None:
        """Put the values back, of the parameters with these ids, and drop the copies that are only for a step."""
        for key, copy in self._copies.items():
            if key in params and not copy.outdated:
                copy.put_back()
        if self._step.are_saved:
            self._step.restore()
            self._step.forget()
        self._stepped = True  # what runs after the hooks may write again

    @torch.no_grad()
    def restore(self) -> None:
        """Put all values back. The copies stay, because a step may be running."""
        if self._paused:
            return
        for copy in self._copies.values():
            if not copy.outdated and copy.follow():
                copy.put_back()
        self._step.restore()
        self._step_versions = self._step.versions()
        self._stepped = False

    @torch.no_grad()
    def settle(self) -> None:
        """Put back what may have changed since the last call: everything after a step, and otherwise the parameters of
        which autograd knows that they were written to. So several forward passes may share one backward pass."""
        if self._paused:
            return
        for copy in self._copies.values():
            written = self._stepped or copy.version != copy.frozen.tensor._version
            if written and not copy.outdated and copy.follow():
                copy.put_back()
        if self._step.are_saved and (self._stepped or self._step_versions != self._step.versions()):
            self._step.restore()
            self._step_versions = self._step.versions()
        self._stepped = False

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Nothing is put back until the context is left. Either more is frozen meanwhile, of which the copies have
        values from before the task, or other values are in the tensors for a while."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def expect_others(self) -> None:
        """Other values are about to be loaded. Copies are not put back until :meth:`keep` has taken the new values."""
        self._step.forget()
        for copy in self._copies.values():
            copy.outdated = True

    def forget(self) -> None:
        """Drop all copies, because the task has ended."""
        self._copies = {}
        self._step.forget()
