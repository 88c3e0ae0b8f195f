"""Which backends and which tuning table a run uses, and how many processes it has.

Masks are the same on all of them, to the bit; steps of optimizers, products and sums over processes round differently.
So a resumed run takes the backends that it took before, or says that it cannot.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from wsn_fast.backends import choose, chosen, comparison, overridden, tables
from wsn_fast.continual.wsn import WSN

# The modules of nets that compute with a whole batch, or draw numbers for it.
_SEE_A_PART = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)


def in_use(wsn: WSN, device: torch.device, processes: int = 1) -> dict[str, Any]:
    """What a checkpoint keeps: ``backends`` (see :func:`wsn_fast.backends.chosen`), the type of the ``device``, the
    digest of its tuning ``table``, which is empty if there is none, and the number of ``processes``.

    Args:
        wsn: the model. What other models of the process use does not count.
        device: where the model is.
        processes: how many train it together.
    """
    backends = chosen(device)
    for override in {layer.backend for layer in wsn.subnet_layers().values()} - {None}:
        backends |= chosen(device, override)
    return {"backends": backends, "device": device.type, "table": _digest(device), "processes": processes}


def take(wsn: WSN, recorded: Mapping[str, Any], device: torch.device, processes: int = 1) -> list[str]:
    """Let a model use the backends that are recorded. Its layers get an override where another one would be chosen now.

    Args:
        wsn: the model.
        recorded: what :func:`in_use` returned in the run so far.
        device: where the model is now.
        processes: how many processes train it now.

    Returns:
        A sentence for everything that is not as it was, and how far the results may differ for it.

    Raises:
        ValueError, TypeError, LookupError: ``recorded`` is not what :func:`in_use` returns.
    """
    others = [f"{text}: results may differ by rounding" for text in _take(wsn, recorded, device)]
    return others + _processes(wsn, recorded.get("processes", 1), processes)


def _processes(wsn: WSN, before: Any, now: int) -> list[str]:
    if type(before) is not int or before < 1:
        raise ValueError(f"expected a number of processes, got {str(before)[:50]!r}")
    if before == now:
        return []
    text = f"this run was trained by {_count(before)} and goes on with {_count(now)}: results may differ by rounding"
    drawing = [name for name, module in wsn.model.named_modules() if isinstance(module, _SEE_A_PART)]
    more = f", and by more because {drawing[0]} sees what each process has of a batch" if drawing else ""
    return [text + more]


def _count(processes: int) -> str:
    return f"{processes} process{'es' if processes != 1 else ''}"


def _take(wsn: WSN, recorded: Mapping[str, Any], device: torch.device) -> list[str]:
    if recorded["device"] != device.type:
        return [f"this run was on {recorded['device']!r} and goes on with {device.type!r}"]
    overrides, differences = [], []
    for operation, name, dtype in _parsed(recorded["backends"]):
        now = choose(operation, device, dtype)
        if now.name == name:
            continue
        before = choose(operation, device, dtype, f"{operation}={name}")
        # The user's wish goes first. The override of a product means that it is always fused, which was not so.
        wished = overridden(operation, None)[0] is not None or operation in comparison.PRODUCTS
        if before.name == name and not wished:
            overrides.append(f"{operation}={name}")
        else:
            reason = now.reason if wished else before.reason.rpartition(", but ")[2]
            differences.append(f"{operation} was computed by {name} and is by {now.name} ({reason})")
    if overrides:
        for layer in wsn.subnet_layers().values():
            layer.backend = ",".join(dict.fromkeys(overrides))
    if _digest(device) != recorded["table"]:
        was, now_used = (_table(digest) for digest in (recorded["table"], _digest(device)))
        differences.append(f"this run used {was} and now uses {now_used}")
    return differences


def _digest(device: torch.device) -> str:
    return tables.of(tables.device_name(device)).digest


def _table(digest: str) -> str:
    return f"the tuning table {digest}" if digest else "no tuning table"


def _parsed(backends: Mapping[str, str]) -> Iterator[tuple[str, str, torch.dtype | None]]:
    for key, name in backends.items():
        operation, _, word = key.partition(" ")
        dtype = getattr(torch, word, word) if word else None
        if dtype is not None and not isinstance(dtype, torch.dtype):
            raise ValueError(f"expected the name of a dtype, got {word[:50]!r}")
        yield operation, name, dtype
