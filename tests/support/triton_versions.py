"""What tests expect of old versions of Triton."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

import pytest


def _is_old() -> bool:
    try:
        return tuple(map(int, version("triton").split(".")[:2])) < (3, 7)
    except (PackageNotFoundError, ValueError):
        return False


spills_when_old = pytest.mark.xfail(
    _is_old(), reason="Triton 3.6 spills registers in kernels of 8-bit means: docs/support.md", strict=False
)
