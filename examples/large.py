"""Convert a large model, train it for two tasks, and compare bytes per weight and step time with the dense model.

    python examples/large.py  # a transformer and a stack of linear layers: 1 G gated weights on a GPU, 2 M on a CPU

The subnet model is built and converted on the meta device, and gets its memory once (:func:`wsn_fast.materialize`). The
data are random, because only memory and time are measured. Autocast computes in bfloat16; parameters are float32.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from wsn_fast import WSN, convert, materialize
from wsn_fast.optim.optimizers import SubnetAdamW

PROGRAMS = ("dense", "standard", "one-pass")
"""The dense model with fused AdamW, and the subnet model with SubnetAdamW in both modes."""
TASKS = ("first", "second")
CLASSES, FEATURES, HEAD_WIDTH = 10, 256, 64
_WARM_UP = 2  # steps of each task that are not timed
_LEARNING_RATE = 1e-4


# --- models
class Attention(nn.Module):
    """Self-attention. Its projections are linear layers that are called, because otherwise masks would not be applied.
    Input and output are [B, L, width]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (-1, HEAD_WIDTH)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class TransformerBlock(nn.Module):
    """A pre-norm block: attention, then a hidden layer of four times the width. It has 12 width^2 weights."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.attention, self.norm2 = nn.LayerNorm(width), Attention(width), nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class MLPBlock(nn.Module):
    """A residual layer of width^2 weights."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.gelu(self.linear(self.norm(x)))


class Stack(nn.Module):
    """Blocks on embedded features, and a classifier on the mean over positions: [B, L, FEATURES] -> [B, CLASSES].

    Args:
        block: makes a block of a width.
        width, depth: the width and the number of the blocks.
        length: L.
        checkpointing: "none" keeps all activations. "non-reentrant" and "reentrant" keep only the input of each block,
            and compute the rest again in the backward pass (see ``torch.utils.checkpoint``).
    """

    def __init__(
        self, block: Callable[[int], nn.Module], width: int, depth: int, length: int, checkpointing: str = "none"
    ) -> None:
        super().__init__()
        self.checkpointing = checkpointing
        self.embed = nn.Linear(FEATURES, width)
        self.position = nn.Parameter(torch.empty(length, width))
        self.blocks = nn.ModuleList(block(width) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, CLASSES)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the module's own parameters. :func:`wsn_fast.materialize` calls it."""
        nn.init.normal_(self.position, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x) + self.position
        for block in self.blocks:
            if self.checkpointing == "none" or not torch.is_grad_enabled():
                x = block(x)
            else:
                x = checkpoint(block, x, use_reentrant=self.checkpointing == "reentrant")
        return self.head(self.norm(x).mean(1))


def transformer(weights: float, length: int, checkpointing: str = "none") -> Stack:
    """A transformer with at least that many weights in its blocks."""
    return _stack(TransformerBlock, 12, weights, length, checkpointing)


def mlp(weights: float, length: int, checkpointing: str = "none") -> Stack:
    """A stack of linear layers with at least that many weights."""
    return _stack(MLPBlock, 1, weights, length, checkpointing)


def _stack(block: Callable[[int], nn.Module], squares: int, weights: float, length: int, checkpointing: str) -> Stack:
    """Make the stack. The width is the largest power of two with which there are at least eight blocks of
    ``squares`` width^2 weights."""
    width = max(HEAD_WIDTH, 1 << int(math.log2(math.sqrt(weights / (8 * squares)))))
    return Stack(block, width, math.ceil(weights / (squares * width**2)), length, checkpointing)


MODELS = {"transformer": transformer, "mlp": mlp}


# --- programs: a model in training
class Dense:
    """The dense model with torch's fused AdamW. Both tasks share one classifier."""

    def __init__(self, build: Callable[[], Stack], device: torch.device, density: float) -> None:
        with torch.device(device):
            self.model: nn.Module = build()
        self.gated = [m.weight for m in self.model.modules() if isinstance(m, nn.Linear) and m.out_features != CLASSES]
        self.optimizer: torch.optim.Optimizer

    def begin_task(self, task: str) -> None:
        """Make a new optimizer."""
        self.optimizer = torch.optim.AdamW(self.model.parameters(), _LEARNING_RATE, weight_decay=0.0, fused=True)

    def end_task(self) -> None:
        """A dense model has nothing to do at the end of a task."""

    def parts(self) -> dict[str, int]:
        """The bytes that training holds after a step, by part. Gradients are included."""
        parameters = list(self.model.parameters())
        return {
            "parameters": _bytes(parameters),
            "moments": _bytes(self._moments()),
            "gradients": _bytes(p.grad for p in parameters if p.grad is not None),
        }

    def _moments(self) -> Iterator[Tensor]:
        return (t for state in self.optimizer.state.values() for t in state.values() if isinstance(t, Tensor))

    def verify(self) -> str:
        """What is known about finished tasks."""
        return "nothing is promised"


