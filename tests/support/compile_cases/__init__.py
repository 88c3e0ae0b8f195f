"""What is compiled of every kernel module, to see whether it fits a GPU. The module of the same name here has the
cases.

The tests and ``benchmarks/resources.py`` compile them; see ``tests/support/kernel_resources.py``.
"""

from __future__ import annotations

import importlib
import pkgutil

from compiling import CompileCase


def all_cases() -> dict[str, list[CompileCase]]:
    """The cases of every module of ``wsn_fast.kernels`` that has kernels, by the module's name."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))
    return {name: importlib.import_module(f".{name}", __name__).compile_cases() for name in names}


def representative(cases: list[CompileCase], archs: list[int]) -> list[tuple[int, int]]:
    """A third of the cases of a module, each for one architecture in turn: pairs of an index into ``cases`` and an
    architecture. A kernel that has few cases is compiled for every architecture.
    """
    by_kernel: dict[str, list[int]] = {}
    for index, case in enumerate(cases):
        by_kernel.setdefault(case.fn.__name__, []).append(index)
    chosen = []
    for indices in by_kernel.values():
        if len(indices) < len(archs):
            chosen += [(index, arch) for index in indices for arch in archs]
        else:
            third = indices[::3] if len(indices) >= 3 * len(archs) else indices
            chosen += [(index, archs[place % len(archs)]) for place, index in enumerate(third)]
    return sorted(chosen)
