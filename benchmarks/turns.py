"""The step of a layer on a CPU beside a dense one, in turns: ``python -m benchmarks.turns``.

The rows of ``pytest benchmarks`` are measured one after the other, and a machine that is busy for a second spoils a
ratio. Here each round has one step of every competitor. Means in 8 bits and in float32 stand beside the dense layer.
Each competitor was checked in the same run.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Sequence

import torch

from .competitors import Competitor, Dense
from .ours import OursOnePass, OursOnePassCoded
from .problem import Problem
from .provenance import provenance
from .shapes import LinearShape
from .tables import table, where
from .tables import three_digits as digits

KINDS: tuple[type[Competitor], ...] = (Dense, OursOnePass, OursOnePassCoded)
_WARM_UP = 5


def seconds_in_turns(kinds: Sequence[type[Competitor]], shape: LinearShape, rounds: int) -> list[list[float]]:
    """Seconds of each step, by competitor and round. Raises ``WrongResultError`` where one is wrong."""
    problem = Problem(shape, torch.device("cpu"))
    competitors = [kind(problem) for kind in kinds]
    for competitor in competitors:
        competitor.step()
        competitor.check()
    times: list[list[float]] = [[] for _ in competitors]
    for turn in range(_WARM_UP + rounds):
        for competitor, seconds in zip(competitors, times, strict=True):
            start = time.perf_counter()
            competitor.step()
            if turn >= _WARM_UP:
                seconds.append(time.perf_counter() - start)
    for competitor in competitors:
        competitor.check_later()
    return times


def rows(kinds: Sequence[type[Competitor]], times: Sequence[Sequence[float]]) -> list[tuple[str, ...]]:
    """A line for each competitor: its quantiles in ms, and the median of its ratio to the first one in the round."""
    lines = []
    for kind, seconds in zip(kinds, times, strict=True):
        quantiles = [sorted(seconds)[int(share * len(seconds))] * 1e3 for share in (0.2, 0.5, 0.8)]
        ratio = statistics.median(mine / first for mine, first in zip(seconds, times[0], strict=True))
        over = statistics.median(seconds) / statistics.median(times[0])
        lines.append((kind.name, *map(digits, quantiles), f"{over:.3f}", f"{ratio:.3f}"))
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.turns", description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=(2048, 4096), help="inputs, and outputs, of the layer")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=60)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    columns = ("p20, ms", "median, ms", "p80, ms", "x dense", "median of x dense in a round")
    print(f"# The step of a layer\n\n{where(provenance(torch.device('cpu')))}\n")
    for size in options.sizes:
        shape = LinearShape(size, size, options.batch)
        cells = rows(KINDS, seconds_in_turns(KINDS, shape, options.rounds))
        load = f"load average {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "load unknown"
        print("\n".join([*table((f"{shape}, {load}", *columns), cells), ""]), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
