"""Predicts device times of training steps on an H200 from the machine code of the kernels. No GPU is needed.

``python -m benchmarks.predict`` prints Markdown; ``--json`` prints the same as JSON. Everything is a model: nothing is
measured. The kernels are those that real steps launch over the stand-in for ``libcuda`` (``real_steps.py``), compiled
for sm_90. ``kernel_work.py`` reads their machine code; ``device_model.py`` turns it into times and has all constants.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch

from . import real_steps
from .device_model import CONSTANTS, torch_kernel, value
from .kernel_work import Row, rows
from .provenance import ROOT, provenance
from .tables import table, where
from .tables import three_digits as digits

sys.path.append(str(ROOT / "tests" / "support"))
stand_in_cuda, steps = importlib.import_module("stand_in_cuda"), importlib.import_module("counted_steps")

SIDES = (1024, 4096, 8192)
SIZES = {side: f"{side * side / 1e6:.3g} M" for side in SIDES}
MODES = ("one-pass", "standard", "guarded")
CODED = ("one-pass, 8bit", "one-pass, bfloat16", "standard, 8bit")
"""Modes whose running means are stored in fewer bytes; after the first task."""
BYTES_8BIT_DENSE = 40 - 2 * 8 + 2 * 2 + 2 * 2 * 4 / 256
"""Bytes per weight of a dense step with AdamW in 8 bits: two running means are read and written as one byte each, with
a scale for 256. Arithmetic: no such kernel was looked at."""
UNIONS = {"": True, ", first task": False}
SHAPES = {"1024^2, batch 256": (1024, 8), "4096^2, batch 32": (4096, 24), "4096^2, batch 256": (4096, 33),
          "4096^2, batch 4096": (4096, 522)}  # fmt: skip
"""Shapes of a step: the side of the weight, and microseconds of its three products at 790 TFLOP/s."""


class Part(NamedTuple):
    """What a model of a step is made of: its kernels, and the microseconds of torch's operators on large tensors."""

    rows: list[Row]
    torch: float

    @property
    def us(self) -> float:
        """The whole, without products."""
        return self.torch + sum(row.prediction.us for row in self.rows)

    @property
    def update(self) -> Row:
        """The kernel that moves most."""
        return max(self.rows, key=lambda row: row.prediction.floor)


Parts = dict[tuple[str, int], Part]


def parts(sides: Sequence[int], stand_in: Any) -> Parts:
    """Every part of the report at every size, by its name and the side of the weight."""
    with pytest.MonkeyPatch.context() as patch, stand_in.active(patch):
        steps.allow_steps(stand_in, patch)
        made: dict[str, Callable[[int], real_steps.Step]] = {
            "dense": lambda side: real_steps.dense_step(side, patch),
            "cold select": lambda side: real_steps.cold_select(side, patch),
            "evaluation, first batch": lambda side: real_steps.first_evaluation(side, patch),
        }
        for mode in MODES:
            for note, union in UNIONS.items():
                made[mode + note] = lambda side, mode=mode, union=union: real_steps.training_step(
                    mode, side, union, patch
                )
        for mode in CODED:
            made[mode] = lambda side, mode=mode: real_steps.training_step(mode, side, True, patch)
        found = {}
        for name, look in made.items():
            for side in sides:
                step = look(side)
                in_torch = sum(torch_kernel(size) for _, size in step.operators)
                found[name, side] = Part(rows(step.launches, side * side), in_torch)
        return found


# --- what it means
class Verdict(NamedTuple):
    """A target "by model", and what the model says."""

    what: str
    limit: float
    is_least: bool  # whether the limit is a least value, not a most
    predicted: float

    @property
    def is_met(self) -> bool:
        """Whether the prediction keeps to the limit."""
        return self.predicted >= self.limit if self.is_least else self.predicted <= self.limit


def tail(part: Part) -> float:
    """What a one-pass step takes besides the update, in microseconds."""
    return part.us - part.update.prediction.us


def ratio(found: Parts, name: str, shape: str) -> float:
    """A step over a dense one."""
    side, products = SHAPES[shape]
    return (products + found[name, side].us) / (products + found["dense", side].us)


def ratio_8bit(found: Parts, name: str, shape: str) -> float:
    """A step over a dense one with AdamW in 8 bits, which moves its bytes as torch's kernels do."""
    side, products = SHAPES[shape]
    return (products + found[name, side].us) / (products + torch_kernel(BYTES_8BIT_DENSE * side * side))


