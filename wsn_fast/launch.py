"""What torchrun tells each process that it starts. This file imports no PyTorch, so that the command line knows early
which process may print."""

from __future__ import annotations

import contextlib
import io
import os
import time
from collections.abc import Iterator

_TO_SPEAK = 10.0  # seconds for the first process to say what is wrong; torchrun ends the others when it has


def world_size() -> int:
    """The number of processes of the run; 1 unless something like torchrun has set ``WORLD_SIZE``.

    Raises:
        ValueError: the variable is no such number. The other functions raise the same for theirs.
    """
    return _number("WORLD_SIZE", 1, 1)


def rank() -> int:
    """The number of this process, from 0; 0 if it is alone."""
    size = world_size()
    return _number("RANK", 0, most=size - 1) if size > 1 else 0


def local_rank() -> int:
    """The number of this process on its machine, from 0; 0 if it is alone."""
    return _number("LOCAL_RANK", 0) if world_size() > 1 else 0


def is_first() -> bool:
    """Whether this process prints what all of them would. One that cannot tell its number does."""
    try:
        return rank() == 0
    except ValueError:
        return True


@contextlib.contextmanager
def said_once() -> Iterator[None]:
    """What is printed in the block is printed by the first process alone. If the block exits with an error, the others
    wait for the first one, because torchrun ends all processes as soon as one has failed."""
    if is_first():
        yield
        return
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    except SystemExit as ended:
        if ended.code:
            time.sleep(_TO_SPEAK)
        raise


def _number(name: str, least: int, otherwise: int | None = None, most: int = 2**31) -> int:
    text = os.environ.get(name, otherwise)
    try:
        value = int(text)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        value = least - 1
    if not least <= value <= most:
        raise ValueError(
            f"{name}: expected an integer from {least} to {most} in this environment variable, got {text!r}; torchrun "
            "sets it"
        )
    return value
