"""Triton's real compiler and launcher without a GPU: real steps on CPU tensors over a stand-in for ``libcuda``.

Nothing is executed, so no value is computed; what is real is everything on the host: which kernels are launched, with
which grids, what is compiled and loaded and when, and how long that takes.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch

SOURCE = Path(__file__).with_name("libcuda.c")
LIBRARY = "libcuda.so.1"

# As on a GPU that nobody has measured, where the fused products are never chosen.
AS_ON_A_GPU = "triton, masked_linear=torch, masked_linear_grad=torch, masked_linear_tasks=torch, masked_conv=torch"


class Launch(NamedTuple):
    """A launch that was written down."""

    kernel: str
    grid: tuple[int, int, int]
    threads: int
    shared: int


class _Launch(ctypes.Structure):
    _fields_ = (
        ("function", ctypes.c_int32), ("grid", ctypes.c_uint32 * 3), ("threads", ctypes.c_uint32),
        ("shared", ctypes.c_uint32),
    )  # fmt: skip


def obstacle() -> str:
    """Why the stand-in cannot be used here; empty if it can."""
    if torch.cuda.is_available():
        return "there is a GPU"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "Triton's interpreter launches nothing"
    if shutil.which("cc") is None:
        return "needs a C compiler"
    return ""


def shared_folder() -> Path:
    """A folder in the user's Triton cache, where the next run finds what this one compiled. The stand-in has its own
    folder, so that Triton never finds a driver module that was linked with the stand-in when there is a GPU."""
    from triton import knobs

    return Path(knobs.cache.dir) / f"stand_in_cuda-{hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]}"


def _build(library: Path) -> None:
    """Compile the library beside its place and then move it there: another run may do the same at this moment."""
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        built = Path(folder) / LIBRARY
        name = f"-Wl,-soname,{LIBRARY}"
        subprocess.run(["cc", "-O2", "-shared", "-fPIC", name, "-o", str(built), str(SOURCE)], check=True)
        built.replace(library)


class StandIn:
    """A GPU that does nothing. Triton has one driver per process, so there is one of these."""

    def __init__(self, folder: Path) -> None:
        """Load the library from ``folder``, which Triton also uses as its cache. It is built if it is not there."""
        library = folder / LIBRARY
        if not library.exists():
            _build(library)
        # The dynamic linker takes a library that is loaded already for every later one of the same soname.
        self._lib = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
        self._folder = folder

    def _number(self, name: str, kind: Any = ctypes.c_int64) -> Any:
        return kind.in_dll(self._lib, f"stand_in_{name}")

    @cached_property
    def driver(self) -> Any:
        """A driver for ``triton.runtime.driver.set_active``."""
        from triton.backends.compiler import GPUTarget
        from triton.backends.nvidia.driver import CudaDriver, CudaLauncher, CudaUtils

        major, minor = (self._number(name, ctypes.c_int32).value for name in ("major", "minor"))

        class Driver(CudaDriver):
            def __init__(self) -> None:
                self.utils = CudaUtils()
                self.launcher_cls = CudaLauncher
                self.get_current_device = lambda: 0
                self.get_current_stream = lambda device: 0
                self.set_current_device = lambda device: None
                self.get_device_capability = lambda device: (major, minor)

            def get_current_target(self) -> GPUTarget:
                return GPUTarget("cuda", 10 * major + minor, 32)

        return Driver()

    @contextmanager
    def active(self, monkeypatch: Any) -> Iterator[StandIn]:
        """Triton, and the backend that the library chooses, run on this GPU."""
        import triton
        from triton import knobs

        from wsn_fast.backends import choice
        from wsn_fast.backends import triton as backend
        from wsn_fast.backends.triton import tuning

        monkeypatch.setattr(knobs.nvidia, "libcuda_path", str(self._folder))
        monkeypatch.setattr(knobs.cache, "dir", str(self._folder / "cache"))
        monkeypatch.setenv(choice.ENVIRONMENT_VARIABLE, AS_ON_A_GPU)
        # A CPU tensor may go to Triton when its interpreter is on: this stands in for that, too.
        monkeypatch.setattr(backend, "INTERPRETED", True)
        gpu = tuning.Gpu(*(self._number(name, ctypes.c_int32).value for name in ("processors", "shared")))
        asks = [m for name, m in sys.modules.items() if name.startswith(backend.__name__) and hasattr(m, "gpu_of")]
        for module in asks:
            monkeypatch.setattr(module, "gpu_of", lambda of: gpu)
        choice.forget()
        before = triton.runtime.driver._active  # reset_active would look for a GPU
        triton.runtime.driver.set_active(self.driver)
        try:
            yield self
        finally:
            triton.runtime.driver.set_active(before)
            choice.forget()

    @contextmanager
    def empty_cache(self, monkeypatch: Any) -> Iterator[Counter[str]]:
        """Triton has compiled and loaded nothing yet. Yields how many variants of each kernel are compiled from now on;
        whoever reads the counts may set them back."""
        from triton import knobs
        from triton.runtime.jit import JITFunction

        compiled: Counter[str] = Counter()

        def listener(*, src: Any, cache_hit: bool, **_: object) -> None:
            compiled[src.fn.__name__] += not cache_hit

        kernels = [module for name, module in sys.modules.items() if name.startswith("wsn_fast.kernels")]
        for function in (value for module in kernels for value in vars(module).values()):
            if isinstance(function, JITFunction):
                function.device_caches.clear()
        with tempfile.TemporaryDirectory() as folder, monkeypatch.context() as patch:
            patch.setattr(knobs.cache, "dir", folder)
            patch.setattr(knobs.compilation, "listener", listener)
            yield compiled

    # --- what was written down
    def launches(self) -> list[Launch]:
        """The launches so far, in order."""
        count = self._number("launch_count").value
        names = (ctypes.c_char * 128 * 4096).in_dll(self._lib, "stand_in_names")
        log = (_Launch * (1 << 16)).in_dll(self._lib, "stand_in_launches")
        assert count <= len(log), "more launches than the stand-in writes down: forget some"
        return [
            Launch(names[one.function].value.decode(), tuple(one.grid), one.threads, one.shared) for one in log[:count]
        ]

    def kernels(self) -> Counter[str]:
        """The number of launches so far by kernel."""
        return Counter(launch.kernel for launch in self.launches())

    @property
    def modules(self) -> int:
        """How many modules were loaded so far."""
        return self._number("module_count").value

    def forget(self) -> None:
        """Forget the launches so far."""
        self._number("launch_count").value = 0

    # --- what goes wrong
    @contextmanager
    def capturing(self) -> Iterator[None]:
        """As while a stream is captured: modules cannot be loaded."""
        capturing = self._number("capturing", ctypes.c_int32)
        capturing.value = 1
        try:
            yield
        finally:
            capturing.value = 0

    @contextmanager
    def broken(self) -> Iterator[None]:
        """Every launch fails."""
        broken = self._number("broken", ctypes.c_int32)
        broken.value = 1
        try:
            yield
        finally:
            broken.value = 0
