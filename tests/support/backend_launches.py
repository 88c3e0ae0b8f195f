"""The launches that the Triton backend can make: its primitives are called with every kind of operands, and what they
launch is written down. Nothing runs, so the values of tensors do not matter.

Any two choices of a caller meet in some call, and what takes the most registers is called too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from unittest import mock

import torch
from compile_cases._covering import Row, covering
from compile_cases._launches import written_down
from compiling import CompileCase
from torch import Tensor

from wsn_fast.backends import moments
from wsn_fast.backends import triton as backend
from wsn_fast.backends.mask import GateOrder, GradientOrder, Mask, RestoreOrder
from wsn_fast.backends.triton import products, tuning
from wsn_fast.backends.updates import (
    SGD,
    WINDOW,
    AdamW,
    AdamWState,
    Batch,
    CodedAdamWState,
    CodedSGDState,
    Gradient,
    Next,
    SGDState,
    Update,
)  # fmt: skip

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
WIDE = (*FLOATS, torch.float64)
RULES = ("magnitude", "value")
BOTH = (False, True)
NEEDS = ((True, True), (True, False), (False, True))
"""Whether the gradient of the weight is needed, and whether that of the scores is."""
GPU = tuning.Gpu(processors=132, shared=99 * 1024)
"""With so little shared memory that the tiles chosen for it fit everywhere."""
N = 64
empty = torch.empty

Calls = Iterator[Callable[[], object]]


@functools.cache
def launches() -> dict[str, list[CompileCase]]:
    """The launches of every primitive of the backend that has kernels, by the primitive's name."""
    found = {}
    with mock.patch.object(products, "gpu_of", lambda device: GPU):
        for primitive in PRIMITIVES:
            with written_down() as found[primitive.__name__]:
                for call in primitive():
                    call()
    return found