class Subnet(Dense):
    """The converted model under :class:`wsn_fast.WSN`."""

    one_pass = False

    def __init__(self, build: Callable[[], Stack], device: torch.device, density: float) -> None:
        with torch.device("meta"):
            net = convert(build(), density, heads="head", exclude_modules="position")
        self.model = self.wsn = WSN(materialize(net, device), per_task="position")
        self.layers = list(self.wsn.subnet_layers().values())
        self.gated = [layer.weight for layer in self.layers]

    def begin_task(self, task: str) -> None:
        self.wsn.begin_task(task)
        self.optimizer = SubnetAdamW(self.wsn, _LEARNING_RATE, one_pass=self.one_pass)

    def end_task(self) -> None:
        self.optimizer.zero_grad()
        self.wsn.end_task()

    def parts(self) -> dict[str, int]:
        gates = [gate for layer in self.layers for gate in layer.gated()]
        ready = [one for layer in self.layers for one in layer.gate_state.ready.values()]
        ahead = [tensor for one in ready for tensor in (one.masked, one.next.tau, one.window) if tensor is not None]
        scores = _bytes(gate.score for gate in gates)
        found = super().parts()
        return found | {
            "parameters": found["parameters"] - scores,
            "scores": scores,
            "masks": _bytes(t for gate in gates for t in (gate.masks, gate.union) if t is not None),
            "gates made ahead": _bytes(ahead),
        }

    def verify(self) -> str:
        report = self.wsn.verify()
        return f"verified: {report.tensors} tensors of tasks {', '.join(map(str, report.tasks))} as they were"


class OnePass(Subnet):
    """The converted model with the one-pass mode of the optimizer."""

    one_pass = True


_PROGRAM_TYPES: dict[str, type[Dense]] = dict(zip(PROGRAMS, (Dense, Subnet, OnePass), strict=True))


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.numel()}.values())


# --- measuring
@dataclass(frozen=True)
class Result:
    """The measurements of one program with one model.

    Attributes:
        model, program: which.
        gated_weights: weights of the layers that are gated, or would be.
        step_ms: median time of a step of the last task.
        bytes_per_weight: by part, after a step of the last task, gradients included. "peak" is the most that a step had
            allocated at any time, and "activations and the rest" (autocast's copies of dense weights, say) what of it
            the parts do not explain; on a GPU only, whose allocator knows.
        losses: the last loss of each task.
        promise: what ``verify`` said.
    """

    model: str
    program: str
    gated_weights: int
    step_ms: float
    bytes_per_weight: dict[str, float]
    losses: list[float]
    promise: str


def measure(model: str, program: str, options: argparse.Namespace) -> Result:
    """Train ``program`` on random data for two tasks."""
    device = torch.device(options.device)
    torch.manual_seed(0)
    gc.collect()
    before = _allocated(device)
    build = partial(MODELS[model], options.weights, options.length, options.checkpointing)
    training = _PROGRAM_TYPES[program](build, device, options.density)
    losses: list[float] = []
    for number, task in enumerate(TASKS):
        generator = torch.Generator(device).manual_seed(number)
        x = torch.randn(options.batch, options.length, FEATURES, device=device, generator=generator)
        y = torch.randint(CLASSES, (options.batch,), device=device, generator=generator)
        training.begin_task(task)
        for _ in range(_WARM_UP):
            _step(training, x, y)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        times, last = zip(*(_step(training, x, y) for _ in range(options.steps)), strict=True)
        peak = None if before is None else torch.cuda.max_memory_allocated(device) - before
        losses.append(last[-1])
        parts = training.parts()  # the gradients are still there
        training.end_task()
    weights = sum(weight.numel() for weight in training.gated)
    per_weight = {part: size / weights for part, size in _with_rest(parts, peak).items()}
    return Result(model, program, weights, 1e3 * statistics.median(times), per_weight, losses, training.verify())


