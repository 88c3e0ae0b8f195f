"""The oldest versions that the library works with. An installation can ignore what ``pyproject.toml`` asks for."""

from __future__ import annotations

import platform
import re
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from types import MappingProxyType

OLDEST_PYTHON = (3, 10)
OLDEST: Mapping[str, tuple[int, int]] = MappingProxyType({"torch": (2, 11), "numpy": (2, 0)})


def check() -> None:
    """Raise ``ImportError`` if Python or a package is too old. Imports none of them."""
    if sys.version_info < OLDEST_PYTHON:
        raise ImportError(_sentence("Python", OLDEST_PYTHON, platform.python_version()))
    for name, oldest in OLDEST.items():
        try:
            installed = version(name)
        except PackageNotFoundError:  # its own import says so, or finds a copy that was not installed
            continue
        numbers = re.match(r"(\d+)\.(\d+)", installed)
        if numbers and (int(numbers[1]), int(numbers[2])) < oldest:
            advice = f": pip install --upgrade {name}"
            raise ImportError(_sentence(name, oldest, installed) + advice, name=name)


def _sentence(name: str, oldest: tuple[int, int], installed: str) -> str:
    return f"wsn_fast needs {name} {oldest[0]}.{oldest[1]} or newer, and this is {name} {installed}"
