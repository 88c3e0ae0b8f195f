"""What a large model with many tasks costs on many GPUs, on paper: memory per GPU, bytes on the wire, times of a step.

    python -m benchmarks.scale                                     the tables of docs/results/scale.md
    python -m benchmarks.scale --gpus 16 --tasks 100 --tokens 8192

Nothing is measured here. The formulas of memory and of what travels are held by ``tests/distributed/test_scale.py`` to
what processes really hold and send. Speeds come from ``CONSTANTS``, which says where each of them is from.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from wsn_fast.backends import digits

from .device_model import CONSTANTS as GPU
from .device_model import MEASURED, Constant

CONSTANTS: Mapping[str, Constant] = MappingProxyType({
    "bandwidth": GPU["bandwidth"],
    "update": Constant(0.85, "of the bandwidth, by the one-pass update", MEASURED),
    "update bytes": Constant(56.125, "per weight that the one-pass update moves", "counted by the library"),
    "gate bytes": Constant(10, "per weight that making a masked shard in bfloat16 moves", "counted by the library"),
    "search bytes": Constant(346, "per weight that the search for a threshold in shards moves: operations of PyTorch",
                             "counted, operands and results of each operation; hot counters make it slower"),
    "product": Constant(400, "TFLOP/s of a training step in bfloat16", "assumed; one large product reaches 700"),
    "inside": Constant(450, "GB/s of a GPU in one direction, up to 8 GPUs", "data sheet of NVLink 4"),
    "between": Constant(50, "GB/s of a GPU in one direction, beyond 8 GPUs", "data sheet of 400 Gb/s InfiniBand"),
})  # fmt: skip


class Matrices(NamedTuple):
    """Gated tensors of one shape."""

    rows: int
    columns: int
    count: int


class Model(NamedTuple):
    """A model, as far as it matters here.

    Attributes:
        gated: the gated tensors of a block.
        blocks: how many blocks there are. Each is gathered as one group.
        frozen: parameters that never change and stay whole in each process, such as an embedding.
        per_task: parameters with a value for each task, such as norms and heads. They stay whole.
    """

    gated: Sequence[Matrices]
    blocks: int
    frozen: int = 0
    per_task: int = 0

    @property
    def tensors(self) -> int:
        return self.blocks * sum(one.count for one in self.gated)

    @property
    def weights(self) -> int:
        """How many elements are gated."""
        return self.blocks * sum(one.rows * one.columns * one.count for one in self.gated)

    def shard(self, processes: int) -> int:
        """The gated elements of the process that holds most: shards are whole rows."""
        return self.blocks * sum(-(-one.rows // processes) * one.columns * one.count for one in self.gated)


SEVEN_BILLION = Model(
    gated=(Matrices(4096, 4096, 4), Matrices(11008, 4096, 2), Matrices(4096, 11008, 1)),
    blocks=32,
    frozen=32_000 * 4096,
    per_task=65 * 4096 + 4096 * 100,
)
"""The shapes of a transformer of 7 billion weights, with a frozen embedding and a head of 100 classes for each task."""


def memory(model: Model, processes: int, tasks: int, *, compute: int = 2, one_pass: bool = True) -> dict[str, float]:
    """The bytes of a process, by kind, without activations.

    Args:
        model: what is trained, with float32 tensors and running means.
        processes: among which FSDP2 cuts it.
        tasks: finished ones, beside the one that trains.
        compute: bytes of an element of the compute dtype.
        one_pass: whether the optimizer is a one-pass optimizer; else scores have gradients too.
    """
    shard = model.shard(processes)
    return {
        "weights": 4 * shard,
        "scores": 4 * shard,
        "running means of AdamW": 16 * shard,
        "gradients": (4 if one_pass else 8) * shard,
        "masks and their union": (tasks + 1) * shard / 8,
        "two gathered blocks": 2 * compute * model.shard(1) / model.blocks,
        "not gated": 4 * model.frozen + 4 * (tasks + 4) * model.per_task,
    }


def on_the_wire(model: Model, processes: int, *, compute: int = 2, reduce: int = 4) -> dict[str, float]:
    """The bytes that a process sends in a step, by kind, if each collective sends the least that it has to.

    Args:
        model: what is trained.
        processes: among which it is cut.
        compute: bytes of an element of the compute dtype, in which masked tensors are gathered, twice a step.
        reduce: bytes of an element of the dtype in which gradients are summed.
    """
    others = processes - 1
    counters = sum(4 << width for width in digits.WIDTHS[4])
    return {
        "masked tensors, gathered": 2 * compute * others * model.shard(processes),
        "their gradients": reduce * others * model.shard(processes),
        "what is not gated": 2 * 4 * model.per_task * others / processes,
        "counters of the thresholds": 2 * counters * model.tensors * others / processes,
    }


class Step(NamedTuple):
    """Milliseconds of a step of one process, by what is busy."""

    products: float
    wire: float
    update: float
    gates: float
    search: float


def step(model: Model, processes: int, tokens: int, **dtypes: int) -> Step:
    """The times of a step, if each part ran alone.

    Args:
        model: what is trained.
        processes: among which it is cut.
        tokens: of a process in a step. Products of a forward and a backward pass take 6 operations for each weight.
        **dtypes: see :func:`on_the_wire`.
    """
    memory_speed = CONSTANTS["bandwidth"].value * 1e9  # bytes per ms
    link = CONSTANTS["inside" if processes <= 8 else "between"].value * 1e6
    shard = model.shard(processes)
    return Step(
        products=6 * model.weights * tokens / (CONSTANTS["product"].value * 1e9),
        wire=sum(on_the_wire(model, processes, **dtypes).values()) / link,
        update=CONSTANTS["update bytes"].value * shard / (CONSTANTS["update"].value * memory_speed),
        gates=2 * CONSTANTS["gate bytes"].value * shard / memory_speed,
        search=CONSTANTS["search bytes"].value * shard / memory_speed,
    )


def hidden_from(model: Model, processes: int) -> int:
    """From how many tokens per GPU on the products take as long as what travels, in bfloat16 summed in float32."""
    one = step(model, processes, 1)
    return round(one.wire / one.products)


# --- the tables ------------------------------------------------------------------------------------------------
def table(heads: Sequence[str], rows: Iterator[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def _by_kind(columns: Sequence[Mapping[str, float]], total: str) -> Iterator[Sequence[str]]:
    for kind in columns[0]:
        yield [kind, *(_short(column[kind] / 1e9) for column in columns)]
    yield [total, *(_short(sum(column.values()) / 1e9) for column in columns)]


def _short(value: float) -> str:
    """With three digits."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def tables(model: Model, gpus: Sequence[int], tasks: int, tokens: int) -> str:
    """All tables of the page, in Markdown."""
    heads = ["", *(f"{n} GPUs" for n in gpus)]
    held = [memory(model, n, tasks) for n in gpus]
    sent = [on_the_wire(model, n) for n in gpus]
    steps = [step(model, n, tokens) for n in gpus]
    times = ([f"{name} alone, ms", *(_short(getattr(one, name)) for one in steps)] for name in Step._fields)
    about = [
        ["rows of a shard of 11,008", *(str(-(-11008 // n)) for n in gpus)],
        ["elements of the fullest process, by the mean", *(f"{model.shard(n) * n / model.weights:.3f}" for n in gpus)],
        ["tokens per GPU from which products hide the wire", *(f"{hidden_from(model, n):,}" for n in gpus)],
    ]
    about_it = f"{model.weights:,} gated weights in {model.tensors} tensors, {tasks} finished tasks"
    return "\n\n".join([
        f"{about_it}, {tokens:,} tokens per GPU",
        "GB per GPU:\n\n" + table(heads, _by_kind(held, "**together, without activations**")),
        "GB that a GPU sends in a step:\n\n" + table(heads, _by_kind(sent, "**together**")),
        table(["a step", *heads[1:]], times),
        table(["what limits it", *heads[1:]], iter(about)),
    ])  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, nargs="+", default=[8, 64, 512], metavar="N", help="how many GPUs")
    parser.add_argument("--tasks", type=int, default=40, metavar="T", help="finished tasks")
    parser.add_argument("--tokens", type=int, default=16_384, metavar="N", help="tokens of a GPU in a step")
    options = parser.parse_args(arguments)
    print(tables(SEVEN_BILLION, options.gpus, options.tasks, options.tokens))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
