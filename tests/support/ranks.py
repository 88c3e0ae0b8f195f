"""The driver in several processes, started and watched as torchrun does it: with its environment variables, a store
that outlives them, and SIGTERM for all others when one has failed. They are forked from a process that has imported
PyTorch, which takes each of them seconds otherwise."""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from torch.distributed import TCPStore

WAIT = 120  # seconds for all of them to end
POLL = 0.01
PRELOADED = ["torch._dynamo", "torch.distributed.fsdp", "wsn_fast.distributed", "wsn_fast.train.commands"]


@dataclass
class Ended:
    """How the processes ended: their exit codes, and what they wrote.

    Attributes:
        codes: by rank; those of signals are negative.
        said, errors: what each wrote to stdout and stderr.
    """

    codes: list[int]
    said: list[str]
    errors: list[str]

    @property
    def lines(self) -> list[str]:
        """The lines of all errors."""
        return [line for text in self.errors for line in text.splitlines()]


def drive(
    folder: Path,
    world: int,
    *arguments: object,
    prepare: str = "",
    using: Sequence[Any] = (),
    one_kills_all: bool = False,
    program: str = "wsn_fast.train.command_line",
) -> Ended:
    """Run ``wsn-fast``, or another ``program``, with the same arguments in ``world`` processes, until all have ended.

    Args:
        folder: an existing folder for what they write.
        world: how many.
        arguments: of the command.
        prepare: "module:function" that each process calls first, with its rank and ``using``.
        program: the package whose command runs.
        one_kills_all: whether the others get SIGKILL in place of SIGTERM, as if the machine had failed.
    """
    multiprocessing.set_forkserver_preload(PRELOADED)
    context = multiprocessing.get_context("forkserver")
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=WAIT))
    words = [str(word) for word in arguments]
    targets = [(rank, world, store.port, str(folder), program, words, prepare, tuple(using)) for rank in range(world)]
    ranks = [context.Process(target=_work, args=arguments) for arguments in targets]
    for rank, one in enumerate(ranks):
        for kind in ("out", "err"):
            (folder / f"{kind}.{rank}").write_text("")  # it may be ended before it does this itself
        one.start()
    end, failed = time.monotonic() + WAIT, False
    while any(one.is_alive() for one in ranks):
        if not failed and any(one.exitcode for one in ranks):
            failed = True
            for one in ranks:
                one.kill() if one_kills_all else one.terminate()
        if time.monotonic() > end:
            for one in ranks:
                one.kill()
            raise TimeoutError(f"processes have not ended: {[one.exitcode for one in ranks]}, {_texts(folder, world)}")
        time.sleep(POLL)
    return Ended([one.exitcode for one in ranks], *_texts(folder, world))  # type: ignore[misc]


def _texts(folder: Path, world: int) -> tuple[list[str], list[str]]:
    every = [[(folder / f"{kind}.{rank}").read_text() for rank in range(world)] for kind in ("out", "err")]
    return every[0], every[1]


def _work(
    rank: int, world: int, port: int, folder: str, program: str, words: list[str], prepare: str, using: tuple[Any, ...]
) -> None:
    for number, kind in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{folder}/{kind}.{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", 1, closefd=False) for number in (1, 2))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if world > 1:
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        names |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": 0}
        os.environ.update({name: str(value) for name, value in names.items()})
    main = importlib.import_module(program).main
    if prepare:
        module, _, name = prepare.partition(":")
        getattr(importlib.import_module(module), name)(rank, *using)
    code = main(words)
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    sys.exit(code)
