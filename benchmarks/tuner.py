"""How the tuner measures: candidates checked, then timed, for each entry of a tuning file."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from wsn_fast import reference

from . import launches
from .cases import WrongResultError, check_close, check_same, check_threshold, compute_dtype, input_sets, name_of
from .data import Gate, rank, scores
from .products import RULE, SOURCES, conv_definition, conv_operands, convolve
from .shapes import ConvShape
from .trials import Precision, Sweep, Trials, as_list
from .tuner_linear import MASK, LinearTables


def tables(trials: Trials, sweep: Sweep) -> dict[str, Any]:
    """The tables of a tuning file, one entry after the other until the time is up."""
    first, *others = sweep.precisions
    measure = LinearTables(trials, sweep)
    result: dict[str, Any] = {
        "elementwise": elementwise(trials, sweep.elementwise),
        "linear": list(measure.linear(first)),
        "linear_grad": list(measure.linear_grad(first)),
        "linear_tasks": list(measure.linear_tasks(first)),
        "conv": list(convolutions(trials, sweep.convs, first)),
    }
    for precision in others:
        result["linear"] += measure.linear(precision)
        result["linear_grad"] += measure.linear_grad(precision)
    return result


def elementwise(trials: Trials, n: int) -> dict[str, Any]:
    """The tile of gate and gradient masking, and the tile sizes of the selection, for n weights."""
    device, clock = trials.device, trials.clock
    dtype = compute_dtype(device)
    g = Gate.random(n, device, dtype, 1)
    mask, grad, select = (launches.kernels(name, device) for name in ("mask", "grad", "threshold"))
    out, dw, ds = torch.empty_like(g.weight, dtype=dtype), torch.empty_like(g.weight), torch.empty_like(g.scores)
    expected = reference.gate_backward(g.grad.float(), g.weight, g.scores, g.mask, g.frozen)
    s = scores(n, device)

    def gate(config: Any) -> float:
        call = partial(mask.gate, g.weight, g.scores, g.tau, out, None, rule=RULE, config=config)
        out.fill_(torch.nan)
        call()
        check_same(out, reference.select(g.mask, g.weight.to(dtype)), "gate")
        return clock([call])

    def gate_backward(config: Any) -> float:
        operands = (g.grad, g.weight, g.scores, g.tau, g.packed_frozen, dw, ds)
        call = partial(grad.gate_backward, *operands, rule=RULE, config=config)
        dw.fill_(torch.nan)
        ds.fill_(torch.nan)
        call()
        check_same(dw, expected[0], "dW")
        check_same(ds, expected[1], "dS")
        return clock([call])

    def threshold(config: Any) -> float:
        call, tau = launches.threshold([s], [rank(n)], RULE, config)
        tau.fill_(torch.nan)
        call()
        check_threshold(tau[0], s, rank(n), RULE)
        return clock([call])

    found = {
        "gate": trials.best("gate", mask.CONFIGS, gate),
        "gate_backward": trials.best("gate_backward", grad.CONFIGS, gate_backward),
        "threshold": trials.best("threshold", select.CONFIGS, threshold),
    }
    return {
        name: vars(best[0]) if name == "threshold" else as_list(best[0])
        for name, best in found.items()
        if best is not None
    }


def convolutions(trials: Trials, shapes: tuple[ConvShape, ...], precision: Precision) -> Iterator[dict[str, Any]]:
    """An entry for each shape, source of the mask and direction."""
    for shape in shapes:
        for source in SOURCES:
            for backward in (False, True):
                what = f"conv {shape} {source}{', dx' * backward}"
                entry = trials.attempt(what, partial(_conv_entry, trials, shape, source, backward, precision, what))
                if entry is not None:
                    yield entry


def _conv_entry(
    trials: Trials, s: ConvShape, source: str, backward: bool, precision: Precision, what: str
) -> dict[str, Any]:
    device = trials.device
    kernels = launches.kernels("conv", device)
    product = precision.product("masked_conv", source, backward, device)
    count = input_sets(precision.dtype.itemsize * s.batch * s.channels * s.size**2, device)
    sets = [conv_operands(s, backward, device) for _ in range(count)]
    torchs, exact = (conv_definition(s, backward, sets[0], dtype) for dtype in (precision.dtype, torch.float64))
    y = torch.empty_like(torchs)

    def fused(config: Any, o: Any) -> None:
        kernels.masked_conv(
            o.x, o.w.weight, y, **dict(zip(MASK, o.w.source(source), strict=True)), stride=(s.stride,) * 2,
            padding=(s.padding,) * 2, dilation=(1, 1), groups=s.groups, backward=backward, config=config,
            precision=precision.name,
        )  # fmt: skip

    def time_one(config: Any) -> float:
        y.fill_(torch.nan)
        fused(config, sets[0])
        check_close(y, torchs, exact, what)
        return trials.clock([partial(fused, config, o) for o in sets])

    def in_memory(o: Any) -> Tensor:
        return convolve(s, backward, o.x, o.w.in_memory(source, precision.dtype))

    best = trials.best(what, product.configs, time_one)
    if best is None:
        raise WrongResultError("no tile is right")
    dense = trials.clock([partial(in_memory, o) for o in sets])
    names = ("batch", "channels", "height", "width", "out_channels", "kernel", "stride", "padding", "groups")
    values = (s.batch, s.channels, s.size, s.size, s.outputs, s.kernel, s.stride, s.padding, s.groups)
    return {
        "dtype": name_of(precision.dtype),
        "precision": precision.name,
        "source": source,
        "backward": backward,
        "shape": dict(zip(names, values, strict=True)),
        "config": as_list(best[0]),
        "us": round(best[1], 3),
        "us_dense": round(dense, 3),
        "wins": best[1] < dense,
    }
