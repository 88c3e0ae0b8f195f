"""What a step costs the host: its kernel launches, its operators, and its CPU time beside that of a dense net.

``python -m benchmarks.launches`` prints JSON. No GPU is needed: Triton's real launcher works on CPU tensors over a
stand-in for ``libcuda``, and what it launches is not computed. ``--help`` names the options. The tests hold the same
counts down: ``tests/support`` has the stand-in and the steps, in ``stand_in_cuda`` and ``counted_steps.py``.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch

from .launch_nets import MODELS, Shape
from .provenance import ROOT, provenance

sys.path.append(str(ROOT / "tests" / "support"))
steps, stand_in_cuda = importlib.import_module("counted_steps"), importlib.import_module("stand_in_cuda")

Step = Callable[[], object]
WARM, MEASURED = 2, 3  # steps in a turn
DEFAULT_MODES = ("standard", "guarded", "one-pass", "captured", "evaluation")
ABOUT = {
    "triton_launches": "of a step of the second task, after warm steps, with gates made ahead. A captured step: those "
    "that its graph holds; a replay is one launch",
    "other_kernels": "operators of torch that return a new tensor or write to an argument: not views, empty_* and "
    "_unsafe_view; foreach and fused ones count once; waits are copies of a value to the host",
    "host_us": "CPU time of the thread, median and least; the modes take turns of a few steps. It includes what torch "
    "computes on small tensors. ratio: median of the ratios to the dense net in the same round",
    "slopes": "for one more linear layer, fitted over the nets of at least 4",
}


def count(step: Step, stand_in: Any) -> dict[str, Any]:
    """The launches and operators of a step after warm ones."""
    steps.warm_up(step, stand_in)
    launches = stand_in.kernels()
    with pytest.MonkeyPatch.context() as patch, steps.Operators(patch) as operators:
        step()
    others = +operators.launching
    return {
        "triton_launches": {"total": launches.total(), "by_kernel": dict(launches)},
        "other_kernels": {"total": others.total(), "waits": operators.waits, "by_operator": dict(others)},
    }


def host_times(made: dict[str, Step], repeats: int, stand_in: Any) -> dict[str, list[float]]:
    """Microseconds of every repetition by mode. The modes take turns, so that what else runs here meets them all. In a
    turn a mode makes steps that are not measured first, as the other modes have emptied the caches of the processor."""
    times: dict[str, list[float]] = {mode: [] for mode in made}
    gc.collect()
    gc.disable()
    for _ in range(repeats):
        for mode, step in made.items():
            for measured in (*[False] * WARM, *[True] * MEASURED):
                stand_in.forget()
                start = time.thread_time()
                step()
                if measured:
                    times[mode].append((time.thread_time() - start) * 1e6)
    gc.enable()
    return times


def measure(shape: Shape, modes: Sequence[str], repeats: int, stand_in: Any) -> dict[str, Any]:
    """One net in the given modes, and in the dense modes that they are compared with."""
    dense_of, x = {mode: steps.BASELINE_OF[mode] for mode in modes}, shape.batch()
    made: dict[str, Step] = {dense: steps.dense_step(dense, shape.net(), x) for dense in dense_of.values()}
    for mode in modes:
        made[mode] = steps.step_of(mode, steps.subnet(shape.net(), shape.head, **shape.owners), x)
    found = {mode: count(step, stand_in) for mode, step in made.items()}
    times = host_times(made, repeats, stand_in)
    for mode, taken in times.items() if repeats else ():
        found[mode]["host_us"] = {"median": round(statistics.median(taken)), "least": round(min(taken))}
        if mode in dense_of:
            ratios = (ours / dense for ours, dense in zip(taken, times[dense_of[mode]], strict=True))
            found[mode]["ratio"] = round(statistics.median(ratios), 2)
    return {"scale": shape.scale, "modes": found}


def slopes(nets: dict[int, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """What every mode takes for one more linear layer."""
    many = sorted(layers for layers in nets if layers >= 4)
    found: dict[str, dict[str, float]] = {}
    for mode in nets[many[0]]["modes"] if len(many) > 1 else ():
        results = [nets[layers]["modes"][mode] for layers in many]
        of = {name: [r[name]["total"] for r in results] for name in ("triton_launches", "other_kernels")}
        of |= {"host_us": [r["host_us"]["median"] for r in results]} if "host_us" in results[0] else {}
        found[mode] = {name: round(statistics.linear_regression(many, y).slope, 2) for name, y in of.items()}
    return found


def compilations(shape: Shape, mode: str, stand_in: Any) -> dict[str, Any]:
    """What is compiled and loaded in each part of a new user's first run: two tasks, and evaluation of the first."""
    wsn, x = steps.subnet(shape.net(), shape.head, **shape.owners), shape.batch()
    found: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch, stand_in.empty_cache(patch) as compiled:

        def note(part: str, work: Step) -> None:
            compiled.clear()
            before = stand_in.modules
            work()
            modules = stand_in.modules - before
            found[part] = {"compiled": compiled.total(), "modules": modules, "by_kernel": dict(+compiled)}

        note("the first task begins", lambda: wsn.begin_task(0))
        step = steps.training_step(mode, wsn, x)
        note("first step", step)
        note("later steps", lambda: steps.warm_up(step, stand_in))
        note("the second task begins", lambda: (wsn.end_task(), wsn.begin_task(1)))
        note("its steps", lambda: steps.warm_up(steps.training_step(mode, wsn, x), stand_in))
        with torch.no_grad(), wsn.use_task(0):
            note("evaluation of the first task", lambda: wsn(x))
    return found


