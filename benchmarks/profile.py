"""What a training step runs on the device: kernels by torch's profiler, each with its role and the least it must move.

The profiler counts time and no bytes. The bytes are those of the kernel's role, computed from the shapes, so that bytes
over time says how far a kernel is from the device's copy bandwidth.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity

from .baselines import BIT, MASTER
from .cases import Kernel
from .problem import Problem

STEPS = 10


class Role(NamedTuple):
    """What kernels are for, by a pattern of their names, and the least bytes per weight that one call of theirs moves
    as a function of the compute dtype's size and of whether the step is a one-pass one; None where nobody can say."""

    pattern: str
    what: str
    bytes_per_weight: Callable[[int, bool], float] | None = None


PRODUCT = "a product"
_MOVED = 2 * 3 * MASTER  # a value and its two moments, read and written
ROLES = (
    Role(r"adamw_kernel|step#SubnetAdamW", "our update of weights, scores and moments",
         lambda item, one_pass: (2 * item if one_pass else 2 * MASTER) + 2 * _MOVED + BIT),
    Role(r"prepare_kernel|write_kernel|programs_kernel|describe_kernel", "our coefficients and tables"),
    Role(r"gate_backward|SubnetGateBackward", "our gradients: from G to dW and dS",
         lambda item, one_pass: item + 4 * MASTER + BIT),
    Role(r"\bgate_(multi_)?kernel", "our gate: from W and S to the masked weight",
         lambda item, one_pass: 2 * MASTER + item),
    Role(r"^(SubnetGate|RawGate)$", "our threshold and gate, on a CPU"),
    Role(r"matmul_grad_kernel|reduce_grad_kernel", "our product that gives dW and dS"),
    Role(r"matmul_kernel|reduce_kernel", "our masked product"),
    Role(r"restore_frozen", "the guard puts frozen weights back"),
    Role(r"window_kernel|select_kernel", "our threshold: reads all scores", lambda item, one_pass: MASTER),
    Role(r"(sample|digit|result|settle|fix)_kernel", "our threshold: what the first pass leaves to do"),
    Role(r"(?i)fused_?adam", "torch's fused AdamW", lambda item, one_pass: MASTER + _MOVED),
    Role(r"(?i)gemm|nvjet|cutlass|xmma|\bmm\b", PRODUCT),
    Role(r"(?i)sort|radix|kthvalue", "torch's selection"),
    Role(r"(?i)memcpy|copy", "a cast of the weight or of its gradient", lambda item, one_pass: MASTER + item),
)  # fmt: skip
"""The first that matches."""


def profile(step: Callable[[], object], problem: Problem, one_pass: bool) -> list[Kernel]:
    """Run a few steps under the profiler.

    Args:
        step: a training step that has run before.
        problem: a single layer.
        one_pass: whether it is a one-pass step.

    Returns:
        Kernels, or on a CPU operators, by their time, those below a thousandth of the step left out.
    """
    on_gpu = problem.device.type == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(STEPS):
            step()
        if on_gpu:
            torch.cuda.synchronize(problem.device)
    return kernels(_found(profiler.events() or (), on_gpu), problem, one_pass)


def _found(events: Iterable[Any], on_gpu: bool) -> list[tuple[str, float]]:
    """Name and microseconds of every run of a kernel, or of an operator without what it calls."""
    if on_gpu:
        kernels = (e for e in events if e.device_type.name == "CUDA" and not e.is_user_annotation)
        return [(e.name, e.time_range.elapsed_us()) for e in kernels]
    return [(e.name, e.self_cpu_time_total) for e in events]


def kernels(found: Iterable[tuple[str, float]], problem: Problem, one_pass: bool) -> list[Kernel]:
    """Add up what ``STEPS`` steps ran: names and microseconds of every run."""
    times, calls = defaultdict[str, float](float), Counter[str]()
    for name, us in found:
        times[name] += us
        calls[name] += 1
    total, listed = sum(times.values()), []
    for name, us in sorted(times.items(), key=lambda item: -item[1]):
        if us >= total / 1000:
            each, (what, moved) = calls[name] / STEPS, _explained(name, problem, one_pass)
            moved = None if moved is None else moved * each
            listed.append(Kernel(_short(name), each, us / STEPS, us / total, what, moved))
    return listed


def _explained(name: str, problem: Problem, one_pass: bool) -> tuple[str, float | None]:
    """The role of a kernel, and the least bytes of one call."""
    role = next((role for role in ROLES if re.search(role.pattern, name)), None)
    if role is None:
        return "", None
    if role.what == PRODUCT:
        return role.what, problem.product_bytes()
    if role.bytes_per_weight is None:
        return role.what, None
    return role.what, role.bytes_per_weight(problem.dtype.itemsize, one_pass) * problem.numel


def _short(name: str) -> str:
    """Without what templates add."""
    return re.sub(r"<.*", "", name.removeprefix("void "))[:80]
