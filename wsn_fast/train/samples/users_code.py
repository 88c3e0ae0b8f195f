"""Calls code of the user: with random numbers and settings apart from those of training, and with errors that say
whose they are."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from wsn_fast.train.data.files import DataError
from wsn_fast.train.samples.randomness import Randomness

_AUTOCAST = ("cpu", "cuda")


class LoadingError(RuntimeError):
    """The user's code has failed while it made or loaded data. The message says for what; the cause says why."""


@contextmanager
def in_users_code(where: str, randomness: Randomness) -> Iterator[None]:
    """The block calls code of the user, with these random numbers. Settings that it changes are put back, since a
    resumed run, in which it may not be called at the same place, would compute something else.

    Raises:
        LoadingError: the code fails, or ends the program.
        MemoryError, torch.OutOfMemoryError: the memory is too small. The message says for what.
    """
    settings = _Settings.now()
    try:
        with randomness.in_use():
            yield
            if torch.is_inference_mode_enabled() and not settings.inference:  # nothing can end it from outside
                raise RuntimeError("torch.inference_mode() is on while the code waits at a yield; use torch.no_grad()")
    except DataError:
        raise
    except (torch.OutOfMemoryError, MemoryError) as error:
        kind = MemoryError if isinstance(error, MemoryError) else torch.OutOfMemoryError
        raise kind(f"{where}: {error}" if str(error) else f"{where}: the memory is too small") from error
    except SystemExit as error:
        raise LoadingError(
            f"{where}: the code that makes the data has ended the program (SystemExit: {error.code}); what a file does "
            "as a program belongs under `if __name__ == '__main__':`"
        ) from error
    except Exception as error:
        what = f"{type(error).__name__}: {error}"
        raise LoadingError(f"{where}: the code that makes the data has failed: {what}") from error
    finally:
        settings.put_back()


def length(of: Sized, where: str) -> int:
    """The length of an object of the user. ``LoadingError`` if it fails."""
    with in_users_code(where, Randomness(0)):
        return len(of)


def known_length(of: Any, where: str) -> int | None:
    """The length of an object of the user; None if it has none. ``LoadingError`` if it fails."""
    if not isinstance(of, Sized):
        return None
    try:
        return length(of, where)
    except LoadingError as error:
        if isinstance(error.__cause__, TypeError | NotImplementedError):  # PyTorch's classes raise these for no length
            return None
        raise


def prepare(owners: Iterable[Any], seed: int, epoch: int) -> None:
    """Tell objects of the user which epoch begins: call ``set_epoch`` where there is one, and seed generators of
    theirs. An object that comes several times hears it once."""
    for owner in {id(owner): owner for owner in owners}.values():
        if hasattr(owner, "set_epoch"):
            owner.set_epoch(epoch)
        generator = getattr(owner, "generator", None)
        if isinstance(generator, torch.Generator):
            generator.manual_seed(seed)


class _Settings(NamedTuple):
    """What code may change for the whole process.

    Attributes:
        threads: the number of CPU threads.
        dtype: the default dtype.
        device: the default device.
        grad: whether gradients are computed.
        inference: whether PyTorch is in inference mode.
        autocast: whether operations run in fewer bits, for each of ``_AUTOCAST``.
        folder: the working directory; None if it was removed.
    """

    threads: int
    dtype: torch.dtype
    device: torch.device
    grad: bool
    inference: bool
    autocast: tuple[bool, ...]
    folder: str | None

    @classmethod
    def now(cls) -> _Settings:
        return cls(
            torch.get_num_threads(),
            torch.get_default_dtype(),
            torch.get_default_device(),
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            tuple(map(torch.is_autocast_enabled, _AUTOCAST)),
            _working_directory(),
        )

    def put_back(self) -> None:
        torch.set_grad_enabled(self.grad)
        for device, enabled in zip(_AUTOCAST, self.autocast, strict=True):
            torch.set_autocast_enabled(device, enabled)
        if torch.get_num_threads() != self.threads:
            torch.set_num_threads(self.threads)
        if torch.get_default_dtype() != self.dtype:
            torch.set_default_dtype(self.dtype)
        if torch.get_default_device() != self.device:
            # PyTorch without a default device uses the CPU, and is faster than with the CPU as default device.
            torch.set_default_device(None if self.device.type == "cpu" else self.device)
        if self.folder is not None and _working_directory() != self.folder:
            os.chdir(self.folder)


def _working_directory() -> str | None:
    try:
        return os.getcwd()
    except FileNotFoundError:
        return None
