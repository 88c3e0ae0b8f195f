"""Whether ``torch.export`` is at work, in every version of torch that is supported."""

from __future__ import annotations

from torch import compiler


def is_exporting() -> bool:
    """As ``torch.compiler.is_exporting``. While torch 2.11 compiles, it takes that for true in every
    ``torch.compile``; the flag behind it tells the truth there too."""
    return compiler._is_exporting_flag
