"""A training command that kills itself: ``python dying_run.py PLACE N train ...``.

Every call of a Python or C function and every return from one is a moment. The process gets SIGKILL at the N-th
moment inside PLACE; with N = 0 it lives, and prints how many moments each place has.
"""

from __future__ import annotations

import inspect
import json
import os
import signal
import sys
from types import CodeType, FrameType
from typing import Any

from wsn_fast.continual.wsn import WSN
from wsn_fast.train import checkpoint
from wsn_fast.train.command_line import main
from wsn_fast.train.run import Run

PLACES = {"anywhere": main, "checkpoint": checkpoint.save, "end_task": WSN.end_task, "task_end": Run._end_task}


def die_at(place: str, number: int) -> dict[str, int]:
    """Begin to count; returns the counters, by place."""
    codes: dict[CodeType, str] = {inspect.unwrap(function).__code__: name for name, function in PLACES.items()}
    depth, count = dict.fromkeys(PLACES, 0), dict.fromkeys(PLACES, 0)

    def moment(frame: FrameType, event: str, argument: Any) -> None:
        entered = codes.get(frame.f_code)
        if entered is not None and event == "call":
            depth[entered] += 1
        for name in PLACES:
            if depth[name]:
                count[name] += 1
        if 0 < number == count[place]:
            os.kill(os.getpid(), signal.SIGKILL)
        if entered is not None and event == "return":
            depth[entered] -= 1

    sys.setprofile(moment)
    return count


if __name__ == "__main__":
    counted = die_at(sys.argv[1], int(sys.argv[2]))
    code = main(sys.argv[3:])
    sys.setprofile(None)
    print(json.dumps(counted))
    sys.exit(code)
