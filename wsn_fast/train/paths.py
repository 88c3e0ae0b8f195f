"""Which backends and which tuning table a run uses.

Masks are the same on all of them, to the bit; steps of optimizers and products round differently. So a resumed run
takes the backends that it took before, or says that it cannot.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from wsn_fast.backends import choose, chosen, comparison, overridden, tables
from wsn_fast.continual.wsn import WSN


def in_use(wsn: WSN, device: torch.device) -> dict[str, Any]:
    """What a checkpoint keeps: ``backends`` (see :func:`wsn_fast.backends.chosen`), the type of the ``device``, and the
    digest of its tuning ``table``, which is empty if there is none.

    Args:
        wsn: the model. What other models of the process use does not count.
        device: where the model is.
    """
    backends = chosen(device)
    for override in {layer.backend for layer in wsn.subnet_layers().values()} - {None}:
        backends |= chosen(device, override)
    return {"backends": backends, "device": device.type, "table": _digest(device)}


def take(wsn: WSN, recorded: Mapping[str, Any], device: torch.device) -> list[str]:
    """Let a model use the backends that are recorded. Its layers get an override where another one would be chosen now.

    Args:
        wsn: the model.
        recorded: what :func:`in_use` returned in the run so far.
        device: where the model is now.

    Returns:
        A sentence for everything that is not as it was.

    Raises:
        ValueError, TypeError, LookupError: ``recorded`` is not what :func:`in_use` returns.
    """
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
