"""Collects what a report says, as plain values for JSON."""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from ...backends import tables
from .. import checking, findings
from ..advice import advice
from ..measuring import machine
from ..measuring.attempts import Attempts, Say, say_at_once
from ..measuring.scrub import scrubbed
from ..measuring.shapes import LinearShape
from . import operations, steps

FORMAT = 1
SHARE = 0.6
"""Of the time of a device, for training steps."""


@dataclass(frozen=True)
class Plan:
    """What to measure on a device.

    Attributes:
        copy: elements of the copy that says what memory can do.
        elements: sizes of the elementwise operations.
        layers: shapes of the layers.
        seconds: of measuring an operation at one size; a layer gets twenty times as many.
    """

    copy: int
    elements: tuple[int, ...]
    layers: tuple[LinearShape, ...]
    seconds: float = 0.1


CPU = Plan(
    1 << 24,
    (1 << 20, 1 << 16),
    (LinearShape(256, 784, 32), LinearShape(512, 512, 64), LinearShape(1024, 1024, 64)),
)
GPU = Plan(
    1 << 27,
    (1 << 24, 1 << 20),
    (LinearShape(1024, 1024, 32), LinearShape(4096, 4096, 256), LinearShape(4096, 4096, 4096)),
)


def plan_of(device: torch.device) -> Plan:
    """What to measure by default."""
    return GPU if device.type == "cuda" else CPU


def collect(
    devices: Sequence[torch.device],
    minutes: float,
    say: Say = say_at_once,
    plan: Callable[[torch.device], Plan] = plan_of,
) -> dict[str, Any]:
    """Everything that a report says.

    Args:
        devices: to report on.
        minutes: after which nothing new is begun.
        say: takes lines of progress.
        plan: what to measure on a device.
    """
    begin = time.monotonic()
    attempts = Attempts(begin + 60 * minutes)
    made = datetime.datetime.now(datetime.timezone.utc)
    report: dict[str, Any] = {
        "format": FORMAT,
        "made": made.isoformat(timespec="seconds"),
        "installation": [_line(finding) for finding in findings.installation()],
        "devices": [],
    }
    for i, device in enumerate(devices):
        attempts.deadline = begin + 60 * minutes * (i + 1) / len(devices)
        with machine.current(device):
            report["devices"].append(_device(device, attempts, plan(device), say))
    report["advice"] = [scrubbed(line) for line in advice()]
    report["not_measured"] = attempts.not_measured
    report["seconds"] = round(time.monotonic() - begin, 1)
    return report


def _line(finding: findings.Finding) -> dict[str, str]:
    return {"subject": finding.subject, "found": scrubbed(finding.found), "reason": scrubbed(finding.reason)}


def _device(device: torch.device, attempts: Attempts, plan: Plan, say: Say) -> dict[str, Any]:
    table = tables.of(tables.device_name(device))
    say(f"{device}: which backend runs what, and whether it is right")
    verdicts = attempts.finish(f"the check of {device}", lambda: list(_verdicts(device))) or []
    entry: dict[str, Any] = {
        "device": str(device),
        "name": tables.device_name(device),
        "facts": machine.facts(device),
        "choices": attempts.attempt(f"the choices on {device}", lambda: list(_choices(device, verdicts))) or [],
        "verdicts": verdicts,
        "table": {"digest": table.digest, "notes": list(map(scrubbed, table.notes)), "entries": dict(table.data)},
    }
    say(f"{device}: training steps")
    # The steps matter most: they go first, and keep what is over for the rest.
    until, now = attempts.deadline, time.monotonic()
    attempts.deadline = now + SHARE * max(0.0, until - now)
    entry["steps"] = steps.times(attempts, device, plan.layers, 20 * plan.seconds)
    attempts.deadline = until
    say(f"{device}: the elementwise operations")
    copying = partial(operations.copied, device, plan.copy, plan.seconds)
    copy = attempts.attempt(f"a copy of {plan.copy} elements on {device}", copying)
    entry["copy"] = None
    if copy is not None:
        entry["copy"] = operations.quantiles(copy.timing) | {"gb_per_s": round(copy.bytes_per_us / 1e3, 2)}
    entry["operations"] = operations.times(attempts, device, plan.elements, copy, plan.seconds)
    return entry


def _choices(device: torch.device, verdicts: Sequence[dict[str, Any]]) -> Iterator[dict[str, str]]:
    """Which backend runs what, after a check: PyTorch runs what is wrong."""
    wrong = {one["operation"]: one for one in verdicts if one["problem"] and one["dtype"] in ("float32", "bits")}
    for finding in findings.routes(device):
        line, verdict = _line(finding), wrong.get(finding.subject)
        if verdict is not None:
            line |= {"found": "torch", "reason": f"{verdict['backend']} is wrong here"}
        yield line


def _verdicts(device: torch.device) -> Iterator[dict[str, Any]]:
    """What a check says. Its verdicts may have more fields than a report shows."""
    for verdict in checking.check(device):
        problem = None if verdict.problem is None else scrubbed(verdict.problem)
        names = {"operation": verdict.operation, "dtype": verdict.dtype, "backend": verdict.backend}
        yield names | {"problem": problem, "note": scrubbed(verdict.note)}
