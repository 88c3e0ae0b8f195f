"""An operation is checked before it is trusted. The first time that it is chosen on a device and a dtype, its results
on a few awkward tensors are compared with those of the torch backend.

What passed is remembered in the user's folder (:mod:`wsn_fast.backends.cache_folder`) for this device, driver, code and
these versions, so that the next process checks nothing. What failed is not remembered.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import platform
import warnings
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType

# Not `import torch`: inside this package that name is the backend of the same name.
from torch import cuda
from torch import device as Device
from torch import dtype as Dtype

from .cache_folder import folder, write_text
from .native.shared_library import FILE, package_roots

ENVIRONMENT_VARIABLE = "WSN_FAST_CHECK"
"""``0`` trusts every operation unchecked. It is read at the first use of each operation."""
PACKAGES = ("wsn-fast", "torch", "triton", "numpy")


def wanted() -> bool:
    """Whether operations are checked."""
    return os.environ.get(ENVIRONMENT_VARIABLE, "").lower() not in ("0", "off", "false")


def obstacle(operation: str, name: str, module: ModuleType, device: Device, dtype: Dtype | None) -> str:
    """Why an operation is not to be trusted; empty if it is right.

    Args:
        operation: one of ``PRIMITIVES``.
        name: the name of the backend.
        module: the backend.
        device: where it would run. Nothing may record or capture what runs there.
        dtype: of the weights or scores; None for an operation on masks.

    A difference is also said in a warning.
    """
    from . import comparison

    if dtype is None and operation not in comparison.ON_BITS:
        return ""  # somebody asks what would run, and runs nothing
    about, memory = _about(operation, name, dtype), _memory(device.type, _index(device))
    if about in memory.passed:
        return ""
    where = comparison.FEW(device, dtype or comparison.ANY)
    problem = comparison.first_problem(operation, module, where)
    if problem is None:
        memory.add(about)
        return ""
    reason = f"{name} failed the check of {operation} on {device}: {problem}"
    advice = "PyTorch runs it instead. Please report what `python -m wsn_fast.doctor --check` prints"
    warnings.warn(f"{reason}. {advice}", RuntimeWarning, stacklevel=2)
    return reason


def has_passed(operation: str, name: str, device: Device, dtype: Dtype | None) -> bool:
    """Whether a check of an operation is remembered; the arguments are those of :func:`obstacle`."""
    return _about(operation, name, dtype) in _memory(device.type, _index(device)).passed


def _about(operation: str, name: str, dtype: Dtype | None) -> str:
    return f"{name} {operation}" + ("" if dtype is None else f" {str(dtype).removeprefix('torch.')}")


class _Memory:
    """The checks that were passed on one device.

    Attributes:
        facts: what has to be as it was for a check to count.
        passed: what was checked, as ``"backend operation dtype"``.
    """

    def __init__(self, facts: dict[str, str]) -> None:
        self.facts, self.passed = facts, set[str]()
        key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
        self._file = folder() / "checked" / f"{key}.json"
        self._read()

    def _read(self) -> None:
        # A file that is damaged or belongs to somebody else holds nothing: what it would say is checked again.
        with contextlib.suppress(OSError, ValueError):
            found = json.loads(self._file.read_text("utf-8"))
            if isinstance(found, dict) and found.get("facts") == self.facts and isinstance(found.get("passed"), list):
                self.passed.update(str(about) for about in found["passed"])

    def add(self, about: str) -> None:
        """Remember a check that was passed, beside those that other processes have added."""
        self._read()
        self.passed.add(about)
        content = {"facts": self.facts, "passed": sorted(self.passed)}
        write_text(self._file, json.dumps(content, indent=1) + "\n")


@functools.cache
def _memory(kind: str, index: int) -> _Memory:
    device = {"device": cuda.get_device_name(index), "driver": _driver()} if kind == "cuda" else {"device": _cpu()}
    return _Memory({**device, **{package: _version_of(package) for package in PACKAGES}, "code": _code()})


def _index(device: Device) -> int:
    if device.type != "cuda":
        return 0
    return cuda.current_device() if device.index is None else device.index


def _version_of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def _driver() -> str:
    """The version of NVIDIA's driver, where Linux tells it."""
    try:
        return Path("/proc/driver/nvidia/version").read_text("utf-8").partition("\n")[0]
    except OSError:
        return "unknown"


def _cpu() -> str:
    """The model of the CPU, where Linux tells it: the native library chooses its instructions by what the CPU has."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines():
            if line.startswith(("model name", "flags", "Features")):
                return hashlib.sha256(line.encode()).hexdigest()[:16] + f" {platform.machine()}"
    return f"{platform.machine()} {platform.processor()}"


def _code() -> str:
    """A hash of the code that is checked: a version says little in a checkout that somebody works on."""
    found = hashlib.sha256()
    for path in sorted(_files()):
        found.update(path.name.encode())
        with contextlib.suppress(OSError):
            found.update(path.read_bytes())
    return found.hexdigest()[:16]


def _files() -> Iterator[Path]:
    package = Path(__file__).parents[1]
    for part in (package / "backends", package / "kernels"):
        yield from part.rglob("*.py")
    yield from (root / FILE for root in package_roots())