def _step(training: Dense, x: Tensor, y: Tensor) -> tuple[float, float]:
    """Do a training step. Returns its seconds and the loss."""
    start = _now(x.device)
    training.optimizer.zero_grad()
    with torch.autocast(x.device.type, torch.bfloat16):
        loss = F.cross_entropy(training.model(x), y)
    loss.backward()
    training.optimizer.step()
    return _now(x.device) - start, loss.item()


def _allocated(device: torch.device) -> int | None:
    """The bytes in use on a GPU, after free memory was given back. None on a CPU, because its allocator does not
    count."""
    if device.type != "cuda":
        return None
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated(device)


def _with_rest(parts: dict[str, int], peak: int | None) -> dict[str, int]:
    if peak is None:
        return {**parts, "sum of these": sum(parts.values())}
    return {**parts, "activations and the rest": peak - sum(parts.values()), "peak": peak}


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


# --- the table
def table(results: Sequence[Result]) -> str:
    """The results of one model as a table, with a column per program."""
    parts = dict.fromkeys(part for result in reversed(results) for part in result.bytes_per_weight)
    last = [part for part in parts if part in ("activations and the rest", "peak", "sum of these")]
    rows = [
        [results[0].model, *(result.program for result in results)],
        ["gated weights", *(f"{result.gated_weights:,}" for result in results)],
        ["step, ms", *(f"{result.step_ms:.2f}" for result in results)],
        ["beside the first", *(f"{result.step_ms / results[0].step_ms:.2f}x" for result in results)],
        ["bytes per weight:", *("" for _ in results)],
    ]
    for part in [*(part for part in parts if part not in last), *last]:
        sizes = (result.bytes_per_weight.get(part) for result in results)
        rows.append([f"  {part}", *("-" if size is None else f"{size:.2f}" for size in sizes)])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows)
    return "\n".join([*lines, *(f"{result.program}: {result.promise}" for result in results)])


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print a table for each model, and write the JSON file."""
    options = _options(arguments)
    results: list[Result] = []
    for model in options.model:
        ours = [measure(model, program, options) for program in options.programs]
        print(table(ours), end="\n\n", flush=True)
        results += ours
    if options.json is not None:
        device = torch.device(options.device)
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
        settings = {key: value for key, value in vars(options).items() if key != "json"}
        facts = {"device_name": name, "torch": torch.__version__, "threads": torch.get_num_threads()}
        found = {"settings": settings | facts, "results": [asdict(result) for result in results]}
        options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    gpu = torch.cuda.is_available()
    parser.add_argument("--model", nargs="+", choices=sorted(MODELS), default=sorted(MODELS))
    parser.add_argument("--programs", nargs="+", choices=PROGRAMS, default=["dense", "one-pass"])
    parser.add_argument("--weights", type=float, help="at least; default 1e9 on a GPU, 2e6 on a CPU")
    parser.add_argument("--batch", type=int, default=8, help="default %(default)s")
    parser.add_argument("--length", type=int, help="positions; default 512 on a GPU, 16 on a CPU")
    parser.add_argument("--steps", type=int, default=5, help="timed ones of each task; default %(default)s")
    parser.add_argument("--density", type=float, default=0.3, help="default %(default)s")
    parser.add_argument("--device", default="cuda" if gpu else "cpu", help="default %(default)s")
    parser.add_argument(
        "--checkpointing",
        nargs="?",
        choices=("none", "non-reentrant", "reentrant"),
        const="non-reentrant",
        default="none",
        help="activation checkpointing of each block; without a value non-reentrant",
    )
    parser.add_argument("--json", type=Path, help="write the results there, too")
    options = parser.parse_args(arguments)
    large = torch.device(options.device).type == "cuda"
    if options.weights is None:
        options.weights = 1e9 if large else 2e6
    if options.length is None:
        options.length = 512 if large else 16
    if min(options.weights, options.batch, options.length, options.steps) < 1:
        parser.error("--weights, --batch, --length and --steps must be at least 1")
    return options


if __name__ == "__main__":
    sys.exit(main())
