"""The folder for what was found out about this machine: measured tables, and checks that were passed.

Everything in it can be made again, so nothing here raises an error. A folder that cannot be read holds nothing, and a
file that cannot be written is a reason.
"""

from __future__ import annotations

import contextlib
import os
import uuid
from pathlib import Path

import platformdirs

ENVIRONMENT_VARIABLE = "WSN_FAST_CACHE"
"""Names another folder than the user's own. It is read at each call of :func:`folder`."""


def folder() -> Path:
    """The folder, which may not exist. The path is relative only if nothing tells where the user's home is."""
    named = os.environ.get(ENVIRONMENT_VARIABLE)
    if named:
        return Path(os.path.abspath(os.path.expanduser(named)))
    return Path(platformdirs.user_cache_dir("wsn_fast", appauthor=False))


def write_text(path: Path, text: str) -> str:
    """Write a file, and its folder if that is missing. A reader sees the whole old file or the whole new one.

    Returns:
        The reason why the file was not written; empty if it was.
    """
    if not path.is_absolute():
        return f"{path} is not an absolute path, because the home folder is unknown"
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")  # other processes may write the same file
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, "utf-8")
        os.replace(temporary, path)
    except OSError as error:
        return f"{path} cannot be written: {error.strerror or error}"
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    return ""
