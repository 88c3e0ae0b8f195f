"""What a measurement has to say of the machine: its hardware, versions and clocks."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from ...backends.tables import cpu_model

_GPU_FIELDS = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "temperature.gpu", "power.draw")


def facts(device: torch.device) -> dict[str, object]:
    """Date, versions and hardware; only queries, nothing is set."""
    found: dict[str, object] = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": model_of(device),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "triton": _triton_version(),
        "cpu": cpu_model(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "capability": [properties.major, properties.minor],
            "cuda": torch.version.cuda,
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": properties.L2_cache_size,
            "memory_bytes": properties.total_memory,
            **gpu_state(getattr(properties, "uuid", None)),
        }
    return found


def current(device: torch.device) -> AbstractContextManager[Any]:
    """A context in which the device is the current one, as streams, events and graphs need it."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def model_of(device: torch.device) -> str:
    """The GPU's name, or the CPU's model."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_model()


def gpu_state(uuid: object = None) -> dict[str, str]:
    """Driver, clocks, temperature and power as ``nvidia-smi`` reads them now, of the GPU with this identifier or of the
    first one; empty without the program."""
    which = [f"--id=GPU-{uuid}"] if uuid else []
    answer = output("nvidia-smi", *which, f"--query-gpu={','.join(_GPU_FIELDS)}", "--format=csv,noheader")
    return dict(zip(("driver", *_GPU_FIELDS[1:]), answer.split("\n")[0].split(", "), strict=False)) if answer else {}


def output(*command: str, cwd: str | os.PathLike[str] | None = None) -> str:
    """What a program prints; empty if it fails."""
    try:
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def _triton_version() -> str | None:
    try:
        return version("triton")
    except PackageNotFoundError:
        return None