def report(options: argparse.Namespace, stand_in: Any) -> dict[str, Any]:
    """Everything that is printed."""
    batch = partial(torch.randn, 4, 32)
    linear = {n: Shape(partial(steps.mlp, n), batch, "32 x 32 with bias, batch 4") for n in options.layers}
    models = {name: MODELS[name] for name in options.models}
    facts = {**provenance(torch.device("cpu")), "repeats": options.repeats, "about": ABOUT}
    with pytest.MonkeyPatch.context() as patch, stand_in.active(patch):
        steps.allow_steps(stand_in, patch)
        if options.compile:
            training = [mode for mode in options.modes if mode != "evaluation"]
            nets = {**linear, **models}
            compiled = {n: {mode: compilations(nets[n], mode, stand_in) for mode in training} for n in nets}
            return {**facts, "compiled": compiled}
        measured = {n: measure(shape, options.modes, options.repeats, stand_in) for n, shape in linear.items()}
        others = {n: measure(shape, options.modes, options.repeats, stand_in) for n, shape in models.items()}
    return {**facts, "linear_layers": measured, "slopes": slopes(measured), "models": others}


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.launches", description=__doc__)
    add = parser.add_argument
    add("--modes", nargs="+", default=DEFAULT_MODES, choices=tuple(steps.BASELINE_OF), help="the dense ones come along")
    add("--layers", type=int, nargs="*", default=(1, 4, 16, 48), metavar="N", help="nets of so many linear layers")
    add("--models", nargs="*", default=tuple(MODELS), help=f"nets with the layers of models: {', '.join(MODELS)}")
    add(
        "--repeats", type=int, default=60, help="turns of every step for its time; 0 counts only (default: %(default)s)"
    )
    add("--compile", action="store_true", help="instead: what is compiled from an empty cache")
    options = parser.parse_args(arguments)
    if stand_in_cuda.obstacle():
        parser.error(stand_in_cuda.obstacle())
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # nothing is computed, so values may be anything, and denormal ones are slow
    torch.backends.mkldnn.enabled = False  # its convolutions take far longer to begin than these small ones to compute
    print(json.dumps(report(options, stand_in_cuda.StandIn(stand_in_cuda.shared_folder())), indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
