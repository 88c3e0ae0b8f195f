"""The processes of a run under torchrun: what they do together, and what the first of them does alone.

The first process has the folder, its lock and the console. The others hear from it what it found there, or that it
failed. Whatever fails, one process says so, and all of them end.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from wsn_fast import launch
from wsn_fast.backends import collectives, meeting
from wsn_fast.continual.parallel import OtherFailedError
from wsn_fast.train.data.files import DataError
from wsn_fast.train.samples import Share
from wsn_fast.train.samples.users_code import LoadingError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup, Store  # type: ignore[attr-defined]

_Value = TypeVar("_Value")
_SPOKEN = "a process has reported an error"


class StoppedError(Exception):
    """Another process of the run has failed. It has reported the error, so this one ends without words."""


class PeerLostError(RuntimeError):
    """Another process of the run has ended, or does not answer."""


class Terminated(BaseException):
    """SIGTERM: torchrun ends all processes in this way when one of them has failed."""


class Processes:
    """The processes of a run, as one of them sees them. :func:`join` makes it.

    Args:
        rank: the number of this process, from 0.
        size: how many there are.
        group: their process group; None if there is only one.
        store: what they share beside the group; None if there is only one.
    """

    def __init__(
        self, rank: int = 0, size: int = 1, group: ProcessGroup | None = None, store: Store | None = None
    ) -> None:
        self.rank, self.size, self.group, self._store = rank, size, group, store

    @property
    def is_first(self) -> bool:
        """Whether this is the process that has the folder and the console."""
        return self.rank == 0

    @property
    def share(self) -> Share:
        """What this process trains and measures."""
        return Share(self.rank, self.size)

    def first(self, do: Callable[[], _Value]) -> _Value:
        """What ``do()`` returns in the first process. No other one calls it.

        Raises:
            StoppedError: ``do()`` failed there. In the first process its own error comes up.
        """
        if self.size == 1:
            return do()
        said: list[Any] = [False, None]
        if self.is_first:
            try:
                said = [True, do()]
            except Exception:
                torch.distributed.broadcast_object_list(said, 0, self.group)
                raise
        torch.distributed.broadcast_object_list(said, 0, self.group)
        if not said[0]:
            raise StoppedError
        value: _Value = said[1]
        return value

    @contextmanager
    def together(self) -> Iterator[None]:
        """If the block fails in any process, it fails in all: the first one that failed has its own error, and the
        others have ``StoppedError``. The processes must not wait for each other inside of the block, unless all of them
        leave it by an error then."""
        failed: Exception | None = None
        try:
            yield
        except Exception as error:
            if self.size == 1 or is_lost(error):
                raise
            failed = error
        if self.size == 1:
            return
        every = torch.zeros(self.size, dtype=torch.int64)
        every[self.rank] = failed is not None and not isinstance(failed, OtherFailedError)
        self.sum(every)
        if every.any():
            if failed is not None and every[self.rank] and not every[: self.rank].any():
                raise failed
            raise StoppedError from failed
        if failed is not None:  # whoever has told of its failure has recovered from it
            raise failed

    def agree(self, fingerprint: str) -> None:
        """Raise ``DataError`` in all processes if they do not have data of the same fingerprint."""
        if len({*collectives.texts_of(self.group, fingerprint)}) > 1:
            raise DataError(
                "data: the processes do not have the same data: their files differ, or the code that makes the tasks "
                "draws what the seed does not decide"
            )

    def sum(self, tensor: Tensor) -> None:
        """In place, ``tensor`` becomes the sum of those of all processes."""
        collectives.sum_over(self.group, tensor)

    def speaks(self) -> bool:
        """Whether this process is the first one that asks, so that one of several reports an error."""
        if self._store is None:
            return True
        try:
            return self._store.add(_SPOKEN, 1) == 1
        except RuntimeError:  # the store has gone with the process that held it
            return True

    def give_up(self) -> None:
        """This process has failed and is on its way out. SIGTERM, by which torchrun hurries it, would only disturb what
        it still has to say."""
        if self.group is not None:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def leave(self) -> None:
        """End the process group, when all has gone well."""
        if self.group is not None:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            torch.distributed.destroy_process_group()


ALONE = Processes()
"""A run of one process."""


def join() -> Processes:
    """Meet the processes that torchrun has started; :data:`ALONE` if it has started only this one or none.

    Raises:
        PeerLostError: they do not find each other.
        ValueError: one of torchrun's environment variables is missing or no number.
    """
    if launch.world_size() == 1:
        return ALONE
    try:
        met = meeting.meet()
    except RuntimeError as error:
        raise PeerLostError(f"the {launch.world_size()} processes of this run have not met: {error}") from error
    signal.signal(signal.SIGTERM, _terminate)
    return Processes(met.rank, met.size, met.group, met.store)


def is_lost(error: BaseException) -> bool:
    """Whether an error says that another process has ended or does not answer."""
    known = isinstance(error, PeerLostError | Terminated | torch.distributed.DistError)
    # An error in the code of the user may say anything.
    of_gloo = isinstance(error, RuntimeError) and not isinstance(error, LoadingError) and "gloo" in str(error)
    return known or of_gloo


def _terminate(number: int, frame: object) -> None:
    if sys.exc_info()[0] is None:  # else it is failing already
        raise Terminated
