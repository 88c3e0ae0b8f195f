"""Messages as they may be published: without folders, and without the names of a user and a machine."""

from __future__ import annotations

import functools
import getpass
import os
import platform
import re
import sys
import tempfile
from pathlib import Path

LONGEST = 600
_PATHS = re.compile(r"(?:\b[A-Za-z]:)?(?:[/\\][\w.+@~-]+)+[/\\](?=[\w.+-])")
_ORDINARY = frozenset({"root", "user", "admin", "localhost"})


def scrubbed(text: object) -> str:
    """The text with paths down to file names, without the user's and the machine's name, and not endless."""
    said = str(text)
    for folder in _folders():
        said = said.replace(folder, os.sep)
    said = _PATHS.sub("", said)
    for name in _names():
        said = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", "(name)", said)
    return said.strip()[:LONGEST]


@functools.cache
def _folders() -> tuple[str, ...]:
    """Folders whose names may hold spaces, the longest first, each with its separator."""
    known = {Path.home().as_posix() if os.environ.get("HOME") else "", os.getcwd(), sys.prefix, tempfile.gettempdir()}
    known |= {str(Path(__file__).parents[3])}
    return tuple(sorted((folder + os.sep for folder in known if len(folder) > 1), key=len, reverse=True))


@functools.cache
def _names() -> tuple[str, ...]:
    """The names of the user and of the machine, but for those that anybody may have."""
    try:
        user = getpass.getuser()
    except (OSError, KeyError, ImportError):
        user = ""
    host = platform.node()
    names = {user, Path(os.path.expanduser("~")).name, host, host.partition(".")[0]}
    return tuple(sorted((name for name in names if len(name) > 2 and name.lower() not in _ORDINARY), key=len)[::-1])