def verdicts(found: Parts) -> list[Verdict]:
    """The targets."""
    large, small = found["one-pass", 4096], found["one-pass", 1024]
    update = large.update.prediction
    batches = {"4096^2, batch 32": 1.28, "4096^2, batch 256": 1.26, "4096^2, batch 4096": 1.09}
    return [
        Verdict("cold select of 1 M, us", 15, False, found["cold select", 1024].us),
        Verdict("cold select of 16.7 M, us", 45, False, found["cold select", 4096].us),
        Verdict("one-pass update of 1 M, us", 18, False, small.update.prediction.us),
        Verdict("one-pass update of 16.7 M, share of the bandwidth", 0.92, True, update.floor / update.us),
        Verdict("tail of the one-pass step at 16.7 M, us", 12, False, tail(large)),
        *(
            Verdict(f"one-pass, {at}, x dense", most, False, ratio(found, "one-pass", at))
            for at, most in batches.items()
        ),
        *(
            Verdict(f"{mode}, 4096^2, batch 32, x dense", 2.2, False, ratio(found, mode, "4096^2, batch 32"))
            for mode in ("standard", "guarded")
        ),
        *(
            Verdict(f"one-pass, 8bit, {at}, x dense", most, False, ratio(found, "one-pass, 8bit", at))
            for at, most in {"4096^2, batch 32": 0.85, "4096^2, batch 256": 0.90}.items()
        ),
    ]


# --- what is printed
def kernel_facts(found: Parts, sides: Sequence[int]) -> list[dict[str, Any]]:
    """Every kernel of the parts, once, with its numbers at every size."""
    known: dict[tuple[str, float, bool], dict[str, Any]] = {}
    for (part, side), one in found.items():
        for row in one.rows:
            code = row.facts
            tile = code.tile
            entry = known.setdefault(row.key, {
                "kernel": row.name, "form": row.form, "first in": part, "registers": code.registers,
                "spilled bytes": code.spills, "occupancy": row.prediction.occupancy * row.work.threads / 2048,
                "threads": row.work.threads, "instructions per element": row.instructions,
                "bytes per element": row.bytes, "widths": dict(tile.widths), "bytes in flight": tile.in_flight,
                "waits per tile": tile.waits, "barriers per tile": [tile.barriers, code.found.barriers],
                "atomics per tile": [_atomics(tile), _atomics(code.found)],
                "share of tiles with keys": row.found, "slow calls per tile": dict(code.way.slow_calls),
                "slow calls that zeros reach": code.zeros.reached,
                "slow calls that zeros may reach": len(code.zeros.undecided), "us": {}, "floor us": {}, "bound": {},
            })  # fmt: skip
            says = row.prediction
            entry["us"][SIZES[side]] = max(says.us, entry["us"].get(SIZES[side], 0.0))  # arguments may differ
            entry["floor us"][SIZES[side]] = says.floor
            entry["bound"][SIZES[side]] = says.bound
    return list(known.values())


def _atomics(tile: Any) -> int:
    return tile.atomics + tile.lane_atomics + tile.spread_atomics


def _slow_calls(one: dict[str, Any]) -> str:
    """How many there are, and how many zeros reach."""
    calls, reached, maybe = (sum(one["slow calls per tile"].values()), one["slow calls that zeros reach"],
                             one["slow calls that zeros may reach"])  # fmt: skip
    return f"{reached} of {calls}" + f", {maybe} unknown" * bool(maybe) if calls else ""


def _kernel_table(kernels: Sequence[dict[str, Any]]) -> list[str]:
    sizes = list(kernels[0]["us"])
    columns = ("kernel", "registers", "spilled", "occupancy", "instr/el", "loads and stores", "in flight B/thread",
               "waits", "barriers", "atomics", "slow calls", "B/el", f"model us, {' / '.join(sizes)}", "floor us",
               "bound")  # fmt: skip
    cells = []
    for one in kernels:
        has_tiles = one["instructions per element"] > 0
        cells.append((
            f"{one['kernel']} {one['form']}", str(one["registers"]), str(one["spilled bytes"]),
            f"{one['occupancy']:.0%}", f"{one['instructions per element']:.1f}" if has_tiles else "",
            ", ".join(f"{count} {opcode}" for opcode, count in sorted(one["widths"].items())) if has_tiles else "",
            str(one["bytes in flight"]), str(one["waits per tile"]),
            *("-".join(map(str, dict.fromkeys(one[f"{what} per tile"]))) for what in ("barriers", "atomics")),
            _slow_calls(one), f"{one['bytes per element']:.1f}" if has_tiles else "",
            " / ".join(digits(us) for us in one["us"].values()),
            " / ".join(digits(us) for us in one["floor us"].values()) if has_tiles else "",
            " / ".join(dict.fromkeys(one["bound"].values())),
        ))  # fmt: skip
    return table(columns, cells, align=False)


