"""The report of ``python -m wsn_fast.doctor``: versions, the native library, the backend that runs each operation on
this machine and why, and advice."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

import torch

from .. import __version__
from ..backends import ENVIRONMENT_VARIABLE, PRIMITIVES, candidate, comparison, native, tables, trust
from .advice import advice

PACKAGES = ("torch", "numpy", "triton")


class Finding(NamedTuple):
    """A line of the report: its subject, what was found, and the reason if there is one."""

    subject: str
    found: str
    reason: str = ""


def installation() -> Iterator[Finding]:
    """Versions, and the native library."""
    yield Finding("wsn_fast", __version__)
    yield Finding("python", platform.python_version(), f"{platform.system()} {platform.machine()}")
    for package in PACKAGES:
        try:
            yield Finding(package, version(package))
        except PackageNotFoundError:
            yield Finding(package, "not installed")
    library = native.load()
    yield Finding("native library", "missing" if library.lib is None else "loaded", library.reason)
    override = os.environ.get(ENVIRONMENT_VARIABLE)
    yield Finding(ENVIRONMENT_VARIABLE, override or "not set", "it overrides the choices below" if override else "")


def devices() -> list[tuple[torch.device, str]]:
    """The devices of this machine, with their names."""
    found = [(torch.device("cpu"), f"{torch.get_num_threads()} threads")]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            found.append((torch.device("cuda", index), torch.cuda.get_device_name(index)))
    return found


def routes(device: torch.device) -> Iterator[Finding]:
    """The backend that runs each operation on float32 tensors of ``device``, if it passes its check. Whether a fused
    product runs also depends on its shape."""
    for operation in PRIMITIVES:
        dtype = None if operation in comparison.ON_BITS else torch.float32
        choice, reason = candidate(operation, device, dtype), ""
        if choice.name != "torch":
            passed = trust.has_passed(operation, choice.name, device, dtype)
            reason = "; checked" if passed else "; its first use checks it" if trust.wanted() else "; not checked"
        yield Finding(operation, choice.name, choice.reason + reason)


def tuning(device: torch.device) -> Iterator[Finding]:
    """The tuning tables of a device: which are in use, and why others are not."""
    found = tables.of(tables.device_name(device))
    yield Finding("tuning table", found.digest or "none", "; ".join(found.notes) or "--tune measures one")


def report() -> str:
    """The whole report."""
    sections = [("installation", list(installation()))]
    sections += [(f"{device}: {name}", [*routes(device), *tuning(device)]) for device, name in devices()]
    width = max(len(finding.subject) for _, findings in sections for finding in findings)
    lines = []
    for title, findings in sections:
        lines += [title, *(f"  {f.subject:{width}}  {f.found:12}  {f.reason}".rstrip() for f in findings), ""]
    advised = list(advice()) or ["nothing that is known: all that this machine can use is in use"]
    lines += ["what would make the library faster", *(f"  {line}" for line in advised)]
    return "\n".join(lines).rstrip() + "\n"


def main() -> int:
    """Print the report."""
    try:
        sys.stdout.write(report())
    except ValueError as error:  # a wrong override
        sys.stdout.write("".join(f"{f.subject}  {f.found}  {f.reason}\n" for f in installation()) + f"\n{error}\n")
        return 1
    return 0
