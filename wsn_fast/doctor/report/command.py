"""``python -m wsn_fast.doctor --report``: one page and one JSON file about this machine, to look at and to send.

Both hold versions, hardware, choices with their reasons, the verdicts of a check, the tuning table in use, times, and
advice. They name no user, no machine and no folder.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from ...backends.cache_folder import write_text
from ..measuring.attempts import Say, say_at_once
from . import page
from .collect import Plan, collect, plan_of

NAME = "wsn-fast-report"


def main(
    devices: Sequence[torch.device],
    folder: Path,
    minutes: float,
    say: Say = say_at_once,
    plan: Callable[[torch.device], Plan] = plan_of,
) -> int:
    """Write both files. Return 1 if they cannot be written, else 0.

    Args:
        devices: to report on.
        folder: of the files; it is made if it is missing.
        minutes: of measuring.
        say: takes lines of progress.
        plan: what to measure on a device.
    """
    report = collect(devices, minutes, say, plan)
    texts = {"json": json.dumps(report, indent=1, ensure_ascii=False) + "\n", "html": str(page.render(report))}
    for suffix, text in texts.items():
        path = folder.absolute() / f"{NAME}.{suffix}"
        obstacle = write_text(path, text)
        say(obstacle or str(path))
        if obstacle:
            return 1
    return 0
