"""What the user can do to make the library faster on this machine: a line for each thing that is missing, and what to
do about it. Nothing is said about what cannot be changed."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution, requires
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlparse
from urllib.request import url2pathname

import torch

from ..backends import availability, native, tables
from ..backends.native import shared_library

_NATIVE_SWITCH = "WSN_FAST_NATIVE"


def advice() -> Iterator[str]:
    """The lines, the most useful first; none if all is well."""
    yield from _gpus()
    yield from _native_library()


# --- the CPU ----------------------------------------------------------------------------------------------------------
def _native_library() -> Iterator[str]:
    library = native.load()
    if library.lib is None:
        state = "is not installed" if library.file is None else f"cannot be used ({library.reason})"
        yield f"the native library {state}, so PyTorch and NumPy do its work on the CPU: {_install_again()}"
    elif torch.get_num_threads() > 1 and not shared_library.shares_team():
        yield (
            "PyTorch's threads here are not those of an OpenMP that the native library can share, and they spin after "
            "each operation, so its own threads find no core: set OMP_WAIT_POLICY=PASSIVE before Python starts, and "
            "compare the time of a step"
        )


def _install_again() -> str:
    steps = []
    if _says_no(os.environ.get(_NATIVE_SWITCH)):
        steps.append(f"unset {_NATIVE_SWITCH}, which leaves the library out")
    if _compiler() is None:
        steps.append(f"install a C++ compiler ({_how_to_get_a_compiler()})")
    return ", then ".join([*steps, f"run {_pip('install --force-reinstall --no-deps --no-cache-dir', _source())}"])


def _says_no(value: str | None) -> bool:
    """Whether a value of ``WSN_FAST_NATIVE`` leaves the library out; ``pyproject.toml`` has the same rule."""
    return re.fullmatch("0|off|false", value or "", re.IGNORECASE) is not None


def _compiler() -> str | None:
    names = (os.environ.get("CXX"), "c++", "g++", "clang++", "cl")
    return next((path for name in names if name and (path := shutil.which(name))), None)


def _how_to_get_a_compiler() -> str:
    known = {"Darwin": "xcode-select --install", "Windows": "the Build Tools of Visual Studio"}
    if (command := known.get(platform.system())) is not None:
        return command
    packages = {"apt-get": "apt-get install g++", "dnf": "dnf install gcc-c++", "pacman": "pacman -S gcc"}
    return next((command for tool, command in packages.items() if shutil.which(tool)), "GCC or Clang")


def _source() -> str:
    """What to give to pip: the folder or archive that the package was installed from, else its name."""
    try:
        origin = json.loads(distribution("wsn-fast").read_text("direct_url.json") or "{}")
    except (PackageNotFoundError, ValueError):
        origin = {}
    url = urlparse(origin.get("url", ""))
    if url.scheme == "file":
        path = url2pathname(url.path)
        if not path.endswith(".whl"):
            return f'-e "{path}"' if origin.get("dir_info", {}).get("editable") else f'"{path}"'
    checkout = Path(__file__).parents[2]
    return f'"{checkout}"' if (checkout / "CMakeLists.txt").is_file() else "wsn-fast"


def _pip(command: str, what: str) -> str:
    return f"`{Path(sys.executable).name} -m pip {command} {what}`"


# --- GPUs -------------------------------------------------------------------------------------------------------------
def _gpus() -> Iterator[str]:
    if torch.version.hip is not None:
        return  # the kernels are for NVIDIA GPUs
    if not torch.cuda.is_available():
        if _has_nvidia_driver():
            yield f"this machine has an NVIDIA GPU that PyTorch does not use: {_how_torch_finds_it()}"
        return
    if find_spec("triton") is None:
        yield f"Triton is not installed, so PyTorch does the work on the GPU: run {_pip('install', _triton())}"
        return
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    for name in dict.fromkeys(names):  # one line for several GPUs of a kind
        yield from _gpu(torch.device("cuda", names.index(name)), name)


def _gpu(device: torch.device, name: str) -> Iterator[str]:
    capability = torch.cuda.get_device_capability(device)
    if capability < availability.OLDEST:
        found, oldest = (".".join(map(str, numbers)) for numbers in (capability, availability.OLDEST))
        yield (
            f"{name} is too old for the Triton kernels, so PyTorch does the work there: use a GPU of compute "
            f"capability {oldest} (Ampere) or later; this one has {found}"
        )
        return
    backend, reason = availability.triton("gate", device, torch.float32, forced=False)
    if backend is None:
        yield f"the Triton kernels do not run on {name}: {_mend_triton(reason)}"
    elif not tables.of(tables.device_name(device)).digest:
        yield (
            f"nobody has measured which products are fastest on {name}: run "
            f"`{Path(sys.executable).name} -m wsn_fast.doctor --tune`, which takes some minutes"
        )


def _mend_triton(reason: str) -> str:
    compilers = (os.environ.get("CC"), "cc", "gcc", "clang")
    if not any(name and shutil.which(name) for name in compilers):
        return "install a C compiler, such as gcc, which Triton needs while it runs"
    return f"{reason}. Mend this, or run {_pip('install --force-reinstall', _triton())}"


def _triton() -> str:
    """The Triton that this torch asks for, for pip."""
    pinned = (re.match(r"triton\s*([=<>!~][^;\s]*)?", line) for line in requires("torch") or ())
    version = next((match[1] for match in pinned if match and match[1]), "")
    return f'"triton{version}"'


def _has_nvidia_driver() -> bool:
    """Whether the system knows an NVIDIA GPU, whatever PyTorch says. It asks no driver, which could take seconds."""
    signs = (Path("/dev/nvidiactl"), Path("/usr/lib/wsl/lib/libcuda.so.1"))
    return any(sign.exists() for sign in signs) or shutil.which("nvidia-smi") is not None


def _how_torch_finds_it() -> str:
    if torch.version.cuda is None:
        return (
            f"torch {torch.__version__} is a build for the CPU alone. Install a build for CUDA: "
            "https://pytorch.org/get-started/locally has the command for your system"
        )
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None and not re.match(r"\s*(\d|GPU|MIG)", hidden):
        return f"CUDA_VISIBLE_DEVICES={hidden!r} hides it. Unset this variable"
    return (
        f"torch {torch.__version__} is built for CUDA {torch.version.cuda}, for which the driver may be too old. "
        "Compare with what nvidia-smi says, and update the driver or install a build of torch for an older CUDA"
    )