def _step_facts(found: Parts) -> list[dict[str, Any]]:
    """The steps at every shape, beside the dense one."""
    names = [name for name, side in found if name.startswith(MODES) and side == SIDES[0]]
    result = []
    for shape, (side, products) in SHAPES.items():
        for name in ("dense", *names):
            part = found[name, side]
            kernels = part.us - part.torch
            times = {"products": products, "torch": part.torch, "triton": kernels, "step": products + part.us}
            ratios = {"x dense": ratio(found, name, shape), "x dense 8bit": ratio_8bit(found, name, shape)}
            result.append({"shape": shape, "step": name, "us": times, **ratios})
    return result


def report(found: Parts, facts: dict[str, Any], sides: Sequence[int]) -> dict[str, Any]:
    """Everything that is printed."""
    sums = {"cold select": lambda part: part.us, "one-pass": tail}
    names = {"cold select": "cold select", "one-pass": "tail of the one-pass step"}
    return {
        **facts,
        "about": "a model, nothing is measured",
        "kernels": kernel_facts(found, sides),
        "sums us": {
            names[name]: {SIZES[side]: of(found[name, side]) for side in sides} for name, of in sums.items()
        },
        "steps": _step_facts(found),
        "targets": [{**one._asdict(), "is_met": one.is_met} for one in verdicts(found)],
        "keys in the window": {kind: value(f"{kind} share") for kind in ("cold", "warm")},
        "constants": {name: one._asdict() for name, one in CONSTANTS.items()},
    }  # fmt: skip


def markdown(told: dict[str, Any]) -> list[str]:
    """The report as Markdown."""
    steps_told = [
        (one["shape"], one["step"], *(f"{one['us'][of]:.0f}" for of in ("products", "torch", "triton", "step")),
         f"{one['x dense']:.2f}", f"{one['x dense 8bit']:.2f}" if "bit" in one["step"] else "")
        for one in told["steps"]
    ]  # fmt: skip
    targets = [
        (one["what"], f"{'>=' if one['is_least'] else '<='} {one['limit']}", digits(one["predicted"]),
         "met" if one["is_met"] else "MISSED")
        for one in told["targets"]
    ]  # fmt: skip
    cold, warm = told["keys in the window"].values()
    return [
        "# Device times of a step on an H200: a model, not a measurement", "",
        f"From the machine code of the kernels for sm_90; {where(told)}.", "",
        "## Kernels", "",
        f"A tile holds keys of the window with the probability that follows from its size: {cold:.1%} of all keys lie "
        f"in the window of a sample, {warm:.2%} in that of an update. Barriers and atomics are those of a tile without "
        "and with such keys. Slow calls: of the places in a tile that may call the slow path of a division or root, "
        "those that do so where all elements are zero.", "",
        *_kernel_table(told["kernels"]), "",
        "## Sums, us of the model", "",
        *table(("sum", *SIZES.values()), [(name, *map(digits, us.values())) for name, us in told["sums us"].items()]),
        "", "## Steps, us of the model", "",
        "Products are arithmetic at 790 TFLOP/s; operators of torch on tensors of the weight's size run at 91 % of the "
        "bandwidth; smaller ones are left out of every step. The second task is trained, so that there is a union, "
        "unless it says first task. The last column is beside a dense step with AdamW in 8 bits, which is arithmetic: "
        f"it moves {BYTES_8BIT_DENSE:.2f} bytes for a weight where the dense step moves 40.", "",
        *table(("shape", "step", "products", "torch", "Triton", "step us", "x dense", "x dense 8bit"), steps_told), "",
        "## Targets by model", "",
        *table(("target", "limit", "model", ""), targets), "",
        "## Constants of the model", "",
        *table(("constant", "value", "unit", "source"),
               [(name, f"{one['value']:g}", one["unit"], one["source"]) for name, one in told["constants"].items()]),
    ]  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the report."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.predict", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(arguments)
    if stand_in_cuda.obstacle():
        parser.error(stand_in_cuda.obstacle())
    stand_in = stand_in_cuda.StandIn(stand_in_cuda.shared_folder())
    told = report(parts(SIDES, stand_in), provenance(torch.device("cpu")), SIDES)
    print(json.dumps(told, indent=1) if options.json else "\n".join(markdown(told)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
