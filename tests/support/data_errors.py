"""What the readers of datasets say about a damaged file."""

from __future__ import annotations

from pathlib import Path

import pytest

from wsn_fast.train.data import DataError, load


def error_of(name: str, root: Path) -> str:
    with pytest.raises(DataError) as caught:
        load(name, root)
    return str(caught.value)
