"""Workers of a device report that do not survive a row. They are here since a new process has to import them."""

from __future__ import annotations

import os
import sys
import time
from multiprocessing.connection import Connection
from types import SimpleNamespace

FAULT = 3  # the exit status of a worker whose GPU does not answer any more


def send_rows(first: int, parent: Connection, end: int = 3) -> None:
    parent.send({})
    for _ in range(first, end):
        parent.send(SimpleNamespace(section="s", status="ok"))


def dies_in_row_1(first: int, parent: Connection) -> None:
    if first < 2:
        send_rows(first, parent, 1)
        os.abort()
    send_rows(first, parent)


def hangs_in_row_1(first: int, parent: Connection) -> None:
    if first < 2:
        send_rows(first, parent, 1)
        time.sleep(600)
    send_rows(first, parent)


def dies_after_row_1(first: int, parent: Connection) -> None:
    if first < 2:
        send_rows(first, parent, 2)
        sys.exit(FAULT)
    send_rows(first, parent)


def ends_at_once(first: int, parent: Connection) -> None:
    sys.exit(7)