def packed(n: int, *rows: int) -> Tensor:
    return empty(*rows, (n + 7) // 8, dtype=torch.uint8)


def tensor(n: int, dtype: torch.dtype, aligned: bool = True) -> Tensor:
    return empty(n + 1, dtype=dtype)[not aligned :][:n]


# --- elementwise
def gate() -> Calls:
    for o in covering({"w": WIDE, "s": WIDE, "out": WIDE, "rule": RULES, "aligned": BOTH}):
        operands = tensor(N, o["w"], o["aligned"]), empty(N, dtype=o["s"]), empty((), dtype=o["s"])
        yield functools.partial(backend.gate, *operands, o["rule"], o["out"])


def gate_packed() -> Calls:
    for o in covering({"w": WIDE, "out": WIDE, "aligned": BOTH}):
        yield functools.partial(backend.gate_packed, tensor(N, o["w"], o["aligned"]), packed(N), o["out"])


def gates() -> Calls:
    for o in covering({"w": FLOATS, "out": FLOATS, "rule": RULES, "aligned": BOTH}):
        w = tensor(N, o["w"], o["aligned"])
        order = GateOrder(w, empty(N, dtype=o["w"]), 10, o["rule"], empty(N, dtype=o["out"]))
        yield functools.partial(backend.gates, [order], {})
    for o in covering({"w": WIDE, "s": FLOATS, "out": WIDE, "rule": RULES, "aligned": BOTH}):
        order = GateOrder(
            tensor(N, o["w"], o["aligned"]), empty(N, dtype=o["s"]), 10, o["rule"], empty(N, dtype=o["out"])
        )
        yield functools.partial(backend.gates, [order])


GRADIENTS = {
    "grad": WIDE, "w": WIDE, "s": WIDE, "rule": RULES, "union": BOTH, "needs": NEEDS, "aligned": BOTH,
}  # fmt: skip


def gate_backward() -> Calls:
    for o in covering(GRADIENTS):
        grad, w, s = tensor(N, o["grad"], o["aligned"]), empty(N, dtype=o["w"]), empty(N, dtype=o["s"])
        union = packed(N) if o["union"] else None
        yield functools.partial(
            backend.gate_backward, grad, w, s, empty((), dtype=o["s"]), union, o["rule"], *o["needs"]
        )


def gates_backward() -> Calls:
    for o in covering(GRADIENTS):
        results = (empty(N, dtype=o[name]) if needed else None for name, needed in zip("ws", o["needs"], strict=True))
        order = GradientOrder(
            tensor(N, o["grad"], o["aligned"]), empty(N, dtype=o["w"]), empty(N, dtype=o["s"]),
            empty((), dtype=o["s"]), packed(N) if o["union"] else None, o["rule"], *results,
        )  # fmt: skip
        yield functools.partial(backend.gates_backward, [order], {})


def threshold() -> Calls:
    for o in covering({"dtype": FLOATS, "rule": RULES, "n": (1, 1000, 100_000)}):
        yield functools.partial(backend.threshold, empty(o["n"], dtype=o["dtype"]), o["n"] // 2, o["rule"])


def masks() -> Calls:
    for aligned in BOTH:
        bits = tensor(256, torch.bool, aligned)
        yield functools.partial(backend.pack, bits)
        yield functools.partial(backend.unpack, tensor(32, torch.uint8, aligned), 256)
        yield functools.partial(backend.union, tensor(96, torch.uint8, aligned).view(3, 32))
        yield functools.partial(backend.popcount, tensor(96, torch.uint8, aligned))


def restore_frozen() -> Calls:
    for dtype in WIDE:
        order = RestoreOrder(empty(N, dtype=dtype), empty(N, dtype=dtype), packed(N))
        yield functools.partial(backend.restore_frozen_many, [order], {})
        yield functools.partial(backend.restore_frozen, *order)


# --- optimizers
ADAMW = AdamW(0.1, 0.9, 0.999, 1e-8, 0.01, True)
MOMENTUM, PLAIN = SGD(0.1, 0.9, 0.0, 0.0, False, False), SGD(0.1, 0.0, 0.0, 0.0, False, False)
UPDATES: dict[str, tuple[Any, ...]] = {
    "w": FLOATS, "grad": FLOATS, "rule": RULES, "union": BOTH, "given": BOTH, "next": (None, *FLOATS),
    "scale": (None, torch.float32, torch.float64), "aligned": BOTH, "few": BOTH,
}  # fmt: skip


def batches(axes: Row, state: Callable[[Row], Any]) -> Iterator[tuple[Row, Batch]]:
    """Choices, and a batch of one update of that form."""
    most = {"union": True, "scale": torch.float64, "aligned": True, "few": False, "rule": "magnitude"}
    heavy = [
        {**most, "w": w, "grad": grad, "next": grad, "given": given}
        for w, grad in (
            (torch.float32, torch.bfloat16),
            (torch.float32, torch.float32),
            (torch.bfloat16, torch.bfloat16),
        )
        for given in BOTH
    ]
    for o in covering({**UPDATES, **axes}, heavy):
        n = N if o["few"] else 2**20
        w, grad = o["w"], o["w"] if o["given"] else o["grad"]  # dW has the dtype of the weight
        following = None
        if o["next"] is not None:
            window = empty(WINDOW, dtype=torch.int64)
            following = Next(empty(n, dtype=o["next"]), empty((), dtype=w), 10, window)
        union = packed(n) if o["union"] else None
        update = Update(empty(n, dtype=w), empty(n, dtype=w), union, o["rule"], state({**o, "n": n}), following)
        score_grad = empty(n, dtype=w) if o["given"] else None
        gradient = Gradient(tensor(n, grad, o["aligned"]), score_grad, empty((), dtype=w))
        yield o, Batch([update], [gradient], None if o["scale"] is None else empty((), dtype=o["scale"]), None)


def adamw_step() -> Calls:
    def state(o: Row) -> AdamWState:
        means = (empty(o["n"], dtype=o["w"]) for _ in range(4))
        return AdamWState(*means, empty((), dtype=torch.float32), empty((), dtype=torch.float32))

    for _, batch in batches({}, state):
        yield functools.partial(backend.adamw_step, batch, [(ADAMW, ADAMW)])


def sgd_step() -> Calls:
    def state(o: Row) -> SGDState:
        return SGDState(*(empty(o["n"], dtype=o["w"]) if s.momentum else None for s in (o["sgd w"], o["sgd s"])))

    for o, batch in batches({"sgd w": (MOMENTUM, PLAIN), "sgd s": (MOMENTUM, PLAIN)}, state):
        yield functools.partial(backend.sgd_step, batch, [(o["sgd w"], o["sgd s"])])


def stored(o: Row, storage: str, signed: bool) -> moments.Stored:
    return moments.zeros(empty(o["n"], dtype=o["w"]), storage, signed)


STORED = {"means w": moments.STORAGES, "means s": moments.STORAGES}


def adamw_coded_step() -> Calls:
    def state(o: Row) -> CodedAdamWState:
        means = (stored(o, o[f"means {of}"], signed) for of in "ws" for signed in (True, False))
        return CodedAdamWState(*means, empty((), dtype=o["step"]), empty((), dtype=o["step"]))

    for _, batch in batches({**STORED, "step": (torch.float32, torch.float64)}, state):
        yield functools.partial(backend.adamw_coded_step, batch, [(ADAMW, ADAMW)])


def sgd_coded_step() -> Calls:
    def state(o: Row) -> CodedSGDState:
        each = ((o["means w"], o["sgd w"]), (o["means s"], o["sgd s"]))
        buffers = (stored(o, storage, True) if s.momentum else None for storage, s in each)
        return CodedSGDState(*buffers, empty((), dtype=torch.float32), empty((), dtype=torch.float32))

    for o, batch in batches({**STORED, "sgd w": (MOMENTUM, PLAIN), "sgd s": (MOMENTUM, PLAIN)}, state):
        yield functools.partial(backend.sgd_coded_step, batch, [(o["sgd w"], o["sgd s"])])


def gradient_squares() -> Calls:
    for _, batch in batches({}, lambda o: None):
        yield functools.partial(backend.gradient_squares, batch)


# --- products
SIZES = (512, 516, 514, 513)
"""Terms of a sum that can be split, and loads of 8, 4, 2 and 1 elements."""
PRODUCTS: dict[str, tuple[Any, ...]] = {
    "x": (*((half, "tf32") for half in FLOATS[1:]), (torch.float32, "tf32"), (torch.float32, "ieee")),
    "w": FLOATS, "aligned": BOTH,
}  # fmt: skip
MASKS = {"scores": (None, *FLOATS), "rule": RULES}


def mask_of(o: Row, *shape: int) -> Mask:
    n = torch.Size(shape).numel()
    if o["scores"] is None:
        return Mask.of_packed(packed(n))
    scores, tau = empty(shape, dtype=o["scores"]), empty((), dtype=o["scores"])
    return Mask(scores, tau, o["rule"], None, packed(n) if o.get("union") else None)


def with_precision(o: Row, setting: Any, call: Callable[..., object], *operands: object) -> Callable[[], object]:
    """The call under torch's setting for products in float32."""

    def run() -> None:
        before, setting.fp32_precision = setting.fp32_precision, o["x"][1]
        try:
            call(*operands)
        finally:
            setting.fp32_precision = before

    return run


def masked_linear() -> Calls:
    axes = {"size": SIZES, "rows": (5, 100), "bias": BOTH, "backward": BOTH}
    for o in covering({**PRODUCTS, **MASKS, **axes}):
        (dtype, _), size, rows = o["x"], o["size"], o["rows"]
        x, w = tensor(rows * size, dtype, o["aligned"]).view(rows, size), empty(size, size, dtype=o["w"])
        operands = x, w, mask_of(o, size, size), empty(size, dtype=dtype) if o["bias"] else None, o["backward"]
        yield with_precision(o, torch.backends.cuda.matmul, backend.masked_linear, *operands)


def masked_linear_grad() -> Calls:
    axes = {
        "shape": ((72, 72), (72, 65), (66, 72), (68, 65), (65, 65)), "rows": (5, 2000), "needs": NEEDS, "union": BOTH,
        "scores": FLOATS, "rule": RULES,
    }  # fmt: skip
    for o in covering({**PRODUCTS, **axes}):
        (dtype, _), (n, k), rows = o["x"], o["shape"], o["rows"]
        grad, x = empty(rows, n, dtype=dtype), tensor(rows * k, dtype, o["aligned"]).view(rows, k)
        operands = grad, x, empty(n, k, dtype=o["w"]), mask_of(o, n, k), *o["needs"]
        yield with_precision(o, torch.backends.cuda.matmul, backend.masked_linear_grad, *operands)


def masked_linear_tasks() -> Calls:
    for o in covering({**PRODUCTS, "size": SIZES, "rows": (5, 100), "bias": ("none", "plain", "masked")}):
        (dtype, _), size, rows = o["x"], o["size"], o["rows"]
        x, w = tensor(rows * size, dtype, o["aligned"]).view(rows, size), empty(72, size, dtype=o["w"])
        bias = None if o["bias"] == "none" else empty(72, dtype=o["w"])
        tasks = torch.zeros(rows, dtype=torch.int64)
        operands = x, w, packed(72 * size, 3), tasks, bias, packed(72, 3) if o["bias"] == "masked" else None
        yield with_precision(o, torch.backends.cuda.matmul, backend.masked_linear_tasks, *operands)


def masked_conv() -> Calls:
    for o in covering({**PRODUCTS, **MASKS, "channels": (8, 3), "bias": BOTH, "backward": BOTH}):
        (dtype, _), channels, backward = o["x"], o["channels"], o["backward"]
        before, after = (tensor(2 * c * 36, dtype, o["aligned"]).view(2, c, 6, 6) for c in (channels, 16))
        shape = (16, channels, 3, 3)
        bias = empty(16, dtype=dtype) if o["bias"] and not backward else None
        geometry = ((1, 1), (1, 1), (1, 1))
        operands = after if backward else before, empty(shape, dtype=o["w"]), mask_of(o, *shape), bias, geometry, 1
        result = before.shape if backward else None
        setting = torch.backends.cudnn.conv  # type: ignore[attr-defined]
        yield with_precision(o, setting, backend.masked_conv, *operands, result)


PRIMITIVES: Iterable[Callable[[], Calls]] = (
    gate, gate_packed, gates, gate_backward, gates_backward, threshold, masks, restore_frozen, adamw_step, sgd_step,
    adamw_coded_step, sgd_coded_step,
    gradient_squares, masked_linear, masked_linear_grad, masked_linear_tasks, masked_conv,
)  # fmt: skip
