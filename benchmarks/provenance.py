"""Where a number comes from: commit, machine, versions, clocks."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

COMMIT_VARIABLE = "WSN_FAST_COMMIT"
"""Names the commit on a machine that has the files without their history; ``+dirty`` at its end for changed files."""

ROOT = Path(__file__).parents[1]
_GPU_FIELDS = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "temperature.gpu", "power.draw")


def provenance(device: torch.device) -> dict[str, object]:
    """Everything that a stored result has to name; only queries, nothing is set."""
    commit, dirty = _commit()
    facts: dict[str, object] = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit,
        "dirty": dirty,
        "device": device_name(device),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "triton": _triton_version(),
        "cpu": _cpu_model(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "capability": [properties.major, properties.minor],
            "cuda": torch.version.cuda,
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": properties.L2_cache_size,
            "memory_bytes": properties.total_memory,
            **gpu_state(),
        }
    return facts


def device_name(device: torch.device) -> str:
    """The GPU's name, or the CPU's model."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_model()


def slug(name: str) -> str:
    """A device's name as files carry it: lower case, spaces as dashes."""
    kept = "".join(c if c.isalnum() or c in " -." else " " for c in name.lower())
    return "-".join(kept.split())


def gpu_state() -> dict[str, str]:
    """Driver, clocks, temperature and power as ``nvidia-smi`` reads them now; empty without it."""
    answer = _output("nvidia-smi", f"--query-gpu={','.join(_GPU_FIELDS)}", "--format=csv,noheader")
    return dict(zip(("driver", *_GPU_FIELDS[1:]), answer.split("\n")[0].split(", "), strict=False)) if answer else {}


def _commit() -> tuple[str, bool | None]:
    """The commit and whether files differ from it; ``("unknown", None)`` where nothing tells."""
    if named := os.environ.get(COMMIT_VARIABLE):
        return named.removesuffix("+dirty"), named.endswith("+dirty")
    commit = _output("git", "rev-parse", "HEAD")
    return (commit, bool(_output("git", "status", "--porcelain"))) if commit else ("unknown", None)


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _triton_version() -> str | None:
    try:
        return version("triton")
    except PackageNotFoundError:
        return None


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text("utf-8").splitlines() if cpuinfo.exists() else []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.processor() or platform.machine())
