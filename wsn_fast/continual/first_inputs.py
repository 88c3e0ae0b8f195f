"""The probe of a training loop that is not ours: what the model was called with first."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .probe import UnmaskedReadError, copied

if TYPE_CHECKING:
    from .wsn import WSN


class FirstInputs:
    """Copies the inputs of the first call of ``wsn`` from now on. :meth:`end_task` uses them as the probe.

    Code that ``torch.compile`` has compiled together with the call is not seen.
    """

    def __init__(self, wsn: WSN) -> None:
        self._wsn = wsn
        self._inputs: tuple[Any, Any] | None = None
        self._handle = wsn.register_forward_pre_hook(self._see, with_kwargs=True)

    def _see(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if not torch.compiler.is_compiling():
            self.stop()
            self._inputs = copied(args), copied(kwargs)

    def stop(self) -> None:
        """Look at no more calls."""
        self._handle.remove()

    def end_task(self) -> None:
        """End the task in progress, and check that it reads nothing outside of its mask (:meth:`wsn_fast.WSN.verify`).

        If the model was not called, or cannot compute the inputs here, a warning says that this was not checked. A WSN
        that is sharded checks each forward pass by itself.

        Raises:
            UnmaskedReadError: the task reads something; it is still in progress.
            RuntimeError, FloatingPointError, ForgottenError: as ``end_task`` of :class:`wsn_fast.WSN`.
        """
        self.stop()
        if self._wsn.gates.sharding is not None:
            return self._wsn.end_task()
        reason = "the WSN was not called"
        if self._inputs is not None:
            args, kwargs = self._inputs
            try:
                return self._wsn.end_task(probe=lambda task: self._wsn(*copied(args), **copied(kwargs)))
            except UnmaskedReadError:
                raise
            except Exception as error:
                reason = f"{type(error).__name__}: {error}"
        self._wsn.end_task()  # if it was the end of the task that failed, it fails again
        warnings.warn(
            f"task {self._wsn.tasks[-1]!r}: whether code reads weights outside of the mask was not checked ({reason}); "
            "wsn.verify(probe=batch) checks it",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
