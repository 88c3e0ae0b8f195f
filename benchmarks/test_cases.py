"""Every case once: checked first, and timed only if it is right."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from .cases import Case, UnavailableError, verify


def test_case(case: Case, device: torch.device, benchmark: Any) -> None:
    """Prepare, check with poisoned memory, time, check again."""
    try:
        prepared = case.prepare()
        verdict = verify(prepared)
    except UnavailableError as reason:
        pytest.skip(str(reason))
    benchmark.group = case.group
    benchmark.name = case.contender
    names = ("operation", "shape", "dtype", "contender")
    benchmark.extra_info.update({name: getattr(case, name) for name in names}, check=verdict)
    call = prepared.calls[0]

    def wait() -> None:  # by the host's clock; the device report leaves out what the host adds
        call()
        torch.cuda.synchronize(device)

    benchmark(call if device.type == "cpu" else wait)
    if prepared.recheck is not None:
        prepared.recheck()
    else:
        verify(prepared)
    if benchmark.enabled:
        benchmark.extra_info.update(notes=prepared.notes())
