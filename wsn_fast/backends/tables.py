"""Tables of what was measured on a device: tiles of the Triton kernels, and the faster backend for each operation.

The package has tables in ``kernels/tuning``, and ``python -m wsn_fast.doctor --tune`` writes a user's own into the
cache folder. Where both have an entry, the user's is used. A user's table holds for the versions of wsn_fast, torch and
(for a GPU) triton that it was measured with, because they decide what is timed; the driver does not, because Triton
compiles down to machine code. The package's tables are chosen with each version of the package. A table that cannot be
used is ignored, and :attr:`Tables.notes` says why.
"""

from __future__ import annotations

import functools
import hashlib
import json
import platform
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .cache_folder import folder
from .table_format import FORMAT, LISTS, MEASURED, key_of, problem

PACKAGED = Path(__file__).parents[1] / "kernels" / "tuning"
MOST_BYTES = 16 << 20
"""A larger file is not read. A full table of a GPU has about 100 kB."""
ON_BITS = "bits"
"""Stands for the dtype of an operation that has none."""


class Tables(NamedTuple):
    """What is known about one device.

    Attributes:
        data: the measured entries, by the names of ``MEASURED``.
        notes: a sentence for every table that was found: its file, and why it is ignored if it is.
        digest: 12 hexadecimal digits of the content; empty if nothing was measured.
    """

    data: Mapping[str, Any]
    notes: tuple[str, ...]
    digest: str


# --- names
def users_folder() -> Path:
    """Where the tables of this user are."""
    return folder() / "tuning"


def file_name(name: str) -> str:
    """The file for a device, such as ``nvidia-h200.json``: ASCII letters, digits, points and dashes."""
    kept = "".join(c if c.isascii() and (c.isalnum() or c in "-.") else " " for c in name.lower())
    return ("-".join(kept.split()) or "unnamed") + ".json"


@functools.cache
def cpu_model() -> str:
    """The model of this CPU as the system calls it."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except (OSError, ValueError):
        lines = []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, "") or platform.processor() or platform.machine() or "CPU"


def device_name(device: torch.device) -> str:
    """The name of a device in tables: the model of a GPU; the model of the CPU with PyTorch's number of threads, which
    decides what is faster there; empty for other devices."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return ""
    threads = torch.get_num_threads()
    return f"{cpu_model()}, {threads} thread{'s' * (threads > 1)}"


def dtype_name(dtype: torch.dtype | None) -> str:
    """The name of a dtype in tables: "float32", or "bits" for None."""
    return ON_BITS if dtype is None else str(dtype).removeprefix("torch.")


def versions(device: torch.device) -> dict[str, str]:
    """The versions that a user's table for this device holds for."""
    names = ("wsn_fast", "torch", "triton") if device.type == "cuda" else ("wsn_fast", "torch")
    return {name: _version_of(name) for name in names}


def _version_of(name: str) -> str:
    if name == "torch":
        return torch.__version__
    try:
        return version(name)
    except PackageNotFoundError:
        return "unknown"


# --- reading
def read(name: str, packaged: Path | None = PACKAGED, users: Path | None = None) -> Tables:
    """What two folders hold about the device of this name.

    Args:
        name: of the device, as :func:`device_name` gives it.
        packaged: a folder whose tables hold for any version; or None.
        users: a folder whose tables hold for the versions that they name, and go first; or None.
    """
    data: dict[str, Any] = {}
    notes = []
    for place, whose, checked in ((packaged, "the package's", False), (users, "your", True)):
        path = None if place is None else place / file_name(name)
        found, obstacle = ({}, "") if path is None else _read(path, name, checked)
        if path is not None and (found or obstacle):
            notes.append(f"{whose} table {path.name} is " + (f"ignored: {obstacle}" if obstacle else "used"))
        data = merged(data, {} if obstacle else found)
    return Tables(data, tuple(notes), digest_of(data))


@functools.cache
def of(name: str) -> Tables:
    """:func:`read` from the package and from the user's folder, once for each device."""
    return read(name, PACKAGED, users_folder()) if name else Tables({}, (), "")


def digest_of(data: Mapping[str, Any]) -> str:
    """12 hexadecimal digits of what was measured; empty for nothing."""
    measured = {key: data[key] for key in MEASURED if data.get(key)}
    text = json.dumps(measured, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12] if measured else ""


def _read(path: Path, name: str, checked: bool) -> tuple[dict[str, Any], str]:
    """The table in a file, empty if there is none; and why it cannot be used, empty if it can."""
    try:
        with open(path, "rb") as file:
            text = file.read(MOST_BYTES + 1)
    except FileNotFoundError:
        return {}, ""
    except OSError as error:
        return {}, f"it cannot be read: {error.strerror or error}"
    if len(text) > MOST_BYTES:
        return {}, f"it has more than {MOST_BYTES} bytes"
    try:
        data = json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        return {}, f"it is no JSON: {str(error)[:100]}"
    return data, problem(data, FORMAT) or _foreign(data, name, checked)


def _refuse(constant: str) -> float:
    raise ValueError(f"a number is {constant}")


def _foreign(data: Mapping[str, Any], name: str, checked: bool) -> str:
    """Why a sound table does not hold here; empty if it does."""
    if data["device"] != name:
        return f"it is for {data['device'][:100]}"
    if not checked:
        return ""
    for package, measured in data["versions"].items():
        if _version_of(package) != measured:
            return f"it was measured with {package} {measured[:50]}, and this is {_version_of(package)}"
    return ""


def merged(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Both; where they have the same entry, that of ``second``."""
    both: dict[str, Any] = {}
    for name in LISTS:
        later = second.get(name, [])
        known = {key_of(entry) for entry in later}
        both[name] = [*later, *(entry for entry in first.get(name, []) if key_of(entry) not in known)]
    both["elementwise"] = {**first.get("elementwise", {}), **second.get("elementwise", {})}
    ours, theirs = (data.get("backends", {}) for data in (first, second))
    both["backends"] = {name: {**ours.get(name, {}), **theirs.get(name, {})} for name in {**ours, **theirs}}
    return {name: value for name, value in both.items() if value}


# --- what the choice between backends asks
Lookup = Callable[[str], Tables]


def tuned_backend(
    device: torch.device, operation: str, dtype: torch.dtype | None, lookup: Lookup = of
) -> tuple[str, str] | None:
    """The backend that was measured to be faster than the usual one, and how that is known; None if the usual one is
    the faster one or nobody has measured it.

    Args:
        device: of the tensors; only CPUs and NVIDIA GPUs have tables.
        operation: a primitive of :mod:`wsn_fast.backends.torch`.
        dtype: of the weights or scores; None for an operation on masks.
        lookup: gives the tables of a device by its name.
    """
    name = device_name(device)
    found = lookup(name)
    entry = found.data.get("backends", {}).get(operation, {}).get(dtype_name(dtype))
    if entry is None or entry["choose"] != "torch":
        return None
    times = "; ".join(
        f"{size} elements: {', '.join(f'{who} {us:.3g} us' for who, us in by.items())}"
        for size, by in entry["times"].items()
    )
    return "torch", f"measured to be faster on {name} ({times}; table {found.digest})"
