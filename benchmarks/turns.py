"""The step of a layer on a CPU beside a dense one, in turns: ``python -m benchmarks.turns``.

The rows of ``pytest benchmarks`` are measured one after the other, and a machine that is busy for a second spoils a
ratio. Here each round has one step of every competitor. Means in 8 bits and in float32 stand beside the dense layer.
Each competitor was checked in the same run.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

import torch

from wsn_fast.doctor.measuring.competitors import Competitor, Dense
from wsn_fast.doctor.measuring.ours import OursOnePass, OursOnePassCoded
from wsn_fast.doctor.measuring.shapes import LinearShape
from wsn_fast.doctor.measuring.timing import Turns, in_turns

from .problem import Problem
from .provenance import provenance
from .tables import table, where
from .tables import three_digits as digits

KINDS: tuple[type[Competitor], ...] = (Dense, OursOnePass, OursOnePassCoded)


def times_in_turns(kinds: Sequence[type[Competitor]], shape: LinearShape, rounds: int) -> Turns:
    """The times of each step, by competitor and round. Raises ``WrongResultError`` where one is wrong."""
    cpu = torch.device("cpu")
    problem = Problem(shape, cpu)
    competitors = [kind(problem) for kind in kinds]
    for competitor in competitors:
        competitor.step()
        competitor.check()
    turns = in_turns({one.name: [one.step] for one in competitors}, cpu, rounds=(rounds, rounds))
    for competitor in competitors:
        competitor.check_later()
    return turns


def rows(turns: Turns) -> list[tuple[str, ...]]:
    """A line for each competitor: its quantiles in ms, and the median of its ratio to the first one in the round."""
    first, *_ = turns.times
    lines = []
    for name in turns.times:
        timing = turns.timing(name)
        over = timing.median_us / turns.timing(first).median_us
        quantiles = (timing.p20_us, timing.median_us, timing.p80_us)
        lines.append((name, *(digits(us / 1e3) for us in quantiles), f"{over:.3f}", f"{turns.ratio(name, first):.3f}"))
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
        cells = rows(times_in_turns(KINDS, shape, options.rounds))
        load = f"load average {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "load unknown"
        print("\n".join([*table((f"{shape}, {load}", *columns), cells), ""]), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
